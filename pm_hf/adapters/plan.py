"""Everything about a merge that is decided and checked before a tensor is written."""

import json
import math
import os
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from pm_hf.adapters.folder import EMBEDDINGS, Adapter, base_name, folded_tasks, is_under, measured_tasks, merge_record
from pm_hf.adapters.layout import MERGE_REPORT, Layout
from pm_hf.adapters.naming import one_naming
from pm_hf.errors import InputError, raise_all
from pm_hf.files import is_number, read_json
from pm_hf.merging.coefficient import Coefficient, Freedom, check_fits, fixed_coefficient
from pm_hf.merging.curvature import Curvature
from pm_hf.merging.lowrank import LowRank, add
from pm_hf.merging.methods import get_method, read_options
from pm_hf.merging.methods.base import Fold, Kernel, Matrix, Method

Curvatures = str | os.PathLike | Curvature | None | Sequence[str | os.PathLike | Curvature]
LearnedSource = str | os.PathLike | Mapping[str, Any]


@dataclass(frozen=True)
class Request:
    """The method and its settings as they were asked for; options: all of the method's, those not given at default."""

    method: Method
    options: dict[str, Any]
    curvature: Curvatures = None
    coefficient: float | None = None
    freedom: Freedom = "global"
    weights: Sequence[float] | None = None
    learned: LearnedSource | None = None


@dataclass(frozen=True)
class Plan:
    """The merge of `adapters` (in a fold the running merge, if any, then the task) with `weights`.

    The result is Σ weights[i]·adapters[i], or the kernel's, or with `free` the optimum over the whole matrix.
    absolute: weights of absolute values (heads). each: one curvature for each adapter, where the kernel needs it.
    relative: the last adapter's Δ starts at the one before it, and the kernel wants the optimum.
    """

    adapters: list[Adapter]
    weights: list[float]
    absolute: list[float]
    tasks: int
    measured: int
    coefficient: Coefficient | None = None
    free: Curvature | None = None
    kernel: Kernel | None = None
    options: dict[str, Any] = field(default_factory=dict)
    each: tuple[Curvature, ...] = ()
    relative: bool = False
    state: Any = None

    @property
    def modules(self) -> list[str]:
        """Every module that an adapter adapts."""
        return list(dict.fromkeys(module for adapter in self.adapters for module in adapter.layouts))

    @property
    def bias(self) -> bool:
        """Whether the result has LoRA biases."""
        return any(adapter.config.get("lora_bias") for adapter in self.adapters)

    def weights_for(self, module: str) -> list[float]:
        """Weights of one module; they differ where each module has a coefficient of its own."""
        alpha = self._own_coefficient(module)
        return self.weights if alpha is None else [1.0, alpha][-len(self.adapters) :]

    def absolute_for(self, module: str) -> list[float]:
        """Weights of an absolute value: a fold is (1 − α)·running + α·task."""
        alpha = self._own_coefficient(module)
        return self.absolute if alpha is None else [1 - alpha, alpha][-len(self.adapters) :]

    def _own_coefficient(self, module: str) -> float | None:
        modules = None if self.coefficient is None else self.coefficient.modules
        return modules[module].used if modules is not None and module in modules else None

    def has_bias(self, module: str) -> bool:
        """Whether this module of the result has a LoRA bias; PEFT then wants one in every such layer."""
        return self.bias and self.layout(module).kind in ("linear", "conv")

    def matrices(self, module: str) -> list[Matrix]:
        """The matrices of one module as every adapter has them; rank 0 where an adapter leaves it alone."""
        layout, bias = self.layout(module), self.has_bias(module)
        read = [a.read(module, bias=bias) if module in a.layouts else layout.zeros(bias=bias) for a in self.adapters]
        if self.relative:
            read[-1] = [add(*pair) for pair in zip(read[-2], read[-1], strict=True)]
        weights = tuple(self.weights_for(module))
        names = layout.names(module, bias)
        sums = self._curvatures(module)
        return [Matrix(n, terms, weights, sums) for n, terms in zip(names, zip(*read, strict=True), strict=True)]

    def stream(self) -> Iterator[Matrix]:
        """Every matrix of the model, one module in memory at a time."""
        for module in self.modules:
            yield from self.matrices(module)

    def layout(self, module: str) -> Layout:
        """How the result stores a module."""
        return next(adapter.layouts[module] for adapter in self.adapters if module in adapter.layouts).merged

    def _curvatures(self, module: str) -> tuple[torch.Tensor, ...]:
        if not self.each:
            return ()
        pairs = list(zip(self.each, self.adapters, strict=True))
        own = [sums.sum_of(module).float() if module in adapter.layouts else None for sums, adapter in pairs]
        zero = torch.zeros_like(next(tensor for tensor in own if tensor is not None))
        return tuple(zero if tensor is None else tensor for tensor in own)


