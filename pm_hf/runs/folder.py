"""The folder of one run: what is finished, which merge is the newest, what is no longer needed."""

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

from pm_hf.adapters.layout import ADAPTER_FILES
from pm_hf.config.loading import config_text, differing_keys, load_config, save_config
from pm_hf.config.presets import preset_notes
from pm_hf.config.schema import RunConfig
from pm_hf.data.stream import Task, TaskStream, tasks_without_rows
from pm_hf.distributed import log_line
from pm_hf.environment import changed_conditions, conditions
from pm_hf.errors import InputError, raise_all
from pm_hf.files import (
    LOCK,
    FileMark,
    as_record,
    copy_folder,
    damaged_file,
    file_marks,
    make_folder,
    read_json,
    remove_leftovers,
    same_files,
    set_aside,
    write_json,
)
from pm_hf.runs.inputs import Inputs, changed_inputs, run_inputs
from pm_hf.runs.paths import CONFIG_FILE, RunPaths, TaskPaths
from pm_hf.runs.records import WAY_OUT, Report, ScoreRows, TaskRecord, primary_metric
from pm_hf.runs.schemas import RowsFile
from pm_hf.runs.start import StreamState
from pm_hf.text import format_metric
from pm_hf.training.checkpoints import remove_checkpoints

# what pm_hf, PEFT and tokenizers write into an adapter's folder
ADAPTER_NAMES = re.compile(
    "|".join([*map(re.escape, ADAPTER_FILES), r"README\.md$", "(special|added)_tokens", "tokenizer", "vocab", "merges"])
    + r"|chat_template|.*\.model$|\."
)


class RemovedError(OSError):
    """A run's folder was removed, or moved away, while the run was at work in it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"{folder} was removed while the run was at work in it; the same command begins anew")


ROWS_WAY_OUT = "it was changed by hand, or damaged: bring it back from a copy, or remove it and the task begins anew"


class ForgettingError(RuntimeError):
    """An old task lost more than `max_forgetting`; `merged/` is still the previous adapter."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


