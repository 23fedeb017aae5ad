"""What the tests of several kinds of runs start from."""

import pytest
from helpers.processes import without_dropout


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
