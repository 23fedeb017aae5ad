"""A run that is killed at one file operation after the other ends where one that was left alone ends."""

import os
import random
import shutil
import signal
import sys

import pytest
from helpers.processes import forked
from helpers.streams import contents, same_tensors, settings, steps, write_yaml

from pm_hf.cli import main

CHANGES = {"training__num_train_epochs": 2, "lora__dropout": 0.1, "groups": 2}
OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "shutil.rmtree"}
MEASURED = (
    "seconds",
    "step_seconds",
    "process_peak_memory_mb",
    "files",
)  # the digests of reports of merges that took other seconds


@pytest.fixture(scope="module")
def data(stream_data):
    return stream_data(8)


@pytest.fixture(scope="module")
def whole(finished_run):
    """A run that nothing disturbed."""
    return finished_run(8, method="best", **CHANGES)


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
    assert contents(folder).keys() == contents(whole).keys()
    for adapter in sorted(path.parent for path in whole.rglob("adapter_model.safetensors")):
        assert same_tensors(folder / adapter.relative_to(whole), adapter)
    for mine, theirs in zip(steps(folder), steps(whole), strict=True):
        for measured in MEASURED:
            mine.pop(measured, 0), theirs.pop(measured, 0)  # none of a step where the last one was checkpointed
        assert mine == theirs


@pytest.mark.parametrize(("seed", "first"), [(0, 24), (1, 0)])
def test_killed_at_its_first_operations_and_at_ones_drawn_at_random(seed, first, whole, tiny_base, data, tmp_path):
    path = write_yaml(tmp_path / "c.yaml", settings(tiny_base, data, tmp_path / "run", method="best", **CHANGES))
    rng = random.Random(seed)
    kills = killed_until_done(path, tmp_path / "run", lambda done: done if done < first else rng.randrange(300))
    assert len(kills) >= max(first, 5)
    assert_same(tmp_path / "run", whole)


@pytest.mark.slow
def test_killed_at_every_third_operation_of_a_run(whole, tiny_base, data, tmp_path):
    """One run for each: killed there, then left alone."""
    count, kills = 0, [0]
    while kills:
        folder = tmp_path / f"run-{count}"
        path = write_yaml(tmp_path / "c.yaml", settings(tiny_base, data, folder, method="best", **CHANGES))
        kills = killed_until_done(path, folder, lambda done, count=count: count if not done else sys.maxsize)
        assert_same(folder, whole)
        shutil.rmtree(folder)
        count += 3
    assert count > 300