class RunFolder:
    """Files of one stream in one output folder; only the main process writes."""

    def __init__(self, config: RunConfig, stream: TaskStream, start: StreamState | None) -> None:
        self.config, self.stream, self.start = config, stream, start
        self.paths = RunPaths(config.output_dir)
        self.path = self.paths.folder

    @cached_property
    def inputs(self) -> Inputs:
        """Digests of what the results depend on besides settings and rows, read once."""
        return run_inputs(self.config, self.stream)

    def task(self, index: int) -> TaskPaths:
        """Files of one task."""
        return self.paths.task(index, self.stream.tasks[index].name)

    def record(self, index: int) -> TaskRecord:
        """What step.json says of a finished task; InputError where it is not of this stream."""
        path, seen = self.task(index).step, self.stream.seen(index)
        record = TaskRecord.load(path)
        name = primary_metric(list(record.scores), [task.own for task in seen])
        row = record.scores.get(name)
        if row is None:
            raise InputError(f"{path}: scores.{name} is missing; {WAY_OUT}")
        if len(row) != len(seen) or None in (row if self.config.merges else row[-1:]):
            raise InputError(f"{path}: scores.{name}: expected {len(seen)} numbers, found {row}; {WAY_OUT}")
        return record

    def state(self, index: int) -> StreamState:
        """What the task before `index` left."""
        if index == 0:
            return self.start or StreamState()
        last = self.task(index - 1)
        return StreamState(
            last.merged,
            last.curvature if last.curvature.is_file() else None,
            last.statistics if last.statistics.is_file() else None,
            last.optimum if last.optimum.is_dir() else last.adapter,
            last.pool if last.pool.is_file() else None,
            last.writers if last.writers.is_dir() else None,
            last.gate if last.gate.is_dir() else None,
        )

    def count_finished(self) -> int:
        """Number of finished tasks before the first that is not, whatever they hold."""
        return sum(1 for _ in takewhile(lambda index: self.task(index).finished, range(len(self.stream.tasks))))

    def finished(self) -> int:
        """Number of finished tasks in the folder; InputError when they contradict the config, or where the training
        rows of a task are left out that is not finished."""
        done = self._finished()
        without_rows = [task.name for task in self.stream.tasks[done:] if not len(task.train)]
        if without_rows:
            raise InputError(
                f"stream.tasks: {', '.join(without_rows)} leave out train, which only finished tasks may, and "
                f"{self.path} has {done} finished tasks; name the training files, or the output_dir in which they are "
                "finished"
            )
        return done

    def data_problem(self, index: int) -> str | None:
        """What contradicts a finished task in its data; training rows that are left out are not compared."""
        return self._data_problem(index, self.record(index))

    def _data_problem(self, index: int, record: TaskRecord) -> str | None:
        task = self.stream.tasks[index]
        if len(task.train):
            return None if record.fingerprint == task.fingerprint() else "its labels or rows differ"
        if record.test_fingerprint is None:
            return "an older version finished it, whose training rows cannot be left out"
        return None if record.test_fingerprint == task.test_fingerprint() else "its labels or test rows differ"

    def _finished(self) -> int:
        path = self.paths.config
        if not path.is_file():
            if self.path.exists() and not self.path.is_dir():
                raise InputError(f"output_dir {self.path} is a file, expected a folder")
            # a run that was killed at once leaves its lock and what it was about to write
            ours = (LOCK, f".{CONFIG_FILE}.")
            if self.path.is_dir() and not all(path.name.startswith(ours) for path in self.path.iterdir()):
                raise InputError(
                    f"output_dir {self.path} is not empty and holds no {CONFIG_FILE}; choose another folder"
                )
            return 0
        done = self.count_finished()
        tasks = self.paths.tasks()
        started = any(task.finished or task.has_checkpoints for task in tasks)
        saved = load_config(path)
        if not started and path.read_bytes() != config_text(saved).encode():
            raise InputError(f"{path} is a file of yours; choose another output_dir, the run writes its settings there")
        problems = differing_keys(saved.to_dict(), self.config.to_dict()) if started else []
        for index in range(done):
            record = self.record(index)
            if problem := self._data_problem(index, record):
                problems.append(f"task {index} ({self.stream.tasks[index].name}): {problem}")
            changes = changed_inputs(self.inputs, record.inputs)
            problems += [problem for problem in changes if problem not in problems]
        finished = sum(task.finished for task in tasks)
        if finished > done:
            problems.append(f"the folder has {finished} finished tasks, the config fits the first {done}")
        raise_all(problems, f"output_dir {self.path} holds another run; use its config or another output_dir")
        return done

    def begin_run(self) -> int:
        """Write the settings and promote what is finished; the number of finished tasks."""
        done = self.finished()  # again: another process may have held the folder until now
        self.check_left(done)
        for index in range(done):
            self.tidy(index)
        save_config(self.config, self.paths.config)
        self.promote(done)
        return done

    def check_left(self, done: int) -> None:
        """InputError where the last of `done` finished tasks lacks what the next one begins from, or has it damaged;
        one line on stderr for each file of an earlier task that is, which nothing depends on any more."""
        for index in range(done - 1):
            if damage := damaged_file(self.task(index).folder, self._marks(index, self.task(index).adapters)):
                log_line(f"{damage}; the run does not need it any more, what is published of this task does")
        if not done:
            return
        last = self.task(done - 1)
        lost = [] if done == len(self.stream.tasks) else [path for path in self._needed(done) if not path.exists()]
        damage = f"{lost[0]} is not there" if lost else damaged_file(last.folder, self._marks(done - 1, last.results))
        if damage:
            raise InputError(
                f"{damage}: task {self.stream.tasks[done - 1].name} is finished and the run goes on from it; bring the "
                f"file back from a copy, or remove {last.folder} and the task is learned again"
            )

    def _marks(self, index: int, parts: Sequence[Path]) -> dict[str, FileMark]:
        """What step.json says of the files in these parts of a finished task; nothing where an older version wrote it,
        and of sums that only the tasks after it needed."""
        task = self.task(index)
        names = [part.relative_to(task.folder).as_posix() for part in parts]
        marks = self.record(index).files
        return {file: mark for file, mark in marks.items() if file.partition("/")[0] in names}

    def _needed(self, index: int) -> list[Path]:
        """Files and folders of the task before `index` that this task cannot do without."""
        last, record, config = self.task(index - 1), self.record(index - 1), self.config
        needed = [last.adapter, last.merged]
        trains = config.trains and not config.head.strict
        if config.measures_curvature and trains and record.curvature_bytes != 0:  # null: of before it was kept
            needed.append(last.curvature)
        if config.analytic_head:
            needed += [last.statistics, *([last.gate] if config.head.gate else [])]
        needed += [last.pool] * config.keeps_pool + [last.writers] * config.keeps_writers
        begun_from_another = index > 1 or self.start is not None
        if record.train_from == "last" and begun_from_another and not config.merging_method.factors:
            needed.append(last.optimum)
        return needed

    def check_shared(self) -> None:
        """InputError in a process that does not see what process 0 has written."""
        if not self.paths.config.is_file():
            raise InputError(
                f"output_dir {self.path} is not one folder for all processes; use a file system that they share"
            )

    def check_not_removed(self) -> None:
        """RemovedError where the settings that `begin_run` wrote are gone."""
        if not self.paths.config.is_file():
            raise RemovedError(self.path)

    def begin_task(self, index: int) -> list[str]:
        """A folder for the task, with its checkpoints if there are any; what is to be said where they are continued."""
        self.check_not_removed()
        task, paths = self.stream.tasks[index], self.task(index)
        make_folder(paths.folder)
        for stale in (paths.adapter, paths.merged, paths.deployed, paths.optimum, paths.change):
            remove_adapter(stale)
        shutil.rmtree(paths.gate, ignore_errors=True)
        remove_leftovers(paths.folder, held=True)
        now = conditions(*self.config.model.packages)
        return _note_conditions(paths, task, self.inputs, now, self.record(index - 1).conditions if index else {})

    def finish_task(self, index: int, record: TaskRecord) -> None:
        """Write step.json, which makes the task a finished one, with sizes and digests of what it leaves."""
        self.check_not_removed()
        task = self.task(index)
        parts = [part.relative_to(task.folder).as_posix() for part in task.results]
        replace(record, files=file_marks(task.folder, parts), inputs=self.inputs).save(task.step)
        self.tidy(index)

    def tidy(self, index: int) -> None:
        """Remove what a finished task no longer needs: checkpoints, and what only the task after it needed.

        The sums and the optimum of the task before stay, so that the last one may be removed and learned again.
        """
        finished = self.task(index)
        remove_checkpoints(finished.checkpoints)
        remove_checkpoints(finished.writer)
        finished.rows.unlink(missing_ok=True)
        # with a gate the promoted adapter may be the previous one, and its curvature goes with it
        kept = 2 if self.config.max_forgetting is None else 3
        for older in map(self.task, range(index + 1 - kept)):
            older.curvature.unlink(missing_ok=True)
            older.pool.unlink(missing_ok=True)
            for folder in (older.writers, older.gate):
                shutil.rmtree(folder, ignore_errors=True)
            remove_adapter(older.optimum)
            remove_adapter(older.change)

    def promote(self, done: int) -> None:
        """Copy the newest merge to `merged/` unless an old task fell further than allowed; write report.json.

        Of an individual run nothing is copied. Other files in `merged/` stay.
        """
        if not done:
            return
        report = self.report(done)
        limit = self.config.max_forgetting
        drops = {} if limit is None else dict(zip(report.tasks, report.forgetting, strict=False))
        fallen = {name: drop for name, drop in drops.items() if limit is not None and drop is not None and drop > limit}
        if fallen:
            report.save()
            listed = ", ".join(f"{name} by {drop:.3f}" for name, drop in fallen.items())
            raise ForgettingError(
                f"forgot more than max_forgetting {limit} after task {report.tasks[done - 1]}: {listed}; "
                f"{self.paths.merged} is still the previous adapter",
                report,
            )
        newest = self.task(done - 1).released
        remove_leftovers(self.path)
        if self.config.merges and not (self.paths.merged.is_dir() and same_files(newest, self.paths.merged)):
            copy_folder(newest, self.paths.merged, self._strangers(done))
        report.save()  # after the adapter that it is about

    def _strangers(self, done: int) -> list[str]:
        """Names in `merged/` that no finished task's merge was written with: files of the user's."""
        ours = set(ADAPTER_FILES)
        for index in range(done):
            ours |= {Path(file).parts[1] for file in self._marks(index, [self.task(index).released])}
        return sorted(path.name for path in self.paths.merged.glob("*") if path.name not in ours)

    def report(self, done: int) -> Report:
        """Report on the first `done` tasks, from their step.json."""
        records = [self.record(index) for index in range(done)]
        notes = [*preset_notes(self.config), *self.stream.notes]
        if self.config.model.trust_remote_code:
            notes.append("model.trust_remote_code was true: Python code that comes with the base model may have run")
        if self.config.model.quantization is not None:
            notes.append(
                f"model.quantization was {self.config.model.quantization}: what was trained, measured and scored was "
                "the adapter on the quantized base"
            )
        notes += [f"task {record.task}: {note}" for record in records for note in record.notes]
        notes += [
            f"task {record.task}: {record.coefficient.note}"
            for record in records
            if record.coefficient and record.coefficient.note and record.coefficient.source != "given"
        ]
        width = max(len(next(iter(record.scores.values()))) for record in records)
        names = list(dict.fromkeys(name for record in records for name in record.scores))

        def matrix(name: str) -> ScoreRows:
            rows = [record.scores.get(name, []) for record in records]
            return [[*row, *[None] * (width - len(row))] for row in rows]

        scored, numbered = self.stream.seen(done - 1), isinstance(self.config.stream.class_groups, int)
        return Report(
            folder=self.path,
            method=self.config.method,
            seed=self.config.seed,
            scenario=self.stream.scenario,
            tasks=[task.name for task in scored],
            metric=primary_metric(names, [task.own for task in scored]),
            matrices={name: matrix(name) for name in names},
            test_rows=[len(task.test) for task in scored],
            alphas=[record.coefficient for record in records],
            merge_errors=[record.merge_error or 0.0 for record in records],
            seconds=sum(record.seconds or 0.0 for record in records),
            freedom=records[-1].freedom,
            train_from=records[-1].train_from,
            held_out=[record.held_out for record in records if record.held_out],
            untouched=records[0].untouched,
            notes=notes,
            classes={task.name: list(task.own) for task in scored} if numbered else {},
            right={task: of for record in records for task, of in record.right.items()},  # the last merge's say
        )


