"""What is said when a run goes on under other conditions."""

import json

import torch
from helpers.streams import settings, steps, write_data

from pm_hf.environment import changed_conditions, conditions
from pm_hf.runs.learner import learn

BEFORE = {"threads": 4, "processes": 1, "device": "cpu AVX2", "versions": {"torch": "2.9", "peft": "0.19"}}


def test_conditions_are_those_of_this_process():
    found = conditions()
    assert (found["threads"], found["processes"]) == (torch.get_num_threads(), 1)
    assert found["versions"]["torch"] == torch.__version__
    assert found["device"]


def test_the_same_conditions_need_no_word():
    assert changed_conditions(BEFORE, BEFORE) == []
    assert changed_conditions(conditions(), conditions()) == []


def test_what_differs_is_named_with_its_effect():
    now = BEFORE | {"threads": 2, "versions": {"torch": "2.10", "peft": "0.19"}}
    assert changed_conditions(now, BEFORE) == [
        "threads 2 instead of 4, torch 2.10 instead of 2.9: equal up to rounding only"
    ]
    now = BEFORE | {"processes": 2, "device": "NVIDIA H100"}
    assert changed_conditions(now, BEFORE) == [
        "processes 2 instead of 1: the global batch is another",
        "device NVIDIA H100 instead of cpu AVX2: equal up to rounding only",
    ]


def test_what_an_older_run_did_not_record_is_not_compared():
    assert changed_conditions(BEFORE, {"threads": 4, "fingerprint": "x"}) == []
    assert changed_conditions(BEFORE, {}) == []


def test_a_task_that_is_begun_under_other_conditions_than_the_one_before_it_says_so(tiny_base, tmp_path, capsys):
    data = write_data(tmp_path / "data", per_class=8)
    learn(settings(tiny_base, data, tmp_path / "run", groups=1, training__num_train_epochs=1))
    path = tmp_path / "run" / "task-00-first" / "step.json"
    step = json.loads(path.read_text())
    path.write_text(json.dumps(step | {"threads": 7, "versions": step["versions"] | {"torch": "1.0"}}))
    report = learn(settings(tiny_base, data, tmp_path / "run", groups=2, training__num_train_epochs=1))
    note = f"continued with threads 1 instead of 7, torch {torch.__version__} instead of 1.0: equal up to rounding only"
    assert f"task second: {note}" in report.notes
    assert note in capsys.readouterr().err
    assert steps(tmp_path / "run")[1]["notes"][0] == note
    again = learn(settings(tiny_base, data, tmp_path / "run", groups=3, training__num_train_epochs=1))
    assert [text for text in again.notes if "instead of" in text] == [f"task second: {note}"]
