"""What an adapter is, and how two adapters relate, from their folders or Hub ids alone.

Updates are ΔW = s·BA, (out, in), one matrix or several (fused experts, grouped convolutions) for each module. They are
read in float32, one module at a time; norms, singular values, cosines and angles come from their factors in float64.
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import prod, sqrt
from statistics import median
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pm_hf.adapters.download import adapter_folder
from pm_hf.adapters.folder import Adapter, base_name, folded_tasks, open_adapter
from pm_hf.adapters.layout import ADAPTER_WEIGHTS
from pm_hf.adapters.naming import one_naming
from pm_hf.errors import InputError
from pm_hf.merging.lowrank import LowRank, compact_svd, row_slices
from pm_hf.text import printable, text_table

UNTRAINED, NEAR_ZERO = 1e-6, 1e-4  # a norm below this; a root mean square entry below this share of the others' median


EXPLODING = 10  # a root mean square entry above this many times the others' median


SHOWN = 8  # names in one line of text


CHUNK = 2**20  # entries of a dense update in memory at once


SHOWN_SETTINGS = ("use_rslora", "lora_bias", "target_parameters", "modules_to_save")


STORED_AS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def inspect_adapters(paths: Sequence[str | os.PathLike]) -> dict[str, list]:
    """{"adapters": [describe(…) of each], "relations": [relate(…) of every pair]}, ready for JSON."""
    opened = [(os.fspath(path), open_adapter(adapter_folder(path))) for path in paths]
    return {
        "adapters": [_describe(name, adapter) for name, adapter in opened],
        "relations": [_relate(left, right) for left, right in combinations(opened, 2)],
    }


def describe(path: str | os.PathLike) -> dict[str, Any]:
    """Base, labels, tasks folded, stored dtype, numbers of parameters, the settings that change what an adapter is,
    and for each module, over its matrices: shape, rank (of the factors), numerical rank (largest), scaling, Frobenius
    norm ‖ΔW‖ (all together), spectral norm (largest), and the norm of a LoRA bias.

    warnings: modules with NaN or infinite values (their numbers are None), modules whose update is all but zero, and
    modules whose root mean square entry is far above that of the others.
    """
    return _describe(os.fspath(path), open_adapter(adapter_folder(path)))


def relate(left: str | os.PathLike, right: str | os.PathLike) -> dict[str, Any]:
    """How the updates of two adapters relate, for each module that both have.

    cosine: <ΔW₁, ΔW₂>/(‖ΔW₁‖‖ΔW₂‖), 0 where one is zero. output_angle and input_angle: smallest principal angle in
    degrees between the column spaces (outputs) and between the row spaces (inputs) within the numerical ranks, with
    the mean of all angles beside it; None where an update is zero. sign_conflict: share of the entries where both
    updates are non-zero and their signs differ. A LoRA bias takes no part. summary: cosine and sign_conflict over all
    these modules together. Modules of one adapter only are listed, and what does not fit stands in the warnings.

    Principal angles: Björck and Golub (1973), "Numerical methods for computing angles between linear subspaces", from
    sines and cosines.
    """
    return _relate(*((os.fspath(path), open_adapter(adapter_folder(path))) for path in (left, right)))


def tables(inspected: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """What `inspect_adapters` returns as text: a table of modules for each adapter and for each pair."""
    parts = [*map(_adapter_lines, inspected["adapters"]), *map(_relation_lines, inspected["relations"])]
    return "\n".join(printable(line) for lines in parts for line in lines)


def _describe(name: str, adapter: Adapter) -> dict[str, Any]:
    modules, warnings = {}, []
    for module in adapter.layouts:
        try:
            modules[module] = _module(adapter, module)
        except InputError as error:
            modules[module] = _place(adapter, module) | dict.fromkeys(("numerical_rank", "norm", "spectral_norm"))
            warnings.append(str(error))
    dtypes, parameters = _stored(adapter)
    return {
        "path": name,
        "base_model": adapter.config.get("base_model_name_or_path"),
        "tasks": folded_tasks(adapter),
        "labels": adapter.labels,
        "dtype": dtypes,
        "parameters": parameters,
        "settings": {key: adapter.config.get(key) for key in SHOWN_SETTINGS},
        "modules": modules,
        "warnings": warnings + _norm_warnings(adapter, {name: row["norm"] for name, row in modules.items()}),
    }


def _place(adapter: Adapter, module: str) -> dict[str, Any]:
    layout = adapter.layouts[module]
    several = (layout.count,) if layout.count > 1 else ()
    return {
        "shape": "x".join(map(str, (*several, *layout.shape))),
        "rank": layout.rank,
        "scaling": float(layout.scaling),
    }


def _module(adapter: Adapter, module: str) -> dict[str, Any]:
    bias = adapter.layouts[module].bias
    matrices = adapter.read(module, bias=bias)
    if not all(math.isfinite(matrix.norm()) for matrix in matrices):
        raise InputError(f"{module}: the update overflows float32")
    bias_norm = {"bias_norm": matrices.pop().norm()} if bias else {}
    values = [compact_svd(matrix)[1] for matrix in matrices]
    numbers = {
        "numerical_rank": max(len(s) for s in values),
        "norm": float(torch.cat(values).norm()),
        "spectral_norm": max(float(s[:1].sum()) for s in values),
    }
    return _place(adapter, module) | numbers | bias_norm


def _stored(adapter: Adapter) -> tuple[str, dict[str, int]]:
    """(dtypes in the file, {"LoRA": parameters, "saved": values of other tensors}), from the file's header."""
    dtypes, parameters = set(), {"LoRA": 0, "saved": 0}
    with safe_open(adapter.path / ADAPTER_WEIGHTS, "pt") as handle:
        for name in handle.keys():  # noqa: SIM118
            tensor = handle.get_slice(name)
            dtypes.add(STORED_AS.get(tensor.get_dtype(), tensor.get_dtype()))
            parameters["LoRA" if ".lora_" in name else "saved"] += prod(tensor.get_shape())
    return ", ".join(sorted(dtypes)), parameters