def make_plan(request: Request, opened: list[Adapter], running: Adapter | None) -> Plan:
    """Check that the adapters belong together and decide weights, coefficient and state."""
    adapters = one_naming([*([running] if running else []), *opened])
    _check_same_base(adapters)
    running, opened = (adapters[0], adapters[1:]) if running else (None, adapters)
    method = request.method
    fold = running is not None or (len(opened) == 1 and method.fold and request.weights is None)
    plan = _plan_fold(request, opened[0], running) if fold else _plan_batch(request, opened)
    if plan.kernel is None or method.prepare is None:
        return plan
    past = None if running is None or not method.saves else _saved_state(running, method.saves)
    return replace(plan, state=method.prepare(plan.stream, past, **plan.options))


def _plan_batch(request: Request, adapters: list[Adapter]) -> Plan:
    method, count = request.method, len(adapters)
    default = 1 / count if method.weight is None else method.weight
    weights = [default] * count if request.weights is None else list(request.weights)
    plan = Plan(
        adapters,
        weights,
        weights,
        sum(folded_tasks(adapter) for adapter in adapters),
        sum(measured_tasks(adapter) for adapter in adapters),
        kernel=method.kernel,
        options=request.options,
        each=curvature_per_adapter(method, request.curvature, adapters, fold=False),
    )
    return replace(plan, state=_learned(request, plan)) if method.learned else plan


def _plan_fold(request: Request, task: Adapter, running: Adapter | None) -> Plan:
    if running is None:
        adapters, tasks, past = [task], folded_tasks(task), measured_tasks(task) - 1
    else:
        adapters, tasks, past = [running, task], folded_tasks(running) + 1, measured_tasks(running)
    if request.method.coefficient is None:
        return _plan_kernel_fold(request, adapters, tasks, past + 1)
    sums = _only_curvature(request.curvature)
    alpha = _coefficient(request, task, running, sums, tasks)
    weights = [alpha.used] if running is None else [1.0, alpha.used]
    absolute = [1.0] if running is None else [1 - alpha.used, alpha.used]
    free = sums if request.freedom == "free" and alpha.source == "closed_form" else None
    return Plan(adapters, weights, absolute, tasks, sums.tasks if sums else past + 1, alpha, free)


def _plan_kernel_fold(request: Request, adapters: list[Adapter], tasks: int, measured: int) -> Plan:
    """A fold by a kernel; the first task is taken as it is."""
    method = request.method
    if len(adapters) == 1:
        return Plan(adapters, [1.0], [1.0], tasks, measured, options=request.options, state={"tasks": tasks})
    alpha = request.options.get("coefficient", 1 / tasks) if request.coefficient is None else request.coefficient
    absolute, relative = [1 - alpha, alpha], method.train_from == "merged"
    return Plan(
        adapters,
        absolute if relative else [1.0, 1.0],
        absolute,
        tasks,
        measured,
        kernel=method.kernel,
        options=request.options,
        each=curvature_per_adapter(method, request.curvature, adapters, fold=True),
        relative=relative,
        state={"tasks": tasks},
    )


def _coefficient(
    request: Request, task: Adapter, running: Adapter | None, sums: Curvature | None, tasks: int
) -> Coefficient:
    if request.coefficient is not None:
        return fixed_coefficient(request.coefficient, tasks, "given")
    assert request.method.coefficient is not None
    fold = Fold(
        tasks,
        first=running is None,
        options=request.options,
        curvature=sums,
        measured=1 if running is None else measured_tasks(running) + 1,
        into="no running merge" if running is None else f"the running merge {running.path}",
        vectors=lambda curvature: task_vector(task, running, curvature),
        freedom="module" if request.freedom == "module" else "global",
    )
    return request.method.coefficient(fold)


