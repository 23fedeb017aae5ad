"""A finished run as it may leave the machine: what is refused, and what is cut out of it."""

import json
import shutil
from pathlib import Path

import pytest
from helpers.hub import TOKEN
from helpers.records import finished_run

from pm_hf import InputError
from pm_hf.reports.release import on_hub, read_finished_run, redact, valid_id


@pytest.fixture
def run(tmp_path):
    return finished_run(tmp_path / "run")


def fails(run, match, base="owner/base"):
    with pytest.raises(InputError, match=match):
        read_finished_run(run, base)


def test_a_finished_run_is_read(run):
    found = read_finished_run(run, "owner/base")
    assert (found.base, found.revision, found.head) == ("owner/base", None, "classifier")
    assert [path.name for path in found.tasks] == ["task-00-news", "task-01-a-b--i-"]


@pytest.mark.parametrize("name", ["report.json", "config.yaml"])
def test_a_folder_that_is_no_finished_run_is_refused(run, name):
    (run / name).unlink()
    fails(run, f"has no {name}; expected the output_dir of a finished pm-hf train")


def test_a_report_of_something_else_is_refused(run):
    (run / "report.json").write_text('{"method": "pm"}')
    fails(run, "it lacks seed, tasks, scores, metrics, coefficients")


def test_a_task_in_the_middle_of_its_training_is_refused(run):
    (run / "task-01-a-b--i-" / "step.json").unlink()
    fails(run, "task-01-a-b--i- is not finished; continue the run with pm-hf train first")


def test_a_run_with_tasks_to_come_is_refused(run):
    shutil.rmtree(run / "task-01-a-b--i-")
    fails(run, "1 of 2 tasks are in its report")


def test_an_adapter_that_the_gate_kept_is_not_published_under_another_report(run):
    shutil.rmtree(run / "merged")
    shutil.copytree(run / "task-00-news" / "merged", run / "merged")
    fails(run, "is not the adapter that its report is about")


def test_a_local_base_needs_an_id_and_two_problems_are_one_error(run, tmp_path):
    fails(run, r"model.base .*tiny base is not on the Hub and is never written; give its id: --base_model_id", None)
    shutil.rmtree(run / "merged")
    fails(run, "2 problems: there is no merged adapter .* --base_model_id /a/b is no id on the Hub", "/a/b")


@pytest.mark.parametrize("name", ["/a/b", "./a", "~/a", "package:x/y", "a/b/c", "a b/c", ""])
def test_no_local_path_is_taken_for_an_id(name):
    assert not valid_id(name)
    assert not on_hub(name)


def test_a_local_folder_wins_over_an_id_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert on_hub("models/bert")
    Path("models/bert").mkdir(parents=True)
    assert not on_hub("models/bert")


def test_every_adapter_names_the_base_by_its_id_and_no_local_path(run, tmp_path):
    found = read_finished_run(run, "owner/base")
    for folder in (found.paths.merged, *(task.adapter for task in found.tasks)):
        files = found.adapter_files(folder)
        assert files["adapter_config.json"]["base_model_name_or_path"] == "owner/base"
        assert files["adapter_model.safetensors"] == folder / "adapter_model.safetensors"
        texts = [
            f.read_text() if isinstance(f, Path) else json.dumps(f) for n, f in files.items() if n.endswith("json")
        ]
        assert not [text for text in texts if str(tmp_path) in text]
    merge = found.adapter_files(found.paths.merged)["merge_report.json"]
    assert merge == {"tasks": 2, "inputs": ["task-01-a-b--i-/adapter"]}


def test_the_tokenizer_beside_an_adapter_goes_with_it_without_local_paths(run, tmp_path):
    content = {"pad_token": "<pad>", "chat_template": "{{ a/b/c }}", "name_or_path": str(tmp_path / "tiny base")}
    for folder in (run / "merged", run / "task-01-a-b--i-" / "merged"):
        (folder / "tokenizer_config.json").write_text(json.dumps(content | {"vocab_file": f"{tmp_path}/vocab.txt"}))
        (folder / "tokenizer.json").write_text('{"model": {"vocab": {}}}')
        merge = {"tasks": 2, "inputs": [], "tokenizer": str(tmp_path / "somewhere" / "start")}
        (folder / "merge_report.json").write_text(json.dumps(merge))
    files = read_finished_run(run, "owner/base").adapter_files(run / "merged")
    assert files["tokenizer.json"] == run / "merged" / "tokenizer.json"
    assert files["tokenizer_config.json"] == {"pad_token": "<pad>", "chat_template": "{{ a/b/c }}"}
    assert files["merge_report.json"]["tokenizer"] == "start"


def test_the_revision_of_a_base_on_the_hub_is_kept(tmp_path):
    folder = finished_run(tmp_path / "run", model={"base": "owner/base", "revision": "v2"})
    assert read_finished_run(folder).revision == "v2"
    assert read_finished_run(folder, "other/base").revision is None


def test_a_gguf_base_needs_the_id_of_the_model_it_was_made_from(tmp_path):
    folder = finished_run(tmp_path / "run", "causal-lm", model={"base": "owner/packed", "gguf_file": "x.Q4_1.gguf"})
    fails(folder, "give the id of the model that it was made from: --base_model_id ID", None)
    assert read_finished_run(folder, "owner/base").base == "owner/base"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("saved to /home/me/runs/x.json, done", "saved to x.json, done"),
        ("/home/me/a", "a"),
        ("~/runs/x", "x"),
        ("in my dir/run/a and more", "in my dir/run/a and more"),
        ("see https://hf.co/owner/name/file", "see https://hf.co/owner/name/file"),
        ("1/t and either/or", "1/t and either/or"),
        (f"token {TOKEN}.", "token …."),
        ("https://me:secret@host/x", "https://…@host/x"),
    ],
)
def test_clean_cuts_local_paths_and_tokens(text, expected):
    assert redact({"a": [text], "n": 1.5}) == {"a": [expected], "n": 1.5}


def test_clean_knows_the_runs_own_paths_even_with_spaces():
    assert redact("in /my dir/run/task-0", ["/my dir/run"]) == "in run/task-0"
