"""Blocks of rows, which all elementwise kernels work by."""

import pytest
from helpers.small_matrices import close, fishers, matrix

from pm_hf.merging.methods import base as elementwise
from pm_hf.merging.methods.curvature_weighted import cofima
from pm_hf.merging.methods.magmax import magmax
from pm_hf.merging.methods.ties import dare, dare_ties, ties


@pytest.mark.parametrize(
    "merge",
    [
        lambda m: ties(m, None, density=0.3, majority="total"),
        lambda m: dare(m, None, density=0.5, seed=0),
        lambda m: dare_ties(m, None, density=0.5, majority="total", seed=0),
        lambda m: magmax(m, None),
        lambda m: cofima(m, None, coefficient=0.4),
    ],
)
def test_blocks_of_rows_give_the_whole(merge, monkeypatch):
    m = matrix([2, 0, 3], shape=(11, 9), curvature=fishers(3, (11, 9)))
    whole = merge(m)
    monkeypatch.setattr(elementwise, "ROW_BLOCK", 20)  # two rows each, one in the last
    close(merge(m), whole, 1e-13)
