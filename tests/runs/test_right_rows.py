"""Which rows are right, packed and compared row by row: against loops over truth values."""

import math
import random

import pytest
from helpers import refusal
from helpers.records import write_run

from pm_hf.files import read_json, write_json
from pm_hf.runs.records import Report
from pm_hf.runs.right_rows import RightRows, discordant, paired_difference, same_rows

COUNTS = {"a": 37, "b": 8, "c": 1}


def drawn(seed):
    """{task: truth values}."""
    draw = random.Random(seed)
    return {task: [draw.random() < 0.6 for _ in range(count)] for task, count in COUNTS.items()}


def packed(truths):
    return {task: RightRows.of(right, f"rows of {task}") for task, right in truths.items()}


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 200])
def test_bits_are_the_truth_values_in_their_order(count):
    right = [random.Random(count).random() < 0.5 for _ in range(count)]
    rows = RightRows.of(right, "x")
    assert rows.mask().tolist() == right
    assert rows.bits == "".join(
        f"{int(''.join('01'[value] for value in (right[at : at + 8] + [False] * 8)[:8]), 2):02x}"
        for at in range(0, count, 8)
    )


def test_paired_error_is_that_of_the_differences():
    left, right = drawn(0), drawn(1)
    delta, error = paired_difference(packed(left), packed(right))
    means, variances = [], []
    for task in COUNTS:
        gaps = [int(a) - int(b) for a, b in zip(left[task], right[task], strict=True)]
        mean = sum(gaps) / len(gaps)
        means.append(mean)
        variances.append(sum((gap - mean) ** 2 for gap in gaps) / len(gaps) / len(gaps))
    assert (delta, error) == pytest.approx((sum(means) / 3, math.sqrt(sum(variances)) / 3))
    assert paired_difference(packed(left), packed(left)) == (0.0, 0.0)
    pairs = [pair for task in COUNTS for pair in zip(left[task], right[task], strict=True)]
    assert discordant(packed(left), packed(right)) == (pairs.count((True, False)), pairs.count((False, True)))


def test_only_the_same_rows_of_the_same_tasks_are_paired():
    rows = packed(drawn(0))
    assert same_rows(rows, packed(drawn(1)))
    assert not same_rows({}, {})
    assert not same_rows(rows, {task: of for task, of in rows.items() if task != "a"})
    assert not same_rows(rows, rows | {"a": RightRows.of([True] * 37, "others")})


def test_report_keeps_them_and_refuses_a_wrong_number_of_bits(tmp_path):
    place = write_run(tmp_path / "run", ["a", "b"], "pm", 0, R=[[0.5, None], [0.5, 0.5]])
    file, content = place / "report.json", read_json(place / "report.json")
    kept = {"a": {"rows": "x", "count": 9, "bits": "ff80"}}
    write_json(file, content | {"right": kept})
    report = Report.load(place)
    assert report.right["a"].mask().tolist() == [True] * 9
    assert report.to_dict()["right"] == kept
    for bits in ("ff", "ff8000", "fg80"):
        write_json(file, content | {"right": {"a": {"rows": "x", "count": 9, "bits": bits}}})
        assert "bits" in refusal(Report.load, place)
