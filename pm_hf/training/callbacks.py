"""Callbacks of a task's training: SIGTERM, SFA's averaging, early stopping, times of steps."""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pm_hf.distributed import any_process, interruptible, on_all_processes
from pm_hf.models.lora import adapted_layers


class StoppedError(BaseException):
    """The run was asked to stop; the same command continues it.

    As KeyboardInterrupt it is no Exception: no library may swallow it that goes on after one.
    """

    def __init__(self) -> None:
        super().__init__("stopped by SIGTERM; the same command continues from here")


class Stop(TrainerCallback):
    """Remembers that SIGTERM came. While a Trainer trains, the step is finished and saved; otherwise it raises at once:
    what was finished is on disk, and what was half done is done again. One of several processes raises where the
    others are told of it, at the latest at the next `check`."""

    def __init__(self) -> None:
        self.asked = False
        self._training = False

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """From here on the Trainer decides where to stop."""
        self._training = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **__: Any
    ) -> TrainerControl:
        """Save and stop if asked to; of several processes all stop where one was asked."""
        if any_process(self.asked):
            self.asked = True
            control.should_save = control.should_training_stop = True
        return control

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """A stop that was asked for takes place here, after the checkpoint was written."""
        self._training = False
        self.check()

    def check(self) -> None:
        """End the run if one of its processes was asked to stop."""
        on_all_processes(self._end)

    def _end(self) -> None:
        if self.asked:
            raise StoppedError

    def handle(self, _: int, __: FrameType | None) -> None:
        """Signal handler."""
        self.asked = True
        if not self._training and interruptible():
            raise StoppedError


@contextmanager
def stop_on_sigterm() -> Iterator[Stop]:
    """Handle SIGTERM inside the block; only the main thread may, elsewhere nothing changes. StoppedError ends it."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, stop.handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


class SequentialAveraging(TrainerCallback):
    """Every pT of a task's T optimizer steps, and at the end: θ ← (1 − β)θ + βθ_before (SFA, arXiv 2501.05559).

    period: p, in (0, 1]; weight: 1 − β. θ_before is the model before the task, where the task's product is 0: its B is
    scaled by 1 − β. The rows of `head`, a head that all tasks share, go back towards what they were; None: the head is
    the task's own.
    """

    def __init__(self, model: nn.Module, adapter: str, head: nn.Linear | None, period: float, weight: float) -> None:
        self.period, self.weight = period, weight
        self._factors = [layer.lora_B[adapter].weight for layer in adapted_layers(model, adapter).values()]
        rows = [] if head is None else list(head.parameters())
        self._rows = [(row, row.detach().clone()) for row in rows]

    @torch.no_grad()
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Average where it is time to."""
        interval = max(1, round(self.period * state.max_steps))
        if state.global_step % interval == 0 or state.global_step == state.max_steps:
            for factor in self._factors:
                factor.mul_(self.weight)
            for row, before in self._rows:
                row.lerp_(before.to(row.device), 1 - self.weight)


class EarlyStopping(TrainerCallback):
    """Ends the training when `patience` evaluations in a row were not better than the best one before them.

    They are counted in the log, which a checkpoint has: a continued training counts on, and one that was over is over.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Count in the checkpoint's log."""
        return self.on_evaluate(args, state, control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Count, and stop where it is enough."""
        key, sign = f"eval_{str(args.metric_for_best_model).removeprefix('eval_')}", 1 if args.greater_is_better else -1
        of_steps = {entry["step"]: sign * entry[key] for entry in state.log_history if key in entry}
        values = [-math.inf if math.isnan(value) else value for value in of_steps.values()]
        since = len(values) - 1 - values.index(max(values)) if values else 0
        if since >= self.patience:
            control.should_training_stop = True
        return control


class StepTimes(TrainerCallback):
    """Seconds of each optimizer step, without what callbacks and checkpoints take between two."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Forget the steps of a training that was broken off."""
        self.seconds.clear()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """The clock starts."""
        self._began = time.perf_counter()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """The clock stops."""
        self.seconds.append(time.perf_counter() - self._began)