def _only_curvature(curvature: Curvatures) -> Curvature | None:
    given = as_list(curvature)
    if len(given) != 1:
        raise InputError(f"this method takes one curvature file, found {len(given)}")
    return load_curvature(given[0])


def _saved_state(adapter: Adapter, names: tuple[str, ...]) -> Mapping | None:
    """What the method kept beside the running merge, numbers by `names`; None where another method folded last."""
    record = merge_record(adapter)
    state = record.get("state")
    numbers = isinstance(state, Mapping) and all(map(is_number, state.values()))
    if state is not None and not (numbers and set(state) == set(names)):
        listed = f"{', '.join(names[:-1])} and {names[-1]}"
        raise InputError(f"{adapter.path / MERGE_REPORT}: state must hold {listed}, found {state!r}")
    return state if state is not None and state["tasks"] == record["tasks"] else None


def _learned(request: Request, plan: Plan) -> dict[str, Any]:
    """{matrix: {"coefficients": [...], "masks": [...]}} that fits the plan's adapters and the request."""
    if request.learned is None:
        raise InputError("this method needs learned= (--learned FILE), made by pm_hf.learn_coefficients")
    content = request.learned if isinstance(request.learned, Mapping) else read_json(Path(request.learned))
    matrices = content.get("matrices") if isinstance(content, Mapping) else None
    if not isinstance(matrices, Mapping):
        raise InputError(
            f"learned coefficients: expected {{'matrices': {{name: …}}}}, found {json.dumps(content, default=str)[:80]}"
        )
    if "digests" in content and content["digests"] != [adapter.digest() for adapter in plan.adapters]:
        raise InputError("the coefficients were learned with other adapters, or in another order; learn them again")
    for key, here in (("method", request.method.name), ("options", request.options)):
        if content.get(key, here) != here:
            raise InputError(
                f"the coefficients were learned with {key} {content[key]!r}, the merge has {here!r}; merge with the "
                "same, or learn them again"
            )
    names = {n for m in plan.modules for n in plan.layout(m).names(m, plan.has_bias(m))}
    if odd := sorted(names ^ set(matrices)):
        raise InputError(f"the learned coefficients do not fit the adapters: {len(odd)} modules, first {odd[0]}")
    count = len(plan.adapters)
    short = [(n, key) for n, row in matrices.items() for key in request.method.learned if not _is_row(row, key, count)]
    if short:
        name, key = short[0]
        raise InputError(f"the learned {key} of {name} are not {count} values, one an adapter")
    return dict(matrices)


def _is_row(learned: Any, key: str, count: int) -> bool:
    """Whether learned[key] has one finite number, or one mask of 0 and 1, for each adapter."""
    values = learned.get(key) if isinstance(learned, Mapping) else None
    if not isinstance(values, list) or len(values) != count:
        return False
    if key == "masks":
        return all(isinstance(mask, list) and all(bit in (0, 1) for bit in mask) for mask in values)
    return all(map(is_number, values))


