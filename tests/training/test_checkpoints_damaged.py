"""A checkpoint that is damaged is set aside, never continued from, never deleted; the older whole one is."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from helpers import edited_json
from helpers.kills import stops_after_checkpoint
from helpers.streams import FEW, contents, same_tensors, settings

import pm_hf.files
from pm_hf.errors import InputError
from pm_hf.runs.learner import learn
from pm_hf.training.checkpoints import (
    _own_digest,
    _state_digest,
    last_checkpoint,
    remove_checkpoints,
)

CHANGES = {**FEW, "groups": 2, "lora__dropout": 0.1, "training__save_strategy": "steps"}
CHANGES |= {"training__save_steps": 1, "training__save_total_limit": 2}
TASK = "task-01-second"
NEWEST, OLDER = "checkpoint-3", "checkpoint-2"


@pytest.fixture(scope="module")
def data(stream_data):
    return stream_data(8)


@pytest.fixture(scope="module")
def whole(finished_run):
    return finished_run(8, **CHANGES)


@pytest.fixture(scope="module")
def stopped(tiny_base, data, tmp_path_factory):
    """A run that ended when the third checkpoint of its second task was written: two are there."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with stops_after_checkpoint(TASK, 3):
        learn(settings(tiny_base, data, folder, **CHANGES))
    return folder


@pytest.fixture
def run(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "run")


@pytest.fixture
def checkpoints(run):
    return run / TASK / "checkpoints"


def changed_bytes(file, change):
    file.write_bytes(change(bytearray(file.read_bytes())))


def flipped(content):
    content[len(content) // 2] ^= 1
    return content


class Payload:
    def __reduce__(self):
        return os.mkdir, (str(Path.home() / "never"),)


PARTS = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "task/adapter_model.safetensors")
DAMAGES = {f"without {name}": lambda path, name=name: (path / name).unlink() for name in PARTS}
for part in (*PARTS, "whole.json"):
    DAMAGES |= {
        f"{part} of zeros": lambda path, name=part: changed_bytes(path / name, lambda old: bytes(len(old))),
        f"{part} cut": lambda path, name=part: changed_bytes(path / name, lambda old: old[:-9]),
        f"{part} empty": lambda path, name=part: (path / name).write_bytes(b""),
        f"{part} with a flipped bit": lambda path, name=part: changed_bytes(path / name, flipped),
    }
for part in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt"):
    DAMAGES |= {
        f"payload in {part}": lambda path, name=part: torch.save(Payload(), path / name),
        f"old pickle in {part}": lambda path, name=part: (path / name).write_bytes(pickle.dumps(Payload())),
    }
for step in (10**9, -1, "3", 2, 3.0, None):
    DAMAGES[f"global_step {step!r}"] = lambda path, step=step: edited_json(
        path / "trainer_state.json", global_step=step
    )
