"""OPCM: each task vector projected off the leading directions of the running merge."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pm_hf.errors import InputError
from pm_hf.merging.lowrank import LowRank, common_bases, numerical_rank
from pm_hf.merging.methods.base import Matrix, Method, dtype_of, from_core

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
    return from_core(U, core / state.scale, V, matrix)


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


def _opcm_core(matrix: Matrix, previous: float) -> tuple[Tensor, Tensor, Tensor]:
    """(U, core, V) of λ_{t−1}P_{t−1} + proj(τ_t)."""
    U, (merged, task), V = common_bases(matrix.terms)
    left, s, right = torch.linalg.svd(merged, full_matrices=False)
    rank = numerical_rank(s, dtype_of(matrix))
    left, right = left[:, :rank], right[:rank].T
    C = left.T @ task @ right
    leading = int((s[:rank].cumsum(0) <= LEADING_SHARE * s.sum()).sum())
    mask = torch.eye(rank, dtype=torch.bool)
    mask[:leading, :leading] = True
    return U, previous * merged + task - left @ (mask * C) @ right.T, V


OPCM = Method(
    "opcm",
    "P_t = (λ_{t−1}P_{t−1} + τ_t projected off the leading directions of P_{t−1})/λ_t",
    "OPCM, arXiv 2501.09522, algorithm 1",
    "nothing",
    "twice a QR and an SVD of R×R a module",
    fold=True,
    batch=False,
    train_from="base",
    starts=("last", "base"),
    kernel=opcm,
    prepare=opcm_scale,
    saves=("scale", "mean_norm", "tasks"),
    in_streams=True,
)
