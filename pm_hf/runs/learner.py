"""The loop over tasks: train, measure, merge, score, write; continue, extend. The only file that knows the order."""

import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import TrainerCallback

from pm_hf.adapters.folder import base_name, merge_record, open_adapter, save_adapter
from pm_hf.adapters.merge import MergeReport, merge_adapters
from pm_hf.adapters.naming import check_loads
from pm_hf.config.loading import load_config
from pm_hf.config.schema import PENALTY_CURVATURES, RunConfig
from pm_hf.data.encoders import check_encoding, check_length, check_tokens, make_encoder, match_padding
from pm_hf.data.language import CausalEncoder, Seq2SeqEncoder
from pm_hf.data.rows import Examples
from pm_hf.data.stream import Task, TaskStream, batches, load_stream, sample
from pm_hf.distributed import (
    OtherProcessError,
    log_line,
    on_all_processes,
    on_main_process,
    process_count,
    process_index,
)
from pm_hf.environment import conditions, process_peak_memory_mb, release_memory
from pm_hf.errors import InputError
from pm_hf.files import locked, make_folder
from pm_hf.measuring.analytic_head import HeadStatistics
from pm_hf.measuring.curvature import estimate_curvature
from pm_hf.measuring.line_search import Point, smallest_within_error
from pm_hf.measuring.scores import Scorer, cut_note
from pm_hf.merging.curvature import Curvature
from pm_hf.models.loading import NeedsWeightsError, resolve_base
from pm_hf.models.lora import adapted_layers, curvature_bytes, find_head, orthonormal_start
from pm_hf.models.sharded import is_sharded, load_whole, put_weights, trained_weights
from pm_hf.models.task_model import (
    MERGED_ADAPTER,
    TASK_ADAPTER,
    TaskModel,
    build_task_model,
    task_tensors,
)
from pm_hf.runs.folder import ForgettingError, RunFolder, finished_labels, log_finished_task
from pm_hf.runs.head import gate_notes, head_policy
from pm_hf.runs.paths import STATISTICS_FILE, TaskPaths
from pm_hf.runs.records import Report, TaskRecord, primary_metric
from pm_hf.runs.rehearsal import Rehearsal, Rehearsed, replay_note
from pm_hf.runs.right_rows import RightRows
from pm_hf.runs.start import TaskStart, adapter_to_fold, check_fold, find_beside, load_start, start_task
from pm_hf.runs.tracking import Tracking
from pm_hf.training.callbacks import EarlyStopping, SequentialAveraging, Stop, stop_on_sigterm
from pm_hf.training.penalties import BaseDivergence, ElasticWeights, OrthogonalSubspaces, OutputDrift, Penalty
from pm_hf.training.record import TrainingRecord
from pm_hf.training.task_trainer import precision, train, training_arguments

__all__ = ["ForgettingError", "evaluate", "learn"]

SEARCH_COST = 0.1  # of the training's time, that the search of a classifier's coefficient takes
LEAST_SEARCH_ROWS = 64


def learn(config: str | os.PathLike | Mapping | RunConfig, **overrides: Any) -> Report:
    """Run a stream of tasks, or continue it after the last finished one, and return its report.

    config: YAML file, mapping or RunConfig; overrides: dotted keys, as in `learn("c.yaml", **{"lora.r": 4}, seed=1)`.
    All input is checked before any training. Under `accelerate launch` every process trains and measures its share of
    the rows; the first one merges, scores and writes, the others wait. Where one fails all do: it raises its error, the
    others OtherProcessError. SIGTERM to any ends all after the step, with a checkpoint to continue from. Raises
    InputError for bad input (another config in the output folder, or another run at work in it, included), StoppedError
    after SIGTERM, RemovedError when somebody removed the folder meanwhile, DivergedError for a loss that is not finite,
    and ForgettingError when `max_forgetting` is exceeded.
    """
    source = config if isinstance(config, Mapping | RunConfig) else Path(config)
    settings = load_config(source, values=overrides)
    run = prepare(settings)[0]  # its first model goes before the training begins
    with _locked_by_main(run.folder.path), stop_on_sigterm() as stop:
        done = on_main_process(run.folder.begin_run)
        on_all_processes(run.folder.check_shared)
        with run.tracking.opened(run.args, done):
            for index in range(done, len(run.stream.tasks)):
                stop.check()
                with _noticing_removal(run.folder):
                    run.learn_task(index, stop)
                    on_main_process(lambda done=index + 1: run.folder.promote(done))  # type: ignore[misc]
    return on_main_process(lambda: run.folder.report(len(run.stream.tasks)))  # promote has written it


