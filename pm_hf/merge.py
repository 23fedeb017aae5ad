"""`merge_adapters`: adapter folders in, one plain PEFT adapter out, without the base model."""

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from pm_hf.adapters import (
    CONFIG,
    LABELS,
    REPORT,
    WEIGHTS,
    Adapter,
    base_name,
    cast_error,
    folded_tasks,
    measured_tasks,
    open_adapter,
    write_adapter,
)
from pm_hf.errors import InputError, raise_all
from pm_hf.merging.curvature import Curvature
from pm_hf.merging.lowrank import LowRank, weighted_sum
from pm_hf.merging.methods import get_method
from pm_hf.merging.solve import (
    Coefficient,
    Freedom,
    ZeroCurvatureError,
    check_fits,
    fixed_coefficient,
    free_solution,
    optimal_coefficient,
)
from pm_hf.versions import versions

FILES = (CONFIG, WEIGHTS, LABELS, REPORT, "README.md")  # what a folder to overwrite may hold
OPTIONS = {"pm": {"on_zero_curvature": ("error", "average"), "unmeasured_past": ("error", "ignore")}}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class MergeReport:
    """What a merge did; written into the output as merge_report.json.

    tasks: number of tasks in the result. modules: {module: ranks in, rank out, relative Frobenius error of the
    truncation, coefficient}. heads: {tensor: how it was merged}. cast_error: relative error of the storage dtype.
    """

    method: str
    freedom: str
    tasks: int
    coefficient: Coefficient | None
    weights: list[float] | None
    modules: dict[str, dict]
    heads: dict[str, str]
    inputs: list[str]
    seconds: float = 0.0
    cast_error: float = 0.0
    measured: int | None = None  # tasks whose curvature has weight in the result
    versions: dict[str, str] = field(default_factory=versions)

    @property
    def error(self) -> float:
        """Largest relative Frobenius error over the modules."""
        return max(module["error"] for module in self.modules.values())


@dataclass(frozen=True)
class _Plan:
    """Everything decided before a tensor is written. The result is Σ weights[i]·adapters[i], or the free solution."""

    adapters: list[Adapter]
    weights: list[float]
    tasks: int
    measured: int
    coefficient: Coefficient | None = None
    curvature: Curvature | None = None  # set when the whole matrix is free

    def weights_for(self, name: str) -> list[float]:
        """Weights of one module; with a coefficient for each module (1 or 1 − α for what is absolute, α)."""
        if self.coefficient is None or self.coefficient.modules is None or name not in self.coefficient.modules:
            return self.weights
        return [1.0, self.coefficient.for_module(name)][-len(self.adapters) :]


