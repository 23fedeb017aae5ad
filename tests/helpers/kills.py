"""Runs that are killed at one file operation after the other, and what they have to end as."""

import os
import signal
import sys

from helpers.processes import forked
from helpers.streams import contents, same_tensors, steps
from pm_hf.cli import main

OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "shutil.rmtree"}
MEASURED = (
    "seconds",
    "step_seconds",
    "process_peak_memory_mb",
    "files",
)  # the digests of reports of merges that took other seconds


def die_at(count, folder):
    """From now on this process dies at its count-th operation on files in `folder`."""
    left = [count]

    def hook(event, arguments):
        if event in OPERATIONS and str(arguments[0]).startswith(str(folder)):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

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
