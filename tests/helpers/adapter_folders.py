"""Small PEFT adapter folders written by hand, and their slow, obvious dense float64 reading."""

import json
import math
import re
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from helpers import edited_json, refusal
from pm_hf import merge_adapters
from pm_hf.merging.curvature import Curvature, CurvatureSpec, accumulate
from pm_hf.merging.lowrank import LowRank

BASE, PREFIX, WEIGHTS, CONFIG = "tiny/base", "base_model.model.", "adapter_model.safetensors", "adapter_config.json"
SHAPES = {"layers.0.q": (12, 16), "layers.1.v": (10, 16)}
HEAD = "classifier"


def factors(shapes, rank, seed):
    """{module: (A, B)} drawn from `seed`; `rank` is one number or {module: rank}."""
    generator = torch.Generator().manual_seed(seed)
    ranks = rank if isinstance(rank, dict) else dict.fromkeys(shapes, rank)
    return {
        name: (torch.randn(ranks[name], n, generator=generator), torch.randn(m, ranks[name], generator=generator))
        for name, (m, n) in shapes.items()
    }


def write_folder(
    path, shapes=SHAPES, rank=2, seed=0, *, alpha=4, dtype=torch.float32, config=None, saved=None, labels=None, drop=()
):
    """A LoRA adapter folder; `config` overrides its settings, `saved` are modules_to_save tensors by name."""
    path = Path(path)
    path.mkdir(parents=True)
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in (saved or {}).items()}
    pairs = factors(shapes, rank, seed)
    for name, (A, B) in pairs.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = A.to(dtype)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = B.to(dtype)
    for name in drop:
        del tensors[PREFIX + name]
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    ranks = {name: A.shape[0] for name, (A, _) in pairs.items()}
    settings = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": BASE,
        "r": max(ranks.values()),
        "lora_alpha": alpha,
        "rank_pattern": {} if len(set(ranks.values())) == 1 else ranks,
        "target_modules": sorted(shapes),
        "modules_to_save": [HEAD] if saved else None,
    }
    (path / CONFIG).write_text(json.dumps(settings | (config or {})))
    if labels is not None:
        (path / "labels.json").write_text(json.dumps(labels))
    return path


def edited(folder, /, **changes):
    """The folder with other settings in its adapter_config.json; ... removes one."""
    edited_json(folder / CONFIG, **changes)
    return folder


def head(rows, seed, width=16, dtype=torch.float32, bias=True):
    """Tensors of a linear classification head."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator).to(dtype)
    values = {f"{HEAD}.weight": weight}
    return values | {f"{HEAD}.bias": torch.randn(rows, generator=generator).to(dtype)} if bias else values


def dense(path):
    """{module: alpha/r·BA or alpha/√r·BA} in float64, straight from the file."""
    config, tensors = json.loads((Path(path) / CONFIG).read_text()), load_file(Path(path) / WEIGHTS)
    patterns = config.get("alpha_pattern") or {}
    alphas = {key.removeprefix("^").replace("\\", ""): value for key, value in patterns.items()}  # plain names
    updates = {}
    for key, B in tensors.items():
        if not key.endswith(".lora_B.weight"):
            continue
        module = key.removeprefix(PREFIX).removesuffix(".lora_B.weight")
        A = tensors[f"{PREFIX}{module}.lora_A.weight"]
        alpha = alphas.get(module, config["lora_alpha"])
        rank = A.shape[0]
        updates[module] = (B.double() @ A.double()) * alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return updates


def saved_tensors(path):
    """{name without prefix: tensor} of everything that is not a LoRA factor."""
    tensors = load_file(Path(path) / WEIGHTS)
    return {key.removeprefix(PREFIX): value for key, value in tensors.items() if ".lora_" not in key}


def distance(found, expected):
    """‖found − expected‖/‖expected‖."""
    return float(torch.linalg.norm(found.double() - expected) / torch.linalg.norm(expected))


def assert_same(found, expected, tolerance=1e-6):
    """Both {module: matrix} agree to a relative Frobenius error."""
    assert set(found) == set(expected)
    for name, matrix in expected.items():
        assert distance(found[name], matrix) <= tolerance, name


def tree(folder):
    """{relative path: bytes, or None for a folder} of everything below a folder, hidden names too."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def refused(folder, message, *given, **arguments):
    """What merge_adapters refuses with: one line that matches `message`; nothing in the folder changes."""
    before = tree(folder)
    found = refusal(merge_adapters, *given, **arguments)
    assert re.search(message, found), found
    assert tree(folder) == before
    return found


def low_rank(matrix):
    """A dense matrix as a LowRank of full rank."""
    return LowRank(matrix, torch.eye(matrix.shape[1], dtype=matrix.dtype))


def curvature_sums(kind, deltas, starts, seed=7, scale=1.0):
    """(Curvature over the tasks, [H of each task]) with random H; task i starts at starts[i] and moves by deltas[i].

    H is elementwise (out, in) for `fisher`, (in, in) for `gram`, and positive.
    """
    generator = torch.Generator().manual_seed(seed)
    sums: Curvature | None = None
    measured = []
    for delta, start in zip(deltas, starts, strict=True):
        H = {}
        for name, matrix in delta.items():
            m, n = matrix.shape
            x = torch.randn(3 * n if kind == "gram" else m, n, generator=generator, dtype=torch.float64)
            H[name] = scale * (x.T @ x / len(x) if kind == "gram" else x.square())
        optimum = {name: low_rank(start.get(name, 0) + matrix) for name, matrix in delta.items()}
        moves = {name: low_rank(matrix) for name, matrix in delta.items()}
        sums = accumulate(H, optimum, moves, CurvatureSpec(kind=kind), 8, previous=sums)
        measured.append(H)
    return sums, measured


def times(kind, H, X):
    """H·X, elementwise or from the right."""
    return H * X if kind == "fisher" else X @ H


@contextmanager
def peft_quiet():
    """PEFT's use of a name that transformers renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield
