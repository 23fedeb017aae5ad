"""DOGE: a correction of the task vectors, learned from the task vectors alone (arXiv 2501.01230)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pm_hf.merging.lowrank import LowRank, compact_svd
from pm_hf.merging.methods.base import TINY, Matrix, Method, Option, row_blocks
from pm_hf.merging.order_statistics import LOW_BINS, count_bits, descend, magnitude

SHARED_SHARE = 6  # the shared subspace has min(out, in)/6 dimensions


@dataclass(frozen=True)
class Largest:
    """thresholds[i]: the smallest |τᵢ| that belongs to the largest entries of task vector i over the whole model."""

    thresholds: tuple[float, ...]


def largest_entries(
    matrices: Callable[[], Iterator[Matrix]], past: Any, *, scale: float, learning_rate: float, steps: int, keep: float
) -> Largest:
    """The thresholds that keep the max(1, int(keep·N)) largest of a task vector's N entries (and equals of the last).

    Exact, in float32, in two passes that keep no task vector (`order_statistics`). A module that an adapter lacks
    counts as zeros.
    """
    high: list[Any] = []
    for matrix in matrices():
        counted = [sum(count_bits(tau) for _, tau in row_blocks(term)) for term in matrix.terms]
        high = [a + b for a, b in zip(high, counted, strict=True)] if high else counted
    places = [descend(counts, max(1, int(keep * int(counts.sum())))) for counts in high]
    low = [torch.zeros(LOW_BINS, dtype=torch.int64) for _ in places]
    for matrix in matrices():
        for counts, term, (within, _) in zip(low, matrix.terms, places, strict=True):
            counts += sum(count_bits(tau, within) for _, tau in row_blocks(term))
    return Largest(
        tuple(magnitude(within, descend(counts, place)[0]) for counts, (within, place) in zip(low, places, strict=True))
    )


def doge(matrix: Matrix, state: Largest, *, scale: float, learning_rate: float, steps: int, keep: float) -> Tensor:
    """Σᵢ λᵢ mᵢ∘(τᵢ + D), dense (out, in) (DOGE task arithmetic, arXiv 2501.01230). Batch; data-free.

    λᵢ = wᵢ·scale/‖τᵢ‖ per matrix (0 for a zero task vector). D, one for each matrix, from 0 by `steps` steps of Adam
    on Σⱼ Σ_rows ⟨τⱼ, Σᵢλᵢ(τᵢ + D) − τⱼ⟩², with gradients projected off the shared subspace: Q = the leading
    min(out, in)/6 left singular vectors of [U₁ … U_N], Uᵢ the leading min(out, in)/N left singular vectors of τᵢ,
    all inside their numerical rank. mᵢ: |τᵢ| reaches the threshold of `largest_entries`. Loss and gradient come from
    the factors: two products (out, in, ΣR) a step. Cost: `steps` times that, and three dense matrices.
    """
    norms = [term.norm() for term in matrix.terms]
    coefficients = [w * scale / n if n else 0.0 for w, n in zip(matrix.weights, norms, strict=True)]
    correction = _learn(matrix, coefficients, learning_rate, steps)
    merged = torch.zeros_like(correction)
    for term, coefficient, threshold in zip(matrix.terms, coefficients, state.thresholds, strict=True):
        for rows, tau in row_blocks(term):
            merged[rows] += coefficient * (tau + correction[rows]) * (tau.float().abs() >= threshold)
    return merged


def _learn(matrix: Matrix, coefficients: list[float], learning_rate: float, steps: int) -> Tensor:
    """D after `steps` steps of Adam.

    With row errors eⱼ = ⟨τⱼ, Σλτ⟩ − ⟨τⱼ, τⱼ⟩ + (Σλ)⟨τⱼ, D⟩, all (out,), the gradient is 2(Σλ) Σⱼ diag(eⱼ)BⱼAⱼ, that
    is (out, ΣR) times (ΣR, in), and the projection acts on its left factor alone.
    """
    B = torch.cat([term.B for term in matrix.terms], dim=1)
    A = torch.cat([term.A for term in matrix.terms])
    owner = torch.repeat_interleave(torch.tensor([term.rank for term in matrix.terms]))
    total, Q = sum(coefficients), _shared_subspace(matrix).to(B.dtype)
    constant, D = _row_errors(matrix, coefficients), B.new_zeros(matrix.shape).requires_grad_()
    optimizer = torch.optim.Adam([D], lr=learning_rate)
    for _ in range(steps if len(owner) else 0):
        with torch.no_grad():
            products = B * (D @ A.T)  # summed over the columns of one adapter: ⟨τⱼ, D⟩ for each row
            errors = constant + total * B.new_zeros(constant.shape).index_add_(1, owner, products)
            weighted = 2 * total * errors[:, owner] * B
            D.grad = (weighted - Q @ (Q.T @ weighted)) @ A
        optimizer.step()
    return D.detach()


def _row_errors(matrix: Matrix, coefficients: list[float]) -> Tensor:
    """⟨τⱼ, Σᵢλᵢτᵢ − τⱼ⟩ for each row, (out, N), in the dtype of the terms."""

    def inner(a: LowRank, b: LowRank) -> Tensor:
        return ((a.B.double() @ (a.A.double() @ b.A.double().T)) * b.B.double()).sum(1)

    columns = [
        sum((c * inner(i, j) for c, i in zip(coefficients, matrix.terms, strict=True)), -inner(j, j))
        for j in matrix.terms
    ]
    return torch.stack(columns, dim=1).to(matrix.terms[0].B.dtype)


def _shared_subspace(matrix: Matrix) -> Tensor:
    """Q, (out, at most min(out, in)/6), float64."""
    side = min(matrix.shape)
    leading = [compact_svd(term)[0][:, : side // len(matrix.terms)] for term in matrix.terms]
    stacked = torch.cat(leading, dim=1).to(matrix.terms[0].B.dtype)
    return compact_svd(LowRank(stacked, torch.eye(stacked.shape[1], dtype=stacked.dtype)))[0][:, : side // SHARED_SHARE]


DOGE = Method(
    "doge",
    "Σ λᵢ mᵢ∘(τᵢ + D), D learned from the task vectors off their shared subspace, λᵢ = wᵢ·0.07/‖τᵢ‖",
    "DOGE, arXiv 2501.01230, algorithm 1",
    "nothing",
    "400 times two dense products a module (minutes at 4096×4096); reads the model twice more",
    fold=False,
    batch=True,
    train_from="base",
    starts=("last", "base"),
    kernel=doge,
    prepare=largest_entries,
    dense=True,
    weight=1.0,
    options={
        "scale": Option(0.07, "η of λᵢ = wᵢη/‖τᵢ‖, in units of the weights' norm", TINY),
        "learning_rate": Option(1e-4, "step size of Adam, in units of the weights", 0.0),
        "steps": Option(400, "number of Adam steps, 0 or more", 0),
        "keep": Option(0.3, "share of a task vector's entries to keep, over the whole model, in (0, 1]", TINY, 1),
    },
)
