"""On Windows the package imports and merges; elsewhere its missing modules and refusing calls are simulated."""

import subprocess
import sys

import pytest
from helpers.adapter_folders import assert_same, dense, write_folder

# what a Windows process lacks or refuses, put on after the libraries have been imported
WINDOWS = """
import fcntl, os, shutil, sys
import numpy, psutil, pydantic, pydantic.fields, safetensors.torch, torch, zoneinfo
flags = fcntl.fcntl
sys.modules["fcntl"] = sys.modules["resource"] = None
del os.fork, os.getuid
opening, syncing = os.open, os.fsync

def open_file(path, *rest, **more):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return opening(path, *rest, **more)

def sync(handle):
    if flags(handle, 3) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(9, "Bad file descriptor")
    syncing(handle)

def kill(pid, signal):
    raise AssertionError(f"os.kill({pid}, {signal}) would end a process")

os.open, os.fsync, os.kill = open_file, sync, kill
shutil._use_fd_functions = False
psutil.pid_exists = lambda pid: True
sys.platform = "win32"
"""
MERGE = """
import sys
from pathlib import Path
from pm_hf.cli import main
from pm_hf.files import _place
left, right, output = sys.argv[1:]
Path(output).with_name(f".{Path(output).name}.tmp-{_place()}-999999-0").mkdir()  # of a process that is alive
for more in ([], ["--overwrite"]):
    code = main(["merge", left, right, "--output", output, "--method", "average", *more])
    assert code == 0, code
"""
IMPORTS = """
from pm_hf.environment import process_peak_memory_mb
from pm_hf.files import locked
import pm_hf.runs.learner, pm_hf.reports.page, pm_hf.reports.hub
"""


def run(program, *arguments):
    command = [sys.executable, "-c", program, *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


SYSTEMS = {"here": ""} | ({} if sys.platform == "win32" else {"simulated": WINDOWS})


@pytest.mark.parametrize("system", SYSTEMS.values(), ids=list(SYSTEMS))
def test_two_adapters_are_merged_and_the_merge_is_replaced(tmp_path, system):
    folders = [write_folder(tmp_path / name, seed=seed) for seed, name in enumerate(("left", "right"))]
    run(system + MERGE, *folders, tmp_path / "merged")
    left, right = map(dense, folders)
    assert_same(dense(tmp_path / "merged"), {name: (left[name] + right[name]) / 2 for name in left})
    assert {path.name for path in tmp_path.iterdir() if path.name[0] != "."} == {"left", "right", "merged"}


@pytest.mark.skipif(sys.platform == "win32", reason="the simulation needs a Unix")
def test_everything_imports_without_the_modules_of_a_unix():
    hidden = "import psutil, sys\nsys.modules['fcntl'] = sys.modules['resource'] = None\n"
    peak = "assert process_peak_memory_mb() is None\nwith locked(__import__('pathlib').Path('.')): pass\n"
    run(hidden + IMPORTS + peak)


def test_the_simulation_refuses_what_windows_refuses(tmp_path):
    refused = "\nimport os\ntry: os.open('.', os.O_RDONLY)\nexcept PermissionError: print('refused')\n"
    assert sys.platform == "win32" or run(WINDOWS + refused) == "refused\n"
