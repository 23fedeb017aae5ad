"""A run that is killed at one file operation after the other ends where one that was left alone ends."""

import random
import shutil
import sys

import pytest
from helpers.kills import assert_same, killed_until_done
from helpers.streams import settings, write_yaml

CHANGES = {"training__num_train_epochs": 2, "lora__dropout": 0.1, "groups": 2}


@pytest.fixture(scope="module")
def data(stream_data):
    return stream_data(8)


@pytest.fixture(scope="module")
def whole(finished_run):
    """A run that nothing disturbed."""
    return finished_run(8, method="best", **CHANGES)


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