def _norm_warnings(adapter: Adapter, norms: Mapping[str, float | None]) -> list[str]:
    """Modules that look untrained, and modules whose update is out of proportion."""
    sizes = {m: adapter.layouts[m].count * prod(adapter.layouts[m].shape) for m in norms}
    rms = {m: norm / sqrt(sizes[m]) for m, norm in norms.items() if norm is not None}
    zero = [m for m, size in rms.items() if (norms[m] or 0.0) < UNTRAINED or size < NEAR_ZERO * _usual(rms, m)]
    trained = {m: size for m, size in rms.items() if m not in zero}
    times = {m: size / _usual(trained, m) for m, size in trained.items()}
    large = [f"{m} ({ratio:.0f} times)" for m, ratio in times.items() if ratio > EXPLODING]
    warnings = [f"update close to zero, untrained: {_names(zero)}"] if zero else []
    return warnings + ([f"update far larger than the others' median: {_names(large)}"] if large else [])


def _usual(sizes: Mapping[str, float], module: str) -> float:
    """Median over the other modules; the module's own size if it is alone."""
    return median([size for name, size in sizes.items() if name != module] or [sizes[module]])


@dataclass(frozen=True)
class _Pair:
    """Two updates of one module compared: sums over its matrices, and all principal angles in degrees."""

    inner: float
    squares: tuple[float, float]
    conflicts: int
    entries: int
    output_angles: Tensor
    input_angles: Tensor

    def row(self) -> dict[str, float | None]:
        """The module's line."""
        return {
            "cosine": _ratio(self.inner, sqrt(self.squares[0] * self.squares[1])),
            "output_angle": _smallest(self.output_angles),
            "output_angle_mean": _mean(self.output_angles),
            "input_angle": _smallest(self.input_angles),
            "input_angle_mean": _mean(self.input_angles),
            "sign_conflict": self.conflicts / self.entries,
        }


def _relate(first: tuple[str, Adapter], second: tuple[str, Adapter]) -> dict[str, Any]:
    (left_name, left), (right_name, right) = first, second
    warnings, pairs = [], {}
    try:
        left, right = one_naming([left, right])
    except InputError as error:
        warnings.append(str(error))
    if base_name(left.config) != base_name(right.config):
        bases = f"{base_name(left.config)} and {base_name(right.config)}"
        warnings.append(f"different bases, {bases}: updates of different models do not compare")
    shared = [module for module in left.layouts if module in right.layouts]
    for module in shared:
        if left.layouts[module].site != right.layouts[module].site:
            kinds = [f"{a.layouts[module].kind} {_place(a, module)['shape']}" for a in (left, right)]
            warnings.append(f"{module} is not the same in both, left out: {' and '.join(kinds)}")
            continue
        try:
            pairs[module] = _pair(left.read(module), right.read(module))
        except InputError as error:
            warnings.append(f"{module} left out: {error}")
    if not shared:
        warnings.append("no module in common")
    return {
        "left": left_name,
        "right": right_name,
        "modules": {module: pair.row() for module, pair in pairs.items()},
        "only_left": [module for module in left.layouts if module not in right.layouts],
        "only_right": [module for module in right.layouts if module not in left.layouts],
        "summary": _summary(pairs.values()),
        "warnings": warnings,
    }