def request_problems(request: Request, count: int, folding: bool) -> list[str]:
    """Everything about the arguments that makes no sense."""
    method, problems = request.method, list[str]()
    weights, coefficient = request.weights, request.coefficient
    if not count:
        problems.append("no adapter given")
    if folding and count != 1:
        problems.append(f"into= folds one adapter, found {count}; merge them one by one, or leave into out")
    if folding and not method.fold:
        problems.append(f"method {method.name!r} merges several adapters at once; leave into= out")
    if not folding and count > 1 and not method.batch:
        problems.append(
            f"method {method.name!r} folds one adapter into a running merge (into=), found {count} adapters"
        )
    if weights is not None and (folding or len(weights) != count or not method.batch):
        problems.append(
            f"weights need one value for each adapter of a merge of several, found {len(weights)} for {count}"
        )
    if coefficient is not None and (count > 1 or weights is not None or not method.fold):
        problems.append("coefficient= belongs to folding one adapter; use weights= for several")
    elif coefficient is not None and method.kernel is not None and "coefficient" not in method.options:
        problems.append(f"method {method.name!r} has no coefficient; leave coefficient= out")
    if count > 1 and request.curvature is not None and (method.curvature is None or method.sums):
        problems.append("curvature= belongs to folding one adapter")
    elif request.curvature is not None and method.curvature is None:
        problems.append(f"method {method.name!r} uses no curvature; leave curvature= out")
    if request.freedom != "global" and count > 1:
        problems.append("freedom= belongs to folding one adapter")
    elif request.freedom != "global" and (not method.sums or coefficient is not None):
        problems.append("freedom= belongs to method 'pm' with a curvature; leave it out")
    if weights is not None and method.learned:
        problems.append(f"weights= would contradict the coefficients that {method.name!r} has learned")
    if request.learned is not None and not method.learned:
        problems.append(f"learned= belongs to methods that learn coefficients, not to {method.name!r}")
    if coefficient is not None and not math.isfinite(coefficient):
        problems.append(f"coefficient must be finite, found {coefficient}")
    if weights is not None and not all(math.isfinite(weight) for weight in weights):
        problems.append(f"weights must be finite, found {list(weights)}")
    if request.options.get("prior") and (count > 1 or coefficient is not None):
        problems.append("prior counts the base in a fold of one adapter; leave it out here")
    if request.freedom not in ("global", "module", "free"):
        problems.append(f"freedom must be global, module or free, found {request.freedom!r}")
    return problems


def make_request(
    method: str,
    options: Mapping[str, Any] | None = None,
    *,
    coefficient: float | None = None,
    weights: Sequence[float] | None = None,
    **more: Any,
) -> Request:
    """The request with the method's options read and its numbers checked; more: the other fields of Request."""
    read = read_options(method, options)
    try:
        alpha = None if coefficient is None else float(coefficient)
        shares = None if weights is None else [float(weight) for weight in weights]
    except (TypeError, ValueError) as error:
        raise InputError(f"coefficient and weights must be numbers, found {coefficient!r} and {weights!r}") from error
    if alpha is not None and "coefficient" in (options or {}) and read["coefficient"] != alpha:
        raise InputError(
            f"coefficient= is {alpha:g} and the option coefficient {read['coefficient']:g}; give one of them"
        )
    return Request(get_method(method), read, coefficient=alpha, weights=shares, **more)


def _check_same_base(adapters: Sequence[Adapter]) -> None:
    bases = {base_name(adapter.config): str(adapter.path) for adapter in adapters}
    if len(bases) > 1:
        raise InputError(
            f"adapters of different base models cannot be merged: {bases}; if these are the same weights (moved, or a "
            "quantised copy), write one of the names into base_model_name_or_path of each adapter_config.json"
        )
    for key, what in (("revision", "revisions of the base model"), ("task_type", "task types")):
        values = {adapter.config[key] for adapter in adapters if adapter.config.get(key)}
        if len(values) > 1:
            raise InputError(f"adapters of different {what} cannot be merged: {sorted(values)}")
    fused = {tuple(sorted(adapter.config.get("target_parameters") or [])) for adapter in adapters}
    if len(fused) > 1:
        raise InputError(
            f"adapters with different target_parameters cannot be merged, found {sorted(fused)}: the tensors of fused "
            "parameters are named by the order in which PEFT wrapped them"
        )
    for module in {name for adapter in adapters for name in adapter.layouts}:
        sites = {adapter.layouts[module].site for adapter in adapters if module in adapter.layouts}
        if len(sites) > 1:
            shapes = sorted({adapter.shape(module) for adapter in adapters if module in adapter.layouts})
            raise InputError(f"{module} has different shapes in the adapters: {shapes}")
    _check_whole_modules(adapters)
    embeddings = any(layout.kind in ("embedding", "fused") for a in adapters for layout in a.layouts.values())
    if embeddings and any(adapter.config.get("lora_bias") for adapter in adapters):
        raise InputError(
            "lora_bias and LoRA on embeddings or fused parameters do not go together in PEFT; merge without"
        )


