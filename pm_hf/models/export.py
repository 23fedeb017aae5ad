"""A base model with an adapter merged into its weights, as a checkpoint that needs neither PEFT nor pm_hf.

No model is built with weights: names and shapes come from the class on the meta device, values from the base's files,
so that one shard is in memory at a time.
"""

import copy
import os
import re
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from pm_hf.adapters.architecture import ModelNames, model_names, model_source
from pm_hf.adapters.download import adapter_folder, base_folder
from pm_hf.adapters.folder import Adapter, is_finite, open_adapter
from pm_hf.adapters.layout import TOKENIZER_FILES
from pm_hf.environment import PeakMemory
from pm_hf.errors import InputError, raise_all
from pm_hf.files import free_space_problem, new_folder, output_problems, read_json, save_tensors, write_json
from pm_hf.merging.lowrank import LowRank, row_slices
from pm_hf.models.contexts import quiet
from pm_hf.models.loading import has_tokenizer, head_name, resolve_base
from pm_hf.models.released import fit_vocabulary, saved_values

SHARD_BYTES = 2**30  # of the checkpoint that is written
ROWS_AT_ONCE = 2**24  # values that are summed at once in float32
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
OTHER_FILES = ("generation_config.json", "LICENSE", *PROCESSOR_FILES)
WANTED = (WEIGHTS, "model-*.safetensors", INDEX, "config.json", *OTHER_FILES, *TOKENIZER_FILES)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
MERGED_BY_PEFT = "merge it in memory: PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(…)"
NAMED = 3  # tensors that a message names


@dataclass(frozen=True)
class ExportReport:
    """What was written. model_class: the class of transformers that loads it. rounding: {updated weight: ‖stored −
    exact‖/‖ΔW‖, the part of its update that the one cast to the storage dtype loses}. left_out: tensors of the base's
    files that the class does not have. untied: output embeddings that have weights of their own now."""

    folder: Path
    model_class: str
    shards: int
    rounding: dict[str, float]
    left_out: list[str]
    untied: list[str]
    seconds: float
    start_memory_mb: float | None
    peak_memory_mb: float | None


@dataclass(frozen=True)
class _Stored:
    """A tensor of the base's files; dtype: None where it is not one of floating point."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None


@dataclass(frozen=True)
class _Entry:
    """A tensor to be written. place: its name in the model. key: in the base's files. saved: in the adapter, whose
    value goes before the base's. module: of the adapter, whose update it gets. dtype: None as it is stored."""

    name: str
    place: str
    key: str | None
    saved: str | None
    module: str | None
    dtype: torch.dtype | None
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * (8 if self.dtype is None else self.dtype.itemsize)


