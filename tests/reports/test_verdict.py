"""What is said of several runs: against sums made by hand."""

import json
import math
from dataclasses import asdict
from statistics import stdev

import pytest
from helpers import edited_json
from helpers.records import write_run

from pm_hf.reports.verdict import difference, group_runs, ranked, verdict
from pm_hf.runs.records import read_runs
from pm_hf.runs.right_rows import RightRows


def run(folder, method, accuracy, seed=0, rows=100, **config):
    """A run of two tasks that ends at an accuracy, the first one 0.1 below what it was."""
    R = [[accuracy + 0.1, None], [accuracy, accuracy]]
    place = write_run(
        folder / f"{method}-{seed}-{len(list(folder.iterdir()))}", ["a", "b"], method, seed, R=R, **config
    )
    edited_json(place / "report.json", test_rows=[rows, rows])
    return place


def groups(*folders):
    return group_runs(read_runs(folders))


def test_seeds_of_the_same_settings_are_one_group(tmp_path):
    folders = [run(tmp_path, "pm", 0.5 + seed / 100, seed) for seed in (0, 1, 2)]
    folders += [run(tmp_path, "pm", 0.5, 0, lora={"r": 4}), run(tmp_path, "best", 0.7)]
    made = groups(*folders)
    assert [(group.title, len(group.runs)) for group in made] == [
        ("pm (1) (3 seeds)", 3),
        ("pm, seed 0 (4)", 1),
        ("best", 1),
    ]
    assert made[0].shown("ACC") == "0.510 ± 0.010"
    twice = groups(run(tmp_path, "opcm", 0.5, 1), run(tmp_path, "opcm", 0.6, 1))
    assert [len(group.runs) for group in twice] == [1, 1]  # one seed twice is no two seeds


def test_differences_are_paired_where_the_seeds_are_the_same(tmp_path):
    left, right = [0.50, 0.60, 0.70], [0.45, 0.56, 0.64]
    folders = [run(tmp_path, m, v, s) for m, values in (("a", left), ("b", right)) for s, v in enumerate(values)]
    first, second = groups(*folders)
    delta, error = difference(first, second)
    gaps = [x - y for x, y in zip(left, right, strict=True)]
    assert (delta, error) == pytest.approx((sum(gaps) / 3, stdev(gaps) / math.sqrt(3)))
    alone = groups(*folders[:3], run(tmp_path, "c", 0.5))
    _, error = difference(*alone)
    rows = math.sqrt(2 * 0.5 * 0.5 / 100) / 2
    assert error == pytest.approx(math.hypot(stdev(left) / math.sqrt(3), rows))


def test_one_seed_is_paired_by_the_rows_that_both_scored(tmp_path):
    left, right = ([True] * 60 + [False] * 40, [True] * 50 + [False] * 50), ([True] * 50 + [False] * 50,) * 2
    folders = [run(tmp_path, "a", 0.55), run(tmp_path, "b", 0.5), run(tmp_path, "c", 0.5)]
    for folder, truths in zip(folders, (left, right, right), strict=True):
        kept = {t: asdict(RightRows.of(of, "rows")) for t, of in zip("ab", truths, strict=True)}
        edited_json(folder / "report.json", right=kept)
    edited_json(folders[2] / "report.json", right={t: kept[t] | {"rows": "others"} for t in "ab"})
    first, second, others = groups(*folders)
    delta, error = difference(first, second)
    assert (delta, error) == pytest.approx((0.05, math.sqrt(0.1 * 0.9 / 100) / 2))
    assert difference(first, others)[1] > error  # the same scores on other rows


def test_verdict_names_the_best_and_whether_it_is_more_than_the_error(tmp_path):
    sure = verdict(groups(run(tmp_path, "pm", 0.5), run(tmp_path, "best", 0.8)))
    assert sure[0].startswith(
        "best leads with accuracy 0.800 at the end, the mean of 2 tasks (one seed, standard error"
    )
    assert sure[1].startswith("best is 0.300 above pm (0.500), better by more than twice the standard error")
    assert sure[-1] == "Until the end best lost 0.100 of a task's best accuracy on average."
    unsure = verdict(groups(run(tmp_path, "pm", 0.5, 1, rows=10), run(tmp_path, "best", 0.55, 1, rows=10)))
    assert "no more than twice the standard error" in unsure[1]
    assert "so no difference is shown" in unsure[1]


def test_joint_training_does_not_compete_and_the_control_is_named(tmp_path):
    joint = write_run(tmp_path / "joint", ["a", "b"], "joint", R=[[None, None], [0.9, 0.9]], joint=True)
    folders = [run(tmp_path, "pm", 0.5), joint, run(tmp_path, "frozen", 0.7), run(tmp_path, "best", 0.6)]
    made = groups(*folders)
    assert [group.label for group in ranked(made)] == ["frozen", "best", "pm"]
    assert [group.label for group in made if group.control] == ["frozen"]
    words = verdict(made)
    assert words[0].startswith("frozen leads with")
    assert any("frozen is 0.200 below joint (0.900)" in sentence for sentence in words)
    assert "As it trains nothing, the training of the others has not earned its time." in words
    best_alone = verdict(
        groups(run(tmp_path, "best", 0.8, 7), run(tmp_path, "pm", 0.75, 7), run(tmp_path, "frozen", 0.1, 7))
    )
    assert any("above the control frozen (0.100), better by more than" in sentence for sentence in best_alone)


def test_a_metric_without_known_error_says_so_and_lower_may_be_better(tmp_path):
    folders = [
        write_run(tmp_path / name, ["a"], name, metric="bits_per_byte", R=[[value]])
        for name, value in (("pm", 2.0), ("average", 1.5))
    ]
    words = verdict(group_runs(read_runs(folders)))
    assert words[0] == "average leads with bits per byte 1.500 at the end, the mean of 1 task (one seed)."
    assert words[1].startswith("average is 0.500 below pm (2.000); whether that is more than the error takes several")
    assert len(words) == 2
    (alone,) = verdict(group_runs(read_runs(folders[:1])))
    assert alone.startswith("pm has bits per byte 2.000")


def test_forgetting_names_the_task_that_lost_most(tmp_path):
    R = [[0.9, None, None], [0.8, 0.9, None], [0.7, 0.5, 0.9]]
    folder = write_run(tmp_path / "pm", ["a", "b", "c"], R=R)
    lost = json.loads((folder / "report.json").read_text())["metrics"]["forgetting"]
    assert verdict(groups(folder))[-1] == (
        f"Until the end pm lost {lost:.3f} of a task's best accuracy on average, most on b (0.400)."
    )
    better = write_run(tmp_path / "up", ["a", "b"], R=[[0.5, None], [0.6, 0.9]])
    assert verdict(groups(better))[-1] == "pm forgot nothing on average (-0.100)."