def _check_whole_modules(adapters: Sequence[Adapter]) -> None:
    """InputError where one trains a module whole and another by LoRA, or where only one ties its embeddings."""
    for saver in adapters:
        for root in saver.config.get("modules_to_save") or []:
            for other in adapters:
                both = [module for module in other.layouts if is_under(f"{module}.", root)]
                if both:
                    raise InputError(
                        f"{both[0]} is trained whole in {saver.path} and by LoRA in {other.path}; an exact merge would "
                        "need the base; train it one way in both"
                    )
    names = [[*adapter.layouts, *(name.rpartition(".")[0] for name in adapter.saved)] for adapter in adapters]
    ties = {
        bool(adapter.config.get("ensure_weight_tying"))
        for adapter, modules in zip(adapters, names, strict=True)
        if any(module.rpartition(".")[2] in EMBEDDINGS for module in modules)
    }
    if len(ties) > 1:
        raise InputError("ensure_weight_tying is set in some of the adapters only; train the embeddings one way in all")


def head_modules(adapter: Adapter, curvature: Curvature) -> list[str]:
    """Saved linear heads that the curvature covers (one shared head over all tasks)."""
    return [
        name for name in sorted(curvature.modules) if name not in adapter.layouts and f"{name}.weight" in adapter.saved
    ]


def task_vector(
    task: Adapter, running: Adapter | None, curvature: Curvature
) -> tuple[Mapping[str, LowRank], Mapping[str, LowRank]]:
    """(Δ, θ̂_{t−1}) of every module in the curvature; heads are absolute, so theirs is the difference.

    The mappings read a module when it is asked for.
    """
    delta, merged = task.products(), {} if running is None else running.products()
    heads, past = {}, {}
    for head in head_modules(task, curvature):
        heads[head] = task.head_matrix(head)
        if running is None:
            continue
        if f"{head}.weight" not in running.saved or running.labels.get(head) != task.labels.get(head):
            raise InputError(
                f"the curvature covers {head}, so both adapters need it with the same labels in the same order; "
                f"{running.path} has {running.labels.get(head)}, {task.path} {task.labels.get(head)}"
            )
        past[head] = running.head_matrix(head)
        heads[head] = LowRank(heads[head].B - past[head].B, heads[head].A)
    return ChainMap(heads, delta), ChainMap(past, merged)  # type: ignore[arg-type]  # read only


def curvature_per_adapter(
    method: Method, given: Curvatures, adapters: Sequence[Adapter], *, fold: bool
) -> tuple[Curvature, ...]:
    """The curvature of each adapter, where the method needs one each; InputError when one does not fit its adapter."""
    kind = method.curvature
    if kind is None or method.sums:
        return ()
    files = as_list(given)
    if None in files or len(files) != len(adapters):
        given_files = sum(file is not None for file in files)
        raise InputError(
            f"method {method.name!r} needs a {kind} curvature file for each of {len(adapters)} adapters, in order "
            f"(in a fold the running merge's first); found {given_files}; measure them with pm_hf.estimate_curvature"
        )
    sums = tuple(curvature for file in files if (curvature := load_curvature(file)) is not None)
    problems = [
        f"the curvature of {a.path} is of kind {c.settings.kind}, expected {kind}"
        for a, c in zip(adapters, sums, strict=True)
        if c.settings.kind != kind
    ]
    problems += [
        f"the curvature of {a.path} lacks {missing[0]}"
        for a, c in zip(adapters, sums, strict=True)
        if (missing := sorted(set(a.layouts) - c.modules))
    ]
    problems += [f"{a.path} has LoRA biases, which no curvature covers" for a in adapters if a.config.get("lora_bias")]
    raise_all(problems, f"method {method.name!r}")
    for adapter, own in list(zip(adapters, sums, strict=True))[-1 if fold else 0 :]:
        check_fits(task_vector(adapter, None, own)[0], own)  # the sums of a running merge have no Δ of it
    return sums


def as_list(given: Curvatures) -> list[str | os.PathLike | Curvature | None]:
    """One or several curvatures as a list."""
    return [given] if isinstance(given, str) or not isinstance(given, Sequence) else list(given)


def load_curvature(curvature: str | os.PathLike | Curvature | None) -> Curvature | None:
    """The sums, from a file or as they are."""
    return Curvature.load(curvature) if isinstance(curvature, str | os.PathLike) else curvature
