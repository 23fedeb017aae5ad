"""Where a run begins: from nothing, or from a released adapter with what lies beside it."""

from dataclasses import dataclass
from pathlib import Path

from pm_hf.adapters import Adapter, base_name, measured_tasks, open_adapter
from pm_hf.errors import InputError, raise_all
from pm_hf.files import same_folder
from pm_hf.heads import HeadStatistics
from pm_hf.merging.curvature import NORMALISATIONS, Curvature
from pm_hf.modeling import resolve_base
from pm_hf.settings import RunConfig
from pm_hf.tasks import STEP, TaskStream

CURVATURE, STATISTICS = "curvature.safetensors", "head_statistics.safetensors"
OPTIMUM = "optimum"  # adapter folder of the last task's own optimum, for methods that train from it
CHANGE = "change"  # adapter folder of θ*_t − θ̂_{t−1}, where training started from the last optimum and not from θ̂_{t−1}


@dataclass(frozen=True)
class State:
    """What one task leaves to the next: running merge, sums of curvature, the head's statistics, its own optimum."""

    merged: Path | None = None
    curvature: Path | None = None
    statistics: Path | None = None
    optimum: Path | None = None


def released(config: RunConfig, stream: TaskStream) -> State | None:
    """The state that `start_from` names: the adapter, and the curvature and head statistics saved with it.

    They are looked for in its folder, in the folder above, and in the task folder of the run that published it.
    InputError with everything that does not fit: base, rank, head, labels, curvature. None without `start_from`.
    """
    if config.head.kind == "lda" and config.start_from is None:
        _check_first_task(stream)
    if config.start_from is None:
        return None
    adapter = open_adapter(Path(config.start_from).expanduser())
    steps = sorted(adapter.path.parent.glob(f"task-*/{STEP}"), reverse=True)
    beside = [adapter.path, adapter.path.parent]
    beside += [step.parent for step in steps if same_folder(step.parent / "merged", adapter.path)]

    def first(name: str) -> Path | None:
        return next((folder / name for folder in beside if (folder / name).is_file()), None)

    state = State(adapter.path, first(CURVATURE), first(STATISTICS), adapter.path)
    problems = _adapter_misfits(config, stream, adapter)
    elastic = config.strategy.ewc_weight > 0
    if elastic and state.curvature is None:
        problems.append(f"strategy.ewc_weight needs {CURVATURE} beside it")
    measured = (config.merge.method == "pm" and config.merge.coefficient is None) or elastic
    if measured and state.curvature is not None:
        problems += _curvature_misfits(config, adapter, Curvature.load(state.curvature))
    if config.head.kind == "lda" and state.statistics is None:
        problems.append(f"head.kind lda needs {STATISTICS} beside it; use head.kind: linear")
    if config.head.kind == "lda" and state.statistics is not None:
        statistics = HeadStatistics.load(state.statistics)
        strict = statistics.temperature is not None
        if list(adapter.labels.values()) != [statistics.labels]:
            problems.append(f"its labels are not those of {state.statistics}; use the file that was saved with it")
        if config.head.means == "class" and len(set(statistics.labels)) < len(statistics.labels):
            problems.append("its head has several means a class; use head.means: task")
        if strict != config.head.strict:
            problems.append(f"its head was made with head.strict: {strict}, the config says {config.head.strict}")
    raise_all(problems, f"start_from {adapter.path}")
    return state


def _adapter_misfits(config: RunConfig, stream: TaskStream, adapter: Adapter) -> list[str]:
    problems, base = [], resolve_base(config.model.base)
    if base_name(adapter.config) != base_name({"base_model_name_or_path": base}):
        problems.append(f"its base model is {adapter.config.get('base_model_name_or_path')}, the config's is {base}")
    rank, limit = max(adapter.product(module).rank for module in adapter.scaling), config.merge.max_rank
    if limit is not None and rank > limit:
        problems.append(f"its rank {rank} is above merge.max_rank {limit}")
    shared = stream.scenario == "domain_incremental"
    if config.head.kind == "none":
        return problems
    if len(adapter.labels) != 1:
        problems.append("it has no labels.json with one head, so its rows have no names")
    elif config.head.kind == "linear" and len(set(rows := next(iter(adapter.labels.values())))) < len(rows):
        problems.append("its head has several rows of one label (head.means: task); use head.kind: lda")
    elif shared and list(dict.fromkeys(next(iter(adapter.labels.values())))) != list(stream.tasks[0].labels):
        problems.append("its labels are not those of the domain-incremental stream, in this order")
    return problems


def _curvature_misfits(config: RunConfig, adapter: Adapter, curvature: Curvature) -> list[str]:
    ours, theirs, problems = config.curvature, curvature.settings, []
    gram = ours.kind == "gram"
    normalisation = NORMALISATIONS[ours.normalisation]
    wanted: tuple = (ours.kind, "none" if gram else ours.labels, ours.shrinkage if gram else 0.0, normalisation)
    found: tuple = (theirs.kind, theirs.labels, theirs.shrinkage, theirs.normalisation)
    if config.head.kind == "none" and not gram:
        wanted, found = (*wanted, ours.loss_reduction), (*found, theirs.loss_reduction)
    if found != wanted:
        problems.append(
            f"its curvature (kind, labels, shrinkage, …) is {found}, the config's {wanted}; sums are never mixed"
        )
    if curvature.tasks != measured_tasks(adapter):
        problems.append(f"its curvature covers {curvature.tasks} tasks, the adapter {measured_tasks(adapter)}")
    strange = sorted(set(adapter.scaling) - curvature.modules)
    if strange:
        problems.append(f"its curvature lacks modules of the adapter, first {strange[0]}")
    return problems


def _check_first_task(stream: TaskStream) -> None:
    """With one head shared by all tasks, the analytic head needs a row of every class in the first task."""
    first = stream.tasks[0]
    if len(first.train) and (lacking := sorted(set(first.labels) - set(first.train.labels))):
        raise InputError(
            f"head.kind lda: task {first.name!r}, the first, has no row of {lacking[:5]}; "
            "put a task with all classes first, or use head.kind: linear"
        )
