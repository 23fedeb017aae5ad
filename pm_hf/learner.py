"""The loop over tasks: train, measure, merge, score, write; continue, extend. The only file that knows the order."""

import os
import resource
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pm_hf.adapter_writer import replace_head, save_adapter
from pm_hf.adapters import open_adapter
from pm_hf.config import RunConfig, config_text, load_config, save_config
from pm_hf.errors import InputError, raise_all
from pm_hf.files import LOCK, copy_folder, locked, read_json, remove_leftovers, same_folder, write_json
from pm_hf.fisher import adapted_layers, estimate_curvature, head_matrix
from pm_hf.heads import HeadStatistics, merge_temperature, ridge_drift
from pm_hf.merge import MergeReport, merge_adapters
from pm_hf.merging.curvature import Curvature
from pm_hf.merging.lowrank import LowRank
from pm_hf.merging.methods import get_method
from pm_hf.metrics import task_forgetting
from pm_hf.modeling import TASK, TaskModel, build_task_model, find_head, load_tokenizer, task_tensors
from pm_hf.released import CURVATURE, STATISTICS, STEP, State, released
from pm_hf.report import Report
from pm_hf.scoring import Scorer
from pm_hf.stopping import Stop, stop_on_sigterm
from pm_hf.tasks import Task, TaskStream, batches, encode, load_stream, sample
from pm_hf.training import precision, train, training_arguments

ROWS = "rows.json"  # fingerprint of the task that is being trained
CONFIG = "config.yaml"
# what may change when a finished run is continued; the data of finished tasks is compared by its fingerprint
FREE_KEYS = ("output_dir", "data_dir", "max_forgetting", "stream.tasks", "stream.class_groups", "stream.domain_column")


