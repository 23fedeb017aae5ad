"""Runs side by side in a terminal, and the command that runs several seeds."""

import json
import math
from pathlib import Path
from statistics import fmean, stdev

import pytest
from helpers import refusal
from helpers.records import write_run
from helpers.streams import settings, write_data

from pm_hf.cli import main
from pm_hf.reports.comparison import compare, compared
from pm_hf.runs.learner import learn
from pm_hf.runs.records import read_runs


def run(folder, method, accuracy, seed=0, tasks=("a", "b"), **config):
    R = [[accuracy, accuracy]] if method == "joint" else [[accuracy + 0.1, None], [accuracy, accuracy]]
    return write_run(
        folder / f"{method}-{seed}-{len(list(folder.iterdir()))}", list(tasks), method, seed, R=R, **config
    )


def test_seeds_are_one_line_with_differences_and_their_error(tmp_path):
    best = [run(tmp_path, "best", value, seed) for seed, value in enumerate((0.7, 0.8, 0.9))]
    joint = [run(tmp_path, "joint", value, seed) for seed, value in enumerate((0.8, 0.85, 0.95))]
    *said, empty, head, first, second = compare(read_runs([*best, *joint]))
    assert empty == ""
    assert said[0].startswith("best has accuracy 0.800 ± 0.100 at the end")
    assert head.split("  ")[0] == "run"
    assert head.endswith("minus joint")
    gaps = [-0.1, -0.05, -0.05]
    assert first.split() == ["best", "3", *f"0.800 ± {stdev((0.7, 0.8, 0.9)):.3f}".split(), *first.split()[5:]]
    assert first.endswith(f"{fmean(gaps):+.3f} ± {stdev(gaps) / math.sqrt(3):.3f}")
    assert second.split()[:2] == ["joint", "3"]
    told = compared(read_runs([*best, *joint]))
    assert [line["seeds"] for line in told] == [[0, 1, 2]] * 2
    assert told[0]["ACC"] == {"mean": pytest.approx(0.8), "values": [0.7, 0.8, 0.9]}
    assert told[0]["minus"]["joint"] == pytest.approx({"difference": fmean(gaps), "error": stdev(gaps) / math.sqrt(3)})
    assert told[1]["minus"] == {}


def test_runs_of_different_streams_have_no_table(tmp_path, capsys):
    runs = [run(tmp_path, "pm", 0.5), run(tmp_path, "pm", 0.6, 1, tasks=("a", "c"))]
    assert "runs of one stream are compared" in refusal(compare, read_runs(runs))
    assert main(["compare", *map(str, runs)]) == 2
    assert "has the tasks a, b" in capsys.readouterr().err


def test_command_prints_what_the_functions_return(tmp_path, capsys):
    runs = [str(run(tmp_path, "pm", 0.5)), str(run(tmp_path, "best", 0.7))]
    assert main(["compare", *runs]) == 0
    assert capsys.readouterr().out.splitlines() == compare(read_runs(runs))
    assert main(["compare", "--json", *runs]) == 0
    assert json.loads(capsys.readouterr().out) == compared(read_runs(runs))


def test_each_seed_has_a_folder_and_all_have_one_report(tiny_base, tmp_path, capsys, monkeypatch):
    config = settings(tiny_base, write_data(tmp_path / "data"), tmp_path / "runs", stream__class_groups=2)
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    command = ["train", "--config", str(tmp_path / "c.yaml"), "--seeds", "3", "5", "training.max_steps=2"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    folders = [tmp_path / "runs" / f"seed-{seed}" for seed in (3, 5)]
    assert [line for line in printed.splitlines() if line in compare(read_runs(folders))[-2:]] != []
    assert (tmp_path / "runs" / "report" / "report.html").is_file()
    alone = learn(
        json.loads(json.dumps(config)), seed=5, output_dir=str(tmp_path / "alone"), **{"training.max_steps": 2}
    )
    assert json.loads((folders[1] / "report.json").read_text())["matrices"] == alone.to_dict()["matrices"]

    def train(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr("pm_hf.runs.learner.train", train)
    assert main(command) == 0  # what is finished is not run again


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seeds", "1", "1"], "each once, found 1 1"),
        (["--seeds", "x=1"], "whole numbers"),
        (["--seeds", "1", "2", "seed=3"], "takes the place of seed="),
    ],
)
def test_seeds_that_contradict_are_refused(words, said, tiny_base, tmp_path, capsys):
    config = settings(tiny_base, write_data(tmp_path / "data"), tmp_path / "runs")
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    assert main(["train", "--config", str(tmp_path / "c.yaml"), *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_seeds_do_not_go_into_the_folder_of_a_run(tiny_base, tmp_path, capsys):
    config = settings(tiny_base, write_data(tmp_path / "data"), tmp_path / "runs", training__max_steps=1)
    learn(config)
    before = sorted(Path(tmp_path / "runs").rglob("*"))
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    assert main(["train", "--config", str(tmp_path / "c.yaml"), "--seeds", "1", "2"]) == 2
    assert "is the folder of one run" in capsys.readouterr().err
    assert sorted(Path(tmp_path / "runs").rglob("*")) == before