def prepare(settings: RunConfig) -> "tuple[Run, TaskModel | None]":
    """The run that settings describe, with all its input checked as `learn` does, and nothing begun or written; and the
    first task's model without weights, None where tasks are finished or where it takes the weights to tell."""
    training_arguments(settings, Path(settings.output_dir), 0)  # joins the launcher's other processes
    run = on_all_processes(lambda: Run(settings, load_stream(settings, finished_labels(settings))))
    unbegun = on_main_process(run.folder.finished) == 0
    return run, on_all_processes(run.check_first_task) if unbegun else None


class Evaluation(dict[str, dict[str, float]]):
    """{task or held-out text: {metric: score}} of an adapter.

    left_out: {task that was not scored: why}. notes: what is to be said of the scores.
    """

    def __init__(
        self, scores: Mapping[str, dict[str, float]], left_out: Mapping[str, str], notes: Sequence[str] = ()
    ) -> None:
        super().__init__(scores)
        self.left_out, self.notes = dict(left_out), list(notes)


def evaluate(config: RunConfig, adapter: str | os.PathLike) -> Evaluation:
    """Scores of a merged adapter on the tasks of the config whose labels it knows, then on the held-out texts.

    The tasks that are left out are named in the result, with the labels that the adapter lacks. Raises InputError for
    an adapter that knows none of them, or that does not fit the base whole.
    """
    opened = open_adapter(adapter)
    check_loads(opened)
    stream = load_stream(config, finished_labels(config))
    run = Run(config, stream, opened.path)
    head, tasks, left_out = None, [*(stream.scored or stream.tasks), *stream.held_out], dict[str, str]()
    answers, labels = run.head.answers(find_beside(opened, STATISTICS_FILE)[0]), None
    if config.kind.has_head:
        if len(opened.labels) != 1:
            raise InputError(f"adapter {opened.path} has no labels.json with one head, so its rows have no names")
        head, labels = next(iter(opened.labels.items()))
    elif answers is not None:
        labels = answers.labels
    if labels is not None:
        left_out = {task.name: reason for task in tasks if (reason := _lacking(task, labels)) is not None}
        tasks = [task for task in tasks if task.name not in left_out]
    if not tasks:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise InputError(f"adapter {opened.path} knows the labels of none of the config's tasks: {reasons}")
    scores = run.scorer.score(opened.path, head, tasks, answers)
    named = dict(zip([task.name for task in tasks], scores, strict=True))
    notes, base = run.scorer.cut_notes(tasks), {"base_model_name_or_path": resolve_base(config.model.base)}
    if base_name(opened.config) != base_name(base):
        notes.append(f"the base model of the adapter is {base_name(opened.config)}, the config's {base_name(base)}")
    return Evaluation(named, left_out, notes)


def _lacking(task: Task, labels: Sequence[str]) -> str | None:
    """Which of a task's labels an adapter lacks; None where it knows all."""
    lacking = [label for label in task.own if label not in labels]
    if not lacking:
        return None
    more = f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
    return f"the adapter has no row for {', '.join(map(repr, lacking[:5]))}{more}"


@dataclass(frozen=True)
class TrainedTask:
    """A task as its training left it. head: module name of its head; record: None where only the head is computed;
    search: points of the coefficient's search, [] where there is none."""

    head: str | None
    record: TrainingRecord | None
    curvature: Curvature | None
    search: list[Point]


@contextmanager
def _locked_by_main(folder: Path) -> Iterator[None]:
    """The folder's lock, held by the main process for all."""
    with ExitStack() as held:

        def take() -> None:
            make_folder(folder)
            held.enter_context(locked(folder))

        on_main_process(take)
        yield


