"""Trackers of a run (`training.report_to`): each training's curves, and the stream's scalars over tasks learned."""

import copy
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from pm_hf.distributed import on_main_process
from pm_hf.files import expand, read_checked, write_json
from pm_hf.runs.folder import RunFolder
from pm_hf.runs.records import Report
from pm_hf.runs.schemas import TrackersFile

# x axes: tasks learned, optimizer steps of all tasks
TASKS_AXIS, STEPS_AXIS = "test/tasks", "train/global_step"


class Tracker(Protocol):
    """One place that a run is logged to."""

    def training(self, task: str, before: int) -> TrainerCallback:
        """What logs a task's training that begins after `before` optimizer steps of earlier tasks."""

    def log(self, values: dict[str, float], tasks: int, steps: int) -> None:
        """Log the stream's scalars after so many tasks and optimizer steps."""

    def close(self, failed: bool) -> None:
        """Write what is left."""


class Tracking:
    """What `training.report_to` names of TensorBoard, W&B and trackio, opened once for a run, not once for each task.

    Only the main process logs. `logs/trackers.json` has the run's id, so that a continued run is the same one there,
    and how many tasks each tracker has. Other names in `report_to` are left to the Trainer of each task.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._open: dict[str, Tracker] = {}
        self._state: dict[str, Any] = {}

    @contextmanager
    def opened(self, args: TrainingArguments, done: int) -> Iterator[None]:
        """Log inside the block; first what is not logged yet of `done` finished tasks."""
        failed = True
        try:
            on_main_process(lambda: self._begin(args, done))
            yield
            failed = False
        finally:
            for tracker in self._open.values():
                tracker.close(failed)
            self._open.clear()

    def training(self, args: TrainingArguments, index: int) -> list[TrainerCallback]:
        """Callbacks of one task's training; their names are taken out of `args.report_to`."""
        args.report_to = [name for name in args.report_to or () if name not in TRACKERS]
        before, task = self._steps(index) if self._open else 0, self.folder.task(index).name
        return [tracker.training(task, before) for tracker in self._open.values()]

    def log(self, done: int) -> None:
        """Log the stream's scalars after `done` tasks; in the main process."""
        for name in self._open:
            self._log(name, done)

    def _begin(self, args: TrainingArguments, done: int) -> None:
        wanted = [name for name in TRACKERS if name in (args.report_to or ())]
        if not wanted:
            return
        path = self.folder.paths.trackers
        begun, way_out = path.is_file(), "remove it and the trackers begin another run"
        new: dict[str, Any] = {"id": secrets.token_hex(4), "logged": {}}
        self._state = read_checked(path, TrackersFile, way_out) if begun else new
        path.parent.mkdir(exist_ok=True)
        write_json(path, self._state)
        for name in wanted:
            self._open[name] = TRACKERS[name](args, self.folder, self._state["id"], begun)
            for tasks in range(self._state["logged"].get(name, 0) + 1, done + 1):
                self._log(name, tasks)

    def _log(self, name: str, tasks: int) -> None:
        self._open[name].log(scalars(self.folder.report(tasks)), tasks, self._steps(tasks))
        self._state["logged"][name] = tasks
        write_json(self.folder.paths.trackers, self._state)

    def _steps(self, tasks: int) -> int:
        return sum(self.folder.record(index).optimizer_steps for index in range(tasks))


def scalars(report: Report) -> dict[str, float]:
    """{name: value} of the run so far.

    `test/ACC`, `test/AAA`, `test/BWT`, `test/forgetting` (the last two from the second task on), `test/score/00-name`
    (the stream's metric on each task seen), `merge/coefficient` (as used) and `merge/one_over_t`.
    """
    metrics, alpha = report.metrics, report.alphas[-1]
    values = {f"test/{name}": metrics[name] for name in ("ACC", "AAA", "BWT", "forgetting")}
    for index, (task, score) in enumerate(zip(report.tasks, report.scores[-1], strict=True)):
        name = "".join(c if c.isalnum() or c in "-_" else "-" for c in task)
        values[f"test/score/{index:02d}-{name}"] = score
    if alpha is not None:
        values |= {"merge/coefficient": alpha.used, "merge/one_over_t": alpha.one_over_t}
    return {name: value for name, value in values.items() if value is not None}


