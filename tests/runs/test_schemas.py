"""Files of a run that were edited or damaged: one line that names the file, the field and the way out; files of other
versions are read as before."""

import json
import re

import pytest
from helpers import changed, refusal
from helpers.records import finished_run, write_run

from pm_hf.cli import main
from pm_hf.errors import InputError
from pm_hf.files import read_record
from pm_hf.reports.release import read_finished_run
from pm_hf.runs.records import MergeLine, Report, TaskRecord, read_runs
from pm_hf.runs.schemas import RowsFile, TrackersFile

STEP = {
    "task": "news",
    "labels": ["a", "b"],
    "fingerprint": "0",
    "coefficient": {"raw": 0.4, "used": 0.4, "numerator": None, "one_over_t": 0.5, "note": None},
    "scores": {"class_incremental": [0.5, 1], "task_incremental": [0.5, None]},
    "held_out": {"text": {"bits_per_byte": 1.5}},
    "untouched": {"text": {"bits_per_byte": 1.25}},
    "training_loss": 0.5,
    "optimizer_steps": 3,
    "factors": {"1": 3},
    "log": [[1, 0.5, 1.0], [2, None, 1]],
    "seconds": 2,
    "threads": 1,
    "versions": {"torch": "2"},
    "files": {"merged/labels.json": [3, "ab"]},
    "replay": {
        "written": 5,
        "kept": 4,
        "copies": 1,
        "doubles": 0,
        "empty": 0,
        "agreement": 0.5,
        "longest_common_run": 2,
        "rows_asked": 4,
        "pool_rows": 8,
        "seconds": {"writer": 1.5, "write": 2, "label": 0.5},
        "samples": [
            {"asked": "a", "prompt": "x", "says": "b"},
            {"asked": "", "prompt": [{"role": "user", "content": "x"}], "says": "b"},
        ],
    },
    "search": [
        {"coefficient": alpha, "new": 1.5, "old": 2, "objective": 3.5, "error": 0.25} for alpha in (0, 0.4, 1.0)
    ],
    "a key of a newer version": {"x": [1]},
}
POINT = {"coefficient": 0, "predicted": None, "loss_sum": 1.0, "loss_mean": 0.5, "score": 0.5}
POINT |= {"losses": [0.5, 0.5], "scores": [0.5, 0.5]}
REGRETS = {name: {"score": 0, "loss": 0.0} for name in ("chosen", "one_over_t", "best_loss")}
LINE_TASK = {"task": "b", "t": 2, "seen": ["a", "b"], "chosen": 0.5, "raw": 0.5, "one_over_t": 0.5, "best_loss": 0.5}
LINE_TASK |= {"best_score": 0.0, "regret": REGRETS, "notes": [], "key": "k"}
LINE_TASK |= {"points": [POINT, POINT | {"coefficient": 0.5}]}
LINE = {"metric": "class_incremental", "regret_unit": "points", "predicted_unit": None, "notes": [], "skipped": []}
LINE |= {"mean_regret": REGRETS, "tasks": [LINE_TASK]}


def place(path):
    """The keys and indices of a dotted path."""
    return [int(key) if key.isdecimal() else key for key in path.split(".")]


BAD_STEP = {  # path: values
    "task": [..., 1, None],
    "labels": ["a", [1], {"a": 0}],
    "coefficient": [1, "x", [0.4], {}],
    "coefficient.used": ["0.4", None, ..., float("nan"), float("inf")],
    "scores": [None, [0.5], {"class_incremental": []}, {"a": [1], "b": [1, 2]}, "x"],
    "scores.class_incremental": [None, 0.5, ["0.5", "0.5"], [True, False], [0.5, float("nan")], [0.5], [0.5] * 3],
    "held_out": ["x", [1], {"text": 1}, {"text": {"x": "1"}}],
    "untouched": ["x", [1], {"text": 1}, {"text": {"x": "1"}}, None],
    "training_loss": ["0.5", [1], float("nan")],
    "optimizer_steps": [1.5, "3", None],
    "factors": [["1"], {"1": "3"}, {"1": 1.5}],
    "log": [3, [1, 2, 3], [[1, 2]], [[None, 1, 1]], [["1", 1, 1]]],
    "seconds": ["2", [2], float("-inf")],
    "versions": [["torch"], {"torch": 2}],
    "notes": [3, [3], "x"],
    "files": [[1], {"x": 3}, {"x": [1]}, {"x": ["1", "ab"]}],
    "replay": ["x", [1], {}, 3],
    "replay.written": ["5", None, 1.5, ...],
    "replay.copies": [..., [1]],
    "replay.agreement": ["0.5", float("nan"), ...],
    "replay.base_rows": ["1", None],
    "replay.seconds": [3, ..., {"writer": 1.5, "write": 2}, {"writer": "1", "write": 2, "label": 3}],
    "replay.samples": [{}, ["x"], [{"asked": "a", "says": "b"}], ...],
    "replay.samples.0.prompt": [3, [], [[]], [{"role": "user"}], [{"role": "user", "content": 3}], None],
    "search": ["x", {}, [1], [{"coefficient": 0.4}], None],
    "search.0.coefficient": ["0", None, ...],
    "search.1.coefficient": [0.5],
    "search.2.objective": [None, "1", [1], float("inf"), ...],
}


