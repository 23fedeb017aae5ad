"""Runs that are extended when the training rows of their finished tasks are gone: `train` is left out of the entry."""

import json
import shutil
from pathlib import Path

import pytest
from helpers import refusal
from helpers.streams import contents, same_tensors, settings, steps, write_rows

import pm_hf.runs.merge_line as line
from pm_hf.config.loading import load_config, save_config
from pm_hf.data.stream import load_stream
from pm_hf.runs.folder import finished_labels
from pm_hf.runs.learner import evaluate, learn

NAMES = ("first", "second", "third")
CLASSES = {"first": ["apple", "bird"], "second": ["car", "dog"], "third": ["egg", "fog"]}
QUICK = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "learning_rate": 2e-2, "head_learning_rate": 2e-2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of each side of each task; `dog` of the second has no test row."""
    folder = tmp_path_factory.mktemp("data")
    for seed, name in enumerate(NAMES):
        write_rows(folder / f"{name}-train.csv", CLASSES[name], 12, seed)
        write_rows(folder / f"{name}-test.csv", CLASSES[name][: 1 if name == "second" else 2], 6, seed + 10)
    return folder


def entries(count, left=()):
    """Entries of stream.tasks, `left` of them without their training rows."""
    return [
        {"name": name, "test": f"{name}-test.csv"} | ({} if name in left else {"train": f"{name}-train.csv"})
        for name in NAMES[:count]
    ]


def config(base, data, output, method, count, left=(), **changes):
    found = settings(base, data, output, method, training=dict(QUICK), **changes)
    found["stream"] = {"tasks": entries(count, left), "max_length": 16}
    return found


@pytest.fixture(scope="module")
def two(tiny_base, data, tmp_path_factory):
    """Finished runs of the first two tasks, with a trained and with an analytic head."""
    folder = tmp_path_factory.mktemp("two")
    for method in ("pm", "best"):
        learn(config(tiny_base, data, folder / method, method, 2))
    return folder


@pytest.fixture(scope="module")
def three(tiny_base, data, two, tmp_path_factory):
    """The same, extended with all files in place."""
    folder = tmp_path_factory.mktemp("three")
    for method in ("pm", "best"):
        shutil.copytree(two / method, folder / method)
        learn(config(tiny_base, data, folder / method, method, 3))
    return folder


@pytest.fixture
def rest(data, tmp_path):
    """The data without the training files of the first two tasks."""
    folder = shutil.copytree(data, tmp_path / "rest")
    for name in NAMES[:2]:
        (folder / f"{name}-train.csv").unlink()
    return folder


@pytest.mark.parametrize("method", ["pm", "best"])
def test_run_without_the_old_training_rows_is_the_run_that_had_them(tiny_base, two, three, rest, tmp_path, method):
    folder = shutil.copytree(two / method, tmp_path / "run")
    report = learn(config(tiny_base, rest, folder, method, 3, left=NAMES[:2]))
    for name in ("adapter", "merged"):
        assert same_tensors(folder / "task-02-third" / name, three / method / "task-02-third" / name)
    assert same_tensors(folder / "merged", three / method / "merged")
    found, expected = steps(folder), steps(three / method)
    assert found[:2] == expected[:2]
    for key in ("scores", "coefficient", "fingerprint", "test_fingerprint"):
        assert found[2][key] == expected[2][key]
    assert report.tasks == list(NAMES)


@pytest.mark.usefixtures("no_training")
def test_finished_run_of_test_files_alone_is_reported_and_its_adapter_scored(tiny_base, data, three, tmp_path):
    folder, tests = shutil.copytree(three / "pm", tmp_path / "run"), tmp_path / "tests"
    tests.mkdir()
    for path in data.glob("*-test.csv"):
        shutil.copy(path, tests)
    settings = config(tiny_base, tests, folder, "pm", 3, left=NAMES)
    before = contents(folder / "merged")
    assert learn(settings).test_rows == [12, 6, 12]
    assert contents(folder / "merged") == before
    scores = evaluate(load_config(settings), folder / "merged")
    last = steps(folder)[2]["scores"]["class_incremental"]
    assert [scores[name]["class_incremental"] for name in NAMES] == pytest.approx(last)


@pytest.mark.usefixtures("no_training")
def test_task_that_is_not_finished_needs_its_training_rows(tiny_base, data, two, tmp_path):
    before = contents(two / "pm")
    message = refusal(learn, config(tiny_base, data, two / "pm", "pm", 3, left=("first", "third")))
    assert message == (
        f"stream.tasks: third leave out train, which only finished tasks may, and {two / 'pm'} has 2 finished tasks; "
        "name the training files, or the output_dir in which they are finished"
    )
    assert contents(two / "pm") == before
    message = refusal(learn, config(tiny_base, data, tmp_path / "new", "pm", 2, left=NAMES[:2]))
    assert f"first, second leave out train, which only finished tasks may, and {tmp_path / 'new'} has 0" in message
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("no_training")
def test_changed_test_rows_are_refused_where_the_training_rows_are_left_out(tiny_base, two, rest):
    write_rows(rest / "second-test.csv", ["car"], 6, seed=99)
    message = refusal(learn, config(tiny_base, rest, two / "pm", "pm", 3, left=NAMES[:2]))
    assert "task 1 (second): its labels or test rows differ" in message
    assert "(first)" not in message


@pytest.mark.usefixtures("no_training")
def test_changed_training_rows_are_refused_where_they_are_named(tiny_base, two, rest):
    write_rows(rest / "first-train.csv", CLASSES["first"], 12, seed=99)
    message = refusal(learn, config(tiny_base, rest, two / "pm", "pm", 3, left=("second",)))
    assert "task 0 (first): its labels or rows differ" in message
    assert "(second)" not in message


@pytest.mark.usefixtures("no_training")
def test_task_finished_before_test_rows_had_a_digest_is_refused(tiny_base, two, rest, tmp_path):
    folder = shutil.copytree(two / "pm", tmp_path / "run")
    step = json.loads((folder / "task-00-first" / "step.json").read_text())
    del step["test_fingerprint"]
    (folder / "task-00-first" / "step.json").write_text(json.dumps(step))
    message = refusal(learn, config(tiny_base, rest, folder, "pm", 3, left=NAMES[:2]))
    assert "task 0 (first): an older version finished it, whose training rows cannot be left out" in message


@pytest.mark.parametrize(("method", "key"), [("replay", "replay_per_class"), ("joint", "joint")])
def test_methods_that_train_on_earlier_rows_need_them(tiny_base, rest, tmp_path, method, key):
    message = refusal(learn, config(tiny_base, rest, tmp_path / "run", method, 3, left=NAMES[:2]))
    expected = f"stream: strategy.{key} trains on rows of earlier tasks: name the training files of 'first', 'second'"
    assert message == expected


def test_merge_lines_are_kept_and_the_analytic_head_needs_the_folded_task_s_rows(three, tmp_path, monkeypatch):
    monkeypatch.setattr(line, "COEFFICIENT_GRID", (0.0,))
    folder = shutil.copytree(three / "best", tmp_path / "run")
    before = line.merge_line(folder)
    assert [task["task"] for task in before["tasks"]] == ["second", "third"]
    settings = load_config(folder / "config.yaml", values={"stream.tasks": entries(3, left=NAMES[:2])})
    save_config(settings, folder / "config.yaml")
    after = line.merge_line(folder)
    assert after["tasks"] == before["tasks"]
    assert after["skipped"] == []
    (folder / "coefficient.json").unlink()
    (again,), (skipped,) = (line.merge_line(folder)[key] for key in ("tasks", "skipped"))
    assert again["points"] == before["tasks"][1]["points"]
    assert skipped["task"] == "second"
    assert skipped["reason"].startswith("its training rows are left out")


# labels


def language(folder, output):
    """One task of a language model with a test file alone; the answers in it are 3."""
    rows = [{"prompt": f"Text {i} :", "completion": f"answer {i % 3}"} for i in range(6)]
    (folder / "test.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    found = settings("unused", folder, output)
    found["stream"] = {"kind": "causal-lm", "tasks": [{"name": "one task", "test": "test.jsonl"}]}
    return load_config(found)


@pytest.mark.parametrize("labels", [[], ["answer 0", "answer 1", "answer 2", "answer 3"]], ids=["free text", "choice"])
def test_answers_are_those_that_the_finished_task_had(tmp_path, labels):
    given = language(tmp_path, tmp_path / "run")
    assert load_stream(given).tasks[0].labels == ("answer 0", "answer 1", "answer 2")
    step = Path(tmp_path / "run" / "task-00-one-task" / "step.json")
    step.parent.mkdir(parents=True)
    step.write_text(json.dumps({"task": "one task", "labels": labels}))
    (task,) = load_stream(given, finished_labels(given)).tasks
    assert task.labels == task.own == tuple(labels)
    assert len(task.train) == 0
    assert len(task.test) == 6


def test_labels_of_domains_are_those_of_all_tasks(tmp_path):
    for name, classes in (("a", ["apple", "bird"]), ("b", ["bird"])):
        write_rows(tmp_path / f"{name}.csv", classes, 2, seed=1)
    tasks = [{"name": "a", "train": "a.csv", "test": "a.csv"}, {"name": "b", "test": "b.csv"}]
    found = settings("unused", tmp_path, tmp_path / "run")
    found["stream"] = {"scenario": "domain_incremental", "tasks": tasks}
    assert [task.labels for task in load_stream(load_config(found)).tasks] == [("apple", "bird")] * 2
