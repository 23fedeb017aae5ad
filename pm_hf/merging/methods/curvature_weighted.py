"""CoFiMA and LOT: means of the optima weighed by each task's own curvature."""

from typing import Any

import torch
from torch import Tensor

from pm_hf.errors import InputError
from pm_hf.merging.coefficient import solve_right
from pm_hf.merging.curvature import shrink
from pm_hf.merging.lowrank import LowRank
from pm_hf.merging.methods.base import DENSE_COST, STEP, TINY, Matrix, Method, Option, dtype_of, map_rows, mean_weights


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

    return map_rows(matrix, mean)


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
    return LowRank(columns, solve_right(torch.cat(rows), total)).scale(scale).to(dtype_of(matrix))


COFIMA = Method(
    "cofima",
    "θ = Σ wᵢFᵢθᵢ / Σ wᵢFᵢ per entry; in a fold w = (1−λ, λ)",
    "CoFiMA, arXiv 2312.08977; Fisher merging, arXiv 2111.09832",
    "one diagonal Fisher for each adapter",
    DENSE_COST,
    fold=True,
    batch=True,
    train_from="merged",
    starts=("merged",),
    kernel=cofima,
    dense=True,
    curvature="fisher",
    options={"coefficient": STEP},
    in_streams=True,
)

LOT = Method(
    "lot",
    "Θ = (Σ wᵢΘᵢGᵢ)(Σ wᵢGᵢ)⁺, the optimum of Σ wᵢ‖(Θ − Θᵢ)Xᵢ‖²",
    "LOT Merging, arXiv 2505.23859; RegMean, arXiv 2212.09849",
    "one Gram file for each adapter",
    "a Cholesky factor of in×in a module",
    fold=False,
    batch=True,
    train_from="base",
    starts=("last", "base"),
    kernel=lot,
    curvature="gram",
    options={
        "scale": Option(1.0, "factor of the merged matrix; the paper uses 1 to 1.5", TINY),
        "shrinkage": Option(0.0, "ρ of (1−ρ)G + ρ·diag(G), on top of what the file has, in [0, 1]", 0.0, 1.0),
    },
)
