"""PEFT adapter folders: read, check, write, reload. The only file that knows PEFT's on-disk format.

It needs neither PEFT nor the base model: an adapter is `adapter_config.json`, `adapter_model.safetensors` and, when it
carries a classification head, `labels.json` ({head module: [label, …] in row order}).
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pm_hf.errors import InputError, raise_all
from pm_hf.files import new_folder, read_json, write_json
from pm_hf.merging.lowrank import LowRank, weighted_sum

CONFIG, WEIGHTS, LABELS = "adapter_config.json", "adapter_model.safetensors", "labels.json"
REPORT = "merge_report.json"
PREFIX = "base_model.model."
FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<factor>[AB])\.weight$")

# initialisations that leave the base weights alone, so that scaling·BA is all that the adapter adds
PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")
# settings that only say where LoRA sits, how it was trained or who made it: the weights already tell
HARMLESS = frozenset(
    [
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "r",
        "target_modules",
        "exclude_modules",
        "lora_alpha",
        "lora_dropout",
        "fan_in_fan_out",
        "bias",
        "use_rslora",
        "modules_to_save",
        "init_lora_weights",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "megatron_config",
        "megatron_core",
        "runtime_config",
        "eva_config",
        "loftq_config",
        "corda_config",
        "lora_ga_config",
        "qalora_group_size",
        "ensure_weight_tying",
    ]
)
CONVERT = "convert it first with peft.convert_to_lora / save_as_lora, or train a plain LoRA"


@dataclass(frozen=True)
class Adapter:
    """A checked LoRA adapter folder. Tensors are read when asked for, one module at a time.

    scaling: {module: s}; the module's weight update is s·B@A, as (out, in).
    saved: names of the `modules_to_save` tensors (absolute values, not updates).
    labels: {head module: [label, …]} of `labels.json`.
    """

    path: Path
    config: dict
    scaling: dict[str, float]
    saved: tuple[str, ...]
    labels: dict[str, list[str]] = field(default_factory=dict)

    def product(self, module: str) -> LowRank:
        """s·B@A of a module in float32; InputError when a value is not finite."""
        A = self._read(f"{module}.lora_A.weight").float()
        B = self._read(f"{module}.lora_B.weight").float()
        return LowRank(B * self.scaling[module], A)

    def shape(self, module: str) -> tuple[int, int]:
        """(out, in) of a module's update, without reading it."""
        with safe_open(self.path / WEIGHTS, "pt") as handle:
            sides = [handle.get_slice(f"{PREFIX}{module}.lora_{factor}.weight").get_shape() for factor in "BA"]
        return sides[0][0], sides[1][1]

    def products(self) -> dict[str, LowRank]:
        """Every module's update."""
        return {module: self.product(module) for module in self.scaling}

    def tensor(self, name: str) -> Tensor:
        """A `modules_to_save` tensor, in its stored dtype."""
        return self._read(name)

    def head_matrix(self, module: str) -> LowRank:
        """[weight | bias] of a saved linear head as (rows, in + 1) (or (rows, in) without a bias), float32."""
        weight = self._read(f"{module}.weight").float()
        if f"{module}.bias" in self.saved:
            weight = torch.cat([weight, self._read(f"{module}.bias").float()[:, None]], dim=1)
        return LowRank(weight, torch.eye(weight.shape[1]))

    def _read(self, name: str) -> Tensor:
        with safe_open(self.path / WEIGHTS, "pt") as handle:
            tensor = handle.get_tensor(PREFIX + name)
        if not torch.isfinite(tensor).all():
            raise InputError(f"adapter {self.path}: {name} holds NaN or infinite values; the training diverged")
        return tensor


def open_adapter(path: str | os.PathLike) -> Adapter:
    """Read and check an adapter folder; one InputError that lists every problem."""
    path = Path(path)
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
    shapes = _shapes(path / WEIGHTS)
    problems = config_problems(config)
    problems += [f"{CONFIG} has no {key!r}" for key in ("r", "lora_alpha") if not config.get(key) and not problems]
    raise_all(problems, f"adapter {path}")
    scaling, saved = _layout(config, shapes, problems)
    raise_all(problems, f"adapter {path}")
    labels = read_json(path / LABELS) if (path / LABELS).is_file() else {}
    if not isinstance(labels, dict) or not all(isinstance(names, list) for names in labels.values()):
        raise InputError(f"adapter {path}: {LABELS} must hold {{head module: [label, …]}}")
    for head, names in labels.items():
        if twice := sorted({str(name) for name in names if names.count(name) > 1}):
            problems.append(f"{LABELS} names {', '.join(twice)} more than once for {head}")
        rows = shapes.get(f"{head}.weight", (0,))[0]
        if rows != len(names):
            problems.append(f"{LABELS} names {len(names)} labels for {head}, which has {rows} rows")
    raise_all(problems, f"adapter {path}")
    return Adapter(path, config, scaling, saved, labels)


