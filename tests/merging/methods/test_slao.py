"""SLAO on the factors."""

import pytest
import torch
from helpers.small_matrices import close, matrix, term

from pm_hf.errors import InputError
from pm_hf.merging.methods.base import Matrix
from pm_hf.merging.methods.slao import slao


def test_slao_merges_the_factors():
    m = matrix([3, 3])
    running, task = m.terms
    found = slao(m, {"tasks": 4})
    assert torch.equal(found.A, task.A)
    close(found.B, running.B + (task.B - running.B) / 2)
    close(slao(m, {"tasks": 1}), task.dense())


def test_slao_treats_a_missing_module_as_zero():
    running, task, nothing = term(2), term(3, seed=1), term(0)
    close(slao(Matrix("m", (running, nothing), (1.0, 1.0)), {"tasks": 4}), running.dense() / 2)
    close(slao(Matrix("m", (nothing, task), (1.0, 1.0)), {"tasks": 4}), task.dense() / 2)


def test_slao_refuses_unequal_ranks():
    with pytest.raises(InputError, match="layer has 2 in the running merge, 3 in the task"):
        slao(matrix([2, 3]), {"tasks": 2})
