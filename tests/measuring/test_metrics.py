"""Metrics of accuracy matrices worked out by hand."""

import pytest

from pm_hf.measuring.metrics import (
    average_accuracy,
    average_anytime_accuracy,
    backward_transfer,
    forgetting,
    summary,
    task_forgetting,
)

R = [
    [0.90, None, None],
    [0.95, 0.80, None],
    [0.60, 0.70, 0.50],
]


def test_three_tasks_by_hand():
    assert average_accuracy(R) == pytest.approx((0.60 + 0.70 + 0.50) / 3)
    assert average_anytime_accuracy(R) == pytest.approx((0.90 + (0.95 + 0.80) / 2 + 0.60) / 3)
    assert backward_transfer(R) == pytest.approx(((0.60 - 0.90) + (0.70 - 0.80)) / 2)
    assert task_forgetting(R) == pytest.approx([0.95 - 0.60, 0.80 - 0.70, None])  # from the best score, not the first
    assert forgetting(R) == pytest.approx((0.35 + 0.10) / 2)


def test_a_task_that_gained_at_the_end_has_negative_forgetting():
    gained = [[0.5, None], [0.75, 0.9]]
    assert forgetting(gained) == pytest.approx(-0.25)
    assert backward_transfer(gained) == pytest.approx(0.25)


def test_scores_of_tasks_not_yet_seen_change_nothing():
    full = [[0.90, 0.11, 0.22], [0.95, 0.80, 0.33], R[2]]
    assert summary(full) == summary(R)


def test_one_task_has_no_transfer_and_no_forgetting():
    assert summary([[0.7]]) == {"ACC": 0.7, "AAA": 0.7, "BWT": None, "forgetting": None}


def test_a_gap_is_left_out_of_a_tasks_best_score():
    gaps = [[0.9, None, None], [None, 0.8, None], [0.4, None, 0.5]]
    assert task_forgetting(gaps) == pytest.approx([0.5, None, None])


def test_a_joint_training_has_the_mean_of_its_only_row():
    assert summary([[0.4, None, 0.8]]) == {
        "ACC": pytest.approx(0.6),
        "AAA": None,
        "BWT": None,
        "forgetting": None,
    }


def test_summary_has_the_four_metrics():
    expected = {
        "ACC": average_accuracy(R),
        "AAA": average_anytime_accuracy(R),
        "BWT": backward_transfer(R),
        "forgetting": forgetting(R),
    }
    assert summary(R) == expected


def test_a_score_that_is_missing_is_named():
    with pytest.raises(ValueError, match=r"R\[1\]\[0\] was not evaluated"):
        average_anytime_accuracy([[0.9, None], [None, 0.8]])