def config_problems(config: Mapping) -> list[str]:
    """Why this PEFT configuration is not a plain LoRA whose product is the whole update; empty if it is."""
    if str(getattr(config.get("peft_type"), "value", config.get("peft_type"))).upper() != "LORA":
        return [f"expected peft_type LORA, found {config.get('peft_type')}; {CONVERT}"]
    problems = []
    init = config.get("init_lora_weights", True)
    if init not in PLAIN_INITS:
        problems.append(
            f"init_lora_weights={init!r} rewrites the base weights, so BA is not the task vector; {CONVERT}"
        )
    if config.get("bias", "none") != "none":
        problems.append(f"bias={config['bias']!r} trains the base's biases; only bias='none' can be merged")
    odd = sorted(key for key, value in config.items() if key not in HARMLESS and value)
    if odd:
        problems.append(f"{', '.join(odd)} make the update more than scaling·BA; {CONVERT}")
    return problems


def base_name(config: Mapping) -> str:
    """Name of the base model; for a model inside an installed package without the environment's own path."""
    return str(config.get("base_model_name_or_path")).rpartition("site-packages/")[2]


def folded_tasks(adapter: Adapter) -> int:
    """Number of tasks in a merged adapter, from its merge_report.json; 1 for an adapter that is no merge."""
    path = adapter.path / REPORT
    return int(read_json(path)["tasks"]) if path.is_file() else 1


def measured_tasks(adapter: Adapter) -> int:
    """Number of its tasks that the running curvature covers: all, unless a past was left unmeasured."""
    path = adapter.path / REPORT
    measured = read_json(path).get("measured") if path.is_file() else None
    return folded_tasks(adapter) if measured is None else int(measured)


def write_adapter(
    path: Path,
    template: Mapping,
    products: Mapping[str, LowRank],
    saved: Mapping[str, Tensor],
    labels: Mapping[str, list[str]],
    *,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    extra: Mapping[str, object] | None = None,
) -> None:
    """Write a plain PEFT adapter (lora_alpha = r, scaling 1), read it back, compare, then let it take its name.

    template: an adapter_config.json whose other fields are kept. extra: further JSON files {name: value}.
    InputError when `path` exists and
    `overwrite` is False; whatever was there stays whole until the new folder has been checked.
    """
    tensors = {PREFIX + name: tensor.contiguous().clone() for name, tensor in saved.items()}
    for module, product in products.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = product.A.to(dtype).contiguous().clone()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = product.B.to(dtype).contiguous().clone()
    with new_folder(path, overwrite=overwrite) as folder:
        _write(folder, _merged_config(template, products, saved), tensors, labels)
        for name, value in (extra or {}).items():
            write_json(folder / name, value)
        _compare(folder, products, tensors)


def save_adapter(
    path: Path,
    config: Mapping,
    factors: dict[str, Tensor],
    saved: dict[str, Tensor],
    labels: Mapping[str, list[str]],
) -> None:
    """Write an adapter as it was trained: lora_A and lora_B as they are, `config` its PEFT configuration."""
    tensors = {PREFIX + name: tensor.contiguous() for name, tensor in (factors | saved).items()}
    with new_folder(path, overwrite=True) as folder:
        _write(folder, config, tensors, labels)
        open_adapter(folder)


def replace_head(path: Path, head: str, weight: Tensor, bias: Tensor) -> None:
    """Write other rows for a linear head into an adapter folder, everything else byte for byte the same."""
    adapter = open_adapter(path)
    tensors = load_file(path / WEIGHTS)
    for name, value in ((f"{PREFIX}{head}.weight", weight), (f"{PREFIX}{head}.bias", bias)):
        if tensors[name].shape != value.shape:
            raise InputError(f"{path}: {name} has shape {tuple(tensors[name].shape)}, found {tuple(value.shape)}")
        tensors[name] = value.to(tensors[name].dtype).contiguous().clone()
    others = [file for file in path.iterdir() if file.name != WEIGHTS]
    with new_folder(path, overwrite=True) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        for file in others:
            (folder / file.name).write_bytes(file.read_bytes())
        if open_adapter(folder).scaling != adapter.scaling:
            raise RuntimeError(f"{path}: the rewritten adapter does not read back as it was written")


