"""Writing PEFT adapter folders: checked before they take their name, plain LoRA that any PEFT of the range loads."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pm_hf.adapters import LABELS, PREFIX, WEIGHTS, open_adapter, under
from pm_hf.errors import InputError
from pm_hf.files import new_folder, save_tensors, write_json
from pm_hf.layouts import CONFIG, Layout
from pm_hf.merging.lowrank import LowRank, weighted_sum
from pm_hf.refusals import ADALORA

CARD = "README.md"


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
    labels: Mapping[str, list[str]],
    *,
    ambiguous: bool = False,
    overwrite: bool = False,
    extra: Mapping[str, object] | None = None,
) -> None:
    """Write a plain PEFT adapter (lora_alpha = r, scaling 1), read it back, compare, then let it take its name.

    template: an adapter_config.json whose other fields are kept. ambiguous: the ends of the modules' names may match
    other modules of the base too, so target_modules is written as an expression for the whole names. updates:
    {module: Update}, emptied while it is written so that each matrix is in memory once. A README.md in the old folder
    is kept. extra: further JSON files {name: value}.
    InputError when `path` exists and `overwrite` is False; whatever was there stays whole until the new folder has
    been checked.
    """
    fused = [module for module, update in updates.items() if update.layout.kind == "fused"]
    # PEFT's rank_pattern cannot tell the parameters of one module apart, so all fused ones share `r`
    shared = max((updates[module].rank for module in fused), default=0)
    ranks = {module: shared if module in fused else update.rank for module, update in updates.items()}
    config = _merged_config(template, updates, ranks, saved, ambiguous)
    modules = set(updates)
    tensors = {PREFIX + name: tensor.contiguous().clone() for name, tensor in saved.items()}
    for module in sorted(modules):
        update = updates.pop(module)
        stored = update.layout.write(module, update.matrices, ranks[module], update.bias)
        tensors |= {PREFIX + name: tensor for name, tensor in stored.items()}
    with new_folder(path, overwrite=overwrite) as folder:
        _write(folder, config, tensors, labels)
        for name, value in (extra or {}).items():
            write_json(folder / name, value)
        if (path / CARD).is_file():  # perhaps written by hand
            (folder / CARD).write_bytes((path / CARD).read_bytes())
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
    tensors = {PREFIX + name: tensor.contiguous() for name, tensor in (factors | saved).items()}
    with new_folder(path, overwrite=True) as folder:
        _write(folder, config, tensors, labels)
        open_adapter(folder)


def replace_head(path: Path, head: str, weight: Tensor, bias: Tensor, labels: Sequence[str]) -> None:
    """Write other rows, and their labels, for a linear head into an adapter folder; else it stays byte for byte."""
    adapter = open_adapter(path)
    tensors = load_file(path / WEIGHTS)
    for name, value in ((f"{PREFIX}{head}.weight", weight), (f"{PREFIX}{head}.bias", bias)):
        expected = (len(labels), *tensors[name].shape[1:])
        if tuple(value.shape) != expected:
            raise InputError(f"{path}: {name} needs shape {expected}, found {tuple(value.shape)}")
        tensors[name] = value.to(tensors[name].dtype).contiguous().clone()
    others = [file for file in path.iterdir() if file.name != WEIGHTS]
    with new_folder(path, overwrite=True) as folder:
        save_tensors(tensors, folder / WEIGHTS, {"format": "pt"})
        for file in others:
            (folder / file.name).write_bytes(file.read_bytes())
        if adapter.labels.get(head) != list(labels):
            write_json(folder / LABELS, adapter.labels | {head: list(labels)})
        if open_adapter(folder).layouts != adapter.layouts:
            raise RuntimeError(f"{path}: the rewritten adapter does not read back as it was written")


def cast_error(product: LowRank, dtype: torch.dtype) -> float:
    """Relative Frobenius error ‖BA − stored‖/‖BA‖ of storing the factors in `dtype`; 0 when they keep their dtype."""
    if dtype == product.A.dtype:
        return 0.0
    difference = weighted_sum([product.to(torch.float64), product.to(dtype).to(torch.float64)], [1, -1])
    return difference.norm() / max(product.norm(), torch.finfo(torch.float64).tiny)


def _write(folder: Path, config: Mapping, tensors: Mapping[str, Tensor], labels: Mapping[str, list[str]]) -> None:
    save_tensors(dict(tensors), folder / WEIGHTS, {"format": "pt"})
    write_json(folder / CONFIG, config)
    if labels:
        write_json(folder / LABELS, labels)


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
    roots = [root for root in template.get("modules_to_save") or [] if any(under(name, root) for name in saved)]
    ambiguous = ambiguous or any("." not in module for module in plain)
    kept = {key: value for key, value in template.items() if key not in ADALORA}
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
    with safe_open(folder / WEIGHTS, "pt") as handle:
        same = same and set(handle.keys()) == set(tensors)
        same = same and all(torch.equal(handle.get_tensor(name), tensor) for name, tensor in tensors.items())
    if not same:
        raise RuntimeError(f"{folder}: the adapter does not read back as it was written; the old one is untouched")
