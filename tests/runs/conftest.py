"""What the tests of several kinds of runs start from."""

import pytest


@pytest.fixture
def no_training(monkeypatch):
    """Fail when anything is trained: bad input has to be found before."""

    def train(*args, **kwargs):
        raise AssertionError("training began")

    monkeypatch.setattr("pm_hf.runs.learner.train", train)
