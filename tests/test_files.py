"""Writes are whole or absent."""

import enum
import json
import math
import os

import pytest

from pm_hf.errors import InputError, raise_all
from pm_hf.files import copy_folder, new_folder, read_json, write_json


class Colour(enum.Enum):
    RED = "red"


def contents(folder) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text(encoding="utf-8") for p in folder.rglob("*") if p.is_file()}


def write_half(path, error: BaseException) -> None:
    """A new folder whose writer fails after its first file."""
    with new_folder(path, overwrite=True) as folder:
        (folder / "x.txt").write_text("half")
        raise error


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
    with pytest.raises(FileNotFoundError):
        copy_folder(tmp_path / "none", tmp_path / "target")
    assert contents(tmp_path / "target") == {"old.txt": "old"}
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def test_all_problems_stand_in_one_error():
    raise_all([], "config")
    with pytest.raises(InputError, match="^config: a is wrong$"):
        raise_all(["a is wrong"], "config")
    with pytest.raises(InputError, match="^config: 2 problems: a is wrong; b is wrong$"):
        raise_all(["a is wrong", "b is wrong"], "config")