def remove_adapter(folder: Path) -> None:
    """Remove an adapter folder of a run; one that holds files of the user's goes to `<name>.kept` with them instead."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.is_dir() and not all(ADAPTER_NAMES.match(path.name) for path in folder.iterdir()):
        set_aside(folder, f"{folder.name}.kept", "")
    else:
        shutil.rmtree(folder, ignore_errors=True)


def finished_labels(config: RunConfig) -> dict[str, list[str]]:
    """{finished task of output_dir whose training rows are left out: labels of its head}."""
    names = tasks_without_rows(config.stream)
    finished = [task.step for task in RunPaths(config.output_dir).tasks() if names and task.finished]
    return {record.task: record.labels for record in map(TaskRecord.load, finished) if record.task in names}


def log_finished_task(index: int, total: int, record: TaskRecord, metric: str) -> None:
    """One line on stderr for a finished task."""
    alpha, scores = record.coefficient, [score or 0.0 for score in record.scores[metric]]
    name, mean = format_metric(metric), sum(scores) / len(scores)
    line = f"task {index + 1}/{total} {record.task}: {name} {scores[-1]:.3f}, mean of {len(scores)} {mean:.3f}"
    if alpha is not None and record.freedom != "free":
        line += f", coefficient {alpha.used:.3f} (1/t {alpha.one_over_t:.3f})"
    if record.gate:
        line += f", deployed at scale {record.gate['deployed']:g}"
    if record.replay:
        line += f", {_told(record.replay)}"
    log_line(f"{line}, {record.seconds:.1f} s")


def _told(replay: Mapping[str, Any]) -> str:
    """A task's written rows in a few words."""
    rows = f"{replay['kept']} of {replay['written']} written rows kept ({replay['copies']} copies dropped)"
    agreement = "" if replay["agreement"] is None else f", {100 * replay['agreement']:.0f} % answered as asked"
    pool = f", {replay['pool_rows']} in the pool" if replay["pool_rows"] else ""
    return f"{rows}{agreement}{pool}, {sum(replay['seconds'].values()):.1f} s for them"


