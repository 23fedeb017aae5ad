"""LoRE-Merging: a common shift and a low-rank part of each task, by turns."""

from typing import Any

import torch
from torch import Tensor

from pm_hf.merging.lowrank import LowRank, common_bases
from pm_hf.merging.methods.base import Matrix, Method, Option, from_core, mean_weights


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
    return from_core(U, common + scale * (w * delta).sum(0), V, matrix)


def _soft_threshold(stack: Tensor, threshold: float) -> Tensor:
    """Singular value thresholding of every matrix of (N, p, q)."""
    U, s, Vh = torch.linalg.svd(stack, full_matrices=False)
    return U * (s - threshold).clamp_min(0)[:, None, :] @ Vh


LORE = Method(
    "lore",
    "θ_0 + λ Σ wᵢδᵢ from min Σ wᵢ(½‖θ_0 + δᵢ − θᵢ‖² + μ‖δᵢ‖_*), by turns",
    "LoRE-Merging, arXiv 2502.10749, algorithm 1",
    "nothing",
    "an SVD of R×R for each adapter and round of a module",
    fold=False,
    batch=True,
    train_from="base",
    starts=("last", "base"),
    kernel=lore,
    options={
        "threshold": Option(0.01, "μ, what every singular value loses, in units of the weights", 0.0),
        "rounds": Option(20, "number of alternations, at least 1", 1),
        "scale": Option(1.0, "λ, factor of the mean low-rank part", 0.0),
    },
)
