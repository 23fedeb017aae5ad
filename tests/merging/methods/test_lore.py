"""LoRE-Merging against dense matrices."""

import pytest
import torch
from helpers.small_matrices import close, dense, matrix

from pm_hf.errors import InputError
from pm_hf.merging.methods.lore import lore

SEEDS = [0, 1, 2]


@pytest.mark.parametrize("ranks", [[2, 3, 1], [4, 0, 5], [6, 6, 6]])
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5]])
@pytest.mark.parametrize("seed", SEEDS)
def test_lore_alternates_like_dense_matrices(ranks, weights, seed):
    m = matrix(ranks, weights, seed=seed)
    found = lore(m, None, threshold=0.8, rounds=5, scale=1.5)
    w = [x / sum(m.weights) for x in m.weights]
    theta, delta = dense(m), [torch.zeros(m.shape, dtype=torch.float64)] * 3
    for _ in range(5):
        common = sum(x * (t - d) for x, t, d in zip(w, theta, delta, strict=True))
        delta = [soft_threshold(t - common, 0.8) for t in theta]
    close(found, common + 1.5 * sum(x * d for x, d in zip(w, delta, strict=True)))


def soft_threshold(dense_matrix: torch.Tensor, mu: float) -> torch.Tensor:
    U, s, Vh = torch.linalg.svd(dense_matrix, full_matrices=False)
    return U @ torch.diag(torch.relu(s - mu)) @ Vh


def test_lore_without_a_threshold_is_the_mean():
    m = matrix([2, 3])
    close(lore(m, None, threshold=0.0, rounds=3, scale=1.0), (dense(m)[0] + dense(m)[1]) / 2)


def test_lore_refuses_weights_that_make_no_mean():
    with pytest.raises(InputError, match="a mean needs weights"):
        lore(matrix([1, 1], [1.0, -1.0]), None, threshold=0.0, rounds=1, scale=1.0)