@contextmanager
def _noticing_removal(folder: RunFolder) -> Iterator[None]:
    """Whatever goes wrong because the run's folder was removed is a RemovedError."""
    try:
        yield
    except OtherProcessError:
        raise
    except Exception:
        folder.check_not_removed()
        raise


class Run:
    """One stream: what one task goes through."""

    def __init__(self, config: RunConfig, stream: TaskStream, adapter: Path | None = None) -> None:
        self.config, self.stream = config, stream
        self.folder = RunFolder(config, stream, load_start(config, stream))
        self.tracking = Tracking(self.folder)
        self.args = args = training_arguments(config, self.folder.path, 0)
        self.encoder = make_encoder(config, adapter)
        tasks = (*(stream.scored or stream.tasks), *stream.held_out)  # a joint task has the rows of those scored
        check_encoding(self.encoder, [rows for task in tasks for rows in (task.train, task.eval, task.test)])
        self.scorer = Scorer(config, self.encoder, args.per_device_eval_batch_size, precision(args), args.device)
        self.head = head_policy(config, self.scorer)
        self.rehearsal = None
        if config.rehearses and isinstance(self.encoder, CausalEncoder | Seq2SeqEncoder):
            self.rehearsal = Rehearsal(config, stream, self.encoder, self.scorer)
        self._first_checked = False  # whether the first task's model was checked, without its weights
        self._check_rows_suffice(args.train_batch_size if args.dataloader_drop_last else 0)

    def learn_task(self, index: int, stop: Stop) -> None:
        """Train, measure, merge and score one task; step.json is written last."""
        began, task, paths = time.perf_counter(), self.stream.tasks[index], self.folder.task(index)
        notes = on_main_process(lambda: self.folder.begin_task(index))
        start = on_all_processes(lambda: start_task(self.config, self.folder.state(index), index))
        rehearsed = Rehearsed() if self.rehearsal is None else self.rehearsal.rehearsed(start, stop)
        trained = self._train_and_measure(task, start, rehearsed, stop)
        release_memory()  # the scores load the model again, and two of them may be too many
        written = None
        if self.rehearsal is not None:
            written = self.rehearsal.write(task, start, rehearsed.pool, paths, stop)
            stop.check()

        def finish() -> None:
            """What process 0 does with the trained task."""
            merge = self._merge(paths, start, trained)
            of_head = self.head.after_merge(paths, task, start, trained.head, trained=self.trains_backbone(index))
            gate = self.head.gate(paths, task, start, trained.head)
            (model, labels), replay = self.scorer.load(paths.released, trained.head), {}
            if self.rehearsal is not None and written is not None:
                replay = self.rehearsal.finish(model, written, rehearsed, start, paths)
            answers = self.head.answers(paths.statistics)
            scores, held_out = self._scores(model, labels, trained.head, index, answers)
            untouched = self._untouched(model) if index == 0 else {}
            record = TaskRecord(
                task=task.name,
                labels=list(task.labels),
                fingerprint=task.fingerprint(),
                test_fingerprint=task.test_fingerprint(),
                head=trained.head,
                train_from=start.train_from,
                freedom=merge.freedom,
                coefficient=merge.coefficient,
                merge_error=merge.error,
                curvature_bytes=0 if trained.curvature is None else trained.curvature.nbytes,
                test_rows=len(task.test),
                training=trained.record,
                scores=scores,
                held_out=held_out,
                confusions=self.scorer.confusions(self._scored(index)),
                right={
                    task.name: RightRows.of(right, task.test_digest())
                    for task in self._scored(index)
                    if (right := self.scorer.right.get(task.name))
                },
                untouched=untouched,
                replay=replay,
                search=trained.search,
                gate=gate,
                seconds=time.perf_counter() - began,
                process_peak_memory_mb=process_peak_memory_mb(),
                conditions=conditions(*self.config.model.packages),
                notes=[
                    *notes,
                    *rehearsed.notes,
                    *of_head,
                    *self._learning_notes(task, trained, index),
                    *self._truncation_notes(task, trained, index),
                    *([replay_note(replay)] if replay else []),
                    *gate_notes(gate),
                ],
            )
            self.folder.finish_task(index, record)
            self.tracking.log(index + 1)
            metric = primary_metric(list(record.scores), [seen.own for seen in self.stream.seen(index)])
            log_finished_task(index, len(self.stream.tasks), record, metric)

        on_main_process(finish)
        release_memory()

    def _train_and_measure(self, task: Task, start: TaskStart, rehearsed: Rehearsed, stop: Stop) -> TrainedTask:
        """Train, measure and save one task."""
        built, record = on_all_processes(lambda: self._build(task, start)), None
        if start.index or not self._first_checked:  # the first one was before the folder was made, where it could be
            on_all_processes(lambda: self._check_built(built, start))
        if self.trains_backbone(start.index):
            with on_all_processes(lambda: self.head.before_training(built, task, start)):
                record = self._train(built, task, start, rehearsed, stop)
            built = self._unsharded(built, task, start)
        stop.check()
        curvature = self._measure(built, task, start)
        stop.check()
        search = on_main_process(lambda: self._search(built, task, start, rehearsed, record))
        stop.check()
        on_main_process(lambda: self._save(built, task, self.folder.task(start.index).adapter))
        return TrainedTask(built.head, record, curvature, search)

    def trains_backbone(self, index: int) -> bool:
        """Whether a task trains the backbone."""
        frozen_now = self.config.head.strict and (index > 0 or self.folder.start is not None)
        return bool(self.config.trains) and not frozen_now

    def check_first_task(self) -> TaskModel | None:
        """InputError where the first task cannot be trained as the settings say, or not be merged with `start_from`.

        It builds the task's model without weights, and merges the adapter that would come of it without writing.
        Returns that model; None where it takes the weights to tell, when the first task begins.
        """
        start, task = start_task(self.config, self.folder.state(0), 0), self.stream.tasks[0]
        try:
            built = self._build(task, start, skeleton=True)
        except NeedsWeightsError:
            return None
        self._check_built(built, start)
        self._first_checked = True
        if start.running is not None:
            check_tokens(self.encoder, built.model.get_base_model())
            with tempfile.TemporaryDirectory() as folder:
                adapter = Path(folder) / "adapter"
                self._save(built, task, adapter)
                check_fold(start.running, adapter)
        return built

    def time_first_task(self) -> float | None:
        """Train the first task as the settings say, without written rows and without measuring or merging anything;
        the median of its steps' seconds."""
        start, task = start_task(self.config, self.folder.state(0), 0), self.stream.tasks[0]
        built = self._build(task, start)
        with stop_on_sigterm() as stop, self.head.before_training(built, task, start):
            return self._train(built, task, start, Rehearsed(), stop).step_seconds

    def _build(self, task: Task, start: TaskStart, *, skeleton: bool = False) -> TaskModel:
        """The model of a task; skeleton: without weights, to check that it can be built."""
        config = self.config
        load_whole()
        built = build_task_model(
            config.model,
            config.lora,
            task.labels,
            start.frozen,
            config.seed,
            start.index,
            kind=config.stream.kind,
            saved_from=start.saved,
            continue_head=config.shared_head or bool(config.strategy.replay_per_class),
            skeleton=skeleton,
        )
        match_padding(built.model, self.encoder)
        if start.factors is not None:
            orthonormal_start(built.model, TASK_ADAPTER, start.factors)
        return built

    def _unsharded(self, built: TaskModel, task: Task, start: TaskStart) -> TaskModel:
        """The trained model; where it is spread over the processes, another one with its weights."""
        if not is_sharded(built.model):
            return built
        weights = trained_weights(built.model)
        again = on_all_processes(lambda: self._build(task, start))
        put_weights(again.model, weights)
        again.model.to(self.scorer.device)
        return again

    def _check_rows_suffice(self, whole_batch: int) -> None:
        """InputError where a process would have no row to measure the curvature on, or no whole batch of so many rows
        to train on."""
        samples = self.config.curvature.samples
        sizes = [len(task.train) for task in self.stream.tasks if len(task.train)]
        fewest = min(
            sizes, default=max(1, whole_batch) * process_count()
        )  # a finished task may leave its training rows out
        if self.config.trains and fewest < whole_batch * process_count():
            raise InputError(
                f"training.dataloader_drop_last: the smallest task has {fewest} training rows, less than one batch of "
                f"{whole_batch * process_count()}; lower per_device_train_batch_size, or leave it out"
            )
        if self.config.measures_curvature and min(fewest, samples or fewest) < process_count():
            raise InputError(
                f"curvature.samples is {samples} and the smallest task has {fewest} training rows: each of "
                f"{process_count()} processes needs one to measure the curvature; launch fewer processes"
            )

    def _check_built(self, built: TaskModel, start: TaskStart) -> None:
        if start.running is not None and (start.curvature is not None or self.config.measures_curvature):
            strange = set(start.running.scaling) ^ set(adapted_layers(built.model, TASK_ADAPTER))
            if strange:
                raise InputError(
                    f"lora.target_modules differ from the running merge's in {sorted(strange)[:3]}, and the curvature "
                    "is measured on the modules of both; name the same, or use a method without curvature, like average"
                )
        _check_rank_fits(self.config, built, len(self.stream.tasks) - start.index)
        check_length(self.config, built.model.get_base_model())
        self.head.check(built)
        if self.config.measures_curvature and start.curvature is None:
            self._check_curvature_fits(built)

    def _check_curvature_fits(self, built: TaskModel) -> None:
        """Say how large the sums will be; InputError above the limit."""
        settings = self.config.curvature
        size, gib = curvature_bytes(built.model, TASK_ADAPTER, self.config.curvature_spec.kind), 2**30
        log_line(f"curvature: {size / 2**20:.1f} MiB, the same for every task")
        if size > settings.max_gib * gib:
            raise InputError(
                f"curvature.kind {settings.kind} needs {size / gib:.1f} GiB, curvature.max_gib is "
                f"{settings.max_gib:g}; use kind: factored, fewer target_modules, or a higher limit"
            )

    def _train(
        self, built: TaskModel, task: Task, start: TaskStart, rehearsed: Rehearsed, stop: Stop
    ) -> TrainingRecord:
        args = training_arguments(self.config, self.folder.task(start.index).checkpoints, start.index)
        examples = on_all_processes(lambda: self.encoder.training(task.train.with_rows(task.replayed), task.labels))
        cut = getattr(self.encoder, "cut", 0)
        patience = self.config.early_stopping_patience
        record = train(
            built,
            examples,
            self.encoder.collate,
            args,
            callbacks=[
                *self.tracking.training(args, start.index),
                stop,
                *_callbacks(self.config, built, start),
                *([EarlyStopping(patience)] if patience else []),
            ],
            penalties=make_penalties(self.config, built, start),
            evaluated=self.encoder.examples(task.eval, task.labels) if len(task.eval) else None,
            rehearsed=on_all_processes(lambda: self._rehearsed_examples(rehearsed)),
        )
        return replace(record, cut_rows=cut)

    def _rehearsed_examples(self, rehearsed: Rehearsed) -> Examples:
        encoder, pool = self.encoder, rehearsed.pool
        return pool.examples(encoder) if isinstance(encoder, CausalEncoder | Seq2SeqEncoder) and pool.rows else []

    def _learning_notes(self, task: Task, trained: TrainedTask, index: int) -> list[str]:
        """What is to be said where a task was hardly learned; with a penalty in its loss nothing can be."""
        strategy, classes = self.config.strategy, None
        penalties = (*PENALTY_CURVATURES, "olora_weight", "base_kl_weight")
        if trained.record is None or any(getattr(strategy, name) for name in penalties):
            return []
        if self.config.kind.has_head:
            against = self.stream.seen(index) if self.config.head.training == "seen" else [task]
            classes = len({label for each in against for label in each.labels})
        note = trained.record.learning_note(classes)
        return [] if note is None else [note]

    def _truncation_notes(self, task: Task, trained: TrainedTask, index: int) -> list[str]:
        """What is to be said of rows that the model does not see whole."""
        rows, cut = len(task.train) + len(task.replayed), trained.record.cut_rows if trained.record else 0
        scored = [*(self.stream.scored or [task]), *(self.stream.held_out if index == 0 else ())]
        return [cut_note(cut, rows, "training rows")] * bool(cut) + self.scorer.cut_notes(scored)

    def _measure(self, built: TaskModel, task: Task, start: TaskStart) -> Curvature | None:
        config, settings, spec = self.config, self.config.curvature, self.config.curvature_spec
        if not config.measures_curvature or not self.trains_backbone(start.index):
            return None
        rows = sample(task.train, settings.samples, config.seed)
        rows = rows.take(range(process_index(), len(rows), process_count()))
        # trained from another model than the running merge, Δ is not the task's adapter alone
        moved = start.running is not None and start.train_from != "merged"
        curvature = estimate_curvature(
            built.model,
            batches(self.encoder, self.encoder.examples(rows, task.labels), self.scorer.batch_size),
            adapter=TASK_ADAPTER,
            kind=spec.kind,
            labels=settings.labels,
            shrinkage=spec.shrinkage if spec.kind == "gram" else None,
            normalisation=settings.normalisation,
            at=settings.at,
            base=spec.base,
            previous=Curvature.load(start.curvature) if config.sums_curvature and start.curvature is not None else None,
            heads=self.head.curvature_heads(built, start),
            merged=start.running.products() if moved and start.running is not None else None,
            seed=config.seed + start.index,
            autocast=self.scorer.autocast,
            loss_reduction=spec.loss_reduction,  # type: ignore[arg-type]
        )
        path = self.folder.task(start.index).curvature
        on_main_process(lambda: curvature.save(path))
        return Curvature.load(path)  # from here on it is read a chunk at a time

    def _search(
        self, built: TaskModel, task: Task, start: TaskStart, rehearsed: Rehearsed, record: TrainingRecord | None
    ) -> list[Point]:
        """What the coefficient is chosen by where it is searched for; the first task is taken as it is."""
        if not self.config.searches or start.running is None or record is None:
            return []
        if self.rehearsal is not None:
            return self.rehearsal.search(built, task, rehearsed.pool)
        args = training_arguments(self.config, self.folder.path, start.index)
        batch = args.train_batch_size * args.gradient_accumulation_steps * process_count()
        # three passes without gradients over this share of the rows that were trained on, of which each took three too
        rows = max(LEAST_SEARCH_ROWS, int(SEARCH_COST * record.optimizer_steps * batch))
        return self.head.search(built, task, start, rows)

    def _save(self, built: TaskModel, task: Task, path: Path) -> None:
        factors, saved, peft_config = task_tensors(built.model, self.config.stream.kind)
        labels = {} if built.head is None else {built.head: list(task.labels)}
        save_adapter(path, peft_config, factors, saved, labels)

    def _merge(self, paths: TaskPaths, start: TaskStart, trained: TrainedTask) -> MergeReport:
        settings, method, curvature = self.config.merge, self.config.merging_method, trained.curvature
        coefficient: float | None = None  # the first task is taken as it is
        if start.running is not None and (self.config.averages or self.config.searches):
            tasks = merge_record(start.running)["tasks"] + 1
            coefficient = smallest_within_error(trained.search) if trained.search else 1 / tasks
        elif start.running is not None and not self.config.computes_coefficient:
            coefficient = settings.coefficient  # type: ignore[assignment]
        if not self.trains_backbone(start.index):
            coefficient = 0.0  # nothing was trained: the running merge stays as it is
        options, curvatures = dict(settings.options), list[Curvature]()
        if curvature is not None and coefficient is None and method.curvature is not None:
            curvatures.append(curvature)
            if not method.sums and start.running is not None and start.curvature is not None:
                curvatures.insert(0, Curvature.load(start.curvature))
        if method.sums and coefficient is None:
            # `start_from` may come without sums; what a task of this run left is never ignored
            unmeasured = start.index == 0 and start.running is not None and start.curvature is None
            options["on_zero_curvature"] = settings.on_zero_curvature
            options.setdefault("unmeasured_past", "ignore" if unmeasured else "error")
        report = merge_adapters(
            adapter_to_fold(self.config, start, paths),
            paths.merged,
            into=None if start.running is None else start.running.path,
            method=method.name,
            curvature=curvatures or None,
            coefficient=coefficient,
            freedom=settings.freedom or "global" if coefficient is None else "global",
            options=options,
            max_rank=settings.max_rank,
        )
        if not self.config.searches or start.running is None or report.coefficient is None:
            return report
        note = None if trained.search else "no written row of an earlier task to search with: 1/t"
        return replace(report, coefficient=replace(report.coefficient, source="line_search", note=note))

    def _scored(self, index: int) -> Sequence[Task]:
        """The tasks that are scored after a task."""
        return self.stream.seen(index) if self.config.merges else (self.stream.tasks[index],)

    def _scores(
        self, model: nn.Module, labels: Sequence[str], head: str | None, index: int, answers: HeadStatistics | None
    ) -> tuple[dict[str, list[float | None]], dict[str, dict[str, float]]]:
        """({metric: one score for each task seen}, {text that is never trained on: {metric: score}}) of a merge.

        Where tasks are not merged, each keeps the scores of its own adapter.
        """
        merges, texts, tasks = self.config.merges, self.stream.held_out, self._scored(index)
        measured = self.scorer.score_loaded(model, labels, head, [*tasks, *texts], answers)
        of_tasks, of_texts = measured[: len(tasks)], measured[len(tasks) :]
        past = self.folder.record(index - 1).scores if index and not merges else {}
        before: list[float | None] = [] if merges else [None] * index
        names = dict.fromkeys([*past, *(name for values in of_tasks for name in values)])
        scores = {name: [*past.get(name, before), *(values.get(name) for values in of_tasks)] for name in names}
        return scores, {text.name: values for text, values in zip(texts, of_texts, strict=True)}

    def _untouched(self, model: PeftModel) -> dict[str, dict[str, float]]:
        """{text that is never trained on: {metric: score}} of the base, without the adapter that it has here."""
        texts = self.stream.held_out
        if not texts:
            return {}
        with model.disable_adapter():
            measured = self.scorer.score_loaded(model, [], None, texts)
        return {text.name: values for text, values in zip(texts, measured, strict=True)}


