"""Kernels that decide entry by entry. Their results are dense; an adapter then has to factor them.

Each gets a `Matrix`, makes the dense task vectors one block of rows at a time, and never changes its inputs. The
result (out, in) has the dtype of the terms, float32 in a merge. A term of rank 0 is a zero task vector.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pm_hf.errors import InputError
from pm_hf.merging.lowrank import LowRank, Matrix, row_slices
from pm_hf.merging.selection import kth_largest

BLOCK = 2**20  # entries of a block of rows


def ties(matrix: Matrix, state: Any, *, density: float, majority: str) -> Tensor:
    """TIES-Merging: trim, elect a sign, disjoint mean (arXiv 2306.01708, algorithm 1). Batch; data-free.

    Of each τᵢ the int(density·out·in) entries of largest magnitude stay (all that equal the last one too). γ = sign of
    Σᵢτᵢ (majority "total") or of Σᵢsign(τᵢ) ("frequency"), + where it is 0; the result is the mean of wᵢτᵢ over the
    adapters whose entry has the sign γ, 0 where none has. As PEFT's `merge_utils.ties` on dense task vectors.
    Cost: one dense matrix a module and a selection for each adapter.
    """
    lowest = [smallest_kept(term, density) for term in matrix.terms]
    return _by_rows(matrix, lambda rows, tau: _elect(_trim(tau, lowest), matrix.weights, majority))


def dare(matrix: Matrix, state: Any, *, density: float, seed: int) -> Tensor:
    """DARE: Σᵢ wᵢ mᵢ∘τᵢ/density (arXiv 2311.03099, with density = 1 − p). Batch; data-free.

    mᵢ = `dare_mask`, so the expectation over the seeds is Σ wᵢτᵢ. As PEFT's `merge_utils.dare_linear` under the same
    masks. Cost: one dense matrix a module and a mask for each adapter.
    """
    masks = _masks(matrix, density, seed)
    return _by_rows(matrix, lambda rows, tau: _weighted(_drop(tau, masks, rows, density), matrix.weights))


def dare_ties(matrix: Matrix, state: Any, *, density: float, majority: str, seed: int) -> Tensor:
    """DARE's random drop and rescale in place of TIES' trimming, then its election and disjoint mean. Batch; data-free.

    arXiv 2311.03099 with 2306.01708; as PEFT's `merge_utils.dare_ties` under the same masks. Cost as `dare`.
    """
    masks = _masks(matrix, density, seed)
    return _by_rows(matrix, lambda rows, tau: _elect(_drop(tau, masks, rows, density), matrix.weights, majority))


def magmax(matrix: Matrix, state: Any) -> Tensor:
    """MagMax: per entry the wᵢτᵢ whose |τᵢ| is largest, the first of equals (arXiv 2407.06322). Data-free.

    τᵢ is relative to the pretrained weights. The weights scale after the selection, so equal ones are the paper's λ.
    Batch, or sequential with terms (running merge, task): with weights 1 folds one by one give the batch result
    as long as nothing is truncated in between.
    Cost: one dense matrix a module.
    """

    def select(rows: slice, tau: Tensor) -> Tensor:
        chosen, scaled = tau[0], matrix.weights[0] * tau[0]
        for w, other in zip(matrix.weights[1:], tau[1:], strict=True):
            larger = other.abs() > chosen.abs()
            chosen, scaled = torch.where(larger, other, chosen), torch.where(larger, w * other, scaled)
        return scaled

    return _by_rows(matrix, select)


def cofima(matrix: Matrix, state: Any, *, coefficient: float) -> Tensor:
    """Fisher-weighted mean: θ = Σ wᵢFᵢθᵢ/Σ wᵢFᵢ, per entry (CoFiMA, arXiv 2312.08977; arXiv 2111.09832).

    matrix.curvature: Fᵢ ≥ 0, (out, in), one diagonal Fisher for each adapter; the sums run in float64. Entries where
    no wᵢFᵢ is above 0 take Σwᵢθᵢ/Σwᵢ; merge_adapters gives an adapter without the module F = 0 there. Batch, or
    sequential with terms (θ̂_{t−1}, θ*_t) and weights (1 − λ, λ), which is what `coefficient` λ is for. InputError: a
    Fisher that is negative or not finite, weights that are negative or all 0. Cost: one dense matrix a module.
    """
    w = mean_weights(matrix)[:, None, None]
    for i, fisher in enumerate(matrix.curvature):
        if not bool((fisher >= 0).all() & fisher.isfinite().all()):
            raise InputError(f"{matrix.name}: the Fisher of adapter {i} is negative or not finite; measure it again")

    def mean(rows: slice, theta: Tensor) -> Tensor:
        share = w * torch.stack([fisher[rows] for fisher in matrix.curvature])
        whole, theta = share.sum(0), theta.double()
        plain = (w * theta).sum(0)
        return torch.where(whole > 0, (share * theta).sum(0) / torch.where(whole > 0, whole, 1.0), plain)

    return _by_rows(matrix, mean)


def adamerging_trimmed(matrix: Matrix, state: Mapping[str, Mapping[str, Sequence]], *, density: float) -> Tensor:
    """AdaMerging++: Σᵢ λᵢ trim(τᵢ), trimmed as `ties` does (arXiv 2310.02575). Batch.

    state: {matrix name: {"coefficients": [λ₁, …, λ_N]}}, learned from unlabelled inputs. Cost: one dense
    matrix a module and a selection for each adapter.
    """
    lowest = [smallest_kept(term, density) for term in matrix.terms]
    return _by_rows(matrix, lambda rows, tau: _weighted(_trim(tau, lowest), learned(matrix, state)["coefficients"]))


def mean_weights(matrix: Matrix) -> Tensor:
    """wᵢ/Σw, (N,) float64; InputError when they are no weights of a mean."""
    w = torch.tensor(matrix.weights, dtype=torch.float64)
    if w.min() < 0 or w.sum() == 0:
        raise InputError(f"a mean needs weights that are 0 or more and not all 0, found {list(matrix.weights)}")
    return w / w.sum()


def learned(matrix: Matrix, state: Mapping[str, Any]) -> Any:
    """What was learned for this matrix; InputError if nothing was."""
    if matrix.name not in state:
        raise InputError(f"no coefficients were learned for {matrix.name}; learn them with these adapters")
    return state[matrix.name]


def smallest_kept(term: LowRank, density: float) -> float:
    """The smallest magnitude, in float32, of the int(density·out·in) largest entries; ∞ if that is none."""
    count = int(density * term.shape[0] * term.shape[1])
    return kth_largest(lambda: (tau for _, tau in row_blocks(term)), count) if count else math.inf


def row_blocks(term: LowRank) -> Iterator[tuple[slice, Tensor]]:
    """The dense product, block by block of rows; the same rounding whenever it is made again."""
    for rows in row_slices(term.shape, BLOCK):
        yield rows, term.B[rows] @ term.A


def dare_mask(name: str, index: int, shape: tuple[int, int], *, density: float, seed: int) -> Tensor:
    """Boolean (out, in), each entry True with probability `density`, from its own generator.

    The generator's seed is SHA-256 of (seed, matrix name, adapter index): the mask depends on nothing else.
    """
    digest = hashlib.sha256(f"{seed}/{name}/{index}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    return torch.rand(shape, generator=generator) < density


def _masks(matrix: Matrix, density: float, seed: int) -> list[Tensor]:
    return [dare_mask(matrix.name, i, matrix.shape, density=density, seed=seed) for i in range(len(matrix.terms))]


def _by_rows(matrix: Matrix, merge: Callable[[slice, Tensor], Tensor]) -> Tensor:
    """`merge` of the stacked dense terms (N, rows, in), so that they never stand side by side whole."""
    merged = matrix.terms[0].B.new_empty(matrix.shape)
    for rows in row_slices(matrix.shape, BLOCK):
        merged[rows] = merge(rows, torch.stack([term.B[rows] @ term.A for term in matrix.terms]))
    return merged


def _trim(tau: Tensor, lowest: Sequence[float]) -> Tensor:
    return tau * (tau.float().abs() >= torch.tensor(lowest)[:, None, None])


def _drop(tau: Tensor, masks: Sequence[Tensor], rows: slice, density: float) -> Tensor:
    return tau * torch.stack([mask[rows] for mask in masks]) / density


def _weighted(tau: Tensor, weights: Sequence[float]) -> Tensor:
    return (tau * torch.tensor(weights, dtype=tau.dtype)[:, None, None]).sum(0)


def _elect(tau: Tensor, weights: Sequence[float], majority: str) -> Tensor:
    """Mean of wᵢτᵢ over the entries that have the elected sign."""
    votes = tau if majority == "total" else tau.sign()
    elected = torch.where(votes.sum(0) >= 0, 1.0, -1.0)
    agree = tau.sign() == elected
    return _weighted(tau * agree, weights) / agree.sum(0).clamp_min(1)