@pytest.mark.parametrize(("path", "value"), [(path, value) for path, values in BAD_STEP.items() for value in values])
def test_a_step_file_of_another_kind_is_one_line(tmp_path, path, value):
    file = tmp_path / "step.json"
    file.write_text(json.dumps(changed(STEP, place(path), value)))
    field = path.partition(".")[0]
    with pytest.raises(InputError, match=rf"{re.escape(str(file))}: .*{field}.*bring it back from a copy") as caught:
        TaskRecord.load(file)
    assert "\n" not in str(caught.value)


def test_a_step_file_comes_back_as_it_stands(tmp_path):
    file = tmp_path / "step.json"
    file.write_text(json.dumps(STEP))
    record = TaskRecord.load(file)
    assert record.training.log == STEP["log"]
    assert type(record.training.log[0][0]) is int
    assert record.scores == STEP["scores"]
    assert (record.held_out, record.untouched) == (STEP["held_out"], STEP["untouched"])
    assert (record.replay, record.search) == (STEP["replay"], STEP["search"])
    assert (record.coefficient.source, record.files) == ("average", STEP["files"])


@pytest.mark.parametrize(
    "text", ["[1]", "3", "null", "{}", '{"task"', "", '"x"', "[" * 3000, "1" * 5000, '{"task":"\\ud800"}']
)
def test_a_file_of_another_shape_is_one_line(tmp_path, text):
    for load in (TaskRecord.load, Report.load, lambda file: read_record(file, RowsFile, "x")):
        file = tmp_path / "file.json"
        file.write_text(text)
        assert refusal(load, file).startswith(str(file))


BAD_REPORT = {
    "method": [3, ["pm"], None, ...],
    "seed": ["1", 1.5, ...],
    "tasks": [3, [1, 2], ["a"], "ab", []],
    "scores": [[], None, [[0.5, None]] * 3, [[0.5], [0.5]], [[0.5, "x"], [0.5, 0.5]], [["0.5", None], [0.5, 0.5]]],
    "scores.0.0": [float("nan"), "text", {}],
    "scores.1": [[None, None], [0.5], [0.5] * 3, None],
    "metric": ["zebra", ["a"], 3],
    "matrices": [[1], {"class_incremental": [1]}, {"x": [[0.5], [0.5]]}, {"class_incremental": [["x", "y"]] * 2}],
    "metrics": [None, "x", ["ACC"]],
    "metrics.ACC": ["0.5", [1], float("inf")],
    "coefficients": ["x", ["x", "y"], [1, 2], [None], {}, None],
    "notes": [3, [3], {"a": 1}],
    "held_out": [3, [3], {"a": 1}, [{"a": 1}], [{"a": {"b": "x"}}]],
    "versions": [["torch"], {"torch": 1}],
    "seconds": ["12"],
    "merge_errors": [[0.1], ["x", "y"], 3],
    "test_rows": [[1], [1.5, 2], "x"],
    "classes": [[1], {"a": "x"}, {"a": [1]}],
    "freedom": ["zebra", 3],
}


