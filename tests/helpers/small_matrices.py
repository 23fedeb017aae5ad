"""Small matrices for the tests of the merging kernels."""

import torch

from pm_hf.merging.lowrank import LowRank
from pm_hf.merging.methods.base import Matrix

RANKS = [[2, 3, 1], [4, 0, 2, 3]]  # unequal; an adapter that lacks the module


def term(rank: int, shape=(6, 9), seed=0, dtype=torch.float64) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(shape[0], rank, generator=generator, dtype=torch.float64)
    return LowRank(B, torch.randn(rank, shape[1], generator=generator, dtype=torch.float64)).to(dtype)


def matrix(ranks, weights=None, *, shape=(6, 9), seed=0, dtype=torch.float64, name="layer", curvature=()) -> Matrix:
    terms = tuple(term(rank, shape, 100 * seed + i, dtype) for i, rank in enumerate(ranks))
    return Matrix(name, terms, tuple(weights or [1.0] * len(terms)), tuple(curvature))


def fishers(count: int, shape=(6, 9), seed=0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def grams(count: int, width=9, inputs=20, seed=0) -> list[torch.Tensor]:
    """XᵀX/n of `inputs` random inputs each."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(count, inputs, width, generator=generator, dtype=torch.float64)
    return list(X.mT @ X / inputs)


def close(found, expected, tolerance=1e-10) -> None:
    dense = found.dense() if isinstance(found, LowRank) else found
    torch.testing.assert_close(dense, expected, rtol=tolerance, atol=tolerance)


def dense(m: Matrix) -> list[torch.Tensor]:
    return [t.dense() for t in m.terms]


def weights_of(m: Matrix) -> torch.Tensor:
    return torch.tensor(m.weights, dtype=torch.float64)
