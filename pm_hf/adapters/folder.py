"""PEFT adapter folders: read and check, one module at a time.

It needs neither PEFT nor the base model: an adapter is `adapter_config.json`, `adapter_model.safetensors` and, when it
carries a classification head, `labels.json` ({head module: [label, …] in row order; of several rows of one label the
largest logit decides; null: its rows are the same in every adapter, as hidden units of one start are}).
"""

import hashlib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from pm_hf.adapters.checks import (
    ADALORA_SETTINGS,
    are_labels,
    bias_problems,
    config_problems,
    label_problems,
    label_text,
    target_problems,
    type_problems,
)
from pm_hf.adapters.layout import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CARD_FILE,
    LABELS_FILE,
    MERGE_REPORT,
    PEFT_PREFIX,
    Layout,
    find_layouts,
    peft_type,
)
from pm_hf.adapters.names import is_own_class, plain_path, read_names
from pm_hf.errors import InputError, raise_all
from pm_hf.files import new_folder, read_json, save_tensors, write_json
from pm_hf.merging.lowrank import LowRank, weighted_sum

# modules whose base weights PEFT saves beside LoRA when the vocabulary was resized or the embedding is adapted
EMBEDDINGS = (
    *("embed_tokens", "lm_head", "wte", "wpe", "word_embeddings", "tok_embeddings", "token_embd", "shared"),
    *("embed_in", "embed_out", "embeddings", "output", "decoder"),
)


SHOWN = 5  # folders that a message names


NO_WEIGHTS = {"BOOL": "true or false", "C64": "complex", "C128": "complex"}  # dtypes that no factor has