class ForgettingError(RuntimeError):
    """An old task lost more than `max_forgetting`; the published adapter is still the previous one."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


def learn(config: str | os.PathLike | Mapping | RunConfig, **overrides: Any) -> Report:
    """Run a stream of tasks, or continue it after the last finished one, and return its report.

    config: YAML file, mapping or RunConfig; overrides: dotted keys, as in `learn("c.yaml", **{"lora.r": 4}, seed=1)`.
    All input is checked before any training. SIGTERM ends it after the step, with a checkpoint to continue from. Raises
    InputError for bad input (another config in the output folder, or another run at work in it, included), StoppedError
    after SIGTERM, and ForgettingError when `max_forgetting` is exceeded.
    """
    source = config if isinstance(config, Mapping | RunConfig) else Path(config)
    settings = load_config(source, values=overrides)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            f"found {os.environ['WORLD_SIZE']} processes; launch with one: accelerate launch --num_processes 1"
        )
    run = Run(settings, load_stream(settings))
    run.finished()
    run.folder.mkdir(parents=True, exist_ok=True)
    with locked(run.folder), stop_on_sigterm() as stop:
        done = run.finished()  # again: another process may have held the folder until now
        save_config(settings, run.folder / CONFIG)
        run.publish(done)
        for index in range(done, len(run.stream.tasks)):
            run.learn_task(index, stop)
            run.publish(index + 1)
    return run.report(len(run.stream.tasks))  # publish has written it


def evaluate(config: RunConfig, adapter: str | os.PathLike) -> dict[str, dict[str, float]]:
    """Scores of a merged adapter on those tasks of the config whose labels it knows: {task: {kind: accuracy}}."""
    opened, stream = open_adapter(adapter), load_stream(config)
    if len(opened.labels) != 1:
        raise InputError(f"adapter {opened.path} has no labels.json with one head, so its rows have no names")
    (head, labels), tokenizer = next(iter(opened.labels.items())), load_tokenizer(config.model)
    known = [task for task in stream.tasks if set(task.labels) <= set(labels)]
    if not known:
        raise InputError(f"adapter {opened.path} knows the labels of none of the config's tasks")
    args = training_arguments(config, Path(config.output_dir), 0)
    scorer = Scorer(config, tokenizer, args.per_device_eval_batch_size, precision(args), args.device)
    return dict(zip([task.name for task in known], scorer.score(opened.path, head, known), strict=True))


class Run:
    """One stream in one output folder."""

    def __init__(self, config: RunConfig, stream: TaskStream) -> None:
        self.config, self.stream = config, stream
        self.folder = Path(config.output_dir).expanduser()
        self.args = training_arguments(config, self.folder, 0)
        self.tokenizer = load_tokenizer(config.model)
        batch_size, device = self.args.per_device_eval_batch_size, self.args.device
        self.scorer = Scorer(config, self.tokenizer, batch_size, precision(self.args), device)
        self.start = released(config, stream)

    def finished(self) -> int:
        """Number of finished tasks in the folder; InputError when they contradict the config."""
        path = self.folder / CONFIG
        if not path.is_file():
            if self.folder.exists() and not self.folder.is_dir():
                raise InputError(f"output_dir {self.folder} is a file, expected a folder")
            if self.folder.is_dir() and any(path.name != LOCK for path in self.folder.iterdir()):
                raise InputError(f"output_dir {self.folder} is not empty and holds no {CONFIG}; choose another folder")
            return 0
        done = 0
        while done < len(self.stream.tasks) and (self._task_folder(done) / STEP).is_file():
            done += 1
        started = [*self.folder.glob(f"task-*/{STEP}"), *self.folder.glob("task-*/checkpoints/checkpoint-*")]
        if not started and path.read_text(encoding="utf-8") != config_text(load_config(path)):
            raise InputError(f"{path} is a file of yours; choose another output_dir, the run writes its settings there")
        problems = differing_keys(load_config(path).to_dict(), self.config.to_dict()) if started else []
        for index in range(done):
            if self._step(index)["fingerprint"] != self.stream.tasks[index].fingerprint():
                problems.append(f"task {index} ({self.stream.tasks[index].name}): its labels or rows differ")
        steps = len(list(self.folder.glob(f"task-*/{STEP}")))
        if steps > done:
            problems.append(f"the folder has {steps} finished tasks, the config fits the first {done}")
        raise_all(problems, f"output_dir {self.folder} holds another run; use its config or another output_dir")
        for index in range(done):
            self._tidy(index)
        return done

    def learn_task(self, index: int, stop: Stop) -> None:
        """Train, measure, merge and score one task; step.json is written last."""
        start, task, folder = time.perf_counter(), self.stream.tasks[index], self._task_folder(index)
        state = self._state(index)
        folder.mkdir(exist_ok=True)
        for stale in ("adapter", "merged"):
            shutil.rmtree(folder / stale, ignore_errors=True)
        remove_leftovers(folder)
        notes = self._begin(folder, task)
        merged = None if state.merged is None else open_adapter(state.merged)
        built = build_task_model(
            self.config.model,
            self.config.lora,
            task.labels,
            merged,
            self.config.seed,
            index,
            continue_head=self._shared_head and merged is not None,
        )
        if merged is not None and state.curvature is not None:
            strange = set(merged.scaling) ^ set(adapted_layers(built.model, TASK))
            if strange:
                raise InputError(f"lora.target_modules differ from the running merge's in {sorted(strange)[:3]}")
        if self.config.head.kind == "lda" and find_head(built.model, built.head).bias is None:
            raise InputError(f"head.kind lda needs a head with a bias, {built.head} has none; use head.kind: linear")
        rows = encode(self.tokenizer, task.train, task.labels, self.config.stream.max_length)
        before = head_matrix(find_head(built.model, built.head))
        trained = {}
        if self._trains(index):
            args = training_arguments(self.config, folder / "checkpoints", index)
            trained = train(built, rows, self.tokenizer, args, [stop])
        curvature = self._measure(built, rows, index, state, before)
        factors, saved, peft_config = task_tensors(built.model)
        save_adapter(folder / "adapter", peft_config, factors, saved, {built.head: list(task.labels)})
        merge = self._merge(folder, state, curvature, index)
        if self.config.head.kind == "lda":
            self._analytic_head(folder, state, rows, task, built.head, index)
        scores = self.scorer.score(folder / "merged", built.head, self.stream.tasks[: index + 1])
        step = {
            "task": task.name,
            "labels": list(task.labels),
            "fingerprint": task.fingerprint(),
            "head": built.head,
            "train_from": get_method(self.config.merge.method or "pm").train_from,
            "freedom": merge.freedom,
            "coefficient": None if merge.coefficient is None else asdict(merge.coefficient),
            "merge_error": merge.error,
            "curvature_bytes": 0 if curvature is None else curvature.nbytes,
            "test_rows": len(task.test),
            **trained,
            **{key: [score[key] for score in scores] for key in scores[0]},
            "seconds": time.perf_counter() - start,
            "process_peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "threads": torch.get_num_threads(),
            "notes": notes,
        }
        write_json(folder / STEP, step)
        self._tidy(index)
        _say(index, len(self.stream.tasks), step)

    def _begin(self, folder: Path, task: Task) -> list[str]:
        """Remember the rows that are trained on; what is to be said where older checkpoints are continued."""
        now = {"fingerprint": task.fingerprint(), "threads": torch.get_num_threads()}
        begun = read_json(folder / ROWS) if (folder / ROWS).is_file() else None
        if not isinstance(begun, dict) or begun["fingerprint"] != now["fingerprint"]:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # of other rows
            write_json(folder / ROWS, now)
            return []
        if begun["threads"] == now["threads"]:
            return []
        note = f"continued with {now['threads']} threads, begun with {begun['threads']}: equal up to rounding only"
        print(f"task {task.name}: {note}", file=sys.stderr, flush=True)
        return [note]

    def _tidy(self, index: int) -> None:
        """Remove what a finished task no longer needs: checkpoints, and the curvature before the published one."""
        folder = self._task_folder(index)
        for name in ("checkpoints", ROWS):
            path = folder / name
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        # with a gate the published adapter may be the previous one, and its curvature goes with it
        last = index - 2 if self.config.max_forgetting is not None else index - 1
        for older in range(last + 1):
            (self._task_folder(older) / CURVATURE).unlink(missing_ok=True)

    def publish(self, done: int) -> None:
        """Copy the newest merge to `merged/` unless an old task fell further than allowed; write report.json."""
        if not done:
            return
        report = self.report(done)
        report.save()
        limit = self.config.max_forgetting
        drops = dict(zip(report.tasks, task_forgetting(report.scores), strict=False))
        fallen = {name: drop for name, drop in drops.items() if limit is not None and drop > limit}
        if fallen:
            listed = ", ".join(f"{name} by {drop:.3f}" for name, drop in fallen.items())
            raise ForgettingError(
                f"forgot more than max_forgetting {limit} after task {report.tasks[done - 1]}: {listed}; "
                f"{self.folder / 'merged'} is still the previous adapter",
                report,
            )
        newest = self._task_folder(done - 1) / "merged"
        remove_leftovers(self.folder)
        if not same_folder(newest, self.folder / "merged"):
            copy_folder(newest, self.folder / "merged")

    def report(self, done: int) -> Report:
        """Report on the first `done` tasks, from their step.json."""
        steps = [self._step(index) for index in range(done)]
        total = len(steps)
        notes = list(self.stream.notes)
        notes += [f"task {step['task']}: {note}" for step in steps for note in step.get("notes", [])]
        notes += [
            f"task {step['task']}: {step['coefficient']['note']}"
            for step in steps
            if step["coefficient"] and step["coefficient"]["note"] not in (None, "given")
        ]

        def matrix(key: str) -> list[list[float | None]]:
            return [[*step[key], *[None] * (total - len(step[key]))] for step in steps]

        return Report(
            folder=self.folder,
            method=self.config.method,
            seed=self.config.seed,
            scenario=self.stream.scenario,
            tasks=[step["task"] for step in steps],
            scores=matrix("class_incremental"),
            task_incremental=matrix("task_incremental"),
            test_rows=[step["test_rows"] for step in steps],
            coefficients=[step["coefficient"] for step in steps],
            seconds=sum(step["seconds"] for step in steps),
            freedom=steps[-1]["freedom"],
            notes=notes,
        )

    @property
    def _shared_head(self) -> bool:
        return self.stream.scenario == "domain_incremental"

    def _trains(self, index: int) -> bool:
        frozen_now = self.config.head.strict and (index > 0 or self.start is not None)
        return bool(self.config.trains) and not frozen_now

    def _measure(
        self, built: TaskModel, rows: Sequence[dict], index: int, state: State, before: LowRank
    ) -> Curvature | None:
        settings, merge = self.config.curvature, self.config.merge
        if merge.method != "pm" or merge.coefficient is not None or not self._trains(index):
            return None
        heads = None
        if self._shared_head and self.config.head.kind == "linear":
            # heads are absolute values: before the first merge there is nothing, so Δ is the head itself
            heads = {built.head: before if state.merged else before.scale(0.0)}
        curvature = estimate_curvature(
            built.model,
            batches(self.tokenizer, sample(rows, settings.samples, self.config.seed), self.scorer.batch_size),
            adapter=TASK,
            kind=settings.kind or "fisher",
            labels=settings.labels,
            shrinkage=settings.shrinkage if settings.kind == "gram" else None,
            previous=None if state.curvature is None else Curvature.load(state.curvature),
            heads=heads,
            seed=self.config.seed + index,
            autocast=self.scorer.autocast,
        )
        curvature.save(self._task_folder(index) / CURVATURE)
        return Curvature.load(self._task_folder(index) / CURVATURE)  # from here on it is read a chunk at a time

    def _merge(self, folder: Path, state: State, curvature: Curvature | None, index: int) -> MergeReport:
        settings = self.config.merge
        method, options = settings.method or "pm", {}
        coefficient = None if state.merged is None else settings.coefficient  # the first task is taken as it is
        if not self._trains(index):
            coefficient = 0.0  # nothing was trained: the running merge stays as it is
        elif method == "pm" and coefficient is None:
            unmeasured = state.merged is not None and state.curvature is None
            options = {
                "on_zero_curvature": settings.on_zero_curvature,
                "unmeasured_past": "ignore" if unmeasured else "error",
            }
        return merge_adapters(
            folder / "adapter",
            folder / "merged",
            into=state.merged,
            method=method,
            curvature=curvature,
            coefficient=coefficient,
            freedom=settings.freedom or "global" if coefficient is None else "global",
            options=options,
            max_rank=settings.max_rank,
        )

    def _analytic_head(
        self, folder: Path, state: State, rows: Sequence[dict], task: Task, head: str, index: int
    ) -> None:
        """Follow the backbone's drift, pool in the task's classes, write the rows into the merged adapter."""
        statistics = HeadStatistics() if state.statistics is None else HeadStatistics.load(state.statistics)
        labels = open_adapter(folder / "merged").labels[head]
        features = self.scorer.features(folder / "merged", rows, head)
        moves = self.config.head.drift == "ridge" and self._trains(index)
        if statistics.labels and moves and state.merged is not None:
            past = self.scorer.features(state.merged, rows, head)
            statistics = statistics.moved(ridge_drift(past, features, self.config.head.ridge))
        targets = torch.tensor([row["labels"] for row in rows])
        statistics = statistics.added(features, targets, list(task.labels))
        columns = torch.tensor([statistics.labels.index(label) for label in task.labels])
        temperature = statistics.temperature or merge_temperature(statistics, features, columns[targets])
        if self.config.head.strict and statistics.temperature is None:
            statistics = statistics.frozen(temperature)
        statistics.save(folder / STATISTICS)
        weight, bias = (value if statistics.temperature else value / temperature for value in statistics.solve())
        order = torch.tensor([statistics.labels.index(label) for label in labels])
        replace_head(folder / "merged", head, weight[order], bias[order])

    def _state(self, index: int) -> State:
        if index == 0:
            return self.start or State()
        folder = self._task_folder(index - 1)
        files = [path if path.is_file() else None for path in (folder / CURVATURE, folder / STATISTICS)]
        return State(folder / "merged", files[0], files[1])

    def _task_folder(self, index: int) -> Path:
        name = "".join(c if c.isalnum() or c in "-_." else "-" for c in self.stream.tasks[index].name)
        return self.folder / f"task-{index:02d}-{name}"

    def _step(self, index: int) -> dict:
        return read_json(self._task_folder(index) / STEP)


def differing_keys(finished: Mapping, now: Mapping, path: str = "") -> list[str]:
    """Settings that contradict those of the finished part of a run."""
    found = []
    for key in [*finished, *(key for key in now if key not in finished)]:
        name, old, new = f"{path}{key}", finished.get(key), now.get(key)
        if name in FREE_KEYS or old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differing_keys(old, new, name + ".")
        else:
            found.append(f"{name}: {old!r} in the finished run, {new!r} now")
    return found


def _say(index: int, total: int, step: Mapping) -> None:
    alpha, scores = step["coefficient"], step["class_incremental"]
    mean = sum(scores) / len(scores)
    line = f"task {index + 1}/{total} {step['task']}: accuracy {scores[-1]:.3f}, mean of {len(scores)} {mean:.3f}"
    scaled = alpha is not None and step["freedom"] != "free"
    merged = f", coefficient {alpha['used']:.3f} (1/t {alpha['one_over_t']:.3f})" if scaled else ""
    print(f"{line}{merged}, {step['seconds']:.1f} s", file=sys.stderr, flush=True)