class TensorBoard:
    """Event files: `task-00-name/` for each training, `stream/` for the stream's scalars.

    They lie in `logs/` of the run, or where TENSORBOARD_LOGGING_DIR is set in a folder there with the run's name.
    """

    def __init__(self, args: TrainingArguments, folder: RunFolder, run: str, begun: bool) -> None:
        given = os.getenv("TENSORBOARD_LOGGING_DIR")
        name = folder.path.resolve().name
        self.root = expand(given, "TENSORBOARD_LOGGING_DIR") / name if given else folder.paths.logs
        self._stream: Any = None

    def training(self, task: str, before: int) -> TensorBoardCallback:
        """Steps are the task's own."""
        callback = TensorBoardCallback()
        callback.logging_dir = str(self.root / task)
        return callback

    def log(self, values: dict[str, float], tasks: int, steps: int) -> None:
        """Steps are tasks."""
        if self._stream is None:
            self._stream = summary_writer(self.root / "stream")
        for name, value in values.items():
            self._stream.add_scalar(name, value, tasks)
        self._stream.flush()

    def close(self, failed: bool) -> None:
        """Close the stream's file."""
        if self._stream is not None:
            self._stream.close()


class _OneAxis:
    """In front of a callback: the steps of one task follow those of the task before it."""

    before = 0

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """Log at the step of the whole stream."""
        moved = copy.copy(state)
        moved.global_step += self.before
        super().on_log(args, moved, control, **more)  # type: ignore[misc]


class _WandbTraining(_OneAxis, WandbCallback):
    """WandbCallback with steps that count on over the tasks."""


class Wandb:
    """One W&B run; one that is there already is used and left open."""

    def __init__(self, args: TrainingArguments, folder: RunFolder, run: str, begun: bool) -> None:
        import wandb

        self._wandb, self._callback = wandb, _WandbTraining()
        self._own, self._defined = wandb.run is None, {TASKS_AXIS}
        if self._own:
            same = {} if os.getenv("WANDB_RUN_ID") else {"id": run, "resume": "allow" if begun else None}
            wandb.init(
                project=os.getenv("WANDB_PROJECT", "huggingface"),  # as WandbCallback does
                name=args.run_name or os.getenv("WANDB_NAME") or run_name(args, folder, run),
                **same,
            )
        wandb.config.update({"pm_hf": run_settings(folder)}, allow_val_change=True)
        wandb.define_metric(TASKS_AXIS)

    def training(self, task: str, before: int) -> WandbCallback:
        """The x axis of its curves is train/global_step, which counts on over the tasks."""
        self._callback.before = before
        return self._callback

    def log(self, values: dict[str, float], tasks: int, steps: int) -> None:
        """The x axis is test/tasks."""
        for name in [name for name in values if name not in self._defined]:
            self._wandb.define_metric(name, step_metric=TASKS_AXIS)
        self._defined |= values.keys()
        self._wandb.log({**values, TASKS_AXIS: tasks, STEPS_AXIS: steps})

    def close(self, failed: bool) -> None:
        """End the run unless it was there before."""
        if self._own:
            self._wandb.finish(exit_code=int(failed))


class _TrackioTraining(_OneAxis, TrackioCallback):
    """TrackioCallback with steps that count on over the tasks, whose run goes on after a task's training."""

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """The run goes on."""


class Trackio:
    """One trackio run, continued by its name."""

    def __init__(self, args: TrainingArguments, folder: RunFolder, run: str, begun: bool) -> None:
        import trackio

        self._trackio, self._callback, self._args = trackio, _TrackioTraining(), copy.copy(args)
        self._args.run_name = run_name(args, folder, run)
        self._callback.setup(self._args, TrainerState(), None)
        trackio.config.update({"pm_hf": run_settings(folder)}, allow_val_change=True)

    def training(self, task: str, before: int) -> TrackioCallback:
        """The same run for every task."""
        self._callback.before = before
        return self._callback

    def log(self, values: dict[str, float], tasks: int, steps: int) -> None:
        """The x axis to choose is test/tasks."""
        self._trackio.log({**values, TASKS_AXIS: tasks, STEPS_AXIS: steps})

    def close(self, failed: bool) -> None:
        """End the run, as TrackioCallback does after a training."""
        TrackioCallback.on_train_end(
            self._callback, self._args, TrainerState(), TrainerControl(), model=SimpleNamespace()
        )


TRACKERS: dict[str, type] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


def summary_writer(folder: Path) -> Any:
    """A writer of event files, by whichever package TensorBoardCallback finds."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        from tensorboardX import SummaryWriter  # type: ignore[no-redef]
    return SummaryWriter(log_dir=str(folder))


def run_name(args: TrainingArguments, folder: RunFolder, run: str) -> str:
    """`training.run_name`, or the folder's name with the run's id."""
    return args.run_name or f"{folder.path.resolve().name}-{run}"


def run_settings(folder: RunFolder) -> dict[str, Any]:
    """The run's settings without the TrainingArguments, which the trackers get from the Trainer, tokens masked."""
    return {key: value for key, value in folder.config.to_dict().items() if key != "training"}