def _pair(left: Sequence[LowRank], right: Sequence[LowRank]) -> _Pair:
    inner, squares, angles = 0.0, [0.0, 0.0], [(torch.zeros(0), torch.zeros(0))]
    for term, other in zip(left, right, strict=True):
        (U, s, Vh), (X, t, Yh) = compact_svd(term), compact_svd(other)
        inner += float(((U.T @ X) * (Vh @ Yh.T) * torch.outer(s, t)).sum())
        squares = [total + float(values.square().sum()) for total, values in zip(squares, (s, t), strict=True)]
        angles.append((_angles(U, X), _angles(Vh.T, Yh.T)))
    conflicts = sum(_sign_conflicts(term, other) for term, other in zip(left, right, strict=True))
    entries = sum(prod(matrix.shape) for matrix in left)
    outputs, inputs = (torch.cat(side) for side in zip(*angles, strict=True))
    return _Pair(inner, (squares[0], squares[1]), conflicts, entries, outputs, inputs)


def _angles(left: Tensor, right: Tensor) -> Tensor:
    """Principal angles in degrees, ascending, of the spans of orthonormal columns (n, p) and (n, q): min(p, q) many.

    Small ones come from their sines, the singular values of what is left of one basis outside the other span: a cosine
    near 1 does not resolve them.
    """
    wide, narrow = (left, right) if left.shape[1] >= right.shape[1] else (right, left)
    overlap = wide.T @ narrow
    cosines, sines = torch.linalg.svdvals(overlap), torch.linalg.svdvals(narrow - wide @ overlap)
    return torch.rad2deg(torch.atan2(sines.flip(0), cosines))


def _sign_conflicts(left: LowRank, right: LowRank) -> int:
    """Number of entries where both are non-zero and the signs differ, from a few dense rows at a time."""
    count = 0
    for rows in row_slices(left.shape, CHUNK):
        signs = (left.B[rows] @ left.A).sign_().mul_((right.B[rows] @ right.A).sign_())
        count += int((signs < 0).sum())
    return count


def _summary(pairs: Iterable[_Pair]) -> dict[str, float]:
    """Cosine and sign conflict of all modules that both adapters have, as one long vector; empty if there is none."""
    shared = list(pairs)
    if not shared:
        return {}
    norms = [sqrt(sum(pair.squares[side] for pair in shared)) for side in (0, 1)]
    conflicts = sum(pair.conflicts for pair in shared) / sum(pair.entries for pair in shared)
    return {"cosine": _ratio(sum(pair.inner for pair in shared), norms[0] * norms[1]), "sign_conflict": conflicts}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _smallest(angles: Tensor) -> float | None:
    return float(angles.min()) if len(angles) else None


def _mean(angles: Tensor) -> float | None:
    return float(angles.mean()) if len(angles) else None


def _adapter_lines(adapter: Mapping[str, Any]) -> list[str]:
    counts = ", ".join(f"{number:,} {kind}" for kind, number in adapter["parameters"].items())
    base = f"base {adapter['base_model']}, {adapter['tasks']} task(s), {adapter['dtype']}, parameters: {counts}"
    lines = [f"{adapter['path']}: {base}"]
    lines += [f"  {key}: {value}" for key, value in adapter["settings"].items() if value]
    lines += [f"  labels of {head}: {_names(labels)}" for head, labels in adapter["labels"].items()]
    return lines + _table(adapter["modules"]) + _warnings(adapter)


def _relation_lines(pair: Mapping[str, Any]) -> list[str]:
    lines = [f"{pair['left']} and {pair['right']}", *_table(pair["modules"])]
    if pair["summary"]:
        lines.append("  all of these: " + ", ".join(f"{key} {_cell(value)}" for key, value in pair["summary"].items()))
    lines += [
        f"  only in {pair[side]}: {_names(pair[f'only_{side}'])}" for side in ("left", "right") if pair[f"only_{side}"]
    ]
    return lines + _warnings(pair)


def _names(names: Sequence[str]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(str, names[:SHOWN])) + rest


def _table(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Aligned lines: a heading, then one for each row; columns are the union of the rows' keys."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    if not columns:
        return []
    cells = [["module", *columns]]
    cells += [[name, *(_cell(row.get(column)) for column in columns)] for name, row in rows.items()]
    return text_table(cells, indent="  ")


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _warnings(described: Mapping[str, Any]) -> list[str]:
    return [f"  warning: {text}" for text in described["warnings"]]
