"""Where a run begins (from nothing, or from a released adapter), and where each task's training starts."""

from dataclasses import astuple, dataclass
from pathlib import Path

from pm_hf.adapters.folder import Adapter, Update, base_name, measured_tasks, open_adapter, write_adapter
from pm_hf.adapters.merge import merge_adapters
from pm_hf.adapters.naming import check_loads
from pm_hf.config.schema import RunConfig
from pm_hf.data.pool import Pool
from pm_hf.data.stream import MOST_ANSWERS, TaskStream
from pm_hf.errors import InputError, raise_all
from pm_hf.files import expand, same_files
from pm_hf.measuring.analytic_head import HeadStatistics
from pm_hf.measuring.gate import Gate
from pm_hf.merging.curvature import FULL_PRECISION, Curvature
from pm_hf.merging.lowrank import LowRank, add, balanced, compact_svd, weighted_sum
from pm_hf.merging.methods.base import Start
from pm_hf.merging.methods.linear import SEQUENTIAL
from pm_hf.models.loading import resolve_base
from pm_hf.runs.paths import (
    CURVATURE_FILE,
    GATE_FOLDER,
    MERGED_FOLDER,
    POOL_FILE,
    STATISTICS_FILE,
    WRITERS_FOLDER,
    RunPaths,
    TaskPaths,
)
from pm_hf.runs.writers import check_kept


@dataclass(frozen=True)
class StreamState:
    """What one task leaves to the next: running merge, sums of curvature, the head's statistics, its own optimum, the
    pool of written rows or the writers, and what the gate keeps."""

    merged: Path | None = None
    curvature: Path | None = None
    statistics: Path | None = None
    optimum: Path | None = None
    pool: Path | None = None
    writers: Path | None = None
    gate: Path | None = None


def load_start(config: RunConfig, stream: TaskStream) -> StreamState | None:
    """The state that `start_from` names: the adapter, and the curvature and head statistics saved with it.

    They are looked for in its folder, in the folder above, and in the task folder of the run that published it.
    InputError with everything that does not fit: base, rank, head, labels, curvature. None without `start_from`.
    """
    if config.analytic_head and not config.kind.has_head:
        _check_answers(stream)
    if config.start_from is None:
        if config.analytic_head:
            _check_classes(config, stream)
        return None
    released = open_adapter(expand(config.start_from, "start_from"))
    check_loads(released)
    state_files = (CURVATURE_FILE, STATISTICS_FILE, POOL_FILE, WRITERS_FOLDER, GATE_FOLDER)
    curvature, head, pool, writers, gate = find_beside(released, *state_files)
    adapter = _ungated(released)
    state = StreamState(adapter.path, curvature, head, adapter.path, pool, writers, gate)
    problems = _adapter_misfits(config, stream, adapter)
    if state.curvature is None:
        problems += [f"strategy.{name} needs {CURVATURE_FILE} beside it" for name in config.curvature_penalties]
    if config.keeps_pool and state.pool is None:
        problems.append(f"strategy.replay generated needs {POOL_FILE} beside it, the rows of its tasks")
    if config.keeps_pool and state.pool is not None:
        Pool.load(state.pool)
    if config.keeps_writers and state.writers is None:
        problems.append(f"strategy.replay_pool false needs {WRITERS_FOLDER} beside it, the writers of its tasks")
    if config.keeps_writers and state.writers is not None:
        check_kept(state.writers)
    must_be_measured = config.merge.options.get("unmeasured_past") == "error" and config.computes_coefficient
    if must_be_measured and state.curvature is None:
        problems.append(f"merge.options.unmeasured_past is error, and it has no {CURVATURE_FILE} beside it")
    method, measured = config.merging_method, config.measures_curvature and config.computes_coefficient
    if measured and method.curvature is not None and not method.sums and state.curvature is None:
        problems.append(f"merge.method {method.name} needs {CURVATURE_FILE} beside it; use the one saved with it")
    if config.measures_curvature:
        problems += _unmeasurable(adapter)
    if config.sums_curvature and state.curvature is not None:
        problems += _curvature_misfits(config, adapter, Curvature.load(state.curvature))
    if config.analytic_head and state.statistics is None:
        way_out = "linear" if config.kind.has_head else "none"
        problems.append(f"head.kind lda needs {STATISTICS_FILE} beside it; use head.kind: {way_out}")
    if config.head.gate and state.gate is None:
        problems.append(f"head.gate needs {GATE_FOLDER} beside it; leave it out")
    if config.analytic_head and state.statistics is not None:
        statistics = HeadStatistics.load(state.statistics)
        strict = statistics.temperature is not None
        if list(adapter.labels.values()) != ([] if statistics.layer else [statistics.labels]):
            problems.append(f"its labels are not those of {state.statistics}; use the file that was saved with it")
        if statistics.base != config.model.base_precision:
            problems.append(f"{STATISTICS_FILE} beside it: {base_misfit(statistics.base, config.model.base_precision)}")
        if config.head.means == "class" and len(set(statistics.labels)) < len(statistics.labels):
            problems.append("its head has several means a class; use head.means: task")
        if strict != config.head.strict:
            problems.append(f"its head was made with head.strict: {strict}, the config says {config.head.strict}")
        if config.head.gate and state.gate is not None:
            Gate.load(state.gate, statistics)
    raise_all(problems, f"start_from {adapter.path}")
    return state


