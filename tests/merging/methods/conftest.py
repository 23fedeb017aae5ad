"""What the tests of several methods start from."""

import pytest
from helpers.small_matrices import RANKS, matrix

from pm_hf.merging.methods.base import Matrix


@pytest.fixture(params=RANKS)
def given(request) -> Matrix:
    return matrix(request.param, [0.7, 1.3, -0.4, 0.2][: len(request.param)])
