"""Several seeds: `pm-hf train --seeds` from the settings to the one report."""

import json
from statistics import mean, stdev

import pytest
from helpers import edited_json
from helpers.streams import FEW, contents, settings, write_yaml

import pm_hf.runs.learner
from pm_hf.cli import main
from pm_hf.runs.records import Report, read_runs

SMALL = FEW | {"groups": 2}


@pytest.fixture(scope="module")
def trained(tiny_base, stream_data, tmp_path_factory):
    """(config, the folder of its runs): two seeds, trained by the command."""
    folder = tmp_path_factory.mktemp("seeds")
    path = write_yaml(folder / "c.yaml", settings(tiny_base, stream_data(8), folder / "runs", **SMALL))
    assert main(["train", "--config", str(path), "--seeds", "0", "3", "lora.r=3"]) == 0
    return path, folder / "runs"


def test_seeds_are_runs_of_their_own_as_if_trained_alone(trained, finished_run):
    _, runs = trained
    alone = finished_run(8, seed=3, lora__r=3, **SMALL)
    assert Report.load(runs / "seed-3").matrices == Report.load(alone).matrices
    assert [run.seed for run in read_runs([runs])] == [0, 3]


def test_one_report_has_mean_and_deviation(trained, capsys):
    path, runs = trained
    assert main(["train", "--config", str(path), "--seeds", "0", "3", "lora.r=3"]) == 0
    printed = capsys.readouterr().out
    values = [Report.load(runs / f"seed-{seed}").metrics["ACC"] for seed in (0, 3)]
    shown = f"{mean(values):.3f} ± {stdev(values):.3f}"
    assert shown in printed
    assert "pm (2 seeds)" in printed
    assert shown in (runs / "report.html").read_text()
    (method,) = json.loads((runs / "report.json").read_text())["methods"]
    assert method["seeds"] == [0, 3]
    assert method["ACC"] == {"mean": pytest.approx(mean(values)), "sd": pytest.approx(stdev(values)), "values": values}


def test_what_is_finished_is_not_run_again_and_what_is_stopped_goes_on(trained, monkeypatch, tmp_path):
    path, runs = trained
    before = contents(runs / "seed-0")
    task = next((runs / "seed-3").glob("task-01*"))
    (task / "step.json").rename(tmp_path / "step.json")  # as if it had been stopped there
    trainings, train = [], pm_hf.runs.learner.train
    monkeypatch.setattr(pm_hf.runs.learner, "train", lambda *a, **k: trainings.append(a) or train(*a, **k))
    assert main(["train", "--config", str(path), "--seeds", "0", "3", "lora.r=3"]) == 0
    assert len(trainings) == 1
    assert contents(runs / "seed-0") == before
    now, then = (json.loads(file.read_text()) for file in (task / "step.json", tmp_path / "step.json"))
    assert now["scores"] == then["scores"]


def test_what_is_wrong_with_the_last_seed_is_said_before_the_first_begins(tiny_base, stream_data, tmp_path, capsys):
    path = write_yaml(tmp_path / "c.yaml", settings(tiny_base, stream_data(8), tmp_path / "runs", **SMALL))
    (tmp_path / "runs" / "seed-1").mkdir(parents=True)
    (tmp_path / "runs" / "seed-1" / "notes.txt").write_text("mine")
    before = contents(tmp_path / "runs")
    assert main(["train", "--config", str(path), "--seeds", "0", "1"]) == 2
    assert "seed-1 is not empty and holds no config.yaml" in capsys.readouterr().err
    assert contents(tmp_path / "runs") == before
    assert main(["train", "--config", str(path), "--seeds", "0", "1", "seed=1"]) == 2
    assert contents(tmp_path / "runs") == before


def test_a_folder_that_holds_a_run_itself_is_no_place_for_seeds(trained, finished_run, capsys):
    path, _ = trained
    run = finished_run(8, seed=3, lora__r=3, **SMALL)
    assert main(["train", "--config", str(path), "--seeds", "0", "1", f"output_dir={run}"]) == 2
    assert f"output_dir {run} holds a run of one seed" in capsys.readouterr().err


def test_a_damaged_seed_is_found_before_the_others_train(trained, capsys, tmp_path):
    path, runs = trained
    step = next((runs / "seed-3").glob("task-00*")) / "step.json"
    whole = step.read_text()
    edited_json(step, fingerprint="another")
    assert main(["train", "--config", str(path), "--seeds", "5", "3", "lora.r=3"]) == 2
    assert "its labels or rows differ" in capsys.readouterr().err
    assert not (runs / "seed-5").exists()
    step.write_text(whole)
