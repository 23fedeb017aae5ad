"""The bounded log of losses and factors."""

import json

import pytest

from pm_hf.training.checkpoints import MOST_POINTS, LossLog


def logged(steps, log=None, micro=1):
    """A log after `steps`, with a loss of 1/step and a factor of step % 3 for each of `micro` micro-steps."""
    log = log or LossLog()
    for step in steps:
        for part in range(micro):
            log.add(step, 1 / step, step % 3 + part)
    return log


def test_a_short_training_keeps_every_step():
    assert logged(range(1, 6)).points == [[s, 1 / s, s % 3] for s in range(1, 6)]


@pytest.mark.parametrize("count", [MOST_POINTS, MOST_POINTS + 1, 1000, 5000])
def test_a_long_training_keeps_every_kth_step(count):
    points = logged(range(1, count + 1)).points
    stride = next(2**k for k in range(20) if len(range(1, count + 1, 2**k)) <= MOST_POINTS)
    assert points == [[s, 1 / s, s % 3] for s in range(1, count + 1, stride)]
    assert MOST_POINTS // 2 < len(points) <= MOST_POINTS


def test_micro_steps_add_their_losses_and_average_their_factors():
    points = logged(range(1, 4), micro=3).points
    for step, (number, loss, factor) in enumerate(points, start=1):
        assert (number, factor) == (step, step % 3 + 1)
        assert loss == pytest.approx(3 / step)


@pytest.mark.parametrize("cut", [1, 2, 300, 700])
def test_a_continued_training_logs_as_one_that_went_through(cut):
    half = json.loads(json.dumps(logged(range(1, cut + 1)).points))
    assert logged(range(cut + 1, 1001), LossLog(half)).points == logged(range(1, 1001)).points
