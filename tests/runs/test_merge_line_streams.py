"""Merge lines of streams beyond the plain one: a head shared by domains, the analytic head, language models, released
adapters."""

import pytest
import torch
from helpers.models import OLD_NAME
from helpers.streams import at, domains, first, language_settings, settings, steps

from pm_hf.measuring.scores import Scorer
from pm_hf.reports.page import write_report
from pm_hf.runs import merge_line as module
from pm_hf.runs.head import AnalyticHead
from pm_hf.runs.learner import learn
from pm_hf.runs.merge_line import merge_line, merge_line_table
from pm_hf.runs.start import start_task

pytestmark = pytest.mark.filterwarnings(OLD_NAME)
QUICK = {"training__num_train_epochs": 2, "stream__train_per_class": 8}


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(module, "COEFFICIENT_GRID", (0.0, 1.0))


@pytest.fixture(scope="module")
def data(stream_data):
    return stream_data(8)


def learned(config):
    """(folder, its only line)."""
    learn(config)
    found = merge_line(config["output_dir"])
    assert found["skipped"] == []
    (line,) = found["tasks"]
    assert line["notes"] == []
    return found, line, steps(config["output_dir"])


def test_a_shared_head_moves_along_the_line(tiny_base, tmp_path):
    config = domains(tiny_base, tmp_path, tmp_path / "run", **QUICK)
    _, line, (before, after) = learned(config)
    assert at(line, 0.0)["scores"][:1] == before["scores"]["class_incremental"]
    assert at(line, line["chosen"])["scores"] == after["scores"]["class_incremental"]
    assert at(line, 0.0)["losses"] != at(line, 1.0)["losses"]
    assert (line["t"], line["seen"]) == (2, ["plain", "odd"])


def test_the_analytic_head_is_computed_anew_for_every_coefficient(tiny_base, data, tmp_path):
    config = settings(tiny_base, data, tmp_path / "run", "best", groups=2, **QUICK)
    found, line, (_, after) = learned(config)
    assert at(line, line["chosen"])["scores"] == after["scores"]["class_incremental"]
    assert found["notes"] == ["the losses are those of the analytic head, predicted is of the heads that were trained"]
    losses = torch.tensor([point["losses"] for point in line["points"]])
    assert len(losses.unique(dim=0)) == len(losses) == 4


def test_what_does_not_depend_on_the_coefficient_is_computed_once_a_task(tiny_base, data, tmp_path, monkeypatch):
    loaded, opened, load = [], [], Scorer.load
    config = settings(tiny_base, data, tmp_path / "run", "best", groups=2, **QUICK)
    learn(config)
    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "load", lambda self, merged, head: loaded.append(merged) or load(self, merged, head))
        patch.setattr(module, "start_task", lambda *args: opened.append(1) or start_task(*args))
        found = merge_line(tmp_path / "run")
    (line,), first_task = found["tasks"], min((tmp_path / "run").glob("task-*"))
    assert len(line["points"]) == 4
    assert (loaded.count(first_task / "merged"), len(loaded), len(opened)) == (1, 1 + 2 * 4, 1)
    (tmp_path / "run" / "coefficient.json").unlink()
    monkeypatch.setattr(
        AnalyticHead,
        "_features_before",
        lambda self, running, task, head: self.scorer.features(running, task.train, task.own, head),
    )
    assert merge_line(tmp_path / "run") == found


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sequential", "coma", "average"])
def test_a_given_coefficient_has_a_line_and_no_prediction(tiny_base, data, tmp_path, method):
    found, line, (_, after) = learned(settings(tiny_base, data, tmp_path / "run", method, groups=2, **QUICK))
    assert at(line, line["chosen"])["scores"] == after["scores"]["class_incremental"]
    assert {point["predicted"] for point in line["points"]} == {None}
    assert found["predicted_unit"] is None
    assert "predicted" not in merge_line_table(found).splitlines()[-1]
    write_report([tmp_path / "run"])
    assert "predicted ×" not in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("choice", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_language_model_s_line_has_its_completion_loss_and_nothing_is_generated(
    language_data,
    tmp_path,
    monkeypatch,
    choice,
):
    config = language_settings(language_data, tmp_path / "run", training__max_steps=2)
    if not choice:
        files = {"train": "domains-train.jsonl", "test": "domains-test.jsonl", "domain_column": "source"}
        config["stream"] = {"kind": "causal-lm", **files, "max_length": 24}
    learn(config)
    monkeypatch.setattr(
        "pm_hf.measuring.language_scores.LanguageScorer.exact_match", lambda *_, **__: pytest.fail("generated")
    )
    found = merge_line(config["output_dir"])
    (line,) = found["tasks"]
    before, after = (step["scores"] for step in steps(config["output_dir"]))
    metric = "class_incremental" if choice else "bits_per_byte"
    assert (found["metric"], found["regret_unit"]) == (metric, "points" if choice else "bits per byte")
    assert at(line, line["chosen"])["losses"] == pytest.approx(after["loss"], rel=1e-5)
    assert at(line, line["chosen"])["scores"] == pytest.approx(after[metric], rel=1e-5)
    assert at(line, 0.0)["losses"][:1] == pytest.approx(before["loss"], rel=1e-5)
    best = (max if choice else min)(point["score"] for point in line["points"])
    assert at(line, line["best_score"])["score"] == best
    gap = abs(best - at(line, line["chosen"])["score"])
    assert line["regret"]["chosen"]["score"] == pytest.approx((100 if choice else 1) * gap)


@pytest.mark.slow
def test_the_first_task_of_a_run_that_starts_from_a_released_adapter_has_a_line(tiny_base, data, tmp_path):
    learn(settings(tiny_base, data, tmp_path / "old", groups=1, **QUICK))
    config = settings(tiny_base, data, tmp_path / "run", groups=2, **QUICK)
    config["start_from"] = str(tmp_path / "old" / "merged")
    config["stream"]["class_groups"] = {"second": first(2)["second"]}
    _, line, (step,) = learned(config)
    assert (line["t"], line["one_over_t"], line["seen"]) == (1, 0.5, ["second"])
    assert at(line, line["chosen"])["scores"] == step["scores"]["class_incremental"]
    write_report([tmp_path / "run"])
    assert "Loss along the merge line of task 1" in (tmp_path / "run" / "report.html").read_text()