def merge_adapters(
    adapters: str | os.PathLike | Sequence[str | os.PathLike],
    output: str | os.PathLike,
    *,
    into: str | os.PathLike | None = None,
    method: str = "pm",
    curvature: str | os.PathLike | Curvature | None = None,
    coefficient: float | None = None,
    freedom: Freedom = "global",
    weights: Sequence[float] | None = None,
    options: Mapping[str, str] | None = None,
    max_rank: int | None = None,
    energy: float | None = None,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> MergeReport:
    """Fold one task adapter into the running merge, or merge N adapters, from their folders alone.

    Fold: θ̂_t = θ̂_{t−1} + αΔ, with α from `curvature` (arXiv 2505.22389), 1/t (`average`), 1 (`sequential`) or
    `coefficient`; without `into` the adapter is the first task. `freedom="free"` takes the optimum over the whole
    matrix instead. N adapters: Σ wᵢΔᵢ. The result is exact, factors side by side, unless `max_rank` or
    `energy` (share of the squared norm) asks for the best approximation; errors stand in the report. Computed in
    float32, coefficients in float64, cast once to `dtype`. Tensors of `modules_to_save` are absolute values: heads
    merge by label (a new label appends its row), others by the same coefficient.

    `output` gets adapter_model.safetensors, adapter_config.json, labels.json (with a head) and merge_report.json;
    it is read back and compared before it takes its name. Raises InputError before anything is written.
    """
    start = time.perf_counter()
    paths = [adapters] if isinstance(adapters, str | os.PathLike) else list(adapters)
    storage = dtype if isinstance(dtype, torch.dtype) else DTYPES.get(dtype or "float32", torch.float32)
    _check_arguments(paths, into, method, coefficient, freedom, weights, options, max_rank, energy, dtype, curvature)
    if Path(output).exists() and not overwrite and not dry_run:
        raise InputError(
            f"output {output} exists; choose another folder, or overwrite=True (--overwrite) to replace it"
        )
    strange = sorted(p.name for p in Path(output).iterdir() if p.name not in FILES) if Path(output).is_dir() else []
    if strange and not dry_run:
        raise InputError(f"output {output} is not an adapter folder alone, it holds {strange[:3]}; choose another")
    opened = [open_adapter(path) for path in paths]
    sums = Curvature.load(curvature) if isinstance(curvature, str | os.PathLike) else curvature
    if into is not None or len(opened) == 1:
        running = None if into is None else open_adapter(into)
        _check_same_base([*([running] if running else []), *opened])
        plan = _plan_fold(opened[0], running, method, sums, coefficient, freedom, dict(options or {}))
    else:
        _check_same_base(opened)
        plan = _Plan(
            opened,
            [1 / len(opened)] * len(opened) if weights is None else list(weights),
            sum(folded_tasks(adapter) for adapter in opened),
            sum(measured_tasks(adapter) for adapter in opened),
        )
    saved, labels, heads = _merge_saved(plan)
    products, modules = _merge_products(plan, max_rank, energy)
    if plan.curvature is not None:
        heads |= _free_heads(plan, saved)
    report = MergeReport(
        method,
        freedom,
        plan.tasks,
        plan.coefficient,
        plan.weights if plan.coefficient is None else None,
        modules,
        heads,
        [str(adapter.path) for adapter in plan.adapters],
        seconds=time.perf_counter() - start,
        measured=plan.measured,
    )
    if dry_run:
        return report
    template = plan.adapters[-1].config | {"modules_to_save": _roots(plan.adapters)}
    report = replace(report, cast_error=max(cast_error(product, storage) for product in products.values()))
    write_adapter(
        Path(output),
        template,
        products,
        saved,
        labels,
        dtype=storage,
        overwrite=overwrite,
        extra={REPORT: asdict(report)},
    )
    return replace(report, seconds=time.perf_counter() - start)


def head_modules(adapter: Adapter, curvature: Curvature) -> list[str]:
    """Saved linear heads that the curvature covers (one shared head over all tasks)."""
    return [name for name in curvature.M if name not in adapter.scaling and f"{name}.weight" in adapter.saved]


def task_vector(task: Adapter, running: Adapter | None, curvature: Curvature) -> tuple[dict, dict]:
    """(Δ, θ̂_{t−1}) of every module in the curvature; heads are absolute, so theirs is the difference."""
    delta = task.products()
    merged = running.products() if running else {}
    for head in head_modules(task, curvature):
        new = task.head_matrix(head)
        if running is None:
            delta[head] = new
        else:
            if f"{head}.weight" not in running.saved or running.labels.get(head) != task.labels.get(head):
                raise InputError(
                    f"the curvature covers {head}, so both adapters need it with the same labels in the same order; "
                    f"{running.path} has {running.labels.get(head)}, {task.path} {task.labels.get(head)}"
                )
            merged[head] = running.head_matrix(head)
            delta[head] = LowRank(new.B - merged[head].B, new.A)
    return delta, merged


def _check_arguments(
    paths, into, method, coefficient, freedom, weights, options, max_rank, energy, dtype, curvature
) -> None:
    chosen, problems = get_method(method), []
    if not paths:
        problems.append("no adapter given")
    if into is not None and len(paths) != 1:
        problems.append(f"into= folds one adapter, found {len(paths)}; merge them one by one, or leave into out")
    if len(paths) > 1 and not chosen.batch:
        problems.append(
            f"method {method!r} folds one adapter into a running merge (into=), found {len(paths)} adapters"
        )
    if weights is not None and (len(paths) == 1 or len(weights) != len(paths)):
        problems.append(f"weights need one value for each of 2 or more adapters, found {len(weights)} for {len(paths)}")
    if coefficient is not None and len(paths) > 1:
        problems.append("coefficient= belongs to folding one adapter; use weights= for several")
    if len(paths) > 1 and curvature is not None:
        problems.append("curvature= belongs to folding one adapter")
    if len(paths) > 1 and freedom != "global":
        problems.append("freedom= belongs to folding one adapter")
    if coefficient is not None and not math.isfinite(coefficient):
        problems.append(f"coefficient must be finite, found {coefficient}")
    if weights is not None and not all(math.isfinite(weight) for weight in weights):
        problems.append(f"weights must be finite, found {list(weights)}")
    if freedom == "free" and energy is not None:
        problems.append("energy= cannot be used with freedom='free'; use max_rank=")
    if freedom not in ("global", "module", "free"):
        problems.append(f"freedom must be global, module or free, found {freedom!r}")
    valid = OPTIONS.get(method, {})
    for key, value in (options or {}).items():
        if key not in valid:
            problems.append(f"unknown option {key!r} for {method}; valid: {', '.join(valid) or 'none'}")
        elif value not in valid[key]:
            problems.append(f"option {key} must be one of {', '.join(valid[key])}, found {value!r}")
    if max_rank is not None and max_rank < 1:
        problems.append(f"max_rank must be at least 1, found {max_rank}")
    if energy is not None and not 0 < energy <= 1:
        problems.append(f"energy must be in (0, 1], found {energy}")
    if dtype is not None and dtype not in (*DTYPES, *DTYPES.values()):
        problems.append(f"dtype must be one of {', '.join(DTYPES)}, found {dtype!r}")
    raise_all(problems, "merge_adapters")


def _check_same_base(adapters: Sequence[Adapter]) -> None:
    bases = {base_name(adapter.config): str(adapter.path) for adapter in adapters}
    if len(bases) > 1:
        raise InputError(f"adapters of different base models cannot be merged: {bases}")
    for module in {name for adapter in adapters for name in adapter.scaling}:
        shapes = {adapter.shape(module) for adapter in adapters if module in adapter.scaling}
        if len(shapes) > 1:
            raise InputError(f"{module} has different shapes in the adapters: {sorted(shapes)}")


def _plan_fold(
    task: Adapter,
    running: Adapter | None,
    method: str,
    curvature: Curvature | None,
    coefficient: float | None,
    freedom: Freedom,
    options: dict[str, str],
) -> _Plan:
    tasks = folded_tasks(task) if running is None else folded_tasks(running) + 1
    adapters = [task] if running is None else [running, task]
    alpha = _coefficient(task, running, method, curvature, coefficient, freedom, options, tasks)
    weights = [alpha.used] if running is None else [1.0, alpha.used]
    solved = not math.isnan(alpha.numerator)  # neither given nor averaged
    free = curvature if freedom == "free" and solved else None
    past = measured_tasks(task) - 1 if running is None else measured_tasks(running)
    return _Plan(adapters, weights, tasks, curvature.tasks if curvature else past + 1, alpha, free)


def _coefficient(task, running, method, curvature, given, freedom, options, tasks) -> Coefficient:
    if given is not None:
        return fixed_coefficient(given, tasks, "given")
    if method == "average":
        return fixed_coefficient(1.0 if running is None else 1 / tasks, tasks)
    if method == "sequential" or (running is None and curvature is None):
        return fixed_coefficient(1.0, tasks)
    if curvature is None:
        raise InputError("method 'pm' needs curvature= (the file saved with the task) or coefficient=")
    expected = 1 if running is None else measured_tasks(running) + 1
    if curvature.tasks != expected and (running is None or options.get("unmeasured_past") != "ignore"):
        there = "no running merge" if running is None else f"the running merge {running.path}"
        raise InputError(
            f"the curvature covers {curvature.tasks} task(s), but there is {there}; use the file saved with this task "
            "(or the option unmeasured_past: ignore, if the past was never measured and shall have no weight)"
        )
    delta, merged = task_vector(task, running, curvature)
    check_fits(delta, curvature)
    try:
        found = optimal_coefficient(delta, merged, curvature, freedom="module" if freedom == "module" else "global")
        unmeasured = "the past was not measured, so it has no weight" if curvature.tasks < expected else found.note
        return replace(found, one_over_t=1 / tasks, note=unmeasured)
    except ZeroCurvatureError:
        if options.get("on_zero_curvature") != "average":
            raise
        return fixed_coefficient(1.0 if running is None else 1 / tasks, tasks, "zero curvature: averaged")


def _merge_products(plan: _Plan, max_rank: int | None, energy: float | None) -> tuple[dict[str, LowRank], dict]:
    products, modules = {}, {}
    for name in dict.fromkeys(module for adapter in plan.adapters for module in adapter.scaling):
        holders = [(a, w) for a, w in zip(plan.adapters, plan.weights_for(name), strict=True) if name in a.scaling]
        terms = [adapter.product(name) for adapter, _ in holders]
        if plan.curvature is not None and name in plan.adapters[-1].scaling:
            past = terms[0] if len(terms) == 2 else None
            merged, error = free_solution(name, terms[-1], past, plan.curvature, max_rank)
        else:
            merged, error = weighted_sum(terms, [weight for _, weight in holders]), 0.0
            full = merged.rank > min(merged.shape)  # more factors than the matrix has dimensions: reduced without loss
            if energy is not None or full or (max_rank is not None and merged.rank > max_rank):
                merged, error = merged.compress(max_rank, energy)
        products[name] = merged.to(torch.float32)
        scaled = name in plan.adapters[-1].scaling and plan.curvature is None  # one factor for the whole of Δ
        alpha = plan.coefficient.for_module(name) if plan.coefficient and scaled else None
        ranks = [term.rank for term in terms]
        modules[name] = {"ranks_in": ranks, "rank_out": merged.rank, "error": error, "coefficient": alpha}
    return products, modules


def _merge_saved(plan: _Plan) -> tuple[dict[str, Tensor], dict[str, list[str]], dict[str, str]]:
    """Tensors of modules_to_save, labels, and how each tensor was merged."""
    heads = dict.fromkeys(head for adapter in plan.adapters for head in adapter.labels)
    labels = {h: list(dict.fromkeys(x for a in plan.adapters for x in a.labels.get(h, []))) for h in heads}
    saved, how = {}, {}
    for name in dict.fromkeys(tensor for adapter in plan.adapters for tensor in adapter.saved):
        head = name.rpartition(".")[0]
        absolute = _absolute(plan, head)
        whole = sum(absolute) if len(absolute) > 1 else 1.0
        holders = [(a, w) for a, w in zip(plan.adapters, absolute, strict=True) if name in a.saved]
        values = [(adapter.tensor(name), weight) for adapter, weight in holders]
        if head in labels:
            _check_rows(name, head, [a for a, _ in holders], plan.adapters)
            rows = [(dict(zip(a.labels[head], a.tensor(name), strict=True)), w) for a, w in holders]
            saved[name] = torch.stack(
                [_blend(f"{name} row {x}", [(r[x], w) for r, w in rows if x in r], whole) for x in labels[head]]
            )
            how[name] = f"by label, {len(labels[head])} rows"
        elif len({tuple(value.shape) for value, _ in values}) > 1:
            shapes = [tuple(value.shape) for value, _ in values]
            raise InputError(f"{name} has different shapes {shapes} and no labels.json says which rows belong together")
        else:
            saved[name] = _blend(name, values, whole)
            how[name] = "by coefficient" if len(values) > 1 else "from the only adapter that has it"
    return saved, labels, how


def _check_rows(name: str, head: str, holders: Sequence[Adapter], adapters: Sequence[Adapter]) -> None:
    """InputError unless every adapter with this head has its labels, this tensor, and rows of one shape."""
    if without := [str(a.path) for a in holders if head not in a.labels]:
        raise InputError(f"{', '.join(without)}: {head} has no entry in labels.json, which the other adapter has")
    if lacking := [str(a.path) for a in adapters if head in a.labels and name not in a.saved]:
        raise InputError(f"{', '.join(lacking)} has no {name}, the other adapter has")
    if len(shapes := {tuple(a.tensor(name).shape[1:]) for a in holders}) > 1:
        raise InputError(f"{name} has different row shapes: {sorted(shapes)}")


def _absolute(plan: _Plan, module: str) -> list[float]:
    """Weights of absolute values: a fold is (1 − α)·running + α·task."""
    weights = plan.weights_for(module)
    return weights if plan.coefficient is None else [1 - weights[-1], weights[-1]][-len(weights) :]


def _blend(name: str, values: Sequence[tuple[Tensor, float]], whole: float) -> Tensor:
    """Weighted mean of absolute values; one value, or equal ones, are taken as they are."""
    first = values[0][0]
    if all(torch.equal(value, first) for value, _ in values):
        return first
    if abs(whole - 1) > 1e-6:
        raise InputError(f"{name} is an absolute value, so its weights must sum to 1; found {whole:.6g}")
    total = sum(weight for _, weight in values)
    return sum(
        (value.float() * (weight / total) for value, weight in values), torch.zeros_like(first, dtype=torch.float32)
    )


def _free_heads(plan: _Plan, saved: dict[str, Tensor]) -> dict[str, str]:
    """Replace shared heads that the curvature covers by their free optimum."""
    assert plan.curvature is not None
    task, running = plan.adapters[-1], plan.adapters[0] if len(plan.adapters) == 2 else None
    delta, merged = task_vector(task, running, plan.curvature)
    how = {}
    for head in head_modules(task, plan.curvature):
        full = min(delta[head].shape)
        matrix = free_solution(head, delta[head], merged.get(head), plan.curvature, full)[0].dense().float()
        columns = saved[f"{head}.weight"].shape[1]
        saved[f"{head}.weight"] = matrix[:, :columns]
        how[f"{head}.weight"] = "free optimum"
        if f"{head}.bias" in saved:
            saved[f"{head}.bias"] = matrix[:, columns]
            how[f"{head}.bias"] = "free optimum"
    return how


def _roots(adapters: Sequence[Adapter]) -> list[str]:
    return list(dict.fromkeys(root for adapter in adapters for root in adapter.config.get("modules_to_save") or []))
