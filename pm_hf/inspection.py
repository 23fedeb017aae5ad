"""What an adapter is, and how two adapters relate, from their folders alone."""

import os

import torch

from pm_hf.adapters import folded_tasks, open_adapter
from pm_hf.errors import InputError
from pm_hf.merging.lowrank import LowRank

NUMERICAL = 1e-6  # singular values below this share of the largest do not count


def describe(path: str | os.PathLike) -> dict:
    """Base, labels, tasks folded and, for each module, shape, rank, scaling, Frobenius norm and numerical rank."""
    adapter = open_adapter(path)
    modules = {}
    for name, scaling in adapter.scaling.items():
        product = adapter.product(name)
        rank = _numerical_rank(product)
        modules[name] = {
            "shape": f"{product.shape[0]}x{product.shape[1]}",
            "rank": product.rank,
            "numerical_rank": rank,
            "scaling": float(scaling),
            "norm": product.norm(),
        }
    return {
        "path": str(adapter.path),
        "base_model": adapter.config.get("base_model_name_or_path"),
        "tasks": folded_tasks(adapter),
        "labels": adapter.labels,
        "modules": modules,
    }


def relate(first: str | os.PathLike, second: str | os.PathLike) -> dict[str, dict[str, float]]:
    """{module: {"cosine": <ΔW₁, ΔW₂>/(‖ΔW₁‖‖ΔW₂‖)}} over the modules that both adapters have."""
    left, right = open_adapter(first), open_adapter(second)
    shared = [name for name in left.scaling if name in right.scaling]
    if not shared:
        raise InputError(f"{first} and {second} have no module in common")
    for name in shared:
        shapes = left.product(name).shape, right.product(name).shape
        if shapes[0] != shapes[1]:
            raise InputError(f"{name} has different shapes in the adapters: {shapes[0]} and {shapes[1]}")
    return {name: {"cosine": _cosine(left.product(name), right.product(name))} for name in shared}


def _cosine(left: LowRank, right: LowRank) -> float:
    """From the factors: <BA, DC> = <BᵀD, ACᵀ>."""
    inner = (left.B.double().T @ right.B.double()) * (left.A.double() @ right.A.double().T)
    norms = left.norm() * right.norm()
    return float(inner.sum()) / norms if norms else 0.0


def _numerical_rank(product: LowRank) -> int:
    _, Rb = torch.linalg.qr(product.B.double())
    _, Ra = torch.linalg.qr(product.A.double().T)
    values = torch.linalg.svdvals(Rb @ Ra.T)
    return int((values > NUMERICAL * values[0]).sum()) if float(values[0]) else 0