def make_penalties(config: RunConfig, built: TaskModel, start: TaskStart) -> list[Penalty]:
    """The penalties of the strategy; none of those that need a past before the first task."""
    strategy, penalties = config.strategy, list[Penalty]()
    if strategy.ewc_weight and start.curvature is not None:
        penalties.append(
            ElasticWeights(built.model, TASK_ADAPTER, Curvature.load(start.curvature), strategy.ewc_weight)
        )
    if strategy.drift_weight and start.curvature is not None:
        penalties.append(
            OutputDrift(
                built.model, TASK_ADAPTER, Curvature.load(start.curvature), strategy.drift_weight, start.offset()
            )
        )
    if strategy.olora_weight and start.running is not None:
        penalties.append(OrthogonalSubspaces(built.model, TASK_ADAPTER, MERGED_ADAPTER, strategy.olora_weight))
    if strategy.base_kl_weight:
        penalties.append(BaseDivergence(strategy.base_kl_weight, strategy.divergence))
    return penalties


def _callbacks(config: RunConfig, built: TaskModel, start: TaskStart) -> Sequence[TrainerCallback]:
    """SFA's averaging, from the second task on."""
    strategy = config.strategy
    if not strategy.averaging_period or start.running is None:
        return []
    head = find_head(built.model, str(built.head)) if config.shared_head else None
    return [SequentialAveraging(built.model, TASK_ADAPTER, head, strategy.averaging_period, strategy.averaging_weight)]


def _check_rank_fits(config: RunConfig, built: TaskModel, tasks: int) -> None:
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
