"""Runs that are stopped at a checkpoint or killed at one file operation after the other, and what they end as."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from helpers.processes import forked
from helpers.streams import contents, same_tensors, steps
from pm_hf.cli import main
from pm_hf.training.callbacks import StoppedError
from pm_hf.training.checkpoints import AtomicCheckpoints

OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "shutil.rmtree"}
MEASURED = (
    "seconds",
    "step_seconds",
    "process_peak_memory_mb",
    "files",
)  # the digests of reports of merges that took other seconds


def die(*_, **__):
    """This process is killed here."""
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def stops_after_checkpoint(task: str = "", step: int | None = None) -> Iterator[None]:
    """The run of the block has to end where a checkpoint of the task, at that step if one is given, was written."""
    save = AtomicCheckpoints._save_checkpoint

    def save_and_stop(self, *args, **kwargs):
        save(self, *args, **kwargs)
        if task in self.args.output_dir and step in (None, self.state.global_step):
            raise StoppedError

    with mock.patch.object(AtomicCheckpoints, "_save_checkpoint", save_and_stop):
        try:
            yield
        except StoppedError:
            return
    raise AssertionError("nothing was stopped")


def die_at(count, folder):
    """From now on this process dies at its count-th operation on files in `folder`."""
    left = [count]

    def hook(event, arguments):
        if event in OPERATIONS and str(arguments[0]).startswith(str(folder)):
            left[0] -= 1
            if left[0] < 0:
                die()

    sys.addaudithook(hook)


def killed_until_done(path, folder, draw):
    """Start the run again and again until it ends by itself; the numbers of operations after which it was killed."""
    kills = []
    while True:
        count = draw(len(kills))

        def work(count=count):
            die_at(count, folder)
            return main(["train", "--config", str(path)])

        status, said = forked(work)
        if status == 0:
            return kills
        assert status == -signal.SIGKILL, said
        kills.append(count)


def assert_same(folder, whole):
    """The same files, adapters bit for bit, and the same step.json but for what the clock says."""
    assert contents(folder).keys() == contents(whole).keys()
    for adapter in sorted(path.parent for path in whole.rglob("adapter_model.safetensors")):
        assert same_tensors(folder / adapter.relative_to(whole), adapter)
    for mine, theirs in zip(steps(folder), steps(whole), strict=True):
        for measured in MEASURED:
            mine.pop(measured, 0), theirs.pop(measured, 0)  # none of a step where the last one was checkpointed
        for of_run in (mine, theirs):
            of_run.get("replay", {}).pop("seconds", None)
        assert mine == theirs