@dataclass(frozen=True)
class Adapter:
    """A checked LoRA adapter folder. Tensors are read when asked for, one module at a time.

    layouts: {module: how its update is stored}. saved: names of the other tensors, absolute values and not updates:
    those of `modules_to_save`, and copies of base embeddings (`base_copies`). rows: {head module: [label, …] or None}
    as in labels.json. Modules and tensors go by their plain names, whatever wrapped the model that wrote the
    file; stored: {tensor: its name in the file}.
    """

    path: Path
    config: dict
    layouts: dict[str, Layout]
    saved: tuple[str, ...]
    rows: Mapping[str, Sequence | None] = field(default_factory=dict)
    stored: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def labels(self) -> dict[str, list[str]]:
        """{head module: [label, …]}, labels as texts."""
        return {head: [label_text(name) for name in names] for head, names in self.rows.items() if names is not None}

    @property
    def in_order(self) -> tuple[str, ...]:
        """Modules that labels.json names with null, whose rows are the same in every adapter."""
        return tuple(sorted(head for head, names in self.rows.items() if names is None))

    @property
    def scaling(self) -> dict[str, float]:
        """{module: s} of the update s·B@A."""
        return {module: layout.scaling for module, layout in self.layouts.items()}

    def digest(self) -> str:
        """SHA-256 of the weights file, first 16 hexadecimal digits."""
        with open(self.path / ADAPTER_WEIGHTS, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()[:16]

    @cached_property
    def base_copies(self) -> tuple[str, ...]:
        """Saved tensors that no entry of `modules_to_save` names: weights of the base that PEFT wrote along."""
        roots = self.config.get("modules_to_save") or []
        return tuple(name for name in self.saved if not any(is_under(name, root) for root in roots))

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

    def stored_name(self, name: str) -> str:
        """What the file calls a tensor."""
        return self.stored.get(name, PEFT_PREFIX + name)

    def saved_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a saved tensor, without reading it."""
        return tuple(self._handle.get_slice(self.stored_name(name)).get_shape())

    def head_matrix(self, module: str) -> LowRank:
        """[weight | bias] of a saved linear head as (rows, in + 1) (or (rows, in) without a bias), float32."""
        bias = self.tensor(f"{module}.bias") if f"{module}.bias" in self.saved else None
        matrix = join_bias(self.tensor(f"{module}.weight"), bias)
        return LowRank(matrix, torch.eye(matrix.shape[1]))

    def _get(self, name: str) -> Tensor:
        """One finite tensor; the file is opened once, and replacing the folder does not change what is read."""
        tensor = self._handle.get_tensor(self.stored_name(name))
        if not is_finite(tensor):
            raise InputError(f"adapter {self.path}: {name} holds NaN or infinite values; the training diverged")
        return tensor

    @cached_property
    def _handle(self) -> Any:
        return safe_open(self.path / ADAPTER_WEIGHTS, "pt")


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
    config = _read_config(path)
    problems = config_problems(config)
    problems = problems or [f"{ADAPTER_CONFIG} {problem}" for problem in type_problems(config)]
    raise_all(problems, f"adapter {path}")
    header = _read_header(path / ADAPTER_WEIGHTS)
    names, own = read_names(header, config), is_own_class(config)
    raise_all(names.problems, f"adapter {path}")
    shapes = {name: header[full][0] for name, full in names.stored.items()}
    if peft_type(config) != "ADALORA":  # which prunes modules to rank 0
        problems += [f"{n} is empty; gather the shards before saving" for n, shape in shapes.items() if 0 in shape][:1]
    layouts, saved = find_layouts(config, shapes, problems, names.called)
    factors = {name: header[full][1] for name, full in names.stored.items() if name not in saved}
    problems += [
        f"{name} holds {NO_WEIGHTS[dtype]} values, expected real numbers; save the adapter again with PEFT"
        for name, dtype in factors.items()
        if dtype in NO_WEIGHTS
    ][:1]
    problems += target_problems(config, layouts, names.called) + bias_problems(config, layouts)
    for key in ("modules_to_save", "target_parameters"):
        if config.get(key):
            config[key] = [plain_path(name, own) for name in config[key]]
    labels = read_json(path / LABELS_FILE) if (path / LABELS_FILE).is_file() else {}
    if not isinstance(labels, dict) or not all(are_labels(names) for names in labels.values()):
        problems.append(
            f"{LABELS_FILE} must hold {{head module: [label, …]}}, labels texts or numbers; null for a module whose "
            "rows are the same in every adapter"
        )
        labels = {}
    labels = {plain_path(head, own): rows for head, rows in labels.items()}
    problems += label_problems(labels, shapes)
    adapter = Adapter(path, config, layouts, tuple(saved), labels, names.stored)
    strange = [
        name
        for name in adapter.base_copies
        if name.rpartition(".")[0].rpartition(".")[2] not in EMBEDDINGS and ".base_layer." not in name
    ]
    if strange:
        problems.append(f"tensor {strange[0]} is neither LoRA nor in modules_to_save; save the adapter again with PEFT")
    raise_all(problems, f"adapter {path}")
    return adapter


def base_name(config: Mapping) -> str:
    """What tells base models apart: the real path of a folder that exists, a repository's name for its snapshot in the
    Hub's cache, the place inside an installed package without the environment's own path; else the name as it stands
    without `hf://`, `./` and a last `/`."""
    name = str(config.get("base_model_name_or_path"))
    package = name.rpartition("site-packages/")
    cached = re.search(r"models--([^/]+)/snapshots/", name)
    if package[1]:
        name = package[2]
    elif cached:
        name = cached[1].replace("--", "/", 1)
    elif "\0" not in name and os.path.isdir(folder := os.path.expanduser(name)):
        name = os.path.realpath(folder)
    return os.path.normpath(name.removeprefix("hf://").removeprefix("models/") if "hf://" in name else name)


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
    path = adapter.path / MERGE_REPORT
    record = read_json(path) if path.is_file() else {"tasks": 1}
    tasks, measured = (record.get("tasks"), record.get("measured")) if isinstance(record, dict) else (None, None)
    if not (_is_count(tasks, 1) and (measured is None or (_is_count(measured, 0) and measured <= tasks))):
        raise InputError(
            f"{path} is no report of a merge: expected tasks ≥ 1 and measured from 0 to tasks, found {tasks} and "
            f"{measured}; merge again, or remove the file"
        )
    return record


def _is_count(value: object, least: int) -> TypeGuard[int]:
    return type(value) is int and value >= least


def join_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    """[weight | bias], (rows, in + 1), or the weight (rows, in) alone without a bias; float32."""
    weight = weight.float()
    return weight if bias is None else torch.cat([weight, bias.float()[:, None]], dim=1)


def is_finite(tensor: Tensor) -> bool:
    """Whether every value is finite; looked at one by one only where the sum is not, or overflows."""
    return math.isfinite(tensor.sum(dtype=torch.float32).item()) or bool(torch.isfinite(tensor).all())


def is_under(name: str, root: str) -> bool:
    """Whether a tensor belongs to a module that PEFT saves for this entry: one whose name ends with it."""
    return f"{root}." in name


def _read_config(path: Path) -> dict:
    """The configuration; InputError when a file is missing or broken."""
    if not path.is_dir():
        raise InputError(f"adapter {path} is not a folder")
    if not (path / ADAPTER_CONFIG).is_file():
        raise InputError(f"adapter {path} has no {ADAPTER_CONFIG}; {_instead(path)}")
    if not (path / ADAPTER_WEIGHTS).is_file():
        pickled = [file.name for file in path.glob("*.bin")] + [file.name for file in path.glob("*.pt")]
        way_out = f"found {pickled}; pickles are never loaded, save it again as safetensors" if pickled else "not found"
        raise InputError(f"adapter {path}: expected {ADAPTER_WEIGHTS}, {way_out}")
    config = read_json(path / ADAPTER_CONFIG)
    if not isinstance(config, dict):
        raise InputError(f"adapter {path}: {ADAPTER_CONFIG} holds a {type(config).__name__}, expected settings by name")
    return config


def _instead(path: Path) -> str:
    """What a folder without an adapter_config.json is, and the way out."""
    below = sorted(
        {file.parent.relative_to(path) for depth in ("*", "*/*") for file in path.glob(f"{depth}/{ADAPTER_CONFIG}")}
    )
    if below:
        more = f" and {len(below) - SHOWN} more" if len(below) > SHOWN else ""
        names = ", ".join(map(str, below[:SHOWN]))
        return (
            f"it has adapters in {names}{more}: give {path / below[0] if len(below) == 1 else 'one of these folders'}"
        )
    if (path / "config.json").is_file():
        return "it holds a whole model; expected a LoRA adapter that PEFT's save_pretrained wrote"
    return "expected a folder that PEFT's save_pretrained wrote"


def _read_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """{tensor name in the file: (shape, dtype as safetensors writes it)}."""
    try:
        with safe_open(path, "pt") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a whole safetensors file ({error}); copy or save the adapter again") from error


@dataclass(frozen=True)
class Update:
    """The merged update of one module: how it is stored and its matrices, in the dtype to be written."""

    layout: Layout
    matrices: Sequence[LowRank]
    bias: bool = False

    @property
    def rank(self) -> int:
        """Largest rank of its weight matrices."""
        return max(matrix.rank for matrix in self.matrices[: self.layout.count])


def write_adapter(
    path: Path,
    template: Mapping,
    updates: dict[str, Update],
    saved: Mapping[str, Tensor],
    labels: Mapping[str, list[str] | None],
    *,
    ambiguous: bool = False,
    overwrite: bool = False,
    extra: Mapping[str, object] | None = None,
) -> None:
    """Write a plain PEFT adapter (lora_alpha = r, scaling 1), read it back, compare, then let it take its name.

    template: an adapter_config.json whose other fields are kept. ambiguous: the ends of the modules' names may match
    other modules of the base too, so target_modules is written as an expression for the whole names. updates:
    {module: Update}, emptied while it is written so that each matrix is in memory once. A README.md in the old folder
    is kept. extra: further files {name: content in bytes, or a value to be written as JSON}.
    InputError when `path` exists and `overwrite` is False; whatever was there stays whole until the new folder has
    been checked.
    """
    fused = [module for module, update in updates.items() if update.layout.kind == "fused"]
    # PEFT's rank_pattern cannot tell the parameters of one module apart, so all fused ones share `r`
    shared = max((updates[module].rank for module in fused), default=0)
    ranks = {module: shared if module in fused else update.rank for module, update in updates.items()}
    config = _merged_config(template, updates, ranks, saved, ambiguous)
    modules = set(updates)
    tensors = {PEFT_PREFIX + name: tensor.contiguous().clone() for name, tensor in saved.items()}
    for module in sorted(modules):
        update = updates.pop(module)
        stored = update.layout.write(module, update.matrices, ranks[module], update.bias)
        tensors |= {PEFT_PREFIX + name: tensor for name, tensor in stored.items()}
    with new_folder(path, overwrite=overwrite) as folder:
        _write(folder, config, tensors, labels)
        for name, value in (extra or {}).items():
            (folder / name).write_bytes(value) if isinstance(value, bytes) else write_json(folder / name, value)
        if (path / CARD_FILE).is_file():  # perhaps written by hand
            (folder / CARD_FILE).write_bytes((path / CARD_FILE).read_bytes())
        _compare(folder, modules, tensors)


def save_adapter(
    path: Path,
    config: Mapping,
    factors: dict[str, Tensor],
    saved: dict[str, Tensor],
    labels: Mapping[str, list[str]],
) -> None:
    """Write an adapter as it was trained: lora_A and lora_B as they are, `config` its PEFT configuration.

    RuntimeError when a tensor has no entries: a process of a sharded training that holds none of them.
    """
    empty = [name for name, value in (factors | saved).items() if not value.numel()]
    if empty:
        raise RuntimeError(
            f"{path}: {len(empty)} of {len(factors) + len(saved)} tensors are empty, first {empty[0]}; their weights "
            "are spread over the processes (ZeRO-3, FSDP): gather them before they are saved"
        )
    tensors = {PEFT_PREFIX + name: tensor.contiguous() for name, tensor in (factors | saved).items()}
    with new_folder(path, overwrite=True) as folder:
        _write(folder, config, tensors, labels)
        open_adapter(folder)


def replace_head(path: Path, head: str, weight: Tensor, bias: Tensor, labels: Sequence[str]) -> None:
    """Write other rows, and their labels, for a linear head into an adapter folder; else it stays byte for byte."""
    adapter = open_adapter(path)
    tensors = load_file(path / ADAPTER_WEIGHTS)
    for name, value in ((adapter.stored_name(f"{head}.{part}"), v) for part, v in (("weight", weight), ("bias", bias))):
        expected = (len(labels), *tensors[name].shape[1:])
        if tuple(value.shape) != expected:
            raise InputError(f"{path}: {name} needs shape {expected}, found {tuple(value.shape)}")
        tensors[name] = value.to(tensors[name].dtype).contiguous().clone()
    others = [file for file in path.iterdir() if file.name != ADAPTER_WEIGHTS]
    with new_folder(path, overwrite=True) as folder:
        save_tensors(tensors, folder / ADAPTER_WEIGHTS, {"format": "pt"})
        for file in others:
            (folder / file.name).write_bytes(file.read_bytes())
        if adapter.labels.get(head) != list(labels):
            write_json(folder / LABELS_FILE, dict.fromkeys(adapter.in_order) | adapter.labels | {head: list(labels)})
        if open_adapter(folder).layouts != adapter.layouts:
            raise RuntimeError(f"{path}: the rewritten adapter does not read back as it was written")


def scale_adapter(path: Path, output: Path, factor: float) -> None:
    """Write the adapter with every update s·BA times `factor`, into B; all else stays, values held whole included.

    A folder at `output` is replaced.
    """
    adapter = open_adapter(path)
    tensors = load_file(path / ADAPTER_WEIGHTS)
    for module, layout in adapter.layouts.items():
        bias = [f"{module}.lora_B.bias"] * layout.bias
        for name in (layout.tensors(module)[1], *bias):
            stored = adapter.stored_name(name)
            tensors[stored] = tensors[stored] * factor
    with new_folder(output, overwrite=True) as folder:
        save_tensors(tensors, folder / ADAPTER_WEIGHTS, {"format": "pt"})
        for file in path.iterdir():
            if file.name != ADAPTER_WEIGHTS:
                (folder / file.name).write_bytes(file.read_bytes())
        if open_adapter(folder).layouts != adapter.layouts:
            raise RuntimeError(f"{output}: the scaled adapter does not read back as it was written")


def cast_error(product: LowRank, dtype: torch.dtype) -> float:
    """Relative Frobenius error ‖BA − stored‖/‖BA‖ of storing the factors in `dtype`; 0 when they keep their dtype."""
    if dtype == product.A.dtype:
        return 0.0
    difference = weighted_sum([product.to(torch.float64), product.to(dtype).to(torch.float64)], [1, -1])
    return difference.norm() / max(product.norm(), torch.finfo(torch.float64).tiny)


def _write(
    folder: Path, config: Mapping, tensors: Mapping[str, Tensor], labels: Mapping[str, list[str] | None]
) -> None:
    save_tensors(dict(tensors), folder / ADAPTER_WEIGHTS, {"format": "pt"})
    write_json(folder / ADAPTER_CONFIG, config)
    if labels:
        write_json(folder / LABELS_FILE, labels)


def _merged_config(
    template: Mapping,
    updates: Mapping[str, Update],
    ranks: Mapping[str, int],
    saved: Mapping[str, Tensor],
    ambiguous: bool,
) -> dict:
    plain = sorted(module for module, update in updates.items() if update.layout.kind != "fused")
    stored = {module: updates[module].layout.stored_rank(rank) for module, rank in ranks.items()}
    fused = [rank for module, rank in stored.items() if module not in plain]
    rank = fused[0] if fused else max(stored.values())
    # anchored: PEFT matches the end of a name, so that "fc" would also mean "block.fc"
    odd = {f"^{re.escape(module)}": stored[module] for module in plain if stored[module] != rank}
    full = "|".join(re.escape(module) for module in plain)
    roots = [root for root in template.get("modules_to_save") or [] if any(is_under(name, root) for name in saved)]
    ambiguous = ambiguous or any("." not in module for module in plain)
    kept = {key: value for key, value in template.items() if key not in ADALORA_SETTINGS}
    return kept | {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": odd,
        "alpha_pattern": odd,
        "use_rslora": False,
        "lora_bias": any(update.bias for update in updates.values()),
        "init_lora_weights": True,
        **{key: None for key in ("eva_config", "corda_config", "lora_ga_config") if template.get(key)},
        "target_modules": full if ambiguous and plain else plain,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": roots or None,
        "inference_mode": True,
    }


def _compare(folder: Path, modules: set[str], tensors: Mapping[str, Tensor]) -> None:
    """Read the new folder back; RuntimeError unless it holds exactly what was to be written."""
    written = open_adapter(folder)
    same = set(written.layouts) == modules and all(scaling == 1 for scaling in written.scaling.values())
    with safe_open(folder / ADAPTER_WEIGHTS, "pt") as handle:
        same = same and set(handle.keys()) == set(tensors)
        same = same and all(torch.equal(handle.get_tensor(name), tensor) for name, tensor in tensors.items())
    if not same:
        raise RuntimeError(f"{folder}: the adapter does not read back as it was written; the old one is untouched")
