"""The loop over tasks: train, measure, merge, score, write; continue, extend. The only file that knows the order."""

import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from pm_hf.adapters.folder import Adapter, open_adapter, save_adapter
from pm_hf.adapters.merge import MergeReport, merge_adapters
from pm_hf.config.loading import load_config
from pm_hf.config.schema import RunConfig
from pm_hf.data.encoders import check_encoding, check_length, make_encoder
from pm_hf.data.stream import Task, TaskStream, batches, load_stream, sample
from pm_hf.distributed import on_all_processes, on_main_process, process_count, process_index
from pm_hf.environment import conditions, release_memory
from pm_hf.errors import InputError
from pm_hf.files import locked
from pm_hf.measuring.curvature import estimate_curvature
from pm_hf.measuring.scores import Scorer, cut_note
from pm_hf.merging.curvature import Curvature
from pm_hf.merging.lowrank import LowRank
from pm_hf.models.lora import adapted_layers, curvature_bytes, find_head, head_matrix
from pm_hf.models.sharded import is_sharded, load_whole, put_weights, trained_weights
from pm_hf.models.task_model import MERGED_ADAPTER, TASK_ADAPTER, TaskModel, build_task_model, task_tensors
from pm_hf.runs.folder import ForgettingError, RunFolder, log_finished_task
from pm_hf.runs.head import start_analytic_head, update_analytic_head
from pm_hf.runs.records import Report, primary_metric
from pm_hf.runs.start import (
    CURVATURE_FILE,
    StreamState,
    TrainingStart,
    adapter_to_fold,
    check_rank_fits,
    choose_start,
    init_from,
    load_start,
)
from pm_hf.runs.tracking import Tracking
from pm_hf.training.callbacks import EarlyStopping, SequentialAveraging, Stop, stop_on_sigterm
from pm_hf.training.penalties import BaseDivergence, ElasticWeights, OrthogonalSubspaces, Penalty
from pm_hf.training.task_trainer import precision, train, training_arguments

__all__ = ["ForgettingError", "evaluate", "learn"]


def learn(config: str | os.PathLike | Mapping | RunConfig, **overrides: Any) -> Report:
    """Run a stream of tasks, or continue it after the last finished one, and return its report.

    config: YAML file, mapping or RunConfig; overrides: dotted keys, as in `learn("c.yaml", **{"lora.r": 4}, seed=1)`.
    All input is checked before any training. Under `accelerate launch` every process trains and measures its share of
    the rows; the first one merges, scores and writes, the others wait. Where one fails all do: it raises its error, the
    others OtherProcessError. SIGTERM to any ends all after the step, with a checkpoint to continue from. Raises
    InputError for bad input (another config in the output folder, or another run at work in it, included), StoppedError
    after SIGTERM, DivergedError for a loss that is not finite, and ForgettingError when `max_forgetting` is exceeded.
    """
    source = config if isinstance(config, Mapping | RunConfig) else Path(config)
    settings = load_config(source, values=overrides)
    args = training_arguments(settings, Path(settings.output_dir), 0)  # joins the launcher's other processes
    run = on_all_processes(lambda: Run(settings, load_stream(settings)))
    on_main_process(run.folder.finished)
    with _locked_by_main(run.folder.path), stop_on_sigterm() as stop:
        done = on_main_process(run.folder.begin_run)
        on_all_processes(run.folder.check_shared)
        with run.tracking.opened(args, done):
            for index in range(done, len(run.stream.tasks)):
                stop.check()
                run.learn_task(index, stop)
                on_main_process(lambda done=index + 1: run.folder.publish(done))  # type: ignore[misc]
    return on_main_process(lambda: run.folder.report(len(run.stream.tasks)))  # publish has written it


def evaluate(config: RunConfig, adapter: str | os.PathLike) -> dict[str, dict[str, float]]:
    """Scores of a merged adapter on those tasks of the config whose labels it knows, then on the held-out texts:
    {task or text: {metric: score}}."""
    opened, stream = open_adapter(adapter), load_stream(config)
    run = Run(config, stream)
    head, known = None, [*(stream.scored or stream.tasks), *stream.held_out]
    if not run.language:
        if len(opened.labels) != 1:
            raise InputError(f"adapter {opened.path} has no labels.json with one head, so its rows have no names")
        head, labels = next(iter(opened.labels.items()))
        known = [task for task in known if set(task.own) <= set(labels)]
    if not known:
        raise InputError(f"adapter {opened.path} knows the labels of none of the config's tasks")
    return dict(zip([task.name for task in known], run.scorer.score(opened.path, head, known), strict=True))


@contextmanager
def _locked_by_main(folder: Path) -> Iterator[None]:
    """The folder's lock, held by the main process for all."""
    lock = locked(folder)

    def take() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        lock.__enter__()

    on_main_process(take)
    try:
        yield
    finally:
        if process_index() == 0:
            lock.__exit__(None, None, None)


