"""PEFT adapter folders: read and check, one module at a time.

It needs neither PEFT nor the base model: an adapter is `adapter_config.json`, `adapter_model.safetensors` and, when it
carries a classification head, `labels.json` ({head module: [label, …] in row order; of several rows of one label the
largest logit decides).
"""

import hashlib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pm_hf.errors import InputError, raise_all
from pm_hf.files import read_json
from pm_hf.layouts import CONFIG, Layout, find_layouts
from pm_hf.merging.lowrank import LowRank
from pm_hf.refusals import config_problems, peft_type, type_problems

WEIGHTS, LABELS = "adapter_model.safetensors", "labels.json"
REPORT = "merge_report.json"
FILES = (CONFIG, WEIGHTS, LABELS, REPORT)  # all that an adapter folder of ours needs
PREFIX = "base_model.model."

# modules whose base weights PEFT saves beside LoRA when the vocabulary was resized or the embedding is adapted
EMBEDDINGS = (
    *("embed_tokens", "lm_head", "wte", "wpe", "word_embeddings", "tok_embeddings", "token_embd", "shared"),
    *("embed_in", "embed_out", "embeddings", "output", "decoder"),
)


@dataclass(frozen=True)
class Adapter:
    """A checked LoRA adapter folder. Tensors are read when asked for, one module at a time.

    layouts: {module: how its update is stored}. saved: names of the other tensors, absolute values and not updates:
    those of `modules_to_save`, and copies of base embeddings (`base_copies`). labels: {head module: [label, …]} of
    `labels.json`.
    """

    path: Path
    config: dict
    layouts: dict[str, Layout]
    saved: tuple[str, ...]
    labels: dict[str, list[str]] = field(default_factory=dict)

    @property
    def scaling(self) -> dict[str, float]:
        """{module: s} of the update s·B@A."""
        return {module: layout.scaling for module, layout in self.layouts.items()}

    def digest(self) -> str:
        """SHA-256 of the weights file, first 16 hexadecimal digits."""
        with open(self.path / WEIGHTS, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()[:16]

    @property
    def base_copies(self) -> tuple[str, ...]:
        """Saved tensors that no entry of `modules_to_save` names: weights of the base that PEFT wrote along."""
        roots = self.config.get("modules_to_save") or []
        return tuple(name for name in self.saved if not any(under(name, root) for root in roots))

    def read(self, module: str, *, bias: bool = False) -> list[LowRank]:
        """The matrices of a module's update, see Layout.read; InputError when a value is not finite."""
        return self.layouts[module].read(module, self._get, bias=bias)

    def product(self, module: str) -> LowRank:
        """s·B@A of a module whose update is one matrix; InputError for a fused or grouped one or one with a bias."""
        layout = self.layouts[module]
        if layout.count > 1 or layout.bias:
            what = "has a LoRA bias" if layout.bias else f"is {layout.count} matrices in one"
            raise InputError(
                f"adapter {self.path}: {module} {what}, which this cannot use; expected a plain LoRA layer"
            )
        return self.read(module)[0]

    def shape(self, module: str) -> tuple[int, int]:
        """(out, in) of a module's update, without reading it."""
        return self.layouts[module].shape

    def products(self) -> Mapping[str, LowRank]:
        """{module: update}, read again whenever it is asked for."""
        return _Products(self)

    def tensor(self, name: str) -> Tensor:
        """A saved tensor, in its stored dtype."""
        return self._get(name)

    def head_matrix(self, module: str) -> LowRank:
        """[weight | bias] of a saved linear head as (rows, in + 1) (or (rows, in) without a bias), float32."""
        weight = self.tensor(f"{module}.weight").float()
        if f"{module}.bias" in self.saved:
            weight = torch.cat([weight, self.tensor(f"{module}.bias").float()[:, None]], dim=1)
        return LowRank(weight, torch.eye(weight.shape[1]))

    def _get(self, name: str) -> Tensor:
        """One finite tensor; the file is opened once, and replacing the folder does not change what is read."""
        tensor = self._handle.get_tensor(PREFIX + name)
        if not is_finite(tensor):
            raise InputError(f"adapter {self.path}: {name} holds NaN or infinite values; the training diverged")
        return tensor

    @cached_property
    def _handle(self) -> Any:
        return safe_open(self.path / WEIGHTS, "pt")


class _Products(Mapping[str, LowRank]):
    """Lazy {module: update} of an adapter."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter

    def __getitem__(self, module: str) -> LowRank:
        return self._adapter.product(module)

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapter.layouts)

    def __len__(self) -> int:
        return len(self._adapter.layouts)


def open_adapter(path: str | os.PathLike) -> Adapter:
    """Read and check an adapter folder; one InputError that lists every problem."""
    path = Path(path)
    config = _config(path)
    problems = config_problems(config)
    problems = problems or [f"{CONFIG} {problem}" for problem in type_problems(config)]
    raise_all(problems, f"adapter {path}")
    shapes = _shapes(path / WEIGHTS)
    if peft_type(config) != "ADALORA":  # which prunes modules to rank 0
        problems += [f"{n} is empty; gather the shards before saving" for n, shape in shapes.items() if 0 in shape][:1]
    if compiled := [name for name in shapes if "_orig_mod." in name]:
        problems.append(f"{compiled[0]} comes from a compiled model; save the model that torch.compile was given")
    layouts, saved = find_layouts(config, shapes, problems)
    problems += _target_problems(config, layouts) + _bias_problems(config, layouts)
    labels = read_json(path / LABELS) if (path / LABELS).is_file() else {}
    if not isinstance(labels, dict) or not all(_are_labels(names) for names in labels.values()):
        raise InputError(f"adapter {path}: {LABELS} must hold {{head module: [label, …]}}, labels texts or numbers")
    problems += _label_problems(labels, shapes)
    adapter = Adapter(path, config, layouts, tuple(saved), labels)
    strange = [name for name in adapter.base_copies if name.split(".")[-2:-1] not in [[e] for e in EMBEDDINGS]]
    strange = [name for name in strange if ".base_layer." not in name]
    if strange:
        problems.append(f"tensor {strange[0]} is neither LoRA nor in modules_to_save; save the adapter again with PEFT")
    raise_all(problems, f"adapter {path}")
    return adapter


def base_name(config: Mapping) -> str:
    """Name of the base model; for a model inside an installed package without the environment's own path."""
    return str(config.get("base_model_name_or_path")).rpartition("site-packages/")[2]


def folded_tasks(adapter: Adapter) -> int:
    """Number of tasks in a merged adapter, from its merge_report.json; 1 for an adapter that is no merge."""
    tasks: int = merge_record(adapter)["tasks"]
    return tasks


def measured_tasks(adapter: Adapter) -> int:
    """Number of its tasks that the running curvature covers: all, unless a past was left unmeasured."""
    record = merge_record(adapter)
    measured: int = record["tasks"] if record.get("measured") is None else record["measured"]
    return measured


def merge_record(adapter: Adapter) -> dict:
    """What merge_report.json says of an adapter's past: at least `tasks`; InputError when it makes no sense."""
    path = adapter.path / REPORT
    record = read_json(path) if path.is_file() else {"tasks": 1}
    tasks, measured = (record.get("tasks"), record.get("measured")) if isinstance(record, dict) else (None, None)
    if type(tasks) is not int or tasks < 1 or not (measured is None or (type(measured) is int and measured >= 0)):
        raise InputError(
            f"{path} is no report of a merge: expected tasks ≥ 1 and measured ≥ 0, found {tasks} and {measured}; "
            "merge again, or remove the file"
        )
    return record


def is_finite(tensor: Tensor) -> bool:
    """Whether every value is finite; looked at one by one only where the sum is not, or overflows."""
    return math.isfinite(tensor.sum(dtype=torch.float32).item()) or bool(torch.isfinite(tensor).all())


def under(name: str, root: str) -> bool:
    """Whether a tensor belongs to a module that PEFT saves for this entry: one whose name ends with it."""
    return f"{root}." in name


def _config(path: Path) -> dict:
    """The configuration; InputError when a file is missing or broken."""
    if not path.is_dir():
        raise InputError(f"adapter {path} is not a folder")
    if not (path / CONFIG).is_file():
        raise InputError(f"adapter {path} has no {CONFIG}; expected a folder that PEFT's save_pretrained wrote")
    if not (path / WEIGHTS).is_file():
        pickled = [file.name for file in path.glob("*.bin")] + [file.name for file in path.glob("*.pt")]
        way_out = f"found {pickled}; pickles are never loaded, save it again as safetensors" if pickled else "not found"
        raise InputError(f"adapter {path}: expected {WEIGHTS}, {way_out}")
    config = read_json(path / CONFIG)
    if not isinstance(config, dict):
        raise InputError(f"adapter {path}: {CONFIG} holds a {type(config).__name__}, expected settings by name")
    return config


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """{tensor name without PEFT's prefix: shape}."""
    try:
        with safe_open(path, "pt") as handle:
            names = list(handle.keys())
            shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a whole safetensors file ({error}); copy or save the adapter again") from error
    if odd := sorted(name for name in names if not name.startswith(PREFIX)):
        raise InputError(f"{path}: expected tensor names that start with {PREFIX}, found {odd[0]}; save it with PEFT")
    return {name.removeprefix(PREFIX): shape for name, shape in shapes.items()}


def _target_problems(config: Mapping, layouts: Mapping[str, Layout]) -> list[str]:
    """Modules in the weights that the configuration does not target: PEFT would leave them out without a word."""
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    if config.get("ensure_weight_tying"):  # which adds modules by itself
        return []
    modules = [module for module, layout in layouts.items() if layout.kind != "fused"]
    every = targets is None or targets == "all-linear"
    outside = [
        module
        for module in modules
        if not (every or _named(module, targets or ()))
        or (excluded and _named(module, excluded))
        or not _in_layers(module, config)
    ]
    return [f"{len(outside)} modules are not in target_modules of {CONFIG}, first {outside[0]}"] if outside else []


def _named(module: str, names: str | Sequence[str]) -> bool:
    """PEFT's match of target_modules and exclude_modules: an expression for the whole name, or ends of it."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _in_layers(module: str, config: Mapping) -> bool:
    """PEFT's match of layers_to_transform: the number after a layers_pattern, or after any name, in the module."""
    wanted, patterns = config.get("layers_to_transform"), config.get("layers_pattern")
    if wanted is None or wanted == []:
        return True
    patterns = [patterns] if isinstance(patterns, str) else patterns or [r"[^.]*"]
    found = next((match for p in patterns if (match := re.match(rf"(?:.*?\.)?{p}\.(\d+)\.", module))), None)
    return found is None or int(found[1]) in ([wanted] if isinstance(wanted, int) else wanted)


def _bias_problems(config: Mapping, layouts: Mapping[str, Layout]) -> list[str]:
    wanted = bool(config.get("lora_bias"))
    odd = [m for m, layout in layouts.items() if layout.kind in ("linear", "conv") and layout.bias != wanted]
    there = "lacks its lora_B.bias" if wanted else "has a lora_B.bias"
    return [f"{CONFIG} says lora_bias {wanted}, but {odd[0]} {there}"] if odd else []


def _are_labels(names: object) -> bool:
    return isinstance(names, list) and all(isinstance(name, str | int | float) for name in names)


def _label_problems(labels: Mapping[str, list], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    problems = []
    for head, names in labels.items():
        rows = shapes.get(f"{head}.weight", (0,))[0]
        if rows != len(names):
            problems.append(f"{LABELS} names {len(names)} labels for {head}, which has {rows} rows")
    return problems
