"""Streams of tiny tasks, their running sums of curvature, and other content for the files of those."""

import json

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pm_hf.merging.curvature import Curvature, CurvatureSpec, accumulate
from pm_hf.merging.lowrank import LowRank, add

SHAPES = {"q": (6, 5), "v": (3, 5), "up": (4, 7)}
OWNER = {"v": "q"}  # q and v read the same input, so they share a Gram
FISHER, GRAM, FACTORED = CurvatureSpec("fisher"), CurvatureSpec("gram", shrinkage=0.1), CurvatureSpec("factored")


def task(seed: int, kind: str) -> tuple[dict, dict]:
    """(measured, delta) of one task."""
    g = torch.Generator().manual_seed(seed)
    delta = {
        name: LowRank(torch.randn(out, 2, generator=g), torch.randn(2, width, generator=g))
        for name, (out, width) in SHAPES.items()
    }
    if kind != "gram":
        fishers = {name: torch.rand(shape, generator=g) for name, shape in SHAPES.items()}
        return fishers if kind == "fisher" else means(fishers), delta
    inputs = {name: torch.randn(9, SHAPES[name][1], generator=g) for name in ("q", "up")}
    return {name: x.T @ x / 9 for name, x in inputs.items()}, delta


def means(fishers: dict) -> dict:
    """{module: means of F over its columns, then over its rows}, (out + in,)."""
    return {name: torch.cat([F.mean(1), F.mean(0)]) for name, F in fishers.items()}


def stream(settings: CurvatureSpec, tasks: int) -> list[Curvature]:
    """Sums after each task, where every task starts from the sum of the earlier ones."""
    owner = OWNER if settings.kind == "gram" else None
    merged, steps = {}, []
    for seed in range(tasks):
        measured, delta = task(seed, settings.kind)
        optimum = {name: add(merged[name], d) if merged else d for name, d in delta.items()}
        previous = steps[-1] if steps else None
        steps.append(accumulate(measured, optimum, delta, settings, 10 + seed, owner=owner, previous=previous))
        merged = optimum
    return steps


def rewrite(path, change) -> None:
    """Write the file again after change(tensors, header) in place, as a foreign program might."""
    with safe_open(path, "pt") as handle:
        metadata = handle.metadata()
    tensors, header = load_file(path), json.loads(metadata["curvature"])
    change(tensors, header)
    save_file(tensors, path, metadata=metadata | {"curvature": json.dumps(header)})