def export_model(
    adapter: str | os.PathLike,
    output: str | os.PathLike,
    *,
    base: str | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> ExportReport:
    """Write W + s·B@A for every adapted weight, the adapter's saved modules, and all else of the base as it is, with
    config (labels, sizes), tokenizer and processor: `AutoModelFor….from_pretrained(output)` loads it.

    Sums are made in float32 and cast once. adapter: folder or Hub id of a merged adapter; a task's own Δ alone is no
    model. base, revision: by default those of its adapter_config.json; the base is read as safetensors, and GGUF files,
    pickles and quantised weights are refused. dtype: float32 (fp32), bfloat16 (bf16) or float16 (fp16) for all floating
    tensors; None keeps the dtype that each has in the base. Tables of tokens that the adapter changes apart are untied.
    shard_bytes: size of a file; about twice as much memory is needed. Raises InputError with everything that does not
    fit, before anything is written.
    """
    began, target = time.perf_counter(), Path(output)
    kind = SHORT.get(dtype or "", dtype)
    if kind is not None and kind not in DTYPES:
        raise InputError(f"dtype: expected one of {', '.join((*DTYPES, *SHORT))}, found {dtype}")
    raise_all(output_problems(target, overwrite=overwrite), "export")
    with PeakMemory() as memory:
        opened = open_adapter(adapter_folder(adapter))
        checkpoint = _Checkpoint.read(base, revision, opened)
        plan = _Plan(opened, checkpoint, None if kind is None else DTYPES[kind])
        if problem := free_space_problem(target, sum(entry.bytes for entry in plan.entries)):
            raise InputError(problem)
        shards = _shards(plan.entries, shard_bytes)
        with new_folder(target, overwrite=overwrite) as folder:
            rounding = _write_weights(folder, shards, plan)
            plan.model.config.save_pretrained(folder)
            _copy_files(folder, checkpoint.folder, opened.path)
    return ExportReport(
        target,
        type(plan.model).__name__,
        len(shards),
        rounding,
        plan.left_out,
        plan.untied,
        time.perf_counter() - began,
        memory.start_mb,
        memory.peak_mb,
    )


@dataclass(frozen=True)
class _Checkpoint:
    """The base's files: {name: tensor in them}."""

    folder: Path
    tensors: dict[str, _Stored]

    @classmethod
    def read(cls, base: str | None, revision: str | None, adapter: Adapter) -> "_Checkpoint":
        """Their headers; InputError for a base that is no plain checkpoint of safetensors."""
        named = base if base is not None else adapter.config.get("base_model_name_or_path")
        if not isinstance(named, str) or not named:
            raise InputError(f"adapter {adapter.path} names no base model; give it: base (--base)")
        revision = revision if base is not None else revision or adapter.config.get("revision")
        folder = base_folder(resolve_base(named), revision, WANTED)
        if not (folder / "config.json").is_file():
            raise InputError(f"base model {named} has no config.json; give the folder or Hub id of a model")
        config = read_json(folder / "config.json")
        if config.get("quantization_config"):
            raise InputError(f"base model {named} has quantised weights; give the one that it was made from: --base")
        if config.get("auto_map"):
            raise InputError(f"base model {named} has Python code of its own; {MERGED_BY_PEFT}")
        if (folder / INDEX).is_file():
            files = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
        else:
            files = [WEIGHTS]
        if lacking := [name for name in files if not (folder / name).is_file()]:
            others = sorted(path.name for path in chain(folder.glob("*.gguf"), folder.glob("*.bin")))
            gguf = any(name.endswith(".gguf") for name in others)
            way_out = "give the model that the GGUF file was made from: --base" if gguf else "save it as safetensors"
            raise InputError(f"base model {named} has no {lacking[0]}, found {others[:NAMED]}; {way_out}")
        return cls(folder, {name: stored for file in files for name, stored in _header(folder / file).items()})

    @property
    def dtype(self) -> torch.dtype:
        """What most of its values are stored as."""
        sizes: dict[torch.dtype, int] = {}
        for stored in self.tensors.values():
            if stored.dtype is not None:
                sizes[stored.dtype] = sizes.get(stored.dtype, 0) + torch.Size(stored.shape).numel()
        return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


def _header(file: Path) -> dict[str, _Stored]:
    try:
        with safe_open(file, "pt") as handle:
            parts = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            return {
                n: _Stored(file, tuple(part.get_shape()), STORED.get(part.get_dtype())) for n, part in parts.items()
            }
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is not a whole safetensors file ({error}); copy it again") from error


class _Plan:
    """What is to be written, all checked.

    model: on the meta device, with the configuration that is written. entries: in the order of the base's files.
    left_out, untied: see ExportReport.
    """

    def __init__(self, adapter: Adapter, checkpoint: _Checkpoint, dtype: torch.dtype | None) -> None:
        self.adapter, self.checkpoint, self._dtype = adapter, checkpoint, dtype
        names = _model_class(adapter, checkpoint)
        self.model, self._problems = _skeleton(names.model, adapter), list[str]()
        self._modules = self._updated(names)
        values = saved_values(adapter)
        self._own = {place: name for (place, own), name in values.items() if own}
        self._copies = {place: name for (place, own), name in values.items() if not own}
        tied = self.model.all_tied_weights_keys
        self.untied = self._untie()
        self._sources = _Sources(self.model, checkpoint)
        for table, partner in chain(tied.items(), ((source, target) for target, source in tied.items())):
            if partner in self._copies:
                self._copies.setdefault(table, self._copies[partner])
            if partner in self._sources.keys:
                self._sources.keys.setdefault(table, self._sources.keys[partner])
        skipped = set(self.model.all_tied_weights_keys)
        shapes = {name: tuple(value.shape) for name, value in self.model.state_dict().items() if name not in skipped}
        self.entries = [entry for name, shape in shapes.items() for entry in self._entries(name, shape)]
        raise_all(self._problems, f"adapter {adapter.path} does not fit base model {checkpoint.folder}")
        place = {key: number for number, key in enumerate(checkpoint.tensors)}
        self.entries.sort(key=lambda entry: place.get(entry.key or "", len(place)))
        used = {key for keys in self._sources.keys.values() for key in keys}
        self.left_out = sorted(set(checkpoint.tensors) - used)
        self.model.config.architectures = [type(self.model).__name__]
        self.model.config.dtype = dtype or checkpoint.dtype

    def delta(self, entry: _Entry) -> LowRank:
        """The update of a weight as a matrix (rows, the rest), of a bias as (rows, 1); float32."""
        layout = self.adapter.layouts[str(entry.module)]
        *matrices, last = self.adapter.read(str(entry.module), bias=layout.bias)
        if entry.place.endswith(".bias"):
            return last
        matrices += [] if layout.bias else [last]
        if len(matrices) > 1:  # groups of a convolution
            dense = torch.cat([matrix.dense() for matrix in matrices])
            return LowRank(dense, torch.eye(dense.shape[1]))
        owner = self.model.get_submodule(entry.place.rpartition(".")[0])
        turned = layout.kind == "embedding" or isinstance(owner, Conv1D)
        return LowRank(matrices[0].A.T, matrices[0].B.T) if turned else matrices[0]

    def _updated(self, names: ModelNames) -> dict[str, str]:
        """{weight or bias of the model: module of the adapter that updates it}."""
        updated, layers = {}, {re.sub(r"(\.base_layer)+$", "", module): module for module in self.adapter.layouts}
        places = names.renamed(layers) | names.placed(layers)
        state = self.model.state_dict()
        for layer, module in layers.items():
            layout, place = self.adapter.layouts[module], places.get(layer, layer)
            if layout.kind == "fused":
                self._problems.append(f"{module} is a parameter of stacked experts; {MERGED_BY_PEFT}")
            for part in ("weight", "bias")[: 1 + layout.bias]:
                if f"{place}.{part}" in state:
                    updated[f"{place}.{part}"] = module
                elif layout.kind != "fused":
                    self._problems.append(f"{type(self.model).__name__} has no {place}.{part}")
        return updated

    def _untie(self) -> list[str]:
        """Give what the adapter changes apart from its tied partner weights of its own; returns their names."""
        apart = self._apart()
        if not apart:
            return []
        if self.adapter.config.get("ensure_weight_tying"):
            raise InputError(f"adapter {self.adapter.path} ties what it adapts (ensure_weight_tying); {MERGED_BY_PEFT}")
        config = self.model.config
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
        self.model = _skeleton(self.model, self.adapter)
        if still := self._apart():
            named = f"adapter {self.adapter.path}: {still[0]} of {type(self.model).__name__}"
            raise InputError(f"{named} shares its weights with another layer; {MERGED_BY_PEFT}")
        return apart

    def _apart(self) -> list[str]:
        changed = {*self._own, *self._modules}
        return sorted(name for name, partner in self.model.all_tied_weights_keys.items() if changed & {name, partner})

    def _entries(self, name: str, shape: tuple[int, ...]) -> list[_Entry]:
        """How a tensor of the model is written; nothing, and a problem noted, where that is not known."""
        keys, saved = self._sources.keys.get(name, []), self._own.get(name, self._copies.get(name))
        module = self._modules.get(name)
        if name in self._sources.converted:
            if saved is not None or module is not None:
                self._problems.append(f"{name} is computed from other tensors of the base; {MERGED_BY_PEFT}")
            return [self._entry(key, name, key, None, None, self.checkpoint.tensors[key].shape) for key in keys]
        if saved is None and not keys:
            self._problems.append(f"neither the adapter nor the base has {name}")
            return []
        key = keys[-1] if keys else None
        stored = self.checkpoint.tensors[str(key)].shape if saved is None else self.adapter.saved_shape(saved)
        if stored != shape:
            self._problems.append(f"{name} has shape {stored}, expected {shape}")
            return []
        return [self._entry(self._sources.written(name), name, key, saved, module, shape)]

    def _entry(
        self, name: str, place: str, key: str | None, saved: str | None, module: str | None, shape: tuple[int, ...]
    ) -> _Entry:
        stored = None if key is None else self.checkpoint.tensors[key]
        kept = self.checkpoint.dtype if stored is None else stored.dtype
        return _Entry(name, place, key, saved, module, kept and (self._dtype or kept), shape)


class _Sources:
    """Which tensors of the base's files each tensor of the model is made of, by transformers' own rules for loading.

    keys: {name in the model: names in the files}. converted: names whose values are computed when the files are loaded.
    """

    def __init__(self, model: PreTrainedModel, checkpoint: _Checkpoint) -> None:
        self._prefix, self._state = model.base_model_prefix, dict(model.state_dict())
        older = getattr(model, "_checkpoint_conversion_mapping", None)
        table = get_model_conversion_mapping(model, key_mapping=older)
        self._renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in table if isinstance(entry, WeightConverter)]
        self.keys: dict[str, list[str]] = {}
        self.converted: set[str] = set()
        for key in checkpoint.tensors:
            name, pattern = self._named(key)
            if name in self._state:
                self.keys.setdefault(name, []).append(key)
                self.converted |= {name} if pattern is not None else set()

    def written(self, name: str) -> str:
        """What the files call a tensor of the model, with the prefix of a base without a head where theirs lack it."""
        key = self.keys.get(name, [name])[-1]
        within = f"{self._prefix}."
        lacks = name.startswith(within) and not key.startswith(within)
        called = f"{within}{key}" if lacks else key
        return called if self._named(called)[0] == name else name

    def _named(self, key: str) -> tuple[str, str | None]:
        return rename_source_key(key, self._renamings, self._converters, self._prefix, self._state)


