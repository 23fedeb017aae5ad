"""A process killed while it replaces a folder leaves the old or the new one, and litter that the next removes."""

import os
import random
import signal
import sys
import time

import pytest

from pm_hf import InputError, files
from pm_hf.files import new_folder, remove_leftovers

DEAD, LIVING = 2**22 + 1, os.getppid()  # Linux hands out no process number above 2²²


def write_number(path, number: int) -> None:
    """Replace a folder by one with two files that say the same number many times."""
    with new_folder(path, overwrite=True) as folder:
        for name in "ab":
            (folder / name).write_text(f"{number} " * 5000)


def number_of(path) -> int:
    """The number of a folder that `write_number` wrote; fails unless the folder is whole."""
    found = {p.name: p.read_text() for p in path.iterdir()}
    assert sorted(found) == ["a", "b"]
    assert found["a"] == found["b"] == f"{int(found['a'].split()[0])} " * 5000
    return int(found["a"].split()[0])


def fork(work) -> int:
    """Number of a child process that does `work` and ends."""
    if (pid := os.fork()) == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def killed_at_line(count: int, work) -> bool:
    """Whether a child that does `work` was killed at the count-th line of files.py that it runs."""
    left = [count]

    def trace(frame, event, _):
        if frame.f_code.co_filename != files.__file__:
            return None
        left[0] -= event == "line"
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    def traced():
        sys.settrace(trace)
        work()

    return os.WIFSIGNALED(os.waitpid(fork(traced), 0)[1])


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_killed_at_any_line_the_folder_is_the_old_or_the_new_one(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda left, right: False)
    path, seen, gone, line = tmp_path / "out", [], 0, 0
    write_number(path, 1)
    while killed_at_line(line, lambda: write_number(path, 2)):
        if not path.exists():  # between two renames
            gone += 1
            remove_leftovers(tmp_path)
        seen.append(number_of(path))
        write_number(path, 1)
        assert [p.name for p in tmp_path.iterdir()] == ["out"], "the next write removes what a dead one left"
        line += 1
    assert line > 40
    assert seen == sorted(seen)
    assert set(seen) == {1, 2}
    assert gone == 0 if exchange else gone > 0


def test_killed_at_random_moments_the_folder_is_whole(tmp_path):
    rng, path, last, litter = random.Random(0), tmp_path / "out", 0, 0
    write_number(path, 0)

    def overwrite_forever():
        number = last
        while True:
            write_number(path, number := number + 1)

    for _ in range(30):
        child = fork(overwrite_forever)
        time.sleep(rng.uniform(0.005, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        litter += len(list(tmp_path.iterdir())) > 1
        assert number_of(path) >= last
        last = number_of(path)
    assert last > 0
    assert litter > 0, "no kill came in the middle of a write"
    write_number(path, last)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_leftovers_of_dead_processes_go_and_others_stay(tmp_path):
    stale, theirs = f".out.tmp-{DEAD}", [f".out.tmp-{LIVING}", f".outer.tmp-{DEAD}", ".out.tmp-x", ".out.txt"]
    for name in (stale, f".out.old-{DEAD}", *theirs):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text("x")
    write_number(tmp_path / "out", 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*theirs, "out"])
    remove_leftovers(tmp_path)
    assert not (tmp_path / f".outer.tmp-{DEAD}").exists()
    assert (tmp_path / f".out.tmp-{LIVING}").exists()


def test_an_old_folder_whose_name_is_free_gets_it_back(tmp_path):
    old = tmp_path / f".out.old-{DEAD}"
    old.mkdir()
    (old / "old.txt").write_text("old")
    with pytest.raises(InputError, match="out exists"):
        new_folder(tmp_path / "out", overwrite=False).__enter__()
    assert (tmp_path / "out" / "old.txt").read_text() == "old"
