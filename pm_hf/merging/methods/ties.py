"""TIES and DARE: trim or drop entries, elect a sign, take the mean of what agrees."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pm_hf.merging.methods.base import (
    DENSE_COST,
    TINY,
    TRIM,
    Matrix,
    Method,
    Option,
    map_rows,
    smallest_kept,
    trim,
    weighted_rows,
)


def ties(matrix: Matrix, state: Any, *, density: float, majority: str) -> Tensor:
    """TIES-Merging: trim, elect a sign, disjoint mean (arXiv 2306.01708, algorithm 1). Batch; data-free.

    Of each τᵢ the int(density·out·in) entries of largest magnitude stay (all that equal the last one too). γ = sign of
    Σᵢτᵢ (majority "total") or of Σᵢsign(τᵢ) ("frequency"), + where it is 0; the result is the mean of wᵢτᵢ over the
    adapters whose entry has the sign γ, 0 where none has. As PEFT's `merge_utils.ties` on dense task vectors.
    Cost: one dense matrix a module and a selection for each adapter.
    """
    lowest = [smallest_kept(term, density) for term in matrix.terms]
    return map_rows(matrix, lambda rows, tau: _elect(trim(tau, lowest), matrix.weights, majority))


def dare(matrix: Matrix, state: Any, *, density: float, seed: int) -> Tensor:
    """DARE: Σᵢ wᵢ mᵢ∘τᵢ/density (arXiv 2311.03099, with density = 1 − p). Batch; data-free.

    mᵢ = `dare_mask`, so the expectation over the seeds is Σ wᵢτᵢ. As PEFT's `merge_utils.dare_linear` under the same
    masks. Cost: one dense matrix a module and a mask for each adapter.
    """
    masks = _masks(matrix, density, seed)
    return map_rows(matrix, lambda rows, tau: weighted_rows(_drop(tau, masks, rows, density), matrix.weights))


def dare_ties(matrix: Matrix, state: Any, *, density: float, majority: str, seed: int) -> Tensor:
    """DARE's random drop and rescale in place of TIES' trimming, then its election and disjoint mean. Batch; data-free.

    arXiv 2311.03099 with 2306.01708; as PEFT's `merge_utils.dare_ties` under the same masks. Cost as `dare`.
    """
    masks = _masks(matrix, density, seed)
    return map_rows(matrix, lambda rows, tau: _elect(_drop(tau, masks, rows, density), matrix.weights, majority))


def dare_mask(name: str, index: int, shape: tuple[int, int], *, density: float, seed: int) -> Tensor:
    """Boolean (out, in), each entry True with probability `density`, from its own generator.

    The generator's seed is SHA-256 of (seed, matrix name, adapter index): the mask depends on nothing else.
    """
    digest = hashlib.sha256(f"{seed}/{name}/{index}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    return torch.rand(shape, generator=generator) < density


def _masks(matrix: Matrix, density: float, seed: int) -> list[Tensor]:
    return [dare_mask(matrix.name, i, matrix.shape, density=density, seed=seed) for i in range(len(matrix.terms))]


def _drop(tau: Tensor, masks: Sequence[Tensor], rows: slice, density: float) -> Tensor:
    return tau * torch.stack([mask[rows] for mask in masks]) / density


def _elect(tau: Tensor, weights: Sequence[float], majority: str) -> Tensor:
    """Mean of wᵢτᵢ over the entries that have the elected sign."""
    votes = tau if majority == "total" else tau.sign()
    elected = torch.where(votes.sum(0) >= 0, 1.0, -1.0)
    agree = tau.sign() == elected
    return weighted_rows(tau * agree, weights) / agree.sum(0).clamp_min(1)


MAJORITY = Option(
    "total", "an entry's sign is elected by the sum of the values or by their number", choices=("total", "frequency")
)

DROP = Option(0.5, "share of the entries that is kept at random (1 − p) and rescaled by 1/density, in (0, 1]", TINY, 1)

SEED = Option(0, "seed of the random masks, an integer from 0", 0, 2**32 - 1)

TIES = Method(
    "ties",
    "trim each τᵢ to its largest entries, elect a sign for each entry, mean of the wᵢτᵢ that agree",
    "TIES-Merging, arXiv 2306.01708, algorithm 1",
    "nothing",
    DENSE_COST,
    fold=False,
    batch=True,
    train_from="base",
    starts=("last", "base"),
    kernel=ties,
    dense=True,
    weight=1.0,
    options={"density": TRIM, "majority": MAJORITY},
)

DARE = Method(
    "dare",
    "Σ wᵢ mᵢ∘τᵢ/(1−p), mᵢ random with P(0) = p (wᵢ = 0.3)",
    "DARE, arXiv 2311.03099",
    "nothing",
    DENSE_COST,
    fold=False,
    batch=True,
    train_from="base",
    starts=("last", "base"),
    kernel=dare,
    dense=True,
    weight=0.3,
    options={"density": DROP, "seed": SEED},
)

DARE_TIES = Method(
    "dare_ties",
    "TIES with the random drop and rescale of DARE in place of trimming",
    "DARE, arXiv 2311.03099, with TIES-Merging, arXiv 2306.01708",
    "nothing",
    DENSE_COST,
    fold=False,
    batch=True,
    train_from="base",
    starts=("last", "base"),
    kernel=dare_ties,
    dense=True,
    weight=1.0,
    options={"density": DROP, "majority": MAJORITY, "seed": SEED},
)
