"""MagMax: of every entry the value of largest magnitude."""

from typing import Any

import torch
from torch import Tensor

from pm_hf.merging.methods.base import DENSE_COST, Matrix, Method, map_rows


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

    return map_rows(matrix, select)


MAGMAX = Method(
    "magmax",
    "per entry the wᵢτᵢ whose |τᵢ| is largest",
    "MagMax, arXiv 2407.06322",
    "nothing",
    DENSE_COST,
    fold=True,
    batch=True,
    train_from="last",
    starts=("last", "base"),
    kernel=magmax,
    dense=True,
    weight=1.0,
    in_streams=True,
)