def base_misfit(measured: str, now: str) -> str:
    """What is to be said of features that were measured on the same base in another precision."""
    words = ["in full precision" if base == FULL_PRECISION else f"in {base}" for base in (measured, now)]
    return f"its features were measured on the base {words[0]}, model.quantization has it {words[1]}; use the same"


def find_beside(adapter: Adapter, *names: str) -> list[Path | None]:
    """What was saved with an adapter: for each name the file or folder in the adapter's folder, in the folder above, or
    in the task folder of the run that published it."""
    beside = [adapter.path, adapter.path.parent, *(task.folder for task in _published_by(adapter))]
    return [next((folder / name for folder in beside if (folder / name).exists()), None) for name in names]


def _published_by(adapter: Adapter) -> list[TaskPaths]:
    """The finished tasks of the run in the folder above whose release an adapter is, the last one first."""
    tasks = reversed(RunPaths(adapter.path.parent).tasks())
    return [task for task in tasks if task.finished and same_files(task.released, adapter.path)]


def _ungated(released: Adapter) -> Adapter:
    """What a run goes on from: the merge that an adapter is a scale of, where a gate deployed it; else the adapter."""
    tasks = _published_by(released)
    return open_adapter(tasks[0].merged) if tasks and tasks[0].released != tasks[0].merged else released


def _adapter_misfits(config: RunConfig, stream: TaskStream, adapter: Adapter) -> list[str]:
    problems, base = [], resolve_base(config.model.base)
    if base_name(adapter.config) != base_name({"base_model_name_or_path": base}):
        problems.append(f"its base model is {adapter.config.get('base_model_name_or_path')}, the config's is {base}")
    rank, limit = max(layout.rank for layout in adapter.layouts.values()), config.merge.max_rank
    if limit is not None and rank > limit:
        problems.append(f"its rank {rank} is above merge.max_rank {limit}")
    if not config.kind.has_head:
        return problems
    if len(adapter.labels) != 1:
        problems.append("it has no labels.json with one head, so its rows have no names")
    elif not config.analytic_head and len(set(rows := next(iter(adapter.labels.values())))) < len(rows):
        problems.append("its head has several rows of one label (head.means: task); use head.kind: lda")
    elif config.shared_head and list(dict.fromkeys(next(iter(adapter.labels.values())))) != list(
        stream.tasks[0].labels
    ):
        problems.append("its labels are not those of the domain-incremental stream, in this order")
    return problems


def _unmeasurable(adapter: Adapter) -> list[str]:
    """Modules whose update is not one matrix, of which no curvature can be measured."""
    odd = [module for module, layout in adapter.layouts.items() if layout.count > 1 or layout.bias]
    way_out = "use a method without curvature, like average, or give merge.coefficient"
    return (
        [f"{odd[0]} has a LoRA bias or several matrices, of which no curvature is measured; {way_out}"] if odd else []
    )


def _curvature_misfits(config: RunConfig, adapter: Adapter, curvature: Curvature) -> list[str]:
    problems, measured, wanted = [], astuple(curvature.settings), astuple(config.curvature_spec)
    if measured != wanted:
        problems.append(
            f"its curvature (kind, labels, shrinkage, …) is {measured}, the config's {wanted}; sums are never mixed"
        )
    if curvature.tasks != measured_tasks(adapter):
        problems.append(f"its curvature covers {curvature.tasks} tasks, the adapter {measured_tasks(adapter)}")
    strange = sorted(set(adapter.scaling) - curvature.modules)
    if strange:
        problems.append(f"its curvature lacks modules of the adapter, first {strange[0]}")
    return problems


def _check_answers(stream: TaskStream) -> None:
    """Of a language model the analytic head chooses among answers, so every task must have some."""
    free = [task.name for task in stream.tasks if not task.own]
    if free:
        raise InputError(
            f"head.kind lda chooses among the answers of a closed list, and the completions of {', '.join(free)} are "
            f"free text (fewer than 2 or more than {MOST_ANSWERS} different ones in train, others in test, or plain "
            "texts); use head.kind: none, or another method"
        )


