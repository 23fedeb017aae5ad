"""What step.json says of a training."""

import math

import pytest

from pm_hf.training.record import TrainingRecord


def record(*losses):
    return TrainingRecord(0.0, len(losses), {}, [[step + 1, loss, 1.0] for step, loss in enumerate(losses)])


@pytest.mark.parametrize(
    ("losses", "classes", "noted"),
    [
        ([1.4, 1.39, 1.38, 1.39], 4, True),  # ln 4 = 1.386
        ([1.4, 1.2, 0.9, 0.4], 4, False),
        ([0.3, 0.2, 0.2, 0.1], 4, False),  # began with analytic rows
        ([3.0, 3.1, 3.0, 3.0], None, True),
        ([3.0, 2.9, 2.5, 2.4], None, False),
        ([0.0, 0.0], 1, False),  # one class has nothing to guess
        ([1.4], 4, False),
        ([], 4, False),
    ],
)
def test_a_training_that_learned_nothing_is_noted(losses, classes, noted):
    note = record(*losses).learning_note(classes)
    assert (note is not None) == noted
    if note and classes:
        assert f"{losses[-1]:.3g} where guessing among 4 classes has {math.log(4):.3g}" in note