def _model_class(adapter: Adapter, checkpoint: _Checkpoint) -> ModelNames:
    """The class that the adapter was trained on; InputError where none of those that the base may be has its layers."""
    source = model_source(adapter.config | {"base_model_name_or_path": str(checkpoint.folder)})
    candidates = model_names(source)
    if not candidates:
        raise InputError(f"base model {checkpoint.folder}: this version of transformers knows no class for it")
    layers = [module for module, layout in adapter.layouts.items() if layout.kind != "fused"]
    lacking = [names.foreign(set(layers) - set(names.placed(layers))) for names in candidates]
    fitting = next((names for names, foreign in zip(candidates, lacking, strict=True) if not foreign), None)
    if fitting is None:
        where = " and ".join(names.title for names in candidates)
        raise InputError(
            f"adapter {adapter.path} adapts {lacking[0][0]}, which {where} does not have; give its base: --base"
        )
    return fitting


def _skeleton(model: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    """The model on the meta device, with the adapter's labels and rows of tokens."""
    config = copy.deepcopy(model.config)
    labels: Sequence[object] = next(iter(adapter.labels.values()), ())
    if not labels:
        with suppress(InputError):  # no class head
            head = f"{head_name(model)}.weight"
            labels = range(adapter.saved_shape(head)[0]) if head in adapter.saved else ()
            labels = () if len(labels) == config.num_labels else [f"LABEL_{row}" for row in labels]
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: row for row, label in enumerate(labels)}
    with quiet(), torch.device("meta"):
        new = type(model)(config)
        fit_vocabulary(new, adapter)
    return new