def _write(folder: Path, config: Mapping, tensors: Mapping[str, Tensor], labels: Mapping[str, list[str]]) -> None:
    save_file(dict(tensors), folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / CONFIG, config)
    if labels:
        write_json(folder / LABELS, labels)


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """{tensor name without PEFT's prefix: shape}."""
    try:
        with safe_open(path, "pt") as handle:
            names = list(handle.keys())
            shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a whole safetensors file ({error}); copy or save the adapter again") from error
    odd = sorted(name for name in names if not name.startswith(PREFIX))
    if odd and any(".lora_" in name for name in odd):
        raise InputError(f"{path}: expected tensor names that start with {PREFIX}, found {odd[0]}; save it with PEFT")
    return {name.removeprefix(PREFIX): shape for name, shape in shapes.items() if name.startswith(PREFIX)}


def _layout(config: Mapping, shapes: Mapping[str, tuple[int, ...]], problems: list[str]) -> tuple[dict, tuple]:
    """(scaling of each module, names of the saved tensors) from the tensor names; problems are appended."""
    factors: dict[str, dict[str, tuple[int, ...]]] = {}
    saved = []
    for name, shape in shapes.items():
        if match := FACTOR.match(name):
            factors.setdefault(match["module"], {})[match["factor"]] = shape
        elif "lora_" in name:
            problems.append(f"tensor {name} is not part of a plain linear LoRA; {CONVERT}")
        else:
            saved.append(name)
    if not factors:
        problems.append("no lora_A / lora_B weights found")
    return {m: s for m, f in factors.items() if (s := _scaling(config, m, f, problems)) is not None}, tuple(saved)


def _scaling(config: Mapping, module: str, factors: Mapping[str, tuple[int, ...]], problems: list[str]) -> float | None:
    if set(factors) != {"A", "B"}:
        problems.append(f"{module} has lora_{next(iter(factors))} only; the file is incomplete")
        return None
    A, B = factors["A"], factors["B"]
    if len(A) != 2 or len(B) != 2 or A[0] != B[1]:
        problems.append(f"{module}: lora_A {A} and lora_B {B} are not the factors of a matrix")
        return None
    rank = _pattern(config.get("rank_pattern"), module, config["r"])
    if rank != A[0]:
        problems.append(f"{module}: {CONFIG} says rank {rank}, the weights have rank {A[0]}")
        return None
    alpha = _pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _pattern(patterns: Mapping | None, module: str, default: float) -> float:
    """PEFT's lookup in rank_pattern and alpha_pattern: the first key that matches the end of the name."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _merged_config(template: Mapping, products: Mapping[str, LowRank], saved: Mapping[str, Tensor]) -> dict:
    ranks = {module: product.rank for module, product in products.items()}
    rank = max(ranks.values())
    # anchored: PEFT matches the end of a name, so that "fc" would also mean "block.fc"
    odd = {f"^{re.escape(module)}": r for module, r in ranks.items() if r != rank}
    full = "|".join(re.escape(module) for module in sorted(products))
    roots = [root for root in template.get("modules_to_save") or [] if any(_under(name, root) for name in saved)]
    ambiguous = template.get("exclude_modules") or any("." not in module for module in products)
    return dict(template) | {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": odd,
        "alpha_pattern": odd,
        "use_rslora": False,
        "init_lora_weights": True,
        **{key: None for key in ("eva_config", "corda_config", "lora_ga_config") if template.get(key)},
        "target_modules": full if ambiguous else sorted(products),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": roots or None,
        "inference_mode": True,
    }


def _under(name: str, root: str) -> bool:
    return f".{name}".find(f".{root}.") >= 0


def _compare(folder: Path, products: Mapping[str, LowRank], tensors: Mapping[str, Tensor]) -> None:
    """Read the new folder back; RuntimeError unless it holds exactly what was to be written."""
    written, stored = open_adapter(folder), load_file(folder / WEIGHTS)
    same = stored.keys() == tensors.keys() and all(torch.equal(stored[n], t) for n, t in tensors.items())
    if not same or set(written.scaling) != set(products) or any(s != 1 for s in written.scaling.values()):
        raise RuntimeError(f"{folder}: the adapter does not read back as it was written; the old one is untouched")


def cast_error(product: LowRank, dtype: torch.dtype) -> float:
    """Relative Frobenius error ‖BA − stored‖/‖BA‖ of storing the factors in `dtype`; 0 when they keep their dtype."""
    if dtype == product.A.dtype:
        return 0.0
    difference = weighted_sum([product.to(torch.float64), product.to(dtype).to(torch.float64)], [1, -1])
    return difference.norm() / max(product.norm(), torch.finfo(torch.float64).tiny)