@pytest.mark.parametrize(("path", "value"), [(path, value) for path, values in BAD_REPORT.items() for value in values])
def test_a_report_of_another_kind_is_one_line_for_every_command(tmp_path, path, value, capsys):
    folder = write_run(tmp_path / "run", ["a", "b"])
    file = folder / "report.json"
    file.write_text(json.dumps(changed({"held_out": [], **json.loads(file.read_text())}, place(path), value)))
    before = sorted(folder.rglob("*"))
    for command in (["report", folder], ["push", folder, "me/x", "--dry-run"]):
        assert main([str(argument) for argument in command]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert str(file) in said
    assert sorted(folder.rglob("*")) == before


BAD_LINE = {
    "tasks": [3, [3], "x", ..., [{}]],
    "tasks.0.points": [[], [POINT], "x", [POINT, POINT | {"coefficient": 0.4}]],
    "tasks.0.points.0.losses": [[0.5], "x", ["a", "b"], None],
    "tasks.0.points.0.task_incremental": ["x", [{}], [True]],
    "tasks.0.points.1.coefficient": ["0.5", None, float("nan")],
    "tasks.0.regret": [{}, {"chosen": {"score": 0, "loss": 0}}, [1]],
    "tasks.0.seen": [["a"], [], [1, 2]],
    "mean_regret": [{}, {"x": {"score": 0, "loss": 0}}, None],
    "skipped": [[1], [{"task": "x"}]],
    "notes": ["x", [3]],
}


@pytest.mark.parametrize(("path", "value"), [(path, value) for path, values in BAD_LINE.items() for value in values])
def test_a_merge_line_of_another_kind_is_one_line(tmp_path, path, value, capsys):
    folder = write_run(tmp_path / "run", ["a", "b"])
    (folder / "coefficient.json").write_text(json.dumps(LINE))
    assert read_runs([folder])[0].line.tasks == LINE["tasks"]
    (folder / "coefficient.json").write_text(json.dumps(changed(LINE, place(path), value)))
    assert main(["report", str(folder)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{folder / 'coefficient.json'}: " in said


@pytest.mark.parametrize("content", ["[]", "0", "null", ""])
def test_a_merge_line_of_nothing_is_one_line(tmp_path, content, capsys):
    folder = write_run(tmp_path / "run", ["a", "b"])
    (folder / "coefficient.json").write_text(content)
    assert main(["report", str(folder)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_no_merge_line_is_none(tmp_path):
    assert MergeLine.load(tmp_path / "coefficient.json") is None


@pytest.mark.parametrize("kind", [RowsFile, TrackersFile])
def test_other_files_are_one_line_too(tmp_path, kind):
    (tmp_path / "x.json").write_text(json.dumps({"fingerprint": 1, "notes": 3, "id": 1, "logged": {"wandb": "1"}}))
    with pytest.raises(InputError, match=r"x.json: (fingerprint|id): expected a valid string, found 1; remove it"):
        read_record(tmp_path / "x.json", kind, "remove it")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a: [", b"!!python/object:os.system {}"])
def test_settings_that_are_no_yaml_are_one_line(tmp_path, content, capsys):
    folder = write_run(tmp_path / "run", ["a", "b"])
    (folder / "config.yaml").write_bytes(content)
    assert main(["report", str(folder)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_other_folders_of_a_run_are_left_alone(tmp_path):
    folder = write_run(tmp_path / "run", ["a", "b"])
    for name in ("task-x", "task-²", "task-"):
        (folder / name).mkdir()
        (folder / name / "step.json").write_text("{}")
    assert [record.task for record in read_runs([folder])[0].records] == ["a", "b"]


@pytest.mark.parametrize("output", ["a\0b", "~nosuchuser/x"])
def test_a_folder_that_cannot_be_named_is_one_line(tmp_path, output, capsys):
    folder = write_run(tmp_path / "run", ["a", "b"])
    assert main(["report", str(folder), "--output", output]) == 2
    assert main(["report", output]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_an_adapter_that_is_not_as_it_was_written_is_not_published(tmp_path):
    folder = finished_run(tmp_path / "run")
    read_finished_run(folder, "owner/base")
    step = folder / "task-00-news" / "step.json"
    file = step.parent / "merged" / "labels.json"
    step.write_text(json.dumps({"task": "news", "files": {"merged/labels.json": [file.stat().st_size, "0"]}}))
    with pytest.raises(InputError, match=f"{file} holds other bytes than were written"):
        read_finished_run(folder, "owner/base")


def test_a_task_without_its_record_leaves_the_others_in_their_place(tmp_path):
    folder = write_run(tmp_path / "run", ["a", "b", "c"])
    (folder / "task-00-x" / "step.json").unlink()
    assert [record and record.task for record in read_runs([folder])[0].records] == [None, "b", "c"]
