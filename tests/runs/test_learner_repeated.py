"""The last task removed and learned again: the same adapter and the same coefficient, or a refusal with a way out."""

import json
import shutil

import pytest
from helpers import edited_json, flip
from helpers.streams import FEW, contents, same_tensors, settings, steps, tasks

from pm_hf.config.presets import PRESETS
from pm_hf.errors import InputError
from pm_hf.files import locked
from pm_hf.runs.learner import learn
from pm_hf.runs.records import Report

QUICK = ("pm", "best", "ewc", "magmax", "cofima")  # sums, head statistics, penalty, optimum, two curvatures
# these train on rows that are drawn anew or on all at once; a joint run has one task
OTHERS = [name for name in PRESETS if name not in (*QUICK, "joint")]


@pytest.fixture(scope="module")
def data(stream_data):
    return stream_data(8)


@pytest.fixture(scope="module")
def whole(finished_run):
    return lambda method: finished_run(8, method=method, **FEW)


def copied(whole, method, tmp_path):
    return shutil.copytree(whole(method), tmp_path / "run")


@pytest.mark.parametrize("method", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_the_last_task_learned_again_is_the_same_bit_for_bit(whole, tiny_base, data, tmp_path, method):
    folder = copied(whole, method, tmp_path)
    shutil.rmtree(tasks(folder)[-1])
    learn(settings(tiny_base, data, folder, method, **FEW))
    for mine, theirs in zip(tasks(folder), tasks(whole(method)), strict=True):
        assert same_tensors(mine / "adapter", theirs / "adapter")
        assert same_tensors(mine / "merged", theirs / "merged")
    assert steps(folder)[-1]["coefficient"] == steps(whole(method))[-1]["coefficient"]
    assert steps(folder)[-1]["scores"] == steps(whole(method))[-1]["scores"]
    assert contents(folder).keys() == contents(whole(method)).keys()


LOST = {  # what the last finished task left and the next one begins from
    "pm": "curvature.safetensors",
    "best": "head_statistics.safetensors",
    "ewc": "curvature.safetensors",
    "magmax": "optimum",
    "cofima": "curvature.safetensors",
}


@pytest.mark.parametrize("method", LOST)
def test_what_the_next_task_begins_from_is_never_done_without(
    whole, tiny_base, data, tmp_path, method, no_training_now
):
    folder = copied(whole, method, tmp_path)
    *_, last, removed = tasks(folder)
    shutil.rmtree(removed)
    lost = last / LOST[method]
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    before = contents(folder)
    no_training_now()
    with pytest.raises(
        InputError, match=f"{lost} is not there: .*bring the file back.*, or remove {last} and"
    ) as caught:
        learn(settings(tiny_base, data, folder, method, **FEW))
    assert "\n" not in str(caught.value)
    assert contents(folder) == before


@pytest.fixture
def no_training_now(monkeypatch):
    """Call it when the run to be copied is made."""
    return lambda: monkeypatch.setattr("pm_hf.runs.learner.train", lambda *_, **__: pytest.fail("training began"))


def test_the_way_out_works_down_to_the_first_task(whole, tiny_base, data, tmp_path):
    folder = copied(whole, "pm", tmp_path)
    first, second, third = tasks(folder)
    shutil.rmtree(third)
    for task in (first, second):
        (task / "curvature.safetensors").unlink(missing_ok=True)
    for task in (second, first):
        with pytest.raises(InputError, match=f"or remove {task} and"):
            learn(settings(tiny_base, data, folder, **FEW))
        shutil.rmtree(task)
    learn(settings(tiny_base, data, folder, **FEW))
    assert same_tensors(folder / "merged", whole("pm") / "merged")


@pytest.mark.parametrize("name", ["merged", "adapter"])
def test_a_flipped_bit_in_what_the_last_task_left_is_refused(whole, tiny_base, data, tmp_path, name, no_training_now):
    folder = copied(whole, "pm", tmp_path)
    shutil.rmtree(tasks(folder)[-1])
    file = tasks(folder)[-1] / name / "adapter_model.safetensors"
    flip(file)
    no_training_now()
    with pytest.raises(InputError, match=f"{file} holds other bytes than were written: task second is finished"):
        learn(settings(tiny_base, data, folder, **FEW))


def test_a_finished_run_with_a_damaged_merge_is_not_published(whole, tiny_base, data, tmp_path):
    folder = copied(whole, "pm", tmp_path)
    published = contents(folder / "merged")
    flip(tasks(folder)[-1] / "merged" / "adapter_model.safetensors")
    with pytest.raises(InputError, match="holds other bytes than were written"):
        learn(settings(tiny_base, data, folder, **FEW))
    assert contents(folder / "merged") == published


def test_damage_of_an_earlier_task_is_told_and_the_run_goes_on(whole, tiny_base, data, tmp_path, capsys):
    folder = copied(whole, "pm", tmp_path)
    shutil.rmtree(tasks(folder)[-1])
    file = tasks(folder)[0] / "merged" / "adapter_model.safetensors"
    flip(file)
    learn(settings(tiny_base, data, folder, **FEW))
    assert f"{file} holds other bytes than were written" in capsys.readouterr().err
    assert same_tensors(folder / "merged", whole("pm") / "merged")


def test_a_run_of_an_older_version_without_digests_goes_on(whole, tiny_base, data, tmp_path):
    folder = copied(whole, "pm", tmp_path)
    shutil.rmtree(tasks(folder)[-1])
    for task in tasks(folder):
        step = json.loads((task / "step.json").read_text())
        for key in ("files", "inputs", "curvature_bytes"):
            step.pop(key, None)
        (task / "step.json").write_text(json.dumps(step))
    learn(settings(tiny_base, data, folder, **FEW))
    assert same_tensors(folder / "merged", whole("pm") / "merged")


def test_what_a_user_put_into_the_folder_of_a_run_stays(whole, tiny_base, data, tmp_path):
    folder = copied(whole, "pm", tmp_path)
    first, second, third = tasks(folder)
    shutil.rmtree(third)
    notes = [
        folder / "notes.txt",
        folder / "merged" / "notes.txt",
        first / "notes.txt",
        second / "merged" / "notes.txt",
    ]
    (folder / "merged" / "deep").mkdir()
    notes += [folder / "merged" / "deep" / "notes.txt", second / "checkpoints" / "notes.txt"]
    for note in notes:
        note.parent.mkdir(exist_ok=True)
        note.write_text("mine")
    learn(settings(tiny_base, data, folder, **FEW))
    learn(settings(tiny_base, data, folder, **FEW))
    assert [note.read_text() for note in notes] == ["mine"] * len(notes)
    assert same_tensors(folder / "merged", whole("pm") / "merged")


def test_a_file_of_the_user_in_what_is_written_again_is_set_aside(whole, tiny_base, data, tmp_path):
    folder = copied(whole, "pm", tmp_path)
    third = tasks(folder)[-1]
    (third / "step.json").unlink()
    (third / "merged" / "notes.txt").write_text("mine")
    learn(settings(tiny_base, data, folder, **FEW))
    assert (third / "merged.kept" / "notes.txt").read_text() == "mine"
    assert same_tensors(folder / "merged", whole("pm") / "merged")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scores", {}),
        ("scores", {"class_incremental": [0.5]}),
        ("scores", {"class_incremental": [0.5, 0.5, 0.5]}),
        ("scores", {"class_incremental": [None, 0.5]}),
        ("scores", {"task_incremental": [0.5, 0.5]}),
        ("seconds", "1"),
        ("held_out", "x"),
        ("coefficient", "x"),
    ],
)
def test_a_step_file_that_does_not_fit_the_stream_is_refused(
    whole, tiny_base, data, tmp_path, key, value, no_training_now
):
    folder = copied(whole, "pm", tmp_path)
    shutil.rmtree(tasks(folder)[-1])
    step = tasks(folder)[-1] / "step.json"
    edited_json(step, **{key: value})
    before = contents(folder)
    no_training_now()
    with pytest.raises(InputError, match=rf"{step}: {key}.*; it was changed by hand") as caught:
        learn(settings(tiny_base, data, folder, **FEW))
    assert "\n" not in str(caught.value)
    assert contents(folder) == before


def test_nothing_changes_before_the_lock_is_held(whole, tiny_base, data, tmp_path):
    folder = copied(whole, "pm", tmp_path)
    (tasks(folder)[-1] / "checkpoints" / "checkpoint-3").mkdir(parents=True)  # what a start removes
    shutil.copy(tasks(folder)[-1] / "curvature.safetensors", tasks(folder)[0])
    before = contents(folder)
    with locked(folder), pytest.raises(InputError, match="is in use by process"):
        learn(settings(tiny_base, data, folder, **FEW))
    assert contents(folder) == before
    assert (tasks(folder)[-1] / "checkpoints" / "checkpoint-3").is_dir()


def test_the_merge_is_published_before_the_report_about_it(tiny_base, data, tmp_path, monkeypatch):
    save, merges = Report.save, []

    def watched(report):
        merges.append(same_tensors(report.folder / "merged", tasks(report.folder)[-1] / "merged"))
        save(report)

    monkeypatch.setattr(Report, "save", watched)
    learn(settings(tiny_base, data, tmp_path / "run", groups=2, **FEW))
    assert merges == [True, True]
