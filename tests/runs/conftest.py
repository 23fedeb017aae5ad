"""What the tests of several kinds of runs start from."""

import shutil

import pytest
from helpers.processes import without_dropout
from helpers.rehearsal import TASKS, settings

from pm_hf.runs.learner import learn


@pytest.fixture(scope="session")
def base(tiny_base, tmp_path_factory):
    """The base model without dropout; nobody changes it."""
    return without_dropout(tiny_base, tmp_path_factory.mktemp("still") / "base")


@pytest.fixture
def no_training(monkeypatch):
    """Fail when anything is trained: bad input has to be found before."""

    def train(*args, **kwargs):
        raise AssertionError("training began")

    monkeypatch.setattr("pm_hf.runs.learner.train", train)


@pytest.fixture(scope="session")
def rehearsal_runs(language_data, tmp_path_factory):
    """(run of three tasks with written rows, the folder that it was when two were finished); nobody changes them."""
    place = tmp_path_factory.mktemp("rehearsal")
    learn(settings(language_data, place / "run", tasks=list(TASKS)[:2]))
    two = shutil.copytree(place / "run", place / "two")
    learn(settings(language_data, place / "run"))
    return place / "run", two