def _note_conditions(
    paths: TaskPaths, task: Task, inputs: Inputs, now: Mapping[str, Any], before: Mapping
) -> list[str]:
    """Remember the task's rows and the conditions `now`; what is to be said where they have changed.

    With checkpoints they are compared with those of the earlier start, else with those of the task before.
    """
    fingerprint = task.fingerprint()
    begun: Mapping[str, Any] | None = None
    if paths.has_checkpoints:
        if not paths.rows.exists():
            log_line(f"task {task.name}: {paths.rows} is not there, which says what its checkpoints are of; begun anew")
        else:
            begun = read_json(paths.rows)
            rows = as_record(begun, RowsFile, str(paths.rows), ROWS_WAY_OUT)
            if changes := _changes(rows, fingerprint, inputs):
                log_line(f"task {task.name}: {'; '.join(changes)} since its checkpoints were written; begun anew")
                begun = None
    if begun is None:
        remove_checkpoints(paths.checkpoints)
        remove_checkpoints(paths.writer)
    notes = [] if begun is None else list(begun.get("notes", []))
    changes = [f"continued with {change}" for change in changed_conditions(now, begun or before)]
    for change in changes:
        log_line(f"task {task.name}: {change}")
    write_json(paths.rows, {"fingerprint": fingerprint, "inputs": inputs, **now, "notes": notes + changes})
    return notes + changes


def _changes(begun: RowsFile, fingerprint: str, inputs: Inputs) -> list[str]:
    """What a task that was begun depends on and is another one now."""
    rows = ["its labels or rows are not what they were"] * (begun.fingerprint != fingerprint)
    return rows + changed_inputs(inputs, begun.inputs)
