"""The folder of one run: what is finished, which merge is the newest, what is no longer needed."""

import shutil
from collections.abc import Mapping

from pm_hf.config.loading import config_text, differing_keys, load_config, save_config
from pm_hf.config.schema import RunConfig
from pm_hf.data.stream import Task, TaskStream, tasks_without_rows
from pm_hf.distributed import log_line
from pm_hf.environment import changed_conditions, conditions
from pm_hf.errors import InputError, raise_all
from pm_hf.files import LOCK, copy_folder, make_folder, read_json, remove_leftovers, same_folder, write_json
from pm_hf.runs.paths import CONFIG_FILE, RunPaths, TaskPaths
from pm_hf.runs.records import Report, ScoreRows, TaskRecord, primary_metric
from pm_hf.runs.start import StreamState
from pm_hf.text import format_metric


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

    def task(self, index: int) -> TaskPaths:
        """Files of one task."""
        return self.paths.task(index, self.stream.tasks[index].name)

    def record(self, index: int) -> TaskRecord:
        """What step.json says of a finished task."""
        return TaskRecord.load(self.task(index).step)

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
        )

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
        for index in range(done):
            self.tidy(index)
        return done

    def data_problem(self, index: int) -> str | None:
        """What contradicts a finished task in its data; training rows that are left out are not compared."""
        task, record = self.stream.tasks[index], self.record(index)
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
        done = 0
        while done < len(self.stream.tasks) and self.task(done).finished:
            done += 1
        tasks = self.paths.tasks()
        started = any(task.finished or task.has_checkpoints for task in tasks)
        if not started and path.read_text(encoding="utf-8") != config_text(load_config(path)):
            raise InputError(f"{path} is a file of yours; choose another output_dir, the run writes its settings there")
        problems = differing_keys(load_config(path).to_dict(), self.config.to_dict()) if started else []
        for index in range(done):
            if problem := self.data_problem(index):
                problems.append(f"task {index} ({self.stream.tasks[index].name}): {problem}")
        finished = sum(task.finished for task in tasks)
        if finished > done:
            problems.append(f"the folder has {finished} finished tasks, the config fits the first {done}")
        raise_all(problems, f"output_dir {self.path} holds another run; use its config or another output_dir")
        return done

    def begin_run(self) -> int:
        """Write the settings and promote what is finished; the number of finished tasks."""
        done = self.finished()  # again: another process may have held the folder until now
        save_config(self.config, self.paths.config)
        self.promote(done)
        return done

    def check_shared(self) -> None:
        """InputError in a process that does not see what process 0 has written."""
        if not self.paths.config.is_file():
            raise InputError(
                f"output_dir {self.path} is not one folder for all processes; use a file system that they share"
            )

    def begin_task(self, index: int) -> list[str]:
        """A folder for the task, with its checkpoints if there are any; what is to be said where they are continued."""
        task, paths = self.stream.tasks[index], self.task(index)
        make_folder(paths.folder)
        for stale in (paths.adapter, paths.merged, paths.optimum):
            shutil.rmtree(stale, ignore_errors=True)
        remove_leftovers(paths.folder)
        return _note_conditions(paths, task, self.record(index - 1).conditions if index else {})

    def finish_task(self, index: int, record: TaskRecord) -> None:
        """Write step.json, which makes the task a finished one."""
        record.save(self.task(index).step)
        self.tidy(index)

    def tidy(self, index: int) -> None:
        """Remove what a finished task no longer needs: checkpoints, and what only the task after it needed."""
        finished = self.task(index)
        shutil.rmtree(finished.checkpoints, ignore_errors=True)
        finished.rows.unlink(missing_ok=True)
        # with a gate the promoted adapter may be the previous one, and its curvature goes with it
        last = index - 2 if self.config.max_forgetting is not None else index - 1
        for older in map(self.task, range(last + 1)):
            older.curvature.unlink(missing_ok=True)
            older.pool.unlink(missing_ok=True)
            shutil.rmtree(older.optimum, ignore_errors=True)
            shutil.rmtree(older.change, ignore_errors=True)

    def promote(self, done: int) -> None:
        """Copy the newest merge to `merged/` unless an old task fell further than allowed; write report.json."""
        if not done:
            return
        report = self.report(done)
        report.save()
        limit = self.config.max_forgetting
        drops = {} if limit is None else dict(zip(report.tasks, report.forgetting, strict=False))
        fallen = {name: drop for name, drop in drops.items() if limit is not None and drop is not None and drop > limit}
        if fallen:
            listed = ", ".join(f"{name} by {drop:.3f}" for name, drop in fallen.items())
            raise ForgettingError(
                f"forgot more than max_forgetting {limit} after task {report.tasks[done - 1]}: {listed}; "
                f"{self.paths.merged} is still the previous adapter",
                report,
            )
        newest = self.task(done - 1).merged
        remove_leftovers(self.path)
        if self.config.merges and not same_folder(newest, self.paths.merged):
            copy_folder(newest, self.paths.merged)

    def report(self, done: int) -> Report:
        """Report on the first `done` tasks, from their step.json."""
        records = [self.record(index) for index in range(done)]
        notes = list(self.stream.notes)
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
            notes=notes,
            classes={task.name: list(task.own) for task in scored} if numbered else {},
        )


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
    if record.replay:
        line += f", {record.replay['kept']} of {record.replay['written']} written rows kept"
    log_line(f"{line}, {record.seconds:.1f} s")


def _note_conditions(paths: TaskPaths, task: Task, before: Mapping) -> list[str]:
    """Remember the task's rows and the conditions; what is to be said where they have changed.

    With checkpoints they are compared with those of the earlier start, else with those of the task before.
    """
    now, fingerprint = conditions(), task.fingerprint()
    begun = read_json(paths.rows) if paths.rows.is_file() and paths.has_checkpoints else None
    if not isinstance(begun, dict) or begun["fingerprint"] != fingerprint:
        shutil.rmtree(paths.checkpoints, ignore_errors=True)  # of other rows
        begun = None
    notes = [] if begun is None else list(begun.get("notes", []))
    changes = [f"continued with {change}" for change in changed_conditions(now, begun or before)]
    for change in changes:
        log_line(f"task {task.name}: {change}")
    write_json(paths.rows, {"fingerprint": fingerprint, **now, "notes": notes + changes})
    return notes + changes
