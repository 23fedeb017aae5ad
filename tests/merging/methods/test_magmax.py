"""MagMax against a loop over single entries."""

import pytest
import torch
from helpers.small_matrices import RANKS, close, dense, matrix

from pm_hf.merging.lowrank import LowRank
from pm_hf.merging.methods.base import Matrix
from pm_hf.merging.methods.magmax import magmax


def test_magmax_takes_the_entry_of_largest_magnitude_and_scales_it_afterwards(given):
    found, tau = magmax(given, None), dense(given)
    for r in range(given.shape[0]):
        for c in range(given.shape[1]):
            best = max(range(len(tau)), key=lambda i: abs(float(tau[i][r, c])))  # max takes the first of equals
            assert float(found[r, c]) == pytest.approx(given.weights[best] * float(tau[best][r, c]), rel=1e-12)


def test_magmax_takes_the_first_of_equal_magnitudes():
    one, other = torch.tensor([[1.0, -2.0]]), torch.tensor([[-1.0, 2.0]])
    m = Matrix("m", tuple(LowRank(torch.ones(1, 1), row) for row in (one, other)), (1.0, 1.0))
    assert torch.equal(magmax(m, None), one)


@pytest.mark.parametrize("ranks", RANKS)
def test_magmax_of_all_equals_folding_one_by_one(ranks):
    m = matrix(ranks)
    running = m.terms[0].dense()
    for new in m.terms[1:]:
        as_factors = LowRank(torch.eye(len(running), dtype=running.dtype), running)
        running = magmax(Matrix("m", (as_factors, new), (1.0, 1.0)), None)
    close(magmax(m, None), running, 0)