def _check_classes(config: RunConfig, stream: TaskStream) -> None:
    """The analytic head needs a training row of a class in the first task that has it: of every class in the first task
    where all tasks share one head."""
    known = set[str]()
    for task in stream.tasks:
        if len(task.train) and (lacking := sorted(set(task.own) - known - set(task.train.labels))):
            raise InputError(
                f"head.kind lda: task {task.name!r} has no training row of {lacking[:5]}, nor has one before it; put a "
                "task with all classes first, keep more rows (stream.train_rows), or use head.kind: "
                f"{'linear' if config.kind.has_head else 'none'}"
            )
        known |= set(task.own)


@dataclass(frozen=True)
class TaskStart:
    """What one task begins with. Adapters are opened once and handed on.

    index: its place in the stream. train_from: merged, last or base. running: the merge that it is folded into, None
    before there is one, or where nothing is merged. frozen: the adapter in place while the task trains, None: the base
    alone. factors: the last task's adapter, whose factors the new one starts with. curvature, statistics, pool,
    writers, gate: the sums, the analytic head, the written rows, the writers and what the gate keeps, as the tasks
    before it left them.
    """

    index: int
    train_from: Start
    running: Adapter | None = None
    frozen: Adapter | None = None
    factors: Adapter | None = None
    curvature: Path | None = None
    statistics: Path | None = None
    pool: Path | None = None
    writers: Path | None = None
    gate: Path | None = None

    @property
    def saved(self) -> Adapter | None:
        """Whose values that are held whole go on: embeddings, norms, and the rows of a head that all tasks share. They
        start where the backbone starts."""
        return self.frozen if self.train_from == "last" and self.frozen is not None else self.running

    def offset(self) -> dict[str, LowRank] | None:
        """{module: where the training starts less the running merge, (out, in)}; None where it starts there."""
        if self.running is None or self.train_from == "merged":
            return None
        merged, frozen = self.running.products(), {} if self.frozen is None else self.frozen.products()
        return {
            name: add(*([frozen[name]] if name in frozen else []), past.scale(-1.0)) for name, past in merged.items()
        }


def start_task(config: RunConfig, state: StreamState, index: int) -> TaskStart:
    """Open what a task starts from: as the merging method states (`train_from`), unless the config asks for another."""
    method = config.merging_method
    train_from = (config.merge.train_from or method.train_from) if config.merges else "base"
    running = open_adapter(state.merged) if config.merges and state.merged is not None else None
    wanted = method.factors or train_from == "last"
    last = open_adapter(state.optimum) if wanted and state.optimum is not None else None
    frozen = {"merged": running, "last": last, "base": None}[train_from]
    return TaskStart(
        index,
        train_from,
        running,
        frozen=None if method.factors else frozen,
        factors=last if method.factors else None,
        curvature=state.curvature,
        statistics=state.statistics,
        pool=state.pool,
        writers=state.writers,
        gate=state.gate,
    )


def check_fold(running: Adapter, adapter: Path) -> None:
    """InputError where an adapter as a task would leave it could not be folded into what the run starts from."""
    try:
        merge_adapters(adapter, adapter.parent / MERGED_FOLDER, into=running.path, method=SEQUENTIAL.name, dry_run=True)
    except InputError as error:
        raise InputError(
            f"start_from {running.path} and an adapter of these settings cannot be merged: {error}"
        ) from error


def adapter_to_fold(config: RunConfig, start: TaskStart, paths: TaskPaths) -> Path:
    """The adapter folder that is folded: the trained adapter, or what it is together with the optimum it started from.

    Trained from the last optimum, a method that takes task vectors relative to the base gets the optimum itself, one
    that takes steps from the running merge gets θ*_t − θ̂_{t−1}, of no more than its own rank. The optimum is kept for
    the next task.
    """
    if start.train_from != "last" or start.frozen is None:
        return paths.adapter
    merge_adapters(
        paths.adapter, paths.optimum, into=start.frozen.path, method=SEQUENTIAL.name, max_rank=config.merge.max_rank
    )
    if config.merging_method.train_from != "merged" or start.running is None:
        return paths.optimum
    task = open_adapter(paths.adapter)
    updates = {}
    for module, layout in task.layouts.items():
        holders = [adapter if module in adapter.layouts else None for adapter in (task, start.frozen, start.running)]
        matrices = [layout.zeros() if adapter is None else adapter.read(module) for adapter in holders]
        parts = zip(*matrices, strict=True)
        updates[module] = Update(layout.merged, [_reduced(weighted_sum(part, [1.0, 1.0, -1.0])) for part in parts])
    saved = {name: task.tensor(name) for name in task.saved}
    write_adapter(paths.change, task.config, updates, saved, task.labels, overwrite=True)
    return paths.change


def _reduced(matrix: LowRank) -> LowRank:
    """The same matrix with as few factors as its numerical rank needs: those of the last optimum and of the running
    merge have most of their directions in common, and would double at every task."""
    U, s, Vh = compact_svd(matrix)
    return balanced(U, s, Vh).to(matrix.B.dtype) if len(s) else matrix
