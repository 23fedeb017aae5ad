"""Where a run begins (from nothing, or from a released adapter), and where each task's training starts."""

from dataclasses import dataclass
from pathlib import Path

from pm_hf.adapters.folder import Adapter, Update, base_name, measured_tasks, open_adapter, write_adapter
from pm_hf.adapters.merge import merge_adapters
from pm_hf.config.schema import RunConfig
from pm_hf.data.stream import STEP_FILE, TaskStream
from pm_hf.errors import InputError, raise_all
from pm_hf.files import same_folder
from pm_hf.measuring.analytic_head import HeadStatistics
from pm_hf.merging.curvature import NORMALISATIONS, Curvature
from pm_hf.merging.lowrank import LowRank, compact_svd, weighted_sum
from pm_hf.merging.methods import get_method
from pm_hf.models.loading import resolve_base
from pm_hf.models.lora import adapted_layers, orthonormal_start
from pm_hf.models.task_model import MERGED_ADAPTER, TASK_ADAPTER, TaskModel

CURVATURE_FILE, STATISTICS_FILE = "curvature.safetensors", "head_statistics.safetensors"


OPTIMUM_FOLDER = "optimum"  # adapter folder of the last task's own optimum, for methods that train from it


CHANGE_FOLDER = (
    "change"  # adapter folder of θ*_t − θ̂_{t−1}, where training started from the last optimum and not from θ̂_{t−1}
)


@dataclass(frozen=True)
class StreamState:
    """What one task leaves to the next: running merge, sums of curvature, the head's statistics, its own optimum."""

    merged: Path | None = None
    curvature: Path | None = None
    statistics: Path | None = None
    optimum: Path | None = None


def load_start(config: RunConfig, stream: TaskStream) -> StreamState | None:
    """The state that `start_from` names: the adapter, and the curvature and head statistics saved with it.

    They are looked for in its folder, in the folder above, and in the task folder of the run that published it.
    InputError with everything that does not fit: base, rank, head, labels, curvature. None without `start_from`.
    """
    if config.head.kind == "lda" and config.start_from is None:
        _check_first_task(stream)
    if config.start_from is None:
        return None
    adapter = open_adapter(Path(config.start_from).expanduser())
    steps = sorted(adapter.path.parent.glob(f"task-*/{STEP_FILE}"), reverse=True)
    beside = [adapter.path, adapter.path.parent]
    beside += [step.parent for step in steps if same_folder(step.parent / "merged", adapter.path)]

    def first(name: str) -> Path | None:
        return next((folder / name for folder in beside if (folder / name).is_file()), None)

    state = StreamState(adapter.path, first(CURVATURE_FILE), first(STATISTICS_FILE), adapter.path)
    problems = _adapter_misfits(config, stream, adapter)
    elastic = config.strategy.ewc_weight > 0
    if elastic and state.curvature is None:
        problems.append(f"strategy.ewc_weight needs {CURVATURE_FILE} beside it")
    measured = (config.merge.method == "pm" and config.merge.coefficient is None) or elastic
    if measured and state.curvature is not None:
        problems += _curvature_misfits(config, adapter, Curvature.load(state.curvature))
    if config.head.kind == "lda" and state.statistics is None:
        problems.append(f"head.kind lda needs {STATISTICS_FILE} beside it; use head.kind: linear")
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


@dataclass(frozen=True)
class TrainingStart:
    """Where a task's training starts: with the adapter `frozen` in place, or with the factors of the last task."""

    train_from: str  # merged, last or base
    frozen: Path | None = None
    factors: Path | None = None


def choose_start(config: RunConfig, state: StreamState) -> TrainingStart:
    """The start that the merging method states (`train_from`), unless the config asks for another."""
    method = get_method(config.merge.method or "pm")
    where = "base" if config.strategy.individual else config.merge.train_from or method.train_from
    if method.factors:
        return TrainingStart(where, factors=state.optimum)
    return TrainingStart(where, {"merged": state.merged, "last": state.optimum, "base": None}[where])


def adapter_to_fold(folder: Path, start: TrainingStart, state: StreamState, method: str, max_rank: int | None) -> Path:
    """The adapter folder that is folded: the trained adapter, or what it is together with the optimum it started from.

    Trained from the last optimum, a method that takes task vectors relative to the base gets the optimum itself, one
    that takes steps from the running merge gets θ*_t − θ̂_{t−1}, of no more than its own rank. The optimum is kept for
    the next task.
    """
    trained = folder / "adapter"
    if start.train_from != "last" or start.frozen is None:
        return trained
    merge_adapters(trained, folder / OPTIMUM_FOLDER, into=start.frozen, method="sequential", max_rank=max_rank)
    if get_method(method).train_from != "merged" or state.merged is None:
        return folder / OPTIMUM_FOLDER
    task, last, merged = (open_adapter(path) for path in (trained, start.frozen, state.merged))
    updates = {}
    for module, layout in task.layouts.items():
        parts = zip(*(adapter.read(module, bias=False) for adapter in (task, last, merged)), strict=True)
        updates[module] = Update(layout.merged, [_reduced(weighted_sum(part, [1.0, 1.0, -1.0])) for part in parts])
    saved = {name: task.tensor(name) for name in task.saved}
    write_adapter(
        folder / CHANGE_FOLDER, task.config, updates, saved, task.labels, ambiguous=False, overwrite=True, extra={}
    )
    return folder / CHANGE_FOLDER


def _reduced(matrix: LowRank) -> LowRank:
    """The same matrix with as few factors as its numerical rank needs: those of the last optimum and of the running
    merge have most of their directions in common, and would double at every task."""
    U, s, Vh = compact_svd(matrix)
    root = s.sqrt()
    return LowRank(U * root, root[:, None] * Vh).to(matrix.B.dtype) if len(s) else matrix


def init_from(config: RunConfig, built: TaskModel, start: TrainingStart) -> None:
    """Give the task adapter the factors that its start names."""
    if start.factors is not None:
        orthonormal_start(built.model, TASK_ADAPTER, open_adapter(start.factors))


def check_rank_fits(config: RunConfig, built: TaskModel, tasks: int) -> None:
    """InputError where O-LoRA's running merge could not hold the factors of `tasks` more tasks side by side."""
    if not config.strategy.olora_weight:
        return
    for name, layer in adapted_layers(built.model, TASK_ADAPTER).items():
        past = layer.lora_A[MERGED_ADAPTER].out_features if MERGED_ADAPTER in layer.lora_A else 0
        rank, limit = past + config.lora.r * (tasks - 1), min(layer.in_features, layer.out_features)
        if rank > limit:
            raise InputError(
                f"strategy.olora_weight keeps the A of every task: rank {rank} before the last one, but {name} has "
                f"room for {limit}; use a smaller lora.r, or fewer tasks"
            )
