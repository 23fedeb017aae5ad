"""SIGTERM ends a run after the step that is being made, with a checkpoint to continue from."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pm_hf.processes import any_process, interruptible, together


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
        together(self._end)

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
