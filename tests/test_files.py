"""Writes are whole or absent."""

import enum
import errno
import hashlib
import json
import math
import os
import resource
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from safetensors import SafetensorError, safe_open

from pm_hf import files
from pm_hf.errors import InputError, raise_all
from pm_hf.files import (
    WriteError,
    copy_folder,
    damaged_file,
    errno_of,
    file_marks,
    free_space_problem,
    locked,
    new_folder,
    output_problems,
    read_json,
    read_record,
    remove_leftovers,
    same_files,
    save_tensors,
    write_json,
)


class Colour(enum.Enum):
    RED = "red"


def contents(folder) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text(encoding="utf-8") for p in folder.rglob("*") if p.is_file()}


def write_half(path, error: BaseException) -> None:
    """A new folder whose writer fails after its first file."""
    with new_folder(path, overwrite=True) as folder:
        (folder / "x.txt").write_text("half")
        raise error


@contextmanager
def largest_file(size: int):
    """No file may grow beyond `size` bytes: a write fails in the middle, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_json_comes_back_and_nan_is_null(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"α": [1, math.nan, {"deep": (math.nan, 0.1)}], 2: Colour.RED, "set": {"b", "a"}, "none": None})
    assert read_json(path) == {
        "α": [1, None, {"deep": [None, 0.1]}],
        "2": "red",
        "set": ["a", "b"],
        "none": None,
    }
    assert "NaN" not in path.read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("value", [object(), math.inf], ids=["object", "infinity"])
def test_a_failed_write_leaves_the_old_json_and_nothing_else(tmp_path, value):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises((TypeError, ValueError), match="JSON"):
        write_json(path, {"new": 2, "broken": value})
    assert read_json(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_json_is_complete_before_it_takes_its_name(tmp_path, monkeypatch):
    path, seen = tmp_path / "a.json", []
    write_json(path, "old")
    replace = os.replace

    def spy(source, target):
        seen.append((json.loads(source.read_text(encoding="utf-8")), json.loads(path.read_text(encoding="utf-8"))))
        replace(source, target)

    monkeypatch.setattr(os, "replace", spy)
    write_json(path, "new")
    assert seen == [("new", "old")]
    assert read_json(path) == "new"


def test_missing_and_broken_json_are_input_errors(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(InputError, match=r"a\.json cannot be read as JSON"):
        read_json(path)
    for broken in (b'{"a": ', b"", b"\xff\xfe"):
        path.write_bytes(broken)
        with pytest.raises(InputError, match=r"a\.json cannot be read as JSON"):
            read_json(path)


def test_a_new_folder_takes_its_name_when_the_block_ends(tmp_path):
    path = tmp_path / "deep" / "out"
    with new_folder(path, overwrite=False) as folder:
        (folder / "a").mkdir()
        (folder / "a" / "x.txt").write_text("1")
        assert not path.exists()
        assert folder.parent == path.parent, "a rename must not cross file systems"
    assert contents(path) == {"a/x.txt": "1"}
    assert [p.name for p in path.parent.iterdir()] == ["out"]


def test_an_error_leaves_no_folder(tmp_path):
    with pytest.raises(RuntimeError, match="midway"):
        write_half(tmp_path / "out", RuntimeError("midway"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_the_old_folder_whole(tmp_path, error):
    path = tmp_path / "out"
    path.mkdir()
    (path / "old.txt").write_text("old")
    with pytest.raises(error, match="midway"):
        write_half(path, error("midway"))
    assert contents(path) == {"old.txt": "old"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_overwriting_replaces_the_whole_folder(tmp_path):
    path = tmp_path / "out"
    path.mkdir()
    (path / "old.txt").write_text("old")
    with new_folder(path, overwrite=True) as folder:
        assert list(folder.iterdir()) == []
        (folder / "new.txt").write_text("new")
        assert contents(path) == {"old.txt": "old"}
    assert contents(path) == {"new.txt": "new"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_swap_that_fails_puts_the_old_folder_back(tmp_path, monkeypatch):
    path, new = tmp_path / "out", tmp_path / "new"
    for folder in (path, new):
        folder.mkdir()
    (path / "old.txt").write_text("old")
    (new / "new.txt").write_text("new")
    replace, calls = os.replace, []
    monkeypatch.setattr(files, "_exchange", lambda left, right: False)

    def second_fails(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(OSError, match="disk full"):
        copy_folder(new, path)
    assert contents(path) == {"old.txt": "old"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "out"]


def test_an_existing_folder_is_refused_before_the_block_runs(tmp_path):
    path = tmp_path / "out"
    path.mkdir()
    (path / "old.txt").write_text("old")
    with pytest.raises(InputError, match="out exists; choose another folder, or overwrite=True"):
        new_folder(path, overwrite=False).__enter__()
    assert contents(path) == {"old.txt": "old"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_copy_replaces_the_target_and_keeps_the_source(tmp_path):
    for name, text in (("source", "new"), ("target", "old")):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{text}.txt").write_text(text)
    copy_folder(tmp_path / "source", tmp_path / "target")
    assert contents(tmp_path / "target") == contents(tmp_path / "source") == {"new.txt": "new"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "target"]


def test_copy_of_a_missing_folder_leaves_the_target(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "old.txt").write_text("old")
    with pytest.raises(WriteError, match="target could not be written: No such file or directory: .*none; what was"):
        copy_folder(tmp_path / "none", tmp_path / "target")
    assert contents(tmp_path / "target") == {"old.txt": "old"}
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def test_on_linux_the_old_and_the_new_folder_change_places_in_one_step(tmp_path):
    left, right = tmp_path / "left", tmp_path / "ri\u00e9ght"
    for folder in (left, right):
        folder.mkdir()
        (folder / "x.txt").write_text(folder.name)
    assert files._exchange(left, right) == sys.platform.startswith("linux")
    if sys.platform.startswith("linux"):
        assert (contents(left), contents(right)) == ({"x.txt": right.name}, {"x.txt": "left"})
    assert not files._exchange(left, tmp_path / "none")
    assert left.is_dir()


def test_no_space_left_in_the_middle_of_a_folder(tmp_path):
    path, tensors = tmp_path / "out", {"x": torch.zeros(400, 400)}
    path.mkdir()
    (path / "old.txt").write_text("old")

    def write():
        with new_folder(path, overwrite=True) as folder:
            (folder / "x.txt").write_text("fits")
            save_tensors(tensors, folder / "x.safetensors", {})

    with largest_file(300_000), pytest.raises(WriteError) as caught:
        write()
    assert caught.value.errno == errno.EFBIG
    message = str(caught.value)
    assert message.startswith(f"{path} could not be written: File too large (0.6 MB needed, ")
    assert message.endswith("free); what was there before is untouched")
    assert contents(path) == {"old.txt": "old"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_everything_is_on_the_disk_before_the_folder_takes_its_name(tmp_path, monkeypatch):
    done, sync, swap = [], files.sync, files._swap
    monkeypatch.setattr(files, "sync", lambda path: (done.append(path.name), sync(path)))
    monkeypatch.setattr(files, "_swap", lambda new, path: (done.append("swap"), swap(new, path)))
    with new_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "a").mkdir()
        (folder / "a" / "x.txt").write_text("1")
    assert set(done[:3]) == {"a", "x.txt", folder.name}
    assert done[3:] == ["swap", tmp_path.name]


@pytest.mark.parametrize("write", [write_json, lambda path, value: save_tensors({"x": value}, path, {})])
def test_no_space_left_in_the_middle_of_a_file(tmp_path, write):
    path, value = tmp_path / "x", torch.zeros(90_000)
    value = value.tolist() if write is write_json else value
    with largest_file(100_000), pytest.raises(WriteError, match="x could not be written: File too large.*nothing was"):
        write(path, value)
    assert list(tmp_path.iterdir()) == []
    path.write_text("old")
    with largest_file(100_000), pytest.raises(WriteError, match="what was there before is untouched"):
        write(path, value)
    assert contents(tmp_path) == {"x": "old"}


def test_saved_tensors_come_back_with_their_metadata(tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(2, dtype=torch.bfloat16)}
    save_tensors(tensors, tmp_path / "x.safetensors", {"format": "pt", "key": "é"})
    with safe_open(tmp_path / "x.safetensors", "pt") as handle:
        assert handle.metadata() == {"format": "pt", "key": "é"}
        assert all(torch.equal(handle.get_tensor(name), tensor) for name, tensor in tensors.items())
        assert handle.get_tensor("b").dtype == torch.bfloat16
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_an_error_of_safetensors_that_is_not_the_disks_stays_what_it_is(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise SafetensorError("invalid header")

    monkeypatch.setattr(files, "save_file", broken)
    with pytest.raises(SafetensorError, match="invalid header"):
        save_tensors({}, tmp_path / "x", {})
    assert list(tmp_path.iterdir()) == []


def test_space_is_asked_for_where_the_folder_will_be(tmp_path, monkeypatch):
    asked = []

    def disk_usage(folder):
        asked.append(folder)
        return type("Usage", (), {"free": 2_000_000_000})

    monkeypatch.setattr(files.shutil, "disk_usage", disk_usage)
    path = tmp_path / "not" / "yet"
    assert free_space_problem(path, 2_000_000_000) is None
    problem = free_space_problem(path, 2_100_000_000)
    assert problem == f"{path} needs 2.1 GB, {tmp_path} has 2.0 GB free; free some space or choose another folder"
    assert asked == [tmp_path, tmp_path]


def test_a_place_that_cannot_hold_an_output_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file is a file, expected a folder"):
        new_folder(tmp_path / "file", overwrite=True).__enter__()
    with pytest.raises(InputError, match="file/out cannot be written: .*File exists"):
        new_folder(tmp_path / "file" / "out", overwrite=True).__enter__()
    with pytest.raises(InputError, match="cannot be written: .*name too long"):
        new_folder(tmp_path / ("x" * 300), overwrite=True).__enter__()
    assert contents(tmp_path) == {"file": "x"}


def test_all_problems_stand_in_one_error():
    raise_all([], "config")
    with pytest.raises(InputError, match="^config: a is wrong$"):
        raise_all(["a is wrong"], "config")
    with pytest.raises(InputError, match="^config: 2 problems: a is wrong; b is wrong$"):
        raise_all(["a is wrong", "b is wrong"], "config")


ALLOWED = ("adapter_config.json", "README.md")


@pytest.mark.parametrize(
    ("output", "settings", "problem"),
    [
        ("new/deep/er", {"overwrite": False}, None),
        ("folder", {"overwrite": True}, None),
        ("folder", {"overwrite": True, "allowed": (*ALLOWED, "mine.txt")}, None),
        (
            "folder",
            {"overwrite": False},
            "exists; choose another folder, or overwrite=True (--overwrite) to replace it",
        ),
        ("folder", {"overwrite": True, "allowed": ALLOWED}, "is not an adapter folder alone, it holds ['mine.txt']"),
        ("folder/mine.txt", {"overwrite": True, "allowed": ALLOWED}, "cannot be written: [Errno 20] Not a directory"),
        ("folder/mine.txt/out", {"overwrite": True}, "expected a name of at most 200 bytes in a folder that may be"),
        ("n" * 201, {"overwrite": True}, "expected a name of at most 200 bytes in a folder that may be written to"),
        ("n" * 300, {"overwrite": True}, "cannot be written: [Errno 36] File name too long"),
    ],
)
def test_what_speaks_against_an_output_is_said_and_nothing_is_touched(tmp_path, output, settings, problem):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    problems = output_problems(tmp_path / output, **settings)
    assert len(problems) == (problem is not None)
    assert not problems or f"output {tmp_path / output} " in problems[0]
    assert not problems or str(problem) in problems[0]
    assert contents(tmp_path) == {"folder/mine.txt": "mine"}


def test_the_number_of_an_error_is_its_own_or_the_one_that_its_text_names():
    assert errno_of(OSError(errno.EFBIG, "File too large")) == errno.EFBIG
    assert errno_of(SafetensorError("I/O error: No space left on device (os error 28)")) == errno.ENOSPC
    assert errno_of(RuntimeError("something else")) is None


# what a name may turn out to be, and who else may be at work


@pytest.mark.parametrize("kind", ["link", "link to nowhere", "folder", "pipe"])
def test_a_lock_that_is_no_lock_is_refused_and_what_it_leads_to_is_untouched(tmp_path, kind):
    lock, other = tmp_path / "run" / ".lock", tmp_path / "other"
    lock.parent.mkdir()
    other.write_text("mine")
    if kind == "folder":
        lock.mkdir()
    elif kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.symlink_to(other if kind == "link" else tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"\.lock is a link or no file: .*; remove it"), locked(lock.parent):
        pass
    assert other.read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_called_that(tmp_path, monkeypatch, code):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with (
        pytest.raises(InputError, match="its file system has no flock .*; choose a folder on another"),
        locked(tmp_path),
    ):
        pass


ELSEWHERE = "m00000000"  # a place that is not this one


def test_what_another_machine_or_container_writes_stays_for_a_day(tmp_path):
    theirs, ours = tmp_path / f".out.tmp-{ELSEWHERE}-1-0", tmp_path / f".out.tmp-{files._place()}-4194305-0"
    for folder in (theirs, ours):
        folder.mkdir()
        (folder / "x.txt").write_text("x")
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [theirs.name]
    old = time.time() - files.ABANDONED - 10
    for path in (theirs / "x.txt", theirs):
        os.utime(path, (old, old))
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_whoever_holds_the_folder_removes_what_any_machine_left(tmp_path):
    (tmp_path / f".out.tmp-{ELSEWHERE}-1-0").mkdir()
    remove_leftovers(tmp_path, held=True)
    assert list(tmp_path.iterdir()) == []


def test_marks_tell_every_change_of_a_file(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"two")
    marks = file_marks(tmp_path, ["a", "b", "none"])
    assert set(marks) == {"a/x", "b"}
    assert marks["b"] == (3, hashlib.sha256(b"two").hexdigest())
    assert damaged_file(tmp_path, marks) is None
    (tmp_path / "c").write_bytes(b"a file beside them")
    assert damaged_file(tmp_path, marks) is None
    for content, problem in (
        (b"tw", "has 2 bytes, it was written with 3"),
        (b"twO", "holds other bytes"),
        (None, "not"),
    ):
        (tmp_path / "b").unlink() if content is None else (tmp_path / "b").write_bytes(content)
        assert problem in damaged_file(tmp_path, marks)


def test_the_same_files_may_lie_among_others(tmp_path):
    for name in ("left", "right"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("1")
    (tmp_path / "right" / "notes").mkdir()
    assert same_files(tmp_path / "left", tmp_path / "right")
    (tmp_path / "right" / "x").write_text("2")
    assert not same_files(tmp_path / "left", tmp_path / "right")
    assert not same_files(tmp_path / "left", tmp_path / "none")


def test_names_that_are_kept_stay_where_a_folder_is_replaced(tmp_path):
    for name in ("new", "out", "out/deep"):
        (tmp_path / name).mkdir()
    for name in ("new/x", "out/x", "out/notes", "out/deep/notes", "out/old"):
        (tmp_path / name).write_text(name)
    copy_folder(tmp_path / "new", tmp_path / "out", ["notes", "deep", "x"])
    assert contents(tmp_path / "out") == {"x": "new/x", "notes": "out/notes", "deep/notes": "out/deep/notes"}


@dataclass
class Example:
    name: str
    count: int = 0
    share: float = 0.0

    def problem(self):
        return "count: below 0" if self.count < 0 else None


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"name": "a", "count": 1.0}', "count: expected a valid integer.*, found 1.0"),
        ('{"name": "a", "count": true}', "count: expected a valid integer.*, found true"),
        ('{"name": "a", "share": "1"}', 'share: expected a valid number, found "1"'),
        ('{"name": "a", "share": NaN}', "share: expected a finite number, found nan|share: expected"),
        ('{"name": "a", "share": 1e999}', "share: expected a finite number, found inf|share: expected"),
        ('{"name": "a", "count": -1}', "count: below 0"),
        ('{"count": 1}', "it lacks name"),
        ("[]", "content: expected an object.*"),
        ('{"name": "' + "x" * 10**6 + '", "count": []}', r"count: expected a valid integer, found \[\]"),
        ('{"name": ["' + "x" * 10**6 + '"]}', "name: expected a valid string, found .* …"),
    ],
)
def test_a_record_that_is_not_as_expected_is_one_short_line(tmp_path, content, problem):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(InputError, match=rf"x.json: ({problem}); remove it") as caught:
        read_record(tmp_path / "x.json", Example, "remove it")
    assert len(str(caught.value)) < 300


def test_a_record_takes_whole_numbers_for_shares_and_leaves_unknown_keys(tmp_path):
    (tmp_path / "x.json").write_text('{"name": "a", "share": 1, "of a newer version": {}}')
    assert read_record(tmp_path / "x.json", Example, "") == Example("a", 0, 1.0)


def test_a_json_key_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "labels.json"
    path.write_text('{"a": {"fc": ["x"], "fc": ["y"]}}')
    with pytest.raises(InputError, match="cannot be read as JSON: key 'fc' stands twice in one object"):
        files.read_json(path)


def test_a_number_that_no_float_can_hold_is_refused():
    with pytest.raises(InputError, match="s.json: a.0: expected a number of at most 300 digits"):
        files.as_record({"a": [10**400]}, dict, "s.json", "way out")
