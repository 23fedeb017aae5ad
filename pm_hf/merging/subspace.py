"""Kernels that stay low-rank: they work on the factors, or on the small cores between common bases.

Each gets a `Matrix` and returns a LowRank; inputs are never changed. A term of rank 0 is a zero task vector. Cores,
decompositions and scalars are float64, the result has the dtype of the terms.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pm_hf.errors import InputError
from pm_hf.merging.curvature import shrink
from pm_hf.merging.elementwise import learned, mean_weights
from pm_hf.merging.lowrank import LowRank, Matrix, common_bases, compact_svd, numerical_rank, weighted_sum
from pm_hf.merging.solve import solve_right

LEADING_SHARE = 0.5  # of the sum of the singular values: α of OPCM


@dataclass(frozen=True)
class OpcmScale:
    """λ_{t−1} and λ_t of the whole model; to_save: what the next fold needs (λ_t, the mean norm, t)."""

    previous: float
    scale: float
    to_save: dict[str, float]


def opcm(matrix: Matrix, state: OpcmScale) -> LowRank:
    """OPCM: P_t = (λ_{t−1}P_{t−1} + proj(τ_t))/λ_t (arXiv 2501.09522, algorithm 1). Sequential; data-free.

    terms: (P_{t−1}, τ_t), both relative to the pretrained weights; weights are not used. With P_{t−1} = USVᵀ inside
    its numerical rank n and C = Uᵀτ_tV: proj(τ_t) = τ_t − U(mask∘C)Vᵀ, where the mask holds the diagonal and the
    block [:k, :k], k the number of singular values before the sum of S passes half. What lies outside the spans of U
    and V is kept: the completed bases of a full SVD would be arbitrary there. Cost: a QR and an SVD of R×R a module,
    twice (`opcm_scale` is the first).
    """
    U, core, V = _opcm_core(matrix, state.previous)
    return _from_core(U, core / state.scale, V, matrix)


def opcm_scale(matrices: Callable[[], Iterator[Matrix]], past: Mapping[str, float] | None) -> OpcmScale:
    """λ_t such that ‖P_t‖ over the whole model is the mean of the norms ‖τ_1‖ … ‖τ_t‖ (arXiv 2501.09522, algorithm 1).

    past: what the last fold saved; None counts the running merge as one task with λ = 1. λ_t =
    ‖λ_{t−1}P_{t−1} + proj(τ_t)‖ / mean norm. InputError when one of the two is 0.
    """
    if past is None:
        running = math.hypot(*(matrix.terms[0].norm() for matrix in matrices()))
        past = {"scale": 1.0, "mean_norm": running, "tasks": 1.0}
    task, total = 0.0, 0.0
    for matrix in matrices():
        task = math.hypot(task, matrix.terms[1].norm())
        total = math.hypot(total, float(torch.linalg.norm(_opcm_core(matrix, past["scale"])[1])))
    tasks = past["tasks"] + 1
    mean = past["mean_norm"] + (task - past["mean_norm"]) / tasks
    if not (mean > 0 and total > 0):
        raise InputError(
            f"opcm cannot scale the merge: mean norm {mean:.3g}, norm of the sum {total:.3g}; both must be > 0"
        )
    scale = total / mean
    return OpcmScale(past["scale"], scale, {"scale": scale, "mean_norm": mean, "tasks": tasks})


def lot(matrix: Matrix, state: Any, *, scale: float, shrinkage: float) -> LowRank:
    """LOT merging: Θ = scale·(Σ wᵢΘᵢGᵢ)(Σ wᵢGᵢ)⁺ (arXiv 2505.23859; RegMean, arXiv 2212.09849). Batch.

    The minimiser of Σᵢ wᵢ tr((Θ − Θᵢ)Gᵢ(Θ − Θᵢ)ᵀ), as factors [B₁ … B_N]·[w₁A₁G₁; …](Σ wᵢGᵢ)⁺. matrix.curvature:
    Gᵢ (in, in), the mean over examples of Σxxᵀ of the inputs of task i through its own model; (1−ρ)G + ρ·diag(G) goes
    into each before both products. merge_adapters gives an adapter without the module G = 0 there: it takes no part.
    InputError: Σ wᵢGᵢ zero or not finite. Cost: a Cholesky factor of in×in a module
    (an eigendecomposition where it is singular).
    """
    total, rows = torch.zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float64), []
    for w, term, measured in zip(matrix.weights, matrix.terms, matrix.curvature, strict=True):
        gram = shrink(measured, shrinkage).double() * w
        rows.append(term.A.double() @ gram)
        total += gram
    if not (total.isfinite().all() and total.diagonal().max() > 0):
        raise InputError(f"{matrix.name}: the weighted sum of the Grams is zero or not finite; measure them again")
    columns = torch.cat([term.B.double() for term in matrix.terms], dim=1)
    return LowRank(columns, solve_right(torch.cat(rows), total)).scale(scale).to(_dtype(matrix))


def lore(matrix: Matrix, state: Any, *, threshold: float, rounds: int, scale: float) -> LowRank:
    """LoRE-Merging: θ_0 + λ·mean(δᵢ) (arXiv 2502.10749, algorithm 1). Batch; data-free.

    Alternates θ_0 = mean(θᵢ − δᵢ) and δᵢ = SVT(θᵢ − θ_0; μ), from δᵢ = 0, `rounds` times; SVT takes μ = `threshold`
    off every singular value, down to 0. Both means have the weights wᵢ/Σw, so the rounds descend on
    Σwᵢ(½‖θ_0 + δᵢ − θᵢ‖² + μ‖δᵢ‖_*). InputError: weights that are negative or all 0. Everything happens on cores: an
    SVD of at most ΣR×ΣR for each adapter and round.
    """
    w = mean_weights(matrix)[:, None, None]
    U, cores, V = common_bases(matrix.terms)
    theta = torch.stack(cores)
    common, delta = torch.zeros_like(theta[0]), torch.zeros_like(theta)
    for _ in range(rounds):
        common = (w * (theta - delta)).sum(0)
        delta = _soft_threshold(theta - common, threshold)
    return _from_core(U, common + scale * (w * delta).sum(0), V, matrix)


def slao(matrix: Matrix, state: Mapping[str, float]) -> LowRank:
    """SLAO's merge: A ← A_t, B ← B + (B_t − B)/√t (arXiv 2512.23017). Sequential; data-free.

    terms: (running merge, task); state: {"tasks": t}, the new task counted. It works on the factors themselves (the
    task's scaling is in B), so their ranks must be equal, and the running merge must not have been truncated in
    between. A module that one side lacks (rank 0) has the factors of the other side with B = 0. InputError: ranks
    differ. Cost: that of a sum.
    """
    running, task = matrix.terms
    step = 1 / math.sqrt(state["tasks"])
    if task.rank == 0:
        return running.scale(1 - step)
    if running.rank == 0:
        return task.scale(step)
    if running.rank != task.rank:
        raise InputError(
            f"slao merges the factors, so ranks must be equal: {matrix.name} has {running.rank} in the running merge, "
            f"{task.rank} in the task; train with one rank and merge without max_rank, or use another method"
        )
    return LowRank(torch.lerp(running.B, task.B, step), task.A)


def adamerging(matrix: Matrix, state: Mapping[str, Mapping[str, Sequence]]) -> LowRank:
    """AdaMerging, layer-wise: Σᵢ λᵢτᵢ (arXiv 2310.02575). Batch.

    state: {matrix name: {"coefficients": [λ₁, …, λ_N]}}, learned from unlabelled inputs of all tasks.
    Cost: that of a sum.
    """
    return weighted_sum(matrix.terms, learned(matrix, state)["coefficients"])


def adarank(matrix: Matrix, state: Mapping[str, Mapping[str, Sequence]]) -> LowRank:
    """AdaRank: Σᵢ λᵢ Uᵢ diag(mᵢ∘sᵢ) Vᵢᵀ (arXiv 2503.22178). Batch.

    state: {matrix name: {"coefficients": [λ₁, …], "masks": [[0 or 1 for each singular value], …]}}, learned from
    unlabelled inputs; the values are those of `compact_svd`, descending. InputError: a mask of another length. Cost:
    a QR and an SVD of r×r for each adapter.
    """
    found = learned(matrix, state)
    kept = [_masked(matrix.name, term, mask) for term, mask in zip(matrix.terms, found["masks"], strict=True)]
    return weighted_sum(kept, found["coefficients"])


def _opcm_core(matrix: Matrix, previous: float) -> tuple[Tensor, Tensor, Tensor]:
    """(U, core, V) of λ_{t−1}P_{t−1} + proj(τ_t)."""
    U, (merged, task), V = common_bases(matrix.terms)
    left, s, right = torch.linalg.svd(merged, full_matrices=False)
    rank = numerical_rank(s, _dtype(matrix))
    left, right = left[:, :rank], right[:rank].T
    C = left.T @ task @ right
    leading = int((s[:rank].cumsum(0) <= LEADING_SHARE * s.sum()).sum())
    mask = torch.eye(rank, dtype=torch.bool)
    mask[:leading, :leading] = True
    return U, previous * merged + task - left @ (mask * C) @ right.T, V


def _from_core(U: Tensor, core: Tensor, V: Tensor, matrix: Matrix) -> LowRank:
    """U core Vᵀ with the core inside the factor that leaves the smaller rank; the zero matrix where it is empty."""
    if core.numel() == 0:
        return weighted_sum(matrix.terms, [0.0] * len(matrix.terms))
    whole = LowRank(U @ core, V.T) if core.shape[1] <= core.shape[0] else LowRank(U, core @ V.T)
    return whole.to(_dtype(matrix))


def _soft_threshold(stack: Tensor, threshold: float) -> Tensor:
    """Singular value thresholding of every matrix of (N, p, q)."""
    U, s, Vh = torch.linalg.svd(stack, full_matrices=False)
    return U * (s - threshold).clamp_min(0)[:, None, :] @ Vh


def _masked(name: str, term: LowRank, mask: Sequence) -> LowRank:
    """The term with only the singular values whose mask is 1."""
    U, s, Vh = compact_svd(term)
    if len(mask) != len(s):
        raise InputError(
            f"{name}: expected a mask of {len(s)} singular values, found {len(mask)}; learn it with these adapters"
        )
    keep = torch.tensor(mask, dtype=torch.bool)
    root = s[keep].sqrt()
    return LowRank(U[:, keep] * root, root[:, None] * Vh[keep]).to(term.B.dtype)


def _dtype(matrix: Matrix) -> torch.dtype:
    return matrix.terms[0].B.dtype
