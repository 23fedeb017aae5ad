"""`pm-hf compare`: the same numbers as on the page, and what is refused."""

import json
from dataclasses import asdict
from statistics import mean, stdev

import pytest
from helpers import edited_json, refusal
from helpers.records import write_run

from pm_hf.cli import main
from pm_hf.reports.comparison import compare_runs, comparison_content, comparison_text
from pm_hf.runs.right_rows import RightRows


def run(folder, accuracy, method="pm", seed=0, **config):
    """A run of two tasks that ends at an accuracy."""
    return write_run(folder, ["a", "b"], method, seed, R=[[accuracy + 0.1, None], [accuracy, accuracy]], **config)


@pytest.fixture
def seeds(tmp_path):
    """{method: its accuracies}, and the folders: each with three seeds."""
    accuracies = {"pm": [0.5, 0.52, 0.48], "best": [0.7, 0.73, 0.67]}
    for method, values in accuracies.items():
        for seed, value in enumerate(values):
            run(tmp_path / method / f"seed-{seed}", value, method, seed)
    return accuracies, [tmp_path / method for method in accuracies]


def test_a_folder_of_seeds_is_one_row_with_mean_and_deviation(seeds):
    accuracies, folders = seeds
    content = comparison_content(compare_runs(folders))
    for row, (method, values) in zip(content["methods"], accuracies.items(), strict=True):
        assert (row["label"], row["seeds"]) == (method, [0, 1, 2])
        assert row["ACC"] == {"mean": pytest.approx(mean(values)), "sd": pytest.approx(stdev(values)), "values": values}
    (pair,) = content["differences"]
    gaps = [x - y for x, y in zip(*accuracies.values(), strict=True)]
    assert pair["difference"] == pytest.approx(mean(gaps))
    assert pair["standard_error"] == pytest.approx(stdev(gaps) / 3**0.5)
    assert (pair["paired_by"], pair["more_than_error"]) == ("seeds", True)
    text = comparison_text(compare_runs(folders))
    assert text.startswith("best leads with accuracy 0.700 ± 0.030 at the end")
    (line,) = [line for line in text.split("\n") if line.startswith("best (3 seeds)")]
    assert "0.700 ± 0.030 *" in line
    assert f"{content['verdict'][1]}\n" in text


def test_runs_of_one_seed_are_paired_by_the_rows_that_both_scored(tmp_path):
    folders = [run(tmp_path / "a", 0.6, "best"), run(tmp_path / "b", 0.5)]
    for folder, right in zip(folders, (60, 50), strict=True):
        kept = {task: asdict(RightRows.of([True] * right + [False] * (100 - right), "rows")) for task in "ab"}
        edited_json(folder / "report.json", right=kept, test_rows=[100, 100])
    (pair,) = comparison_content(compare_runs(folders))["differences"]
    assert pair["paired_by"] == "rows"
    assert pair["standard_error"] == pytest.approx((2 * 0.1 * 0.9 / 100) ** 0.5 / 2)
    edited_json(folders[1] / "report.json", right={})
    (pair,) = comparison_content(compare_runs(folders))["differences"]
    assert pair["paired_by"] is None
    assert pair["standard_error"] == pytest.approx(((2 * 0.6 * 0.4 + 2 * 0.5 * 0.5) / 100) ** 0.5 / 2)


def test_runs_of_different_streams_are_refused(tmp_path):
    first, other = run(tmp_path / "a", 0.5), write_run(tmp_path / "b", ["a", "c"], "best")
    words = f"{first} and {other} have different tasks: only the first has b; only the second has c"
    assert words in refusal(compare_runs, [first, other])
    fewer = run(tmp_path / "fewer", 0.4, "best")
    edited_json(first / "report.json", test_rows=[10, 20])
    edited_json(fewer / "report.json", test_rows=[10, 30])
    assert "have 20 and 30 test rows in task b" in refusal(compare_runs, [first, fewer])
    for folder, label in ((first, "x"), (fewer, "y")):
        edited_json(folder / "report.json", test_rows=[10, 20], classes={"a": [label], "b": ["z"]})
    assert "have different classes in task a" in refusal(compare_runs, [first, fewer])


def test_the_command_prints_text_or_json_and_writes_nothing(seeds, capsys, tmp_path):
    _, folders = seeds
    before = sorted(tmp_path.rglob("*"))
    assert main(["compare", *map(str, folders)]) == 0
    assert capsys.readouterr().out == comparison_text(compare_runs(folders)) + "\n"
    assert main(["compare", *map(str, folders), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == comparison_content(compare_runs(folders))
    assert main(["compare", str(folders[0]), str(tmp_path / "none")]) == 2
    assert "none holds no report.json" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
