"""The folder of one run: what is finished, what is published, what is no longer needed."""

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from pm_hf.config.loading import config_text, differing_keys, load_config, save_config
from pm_hf.config.schema import RunConfig
from pm_hf.data.stream import STEP_FILE, Task, TaskStream, task_folder
from pm_hf.environment import changed_conditions, conditions
from pm_hf.errors import InputError, raise_all
from pm_hf.files import LOCK, copy_folder, make_folder, read_json, remove_leftovers, same_folder, write_json
from pm_hf.measuring.metrics import task_forgetting
from pm_hf.runs.records import CLASS_INCREMENTAL, Report, primary_metric
from pm_hf.runs.start import CHANGE_FOLDER, CURVATURE_FILE, OPTIMUM_FOLDER, STATISTICS_FILE, StreamState

ROWS_FILE = "rows.json"  # rows of the task that is being trained, and under which conditions


CONFIG_FILE = "config.yaml"


METRIC_NAMES = {CLASS_INCREMENTAL: "accuracy"}  # how a metric is called in a message


class ForgettingError(RuntimeError):
    """An old task lost more than `max_forgetting`; the published adapter is still the previous one."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


class RunFolder:
    """Files of one stream in one output folder; only the main process writes."""

    def __init__(self, config: RunConfig, stream: TaskStream, start: StreamState | None) -> None:
        self.config, self.stream, self.start = config, stream, start
        self.path = Path(config.output_dir).expanduser()

    def task(self, index: int) -> Path:
        """Folder of one task."""
        return task_folder(self.config, index, self.stream.tasks[index].name)

    def step(self, index: int) -> dict:
        """What step.json says of a finished task."""
        return read_json(self.task(index) / STEP_FILE)

    def state(self, index: int) -> StreamState:
        """What the task before `index` left."""
        if index == 0:
            return self.start or StreamState()
        folder = self.task(index - 1)
        curvature, statistics, optimum = (folder / name for name in (CURVATURE_FILE, STATISTICS_FILE, OPTIMUM_FOLDER))
        return StreamState(
            folder / "merged",
            curvature if curvature.is_file() else None,
            statistics if statistics.is_file() else None,
            optimum if optimum.is_dir() else folder / "adapter",
        )

    def finished(self) -> int:
        """Number of finished tasks in the folder; InputError when they contradict the config, or where the training
        rows of a task are left out that is not finished."""
        done = self._finished()
        left = [task.name for task in self.stream.tasks[done:] if not len(task.train)]
        if left:
            raise InputError(
                f"stream.tasks: {', '.join(left)} leave out train, which only finished tasks may, and {self.path} has "
                f"{done} finished tasks; name the training files, or the output_dir in which they are finished"
            )
        for index in range(done):
            self.tidy(index)
        return done

    def data_problem(self, index: int) -> str | None:
        """What contradicts a finished task in its data; training rows that are left out are not compared."""
        task, step = self.stream.tasks[index], self.step(index)
        if len(task.train):
            return None if step["fingerprint"] == task.fingerprint() else "its labels or rows differ"
        if "test_fingerprint" not in step:
            return "an older version finished it, whose training rows cannot be left out"
        return None if step["test_fingerprint"] == task.test_fingerprint() else "its labels or test rows differ"

    def _finished(self) -> int:
        path = self.path / CONFIG_FILE
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
        while done < len(self.stream.tasks) and (self.task(done) / STEP_FILE).is_file():
            done += 1
        started = [*self.path.glob(f"task-*/{STEP_FILE}"), *self.path.glob("task-*/checkpoints/checkpoint-*")]
        if not started and path.read_text(encoding="utf-8") != config_text(load_config(path)):
            raise InputError(f"{path} is a file of yours; choose another output_dir, the run writes its settings there")
        problems = differing_keys(load_config(path).to_dict(), self.config.to_dict()) if started else []
        for index in range(done):
            if problem := self.data_problem(index):
                problems.append(f"task {index} ({self.stream.tasks[index].name}): {problem}")
        steps = len(list(self.path.glob(f"task-*/{STEP_FILE}")))
        if steps > done:
            problems.append(f"the folder has {steps} finished tasks, the config fits the first {done}")
        raise_all(problems, f"output_dir {self.path} holds another run; use its config or another output_dir")
        return done

    def begin_run(self) -> int:
        """Write the settings and publish what is finished; the number of finished tasks."""
        done = self.finished()  # again: another process may have held the folder until now
        save_config(self.config, self.path / CONFIG_FILE)
        self.publish(done)
        return done

    def check_shared(self) -> None:
        """InputError in a process that does not see what process 0 has written."""
        if not (self.path / CONFIG_FILE).is_file():
            raise InputError(
                f"output_dir {self.path} is not one folder for all processes; use a file system that they share"
            )

    def begin_task(self, index: int) -> list[str]:
        """A folder for the task, with its checkpoints if there are any; what is to be said where they are continued."""
        task, folder = self.stream.tasks[index], self.task(index)
        make_folder(folder)
        for stale in ("adapter", "merged", OPTIMUM_FOLDER):
            shutil.rmtree(folder / stale, ignore_errors=True)
        remove_leftovers(folder)
        return _note_conditions(folder, task, self.step(index - 1) if index else None)

    def finish_task(self, index: int, step: Mapping) -> None:
        """Write step.json, which makes the task a finished one."""
        write_json(self.task(index) / STEP_FILE, step)
        self.tidy(index)

    def tidy(self, index: int) -> None:
        """Remove what a finished task no longer needs: checkpoints, and what only the task after it needed."""
        folder = self.task(index)
        for name in ("checkpoints", ROWS_FILE):
            path = folder / name
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        # with a gate the published adapter may be the previous one, and its curvature goes with it
        last = index - 2 if self.config.max_forgetting is not None else index - 1
        for older in range(last + 1):
            (self.task(older) / CURVATURE_FILE).unlink(missing_ok=True)
            shutil.rmtree(self.task(older) / OPTIMUM_FOLDER, ignore_errors=True)
            shutil.rmtree(self.task(older) / CHANGE_FOLDER, ignore_errors=True)

    def publish(self, done: int) -> None:
        """Copy the newest merge to `merged/` unless an old task fell further than allowed; write report.json."""
        if not done:
            return
        report = self.report(done)
        report.save()
        limit = self.config.max_forgetting
        drops = {} if limit is None else dict(zip(report.tasks, task_forgetting(report.signed), strict=False))
        fallen = {name: drop for name, drop in drops.items() if limit is not None and drop > limit}
        if fallen:
            listed = ", ".join(f"{name} by {drop:.3f}" for name, drop in fallen.items())
            raise ForgettingError(
                f"forgot more than max_forgetting {limit} after task {report.tasks[done - 1]}: {listed}; "
                f"{self.path / 'merged'} is still the previous adapter",
                report,
            )
        newest = self.task(done - 1) / "merged"
        remove_leftovers(self.path)
        if not self.config.strategy.individual and not same_folder(newest, self.path / "merged"):
            copy_folder(newest, self.path / "merged")

    def report(self, done: int) -> Report:
        """Report on the first `done` tasks, from their step.json."""
        steps = [self.step(index) for index in range(done)]
        notes = list(self.stream.notes)
        notes += [f"task {step['task']}: {note}" for step in steps for note in step.get("notes", [])]
        notes += [
            f"task {step['task']}: {step['coefficient']['note']}"
            for step in steps
            if step["coefficient"] and step["coefficient"]["note"] not in (None, "given")
        ]
        width = max(len(step["scores"][next(iter(step["scores"]))]) for step in steps)
        names = list(dict.fromkeys(name for step in steps for name in step["scores"]))

        def matrix(name: str) -> list[list[float | None]]:
            found = [step["scores"].get(name, []) for step in steps]
            return [[*row, *[None] * (width - len(row))] for row in found]

        scored = self.stream.seen(done - 1)
        return Report(
            folder=self.path,
            method=self.config.method,
            seed=self.config.seed,
            scenario=self.stream.scenario,
            tasks=[task.name for task in scored],
            metric=primary_metric(names, [task.own for task in scored]),
            matrices={name: matrix(name) for name in names},
            test_rows=[len(task.test) for task in scored],
            coefficients=[step["coefficient"] for step in steps],
            merge_errors=[step["merge_error"] for step in steps],
            seconds=sum(step["seconds"] for step in steps),
            freedom=steps[-1]["freedom"],
            train_from=steps[-1]["train_from"],
            held_out=[step["held_out"] for step in steps if step["held_out"]],
            notes=notes,
        )


def log_finished_task(index: int, total: int, step: Mapping, metric: str) -> None:
    """One line on stderr for a finished task."""
    alpha, scores = step["coefficient"], step["scores"][metric]
    mean = sum(scores) / len(scores)
    name = METRIC_NAMES.get(metric, metric.replace("_", " "))
    line = f"task {index + 1}/{total} {step['task']}: {name} {scores[-1]:.3f}, mean of {len(scores)} {mean:.3f}"
    scaled = alpha is not None and step["freedom"] != "free"
    merged = f", coefficient {alpha['used']:.3f} (1/t {alpha['one_over_t']:.3f})" if scaled else ""
    print(f"{line}{merged}, {step['seconds']:.1f} s", file=sys.stderr, flush=True)


def _note_conditions(folder: Path, task: Task, before: Mapping | None) -> list[str]:
    """Remember the task's rows and the conditions; what is to be said where they have changed.

    With checkpoints they are compared with those of the earlier start, else with step.json of the task before.
    """
    now, path = conditions(), folder / ROWS_FILE
    begun = read_json(path) if path.is_file() and any((folder / "checkpoints").glob("checkpoint-*")) else None
    if not isinstance(begun, dict) or begun["fingerprint"] != task.fingerprint():
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # of other rows
        begun = None
    notes = [] if begun is None else list(begun.get("notes", []))
    new = [f"continued with {change}" for change in changed_conditions(now, begun or before or {})]
    for note in new:
        print(f"task {task.name}: {note}", file=sys.stderr, flush=True)
    write_json(path, {"fingerprint": task.fingerprint(), **now, "notes": notes + new})
    return notes + new
