"""Adapter folders of any layout drawn by hypothesis, and their slow, obvious dense float64 reading."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

PREFIX, WEIGHTS, CONFIG = "base_model.model.", "adapter_model.safetensors", "adapter_config.json"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Site:
    """An adapted place of the base: what every adapter of it shares."""

    name: str
    kind: str  # linear, embedding, conv, grouped, fused
    out: int
    columns: int
    experts: int = 1
    kernel: tuple[int, ...] = ()


@dataclass(frozen=True)
class Drawn:
    """How one adapter adapts the sites: {site: (rank, alpha)}, a site that is left out is not adapted."""

    sizes: dict[str, tuple[int, int]]
    rslora: bool
    bias: bool
    dtype: torch.dtype
    seed: int


@st.composite
def sites(draw):
    """One to four places; a bias is possible only where there are no embeddings and no fused parameters."""
    kinds = draw(
        st.lists(st.sampled_from(["linear", "linear", "embedding", "conv", "grouped", "fused"]), min_size=1, max_size=4)
    )
    found = []
    for i, kind in enumerate(kinds):
        out = 2 * draw(st.integers(1, 5)) if kind == "grouped" else draw(st.integers(1, 9))
        kernel = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=2))) if kind in ("conv", "grouped") else ()
        experts = draw(st.integers(2, 3)) if kind == "fused" else 1
        found.append(Site(f"block.{i}.{kind}", kind, out, draw(st.integers(1, 9)), experts, kernel))
    return found


@st.composite
def adapters(draw, places, count):
    """`count` adapters of the same sites with ranks, alphas, scalings, dtypes and gaps of their own."""
    biased = not any(place.kind in ("embedding", "fused") for place in places) and draw(st.booleans())
    drawn = []
    for i in range(count):
        kept = [p for p in places if p.kind == "fused" or draw(st.integers(0, 3))] or places[:1]
        fused = (draw(st.integers(1, 4)), draw(st.integers(1, 9)))
        sizes = {p.name: fused if p.kind == "fused" else _size(draw, p) for p in kept}
        drawn.append(
            Drawn(sizes, draw(st.booleans()), biased and draw(st.booleans()), draw(st.sampled_from(DTYPES)), i)
        )
    return drawn


def _size(draw, place):
    rank = draw(st.integers(1, 4)) * (2 if place.kind == "grouped" else 1)
    return rank, draw(st.integers(1, 9))


def write(path: Path, places, drawn: Drawn) -> Path:
    """The folder as PEFT lays it out, one rank_pattern and alpha_pattern entry for each module."""
    generator, tensors = torch.Generator().manual_seed(drawn.seed), {}
    for place in places:
        if place.name not in drawn.sizes:
            continue
        for name, shape in shapes(place, drawn.sizes[place.name][0], drawn.bias).items():
            tensors[PREFIX + name] = torch.randn(shape, generator=generator).to(drawn.dtype)
    path.mkdir()
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    fused = [p for p in places if p.kind == "fused"]
    patterns = {f"{p.name}.weight" if p.kind == "fused" else p.name: drawn.sizes.get(p.name) for p in places}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "tiny/base",
        "r": 64,
        "lora_alpha": 64,
        "rank_pattern": {name: size[0] for name, size in patterns.items() if size},
        "alpha_pattern": {name: size[1] for name, size in patterns.items() if size},
        "use_rslora": drawn.rslora,
        "lora_bias": drawn.bias,
        "target_modules": [p.name for p in places if p.kind != "fused"],
        "target_parameters": [f"{p.name}.weight" for p in fused] or None,
    }
    (path / CONFIG).write_text(json.dumps(config))
    return path


def shapes(place: Site, rank: int, bias: bool) -> dict[str, tuple[int, ...]]:
    """{tensor name: shape} of one site."""
    if place.kind == "embedding":
        return {
            f"{place.name}.lora_embedding_A": (rank, place.columns),
            f"{place.name}.lora_embedding_B": (place.out, rank),
        }
    A, B = (rank * place.experts, place.columns), (place.out, rank * place.experts)
    if place.kernel:
        groups = 2 if place.kind == "grouped" else 1
        A, B = (rank, place.columns, *place.kernel), (place.out, rank // groups, *(1 for _ in place.kernel))
    found = {f"{place.name}.lora_A.weight": A, f"{place.name}.lora_B.weight": B}
    return found | ({f"{place.name}.lora_B.bias": (place.out,)} if bias else {})


def dense(path: Path, places) -> dict[str, torch.Tensor]:
    """{site: update of its weight, site.bias: of its bias} in float64, as PEFT's layers compute it; zero if absent."""
    tensors = {name.removeprefix(PREFIX): value.double() for name, value in load_file(path / WEIGHTS).items()}
    config, found = json.loads((path / CONFIG).read_text()), {}
    for place in places:
        empty = place.kind == "embedding"
        names = [f"{place.name}.lora_embedding_{f}" if empty else f"{place.name}.lora_{f}.weight" for f in "AB"]
        found[place.name] = torch.zeros(_weight_shape(place), dtype=torch.float64)
        found[f"{place.name}.bias"] = torch.zeros(place.out, dtype=torch.float64)
        if names[0] not in tensors:
            continue
        A, B = (tensors[name] for name in names)
        scaling = _scaling(config, place, A.shape[0] // place.experts)
        found[place.name] = scaling * _product(place, A, B)
        if f"{place.name}.lora_B.bias" in tensors:
            found[f"{place.name}.bias"] = scaling * tensors[f"{place.name}.lora_B.bias"]
    return found


def _scaling(config, place, rank):
    """The pattern's alpha where an entry ends the name (ours are anchored and escaped), else lora_alpha."""
    name = f"{place.name}.weight" if place.kind == "fused" else place.name
    plain = {key.removeprefix("^").replace("\\", ""): value for key, value in (config["alpha_pattern"] or {}).items()}
    alpha = plain.get(name, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config["use_rslora"] else rank)


def _weight_shape(place):
    if place.kind == "fused":
        return place.experts, place.out, place.columns
    if place.kind == "embedding":
        return place.columns, place.out
    return place.out, place.columns, *place.kernel


def _product(place, A, B):
    if place.kind == "fused":
        stacked = A.reshape(place.experts, -1, place.columns)
        return torch.einsum("ore,eri->eoi", B.reshape(place.out, -1, place.experts), stacked)
    if place.kind == "embedding":
        return (B @ A).T
    if not place.kernel:
        return B @ A
    groups = 2 if place.kind == "grouped" else 1
    rows = []
    for i in range(place.out):  # output channel i of a group sees the ranks of that group
        group, width = i // (place.out // groups), A.shape[0] // groups
        rows.append(sum(B[i, r].reshape(()) * A[group * width + r] for r in range(width)))
    return torch.stack(rows)