DAMAGES |= {
    "zebra in the state": lambda path: edited_json(path / "trainer_state.json", zebra=1),
    "callbacks a text": lambda path: edited_json(path / "trainer_state.json", stateful_callbacks="x"),
    "state a list": lambda path: (path / "trainer_state.json").write_text("[1]"),
    "other losses": lambda path: edited_json(path / "whole.json", losses=[1.0]),
    "losses of texts": lambda path: edited_json(path / "whole.json", losses=["1"]),
    "factors a list": lambda path: edited_json(path / "whole.json", factors=["1"]),
    "log a number": lambda path: edited_json(path / "whole.json", log=3),
    "no digests": lambda path: edited_json(path / "whole.json", files={}, factors={"x": 1}, digest="0"),
    "whole a list": lambda path: (path / "whole.json").write_text("[]"),
    "whole null": lambda path: (path / "whole.json").write_text("null"),
    "whole of nothing": lambda path: (path / "whole.json").write_text("{}"),
    "adapter a folder": lambda path: ((path / PARTS[4]).unlink(), (path / PARTS[4]).mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_older_one_is_gone_on_from(checkpoints, damage, capsys):
    DAMAGES[damage](checkpoints / NEWEST)
    before = contents(checkpoints / NEWEST)
    assert last_checkpoint(checkpoints) == str(checkpoints / OLDER)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert str(checkpoints / NEWEST) in said[0]
    assert said[0].endswith("the checkpoint is not continued from")
    assert said[1] == f"the training goes on from {checkpoints / OLDER}"
    assert contents(checkpoints / f"damaged-{NEWEST}") == before
    assert not (Path.home() / "never").exists()


@pytest.mark.parametrize("damage", ["optimizer.pt of zeros", "without scheduler.pt", "whole.json with a flipped bit"])
def test_a_run_with_a_damaged_checkpoint_ends_as_one_that_nothing_disturbed(
    run, checkpoints, damage, whole, tiny_base, data
):
    DAMAGES[damage](checkpoints / NEWEST)
    learn(settings(tiny_base, data, run, **CHANGES))
    assert same_tensors(run / "merged", whole / "merged")
    assert contents(run).keys() == contents(whole).keys()


def test_a_run_without_a_whole_checkpoint_begins_the_task_anew_and_says_so(
    run, checkpoints, whole, tiny_base, data, capsys
):
    for name in (NEWEST, OLDER):
        DAMAGES["optimizer.pt cut"](checkpoints / name)
    learn(settings(tiny_base, data, run, **CHANGES))
    assert f"{TASK}: the task begins anew" in capsys.readouterr().err.splitlines()
    assert same_tensors(run / "merged", whole / "merged")
    assert contents(run).keys() == contents(whole).keys()


def test_two_damaged_checkpoints_of_one_step_are_both_kept(checkpoints):
    for kept in ("damaged-checkpoint-3", "damaged-checkpoint-3-1"):
        shutil.copytree(checkpoints / OLDER, checkpoints / NEWEST, dirs_exist_ok=True)
        (checkpoints / NEWEST / "optimizer.pt").write_bytes(kept.encode())
        last_checkpoint(checkpoints)
        assert (checkpoints / kept / "optimizer.pt").read_bytes() == kept.encode()


@pytest.mark.parametrize("name", ["whole.json", "trainer_state.json", "optimizer.pt"])
@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")], ids=str)
def test_a_checkpoint_that_cannot_be_read_is_refused_and_nothing_is_touched(checkpoints, name, error, monkeypatch):
    before, read_text, digest = contents(checkpoints), Path.read_text, pm_hf.files.digest

    def failing(read):
        def failed(path, *args, **kwargs):
            if path == checkpoints / NEWEST / name:
                raise error
            return read(path, *args, **kwargs)

        return failed

    monkeypatch.setattr(Path, "read_text", failing(read_text))
    monkeypatch.setattr(pm_hf.files, "digest", failing(digest))
    with pytest.raises(InputError, match=rf"{NEWEST}.* cannot be read.*{error.strerror}.*make it readable"):
        last_checkpoint(checkpoints)
    monkeypatch.undo()
    assert contents(checkpoints) == before


def test_a_checkpoint_of_an_older_version_is_gone_on_from(run, checkpoints, whole, tiny_base, data, capsys):
    for name in (NEWEST, OLDER):
        file = checkpoints / name / "whole.json"
        old = json.loads(file.read_text())
        file.write_text(json.dumps({key: old[key] for key in ("losses", "factors", "log")}))
    assert last_checkpoint(checkpoints) == str(checkpoints / NEWEST)
    assert capsys.readouterr().err == ""
    learn(settings(tiny_base, data, run, **CHANGES))
    assert same_tensors(run / "merged", whole / "merged")


def test_a_link_to_a_checkpoint_is_gone_on_from_and_only_the_link_is_removed(run, checkpoints, whole, tiny_base, data):
    outside = shutil.move(checkpoints / NEWEST, run.parent / "outside")
    (checkpoints / NEWEST).symlink_to(outside)
    before = contents(outside)
    learn(settings(tiny_base, data, run, **CHANGES))
    assert contents(outside) == before
    assert same_tensors(run / "merged", whole / "merged")
    assert contents(run).keys() == contents(whole).keys()


def test_a_link_that_leads_nowhere_is_set_aside(checkpoints):
    shutil.rmtree(checkpoints / NEWEST)
    (checkpoints / NEWEST).symlink_to(checkpoints / "nowhere")
    assert last_checkpoint(checkpoints) == str(checkpoints / OLDER)
    assert (checkpoints / f"damaged-{NEWEST}").is_symlink()


def test_the_best_checkpoint_is_looked_for_beside_it_and_the_checkpoint_stays_whole(checkpoints, tmp_path):
    state = checkpoints / NEWEST / "trainer_state.json"
    moved = shutil.copytree(checkpoints, tmp_path / "moved")
    assert json.loads(state.read_text())["best_model_checkpoint"] is None
    for _ in range(2):
        assert last_checkpoint(moved) == str(moved / NEWEST)


@pytest.mark.parametrize("damage", ["task/adapter_model.safetensors with a flipped bit", "all of it"])
def test_a_checkpoint_whose_best_one_is_damaged_is_not_gone_on_from(checkpoints, damage, capsys):
    best, state = checkpoints / OLDER, checkpoints / NEWEST / "trainer_state.json"
    edited_json(state, best_model_checkpoint=str(best))
    whole = checkpoints / NEWEST / "whole.json"
    edited_json(whole, state=_state_digest(state.parent))
    edited_json(whole, digest=_own_digest(json.loads(whole.read_text())))
    assert last_checkpoint(checkpoints) == str(checkpoints / NEWEST)
    shutil.rmtree(best) if damage == "all of it" else DAMAGES[damage](best)
    assert last_checkpoint(checkpoints) is None
    assert f"it is the best checkpoint of {checkpoints / NEWEST}" in capsys.readouterr().err


def test_other_files_among_checkpoints_stay(checkpoints):
    (checkpoints / "notes.txt").write_text("mine")
    (checkpoints / "checkpoint-3 copy").mkdir()
    shutil.copytree(checkpoints / OLDER, checkpoints / "damaged-checkpoint-7-1")
    remove_checkpoints(checkpoints)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-3 copy", "notes.txt"]
    remove_checkpoints(checkpoints / "none")


@pytest.mark.parametrize("change", [{"notes": 3}, {"fingerprint": 1}, {"threads": "x"}, {"inputs": ["x"]}])
def test_a_rows_file_of_another_kind_is_refused_and_the_checkpoints_stay(run, checkpoints, tiny_base, data, change):
    rows = run / TASK / "rows.json"
    edited_json(rows, **change)
    before = contents(checkpoints)
    with pytest.raises(InputError, match=rf"{rows}: {next(iter(change))}.*, or remove it and the task begins anew"):
        learn(settings(tiny_base, data, run, **CHANGES))
    assert contents(checkpoints) == before


def test_without_its_rows_file_a_task_begins_anew_and_says_so(run, whole, tiny_base, data, capsys):
    (run / TASK / "rows.json").unlink()
    learn(settings(tiny_base, data, run, **CHANGES))
    assert "rows.json is not there, which says what its checkpoints are of; begun anew" in capsys.readouterr().err
    assert same_tensors(run / "merged", whole / "merged")