def _shards(entries: Iterable[_Entry], limit: int) -> list[list[_Entry]]:
    """The entries in order, as many to a file as `limit` bytes take, at least one."""
    shards: list[list[_Entry]] = []
    size = limit
    for entry in entries:
        if size + entry.bytes > limit and (size or not shards):
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.bytes
    return shards


def _write_weights(folder: Path, shards: Sequence[Sequence[_Entry]], plan: _Plan) -> dict[str, float]:
    """All files of weights; returns the rounding of ExportReport."""
    count, rounding, places = len(shards), dict[str, float](), dict[str, str]()
    for number, shard in enumerate(shards, start=1):
        name = WEIGHTS if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        tensors = {}
        for entry in shard:
            tensors[entry.name] = _tensor(entry, plan, rounding)
        save_tensors(tensors, folder / name, {"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    if count > 1:
        total = sum(entry.bytes for shard in shards for entry in shard)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})
    return rounding


def _tensor(entry: _Entry, plan: _Plan, rounding: dict[str, float]) -> Tensor:
    """A tensor as it is written; of an updated one its rounding is noted."""
    if entry.saved is not None:
        value = plan.adapter.tensor(entry.saved)
    else:
        with safe_open(plan.checkpoint.tensors[str(entry.key)].file, "pt") as handle:
            value = handle.get_tensor(entry.key)
    if entry.module is None:
        stored = value if entry.dtype is None else value.to(entry.dtype)
    else:
        delta = plan.delta(entry)
        stored, lost = _sum(value, delta, entry.dtype or value.dtype)
        rounding[entry.name] = lost / max(delta.norm(), torch.finfo(torch.float32).tiny)
    if stored.dtype == torch.float16 and not is_finite(stored):
        raise InputError(f"{entry.name}: its values do not fit float16; use float32 or bfloat16")
    return stored


def _sum(weight: Tensor, delta: LowRank, dtype: torch.dtype) -> tuple[Tensor, float]:
    """(weight + delta summed in float32 and cast once, Frobenius norm of what the cast loses), some rows at a time."""
    matrix = weight.reshape(delta.shape)
    stored, lost = torch.empty(delta.shape, dtype=dtype), 0.0
    for rows in row_slices(delta.shape, ROWS_AT_ONCE):
        exact = torch.addmm(matrix[rows].float(), delta.B[rows], delta.A)
        stored[rows] = exact.to(dtype)
        lost += (stored[rows].float() - exact).double().square().sum().item()
    return stored.reshape(weight.shape), lost**0.5


def _copy_files(folder: Path, base: Path, adapter: Path) -> None:
    """Tokenizer (the one beside the adapter, if there is one), processor, generation settings and licence."""
    tokens = adapter if has_tokenizer(adapter) else base
    for source, names in ((base, OTHER_FILES), (tokens, TOKENIZER_FILES)):
        for name in names:
            if (source / name).is_file():
                (folder / name).write_bytes((source / name).read_bytes())
