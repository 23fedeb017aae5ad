"""AdaMerging and AdaRank: coefficients, and masks of singular values, learned from unlabelled inputs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pm_hf.errors import InputError
from pm_hf.merging.lowrank import LowRank, balanced, compact_svd, weighted_sum
from pm_hf.merging.methods.base import (
    DENSE_COST,
    SUM_COST,
    TRIM,
    Matrix,
    Method,
    map_rows,
    smallest_kept,
    trim,
    weighted_rows,
)


def adamerging(matrix: Matrix, state: Mapping[str, Mapping[str, Sequence]]) -> LowRank:
    """AdaMerging, layer-wise: Σᵢ λᵢτᵢ (arXiv 2310.02575). Batch.

    state: {matrix name: {"coefficients": [λ₁, …, λ_N]}}, learned from unlabelled inputs of all tasks.
    Cost: that of a sum.
    """
    return weighted_sum(matrix.terms, _learned_for(matrix, state)["coefficients"])


def adamerging_trimmed(matrix: Matrix, state: Mapping[str, Mapping[str, Sequence]], *, density: float) -> Tensor:
    """AdaMerging++: Σᵢ λᵢ trim(τᵢ), trimmed as `ties` does (arXiv 2310.02575). Batch.

    state: {matrix name: {"coefficients": [λ₁, …, λ_N]}}, learned from unlabelled inputs. Cost: one dense
    matrix a module and a selection for each adapter.
    """
    lowest = [smallest_kept(term, density) for term in matrix.terms]
    return map_rows(
        matrix, lambda rows, tau: weighted_rows(trim(tau, lowest), _learned_for(matrix, state)["coefficients"])
    )


def adarank(matrix: Matrix, state: Mapping[str, Mapping[str, Sequence]]) -> LowRank:
    """AdaRank: Σᵢ λᵢ Uᵢ diag(mᵢ∘sᵢ) Vᵢᵀ (arXiv 2503.22178). Batch.

    state: {matrix name: {"coefficients": [λ₁, …], "masks": [[0 or 1 for each singular value], …]}}, learned from
    unlabelled inputs; the values are those of `compact_svd`, descending. InputError: a mask of another length. Cost:
    a QR and an SVD of r×r for each adapter.
    """
    learned = _learned_for(matrix, state)
    masked = [_masked_term(matrix.name, term, mask) for term, mask in zip(matrix.terms, learned["masks"], strict=True)]
    return weighted_sum(masked, learned["coefficients"])


def _learned_for(matrix: Matrix, state: Mapping[str, Any]) -> Any:
    """What was learned for this matrix; InputError if nothing was."""
    if matrix.name not in state:
        raise InputError(f"no coefficients were learned for {matrix.name}; learn them with these adapters")
    return state[matrix.name]


def _masked_term(name: str, term: LowRank, mask: Sequence) -> LowRank:
    """The term with only the singular values whose mask is 1."""
    U, s, Vh = compact_svd(term)
    if len(mask) != len(s):
        raise InputError(
            f"{name}: expected a mask of {len(s)} singular values, found {len(mask)}; learn it with these adapters"
        )
    keep = torch.tensor(mask, dtype=torch.bool)
    return balanced(U[:, keep], s[keep], Vh[keep]).to(term.B.dtype)


ADAMERGING = Method(
    "adamerging",
    "Σ λᵢτᵢ, λᵢ learned for each module to minimise the prediction entropy",
    "AdaMerging, arXiv 2310.02575",
    "coefficients learned from unlabelled inputs",
    SUM_COST,
    fold=False,
    batch=True,
    train_from="base",
    starts=("last", "base"),
    kernel=adamerging,
    learned=("coefficients",),
)

ADAMERGING_TRIMMED = Method(
    "adamerging++",
    "AdaMerging of task vectors that are trimmed as TIES does",
    "AdaMerging++, arXiv 2310.02575",
    "coefficients learned from unlabelled inputs",
    DENSE_COST,
    fold=False,
    batch=True,
    train_from="base",
    starts=("last", "base"),
    kernel=adamerging_trimmed,
    dense=True,
    learned=("coefficients",),
    options={"density": TRIM},
)

ADARANK = Method(
    "adarank",
    "Σ λᵢ Uᵢ(mᵢ∘Sᵢ)Vᵢᵀ, λᵢ and the 0/1 masks mᵢ learned to minimise the prediction entropy",
    "AdaRank, arXiv 2503.22178",
    "coefficients and masks learned from unlabelled inputs",
    "a QR and an SVD of r×r for each adapter of a module",
    fold=False,
    batch=True,
    train_from="base",
    starts=("last", "base"),
    kernel=adarank,
    learned=("coefficients", "masks"),
)