class Run:
    """One stream: what one task goes through."""

    def __init__(self, config: RunConfig, stream: TaskStream) -> None:
        self.config, self.stream = config, stream
        self.folder = RunFolder(config, stream, load_start(config, stream))
        self.tracking = Tracking(self.folder)
        args = training_arguments(config, self.folder.path, 0)
        self.encoder = make_encoder(config)
        check_encoding(self.encoder, [rows for task in stream.all for rows in (task.train, task.test)])
        self.scorer = Scorer(config, self.encoder, args.per_device_eval_batch_size, precision(args), args.device)
        sizes, samples = [len(task.train) for task in stream.tasks if len(task.train)], config.curvature.samples
        fewest = min(sizes, default=process_count())  # a finished task may leave its training rows out
        if self._measures and min(fewest, samples or fewest) < process_count():
            raise InputError(
                f"curvature.samples is {samples} and the smallest task has {fewest} training rows: each of "
                f"{process_count()} processes needs one to measure the curvature; launch fewer processes"
            )

    @property
    def language(self) -> bool:
        """Whether the stream has prompts and completions, and no class head."""
        return self.config.head.kind == "none"

    def learn_task(self, index: int, stop: Stop) -> None:
        """Train, measure, merge and score one task; step.json is written last."""
        began, task = time.perf_counter(), self.stream.tasks[index]
        state, folder = self.folder.state(index), self.folder.task(index)
        notes = on_main_process(lambda: self.folder.begin_task(index))
        start = choose_start(self.config, state)
        head, trained, curvature = self._optimum(task, state, start, index, stop)
        release_memory()  # the scores load the model again, and two of them may be too many

        def finish() -> None:
            """What process 0 does with the trained task."""
            merge = self._merge(folder, state, start, curvature, index)
            if self.config.head.kind == "lda":
                moved = self._trains(index)
                update_analytic_head(folder, state, task, str(head), self.scorer, self.config.head, moved=moved)
            scores, seen = self._scores(folder, head, index), self.stream.seen(index)
            step = {
                "task": task.name,
                "labels": list(task.labels),
                "fingerprint": task.fingerprint(),
                "test_fingerprint": task.test_fingerprint(),
                "head": head,
                "train_from": start.train_from,
                "freedom": merge.freedom,
                "coefficient": None if merge.coefficient is None else asdict(merge.coefficient),
                "merge_error": merge.error,
                "curvature_bytes": 0 if curvature is None else curvature.nbytes,
                "test_rows": len(task.test),
                **trained,
                "scores": scores,
                "held_out": self._held_out(folder),
                "seconds": time.perf_counter() - began,
                "process_peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                **conditions(),
                "notes": [*notes, *self._cut(task, trained, index)],
            }
            self.folder.finish_task(index, step)
            self.tracking.log(index + 1)
            log_finished_task(index, len(self.stream.tasks), step, primary_metric(list(scores), [t.own for t in seen]))

        on_main_process(finish)
        release_memory()

    def _optimum(
        self, task: Task, state: StreamState, start: TrainingStart, index: int, stop: Stop
    ) -> tuple[str | None, dict[str, Any], Curvature | None]:
        """Train, measure and save one task: (head, what step.json says of the training, curvature)."""
        built = on_all_processes(lambda: self._build(task, state, start, index))
        on_all_processes(lambda: self._check_built(built, state, index))
        trained: dict[str, Any] = {}
        if self._trains(index):
            rivals = on_all_processes(lambda: self._rivals(built, task, state))
            trained = self._train(built, task, state, index, stop)
            if rivals is not None:
                rivals.remove()
            built = self._whole(built, task, state, start, index)
        stop.check()
        curvature = self._measure(built, task, state, start, index)
        stop.check()

        on_main_process(lambda: self._save(built, task, self.folder.task(index)))
        return built.head, trained, curvature

    @property
    def _shared_head(self) -> bool:
        return self.stream.scenario == "domain_incremental"

    def _trains(self, index: int) -> bool:
        frozen_now = self.config.head.strict and (index > 0 or self.folder.start is not None)
        return bool(self.config.trains) and not frozen_now

    def _build(self, task: Task, state: StreamState, start: TrainingStart, index: int) -> TaskModel:
        frozen = None if start.frozen is None else open_adapter(start.frozen)
        # a head that all tasks share starts where the backbone starts
        published = frozen if start.train_from == "last" and frozen is not None else self._published(state)
        continued = self._shared_head or bool(self.config.strategy.replay_per_class)
        settings = self.config
        load_whole()
        built = build_task_model(
            *(settings.model, settings.lora, task.labels, frozen, settings.seed, index),
            kind=settings.stream.kind,
            published=published,
            continue_head=continued,
        )
        init_from(settings, built, start)
        return built

    def _whole(self, built: TaskModel, task: Task, state: StreamState, start: TrainingStart, index: int) -> TaskModel:
        """The trained model; where it is spread over the processes, another one with its weights."""
        if not is_sharded(built.model):
            return built
        weights = trained_weights(built.model)
        again = on_all_processes(lambda: self._build(task, state, start, index))
        put_weights(again.model, weights)
        again.model.to(self.scorer.device)
        return again

    def _published(self, state: StreamState) -> Adapter | None:
        """The running merge that the task is folded into."""
        return None if state.merged is None or self.config.strategy.individual else open_adapter(state.merged)

    def _check_built(self, built: TaskModel, state: StreamState, index: int) -> None:
        published = self._published(state)
        if published is not None and (state.curvature is not None or self._measures):
            strange = set(published.scaling) ^ set(adapted_layers(built.model, TASK_ADAPTER))
            if strange:
                raise InputError(f"lora.target_modules differ from the running merge's in {sorted(strange)[:3]}")
        check_rank_fits(self.config, built, len(self.stream.tasks) - index)
        check_length(self.config, built.model.get_base_model().config)
        lda = self.config.head.kind == "lda" and built.head is not None
        if lda and find_head(built.model, str(built.head)).bias is None:
            raise InputError(f"head.kind lda needs a head with a bias, {built.head} has none; use head.kind: linear")
        if self._measures and state.curvature is None:
            size, limit = curvature_bytes(built.model, TASK_ADAPTER, self.config.curvature.kind or "fisher"), 2**30
            if process_index() == 0:
                print(f"curvature: {size / 2**20:.1f} MiB, the same for every task", file=sys.stderr, flush=True)
            if size > self.config.curvature.max_gib * limit:
                raise InputError(
                    f"curvature.kind {self.config.curvature.kind} needs {size / limit:.1f} GiB, curvature.max_gib is "
                    f"{self.config.curvature.max_gib:g}; use kind: factored, fewer target_modules, or a higher limit"
                )

    def _rivals(self, built: TaskModel, task: Task, state: StreamState) -> RemovableHandle | None:
        if self.config.head.kind != "lda" or self.config.head.training != "seen":
            return None
        return start_analytic_head(built.model, state, task, str(built.head), self.scorer, self.config.head)

    def _train(self, built: TaskModel, task: Task, state: StreamState, index: int, stop: Stop) -> dict[str, Any]:
        args = training_arguments(self.config, self.folder.task(index) / "checkpoints", index)
        rows = task.train.with_rows(task.replayed)
        examples = on_all_processes(lambda: self.encoder.training(rows, task.labels))
        cut = getattr(self.encoder, "cut", 0)
        patience = self.config.early_stopping_patience
        found = train(
            built,
            examples,
            self.encoder.collate,
            args,
            callbacks=[
                *self.tracking.training(args, index),
                stop,
                *make_callbacks(self.config, built, state),
                *([EarlyStopping(patience)] if patience else []),
            ],
            penalties=make_penalties(self.config, built, state),
            evaluated=self.encoder.examples(task.eval, task.labels) if len(task.eval) else None,
        )
        return found | ({"cut_rows": cut} if cut else {})

    def _cut(self, task: Task, trained: Mapping, index: int) -> list[str]:
        """What is to be said of rows that the model does not see whole."""
        rows, cut = len(task.train) + len(task.replayed), trained.get("cut_rows", 0)
        scored = [*(self.stream.scored or [task]), *(self.stream.held_out if index == 0 else ())]
        return [cut_note(cut, rows, "training rows")] * bool(cut) + self.scorer.cut_notes(scored)

    @property
    def _measures(self) -> bool:
        merge = self.config.merge
        used = merge.method in ("pm", "cofima") and merge.coefficient is None
        return (used or self.config.strategy.ewc_weight > 0) and not self.config.strategy.individual

    def _measure(
        self, built: TaskModel, task: Task, state: StreamState, start: TrainingStart, index: int
    ) -> Curvature | None:
        settings = self.config.curvature
        if not self._measures or not self._trains(index):
            return None
        heads: dict[str, LowRank] | None = None
        if (
            built.head is not None
            and self._shared_head
            and self.config.head.kind == "linear"
            and (self.config.merge.method == "pm" or self.config.strategy.ewc_weight > 0)
        ):
            # heads are absolute values: before the first merge there is nothing, so Δ is the head itself
            nothing = head_matrix(find_head(built.model, built.head)).scale(0.0)
            heads = {built.head: open_adapter(state.merged).head_matrix(built.head) if state.merged else nothing}
        # trained from another model than the running merge, Δ is not the task's adapter alone
        apart = None if state.merged is None or start.train_from == "merged" else open_adapter(state.merged).products()
        rows = sample(task.train, settings.samples, self.config.seed)
        rows = rows.take(range(process_index(), len(rows), process_count()))
        sums = self.config.merge.method != "cofima"  # which weighs each model by its own curvature
        curvature = estimate_curvature(
            built.model,
            batches(self.encoder, self.encoder.examples(rows, task.labels), self.scorer.batch_size),
            adapter=TASK_ADAPTER,
            kind=settings.kind or "fisher",
            labels=settings.labels,
            shrinkage=settings.shrinkage if settings.kind == "gram" else None,
            normalisation=settings.normalisation,
            previous=Curvature.load(state.curvature) if sums and state.curvature is not None else None,
            heads=heads,
            merged=apart,
            seed=self.config.seed + index,
            autocast=self.scorer.autocast,
            loss_reduction=settings.loss_reduction if self.language else "mean",
        )
        path = self.folder.task(index) / CURVATURE_FILE
        on_main_process(lambda: curvature.save(path))
        return Curvature.load(path)  # from here on it is read a chunk at a time

    def _save(self, built: TaskModel, task: Task, folder: Path) -> None:
        factors, saved, peft_config = task_tensors(built.model, self.config.stream.kind)
        labels = {} if built.head is None else {built.head: list(task.labels)}
        save_adapter(folder / "adapter", peft_config, factors, saved, labels)

    def _merge(
        self, folder: Path, state: StreamState, start: TrainingStart, curvature: Curvature | None, index: int
    ) -> MergeReport:
        settings, individual = self.config.merge, self.config.strategy.individual
        method, options = settings.method or "pm", dict(settings.options)
        into = None if individual else state.merged
        coefficient = None if into is None else settings.coefficient  # the first task is taken as it is
        if not self._trains(index):
            coefficient = 0.0  # nothing was trained: the running merge stays as it is
        curvatures = [] if curvature is None or coefficient is not None else [curvature]
        if method == "pm" and coefficient is None:
            unmeasured = state.merged is not None and state.curvature is None
            options["on_zero_curvature"] = settings.on_zero_curvature
            options["unmeasured_past"] = "ignore" if unmeasured else "error"
        elif method == "cofima" and into is not None and state.curvature is not None:
            curvatures.insert(0, Curvature.load(state.curvature))
        elif method != "pm":
            curvatures = []
        return merge_adapters(
            adapter_to_fold(folder, start, state, method, settings.max_rank),
            folder / "merged",
            into=into,
            method=method,
            curvature=curvatures or None,
            coefficient=coefficient,
            freedom=settings.freedom or "global" if coefficient is None else "global",
            options=options,
            max_rank=settings.max_rank,
        )

    def _held_out(self, folder: Path) -> dict[str, dict[str, float]]:
        """{text: {metric: score}} of what is never trained on."""
        texts = self.stream.held_out
        found = self.scorer.score(folder / "merged", None, texts) if texts else []
        return {text.name: scores for text, scores in zip(texts, found, strict=True)}

    def _scores(self, folder: Path, head: str | None, index: int) -> dict[str, list[float | None]]:
        """{metric: one score for each task seen}."""
        if not self.config.strategy.individual:
            found = self.scorer.score(folder / "merged", head, self.stream.seen(index))
            names = dict.fromkeys(name for scores in found for name in scores)
            return {name: [scores.get(name) for scores in found] for name in names}
        own = self.scorer.score(folder / "merged", head, [self.stream.tasks[index]])[0]
        past = self.folder.step(index - 1)["scores"] if index else {}
        return {name: [*past.get(name, [None] * index), own.get(name)] for name in dict.fromkeys([*past, *own])}


def make_penalties(config: RunConfig, built: TaskModel, state: StreamState) -> list[Penalty]:
    """The penalties of the strategy; none of those that need a past before the first task."""
    strategy, found = config.strategy, list[Penalty]()
    if strategy.ewc_weight and state.curvature is not None:
        found.append(ElasticWeights(built.model, TASK_ADAPTER, Curvature.load(state.curvature), strategy.ewc_weight))
    if strategy.olora_weight and state.merged is not None:
        found.append(OrthogonalSubspaces(built.model, TASK_ADAPTER, MERGED_ADAPTER, strategy.olora_weight))
    if strategy.base_kl_weight:
        found.append(BaseDivergence(strategy.base_kl_weight, strategy.divergence))
    return found


def make_callbacks(config: RunConfig, built: TaskModel, state: StreamState) -> Sequence[TrainerCallback]:
    """SFA's averaging, from the second task on."""
    strategy = config.strategy
    if not strategy.averaging_period or state.merged is None:
        return []
    shared = built.head is not None and config.stream.scenario == "domain_incremental"
    head = find_head(built.model, str(built.head)) if shared else None
    return [SequentialAveraging(built.model, TASK_ADAPTER, head, strategy.averaging_period, strategy.averaging_weight)]
