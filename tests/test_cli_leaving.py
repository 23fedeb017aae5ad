"""How the command line ends where it is interrupted, or where what it writes to is closed or cannot encode."""

import io
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.adapter_folders import HEAD, head, write_folder
from helpers.processes import forked
from helpers.streams import FEW, same_tensors, settings, steps, write_yaml

import pm_hf.runs.learner
from pm_hf.cli import _open_standard_streams, main
from pm_hf.runs.learner import learn

CHANGES = FEW | {"groups": 2, "training__save_strategy": "epoch"}
HOSTILE = "a\x1b[2Jb\x9bc\u202ed\x07"


@pytest.fixture(scope="module")
def data(stream_data):
    return stream_data(8)


@pytest.fixture(autouse=True)
def _sigint_as_at_a_terminal():
    """What a shell starts in the background ignores SIGINT, and so would a test run."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("moment", ["build_task_model", "train", "estimate_curvature", "merge_adapters"])
def test_ctrl_c_in_a_run_is_one_line_with_the_way_to_go_on(
    moment, finished_run, tiny_base, data, tmp_path, monkeypatch, capfd
):
    path = write_yaml(tmp_path / "c.yaml", settings(tiny_base, data, tmp_path / "run", **CHANGES))

    def interrupted(*_, **__):
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(pm_hf.runs.learner, moment, interrupted)
        assert main(["train", "--config", str(path)]) == 130
    last = capfd.readouterr().err.splitlines()[-1]
    assert last == "pm-hf: stopped by Ctrl-C; the same command continues from the newest checkpoint"
    if moment == "train":
        learn(settings(tiny_base, data, tmp_path / "run", **CHANGES))
        assert same_tensors(tmp_path / "run" / "merged", finished_run(8, **CHANGES) / "merged")


def test_ctrl_c_in_another_command_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("pm_hf.adapters.inspection.inspect_adapters", lambda _: signal.raise_signal(signal.SIGINT))
    assert main(["inspect", "x"]) == 130
    assert capsys.readouterr().err == "pm-hf: stopped by Ctrl-C; the same command begins again\n"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("command", [["methods"], ["--help"], ["inspect", "none"], ["melt"]], ids=" ".join)
def test_a_closed_pipe_ends_the_command_without_a_word(command, stream):
    def work():
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        reading, writing = os.pipe()
        os.close(reading)
        os.dup2(writing, 1 if stream == "stdout" else 2)
        opened = open(writing, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        setattr(sys, stream, opened)
        try:
            code = main(command)
        except SystemExit as end:
            code = end.code
        opened.flush()  # as the interpreter does at its end
        return code

    code, said = forked(work)
    assert "Traceback" not in said
    writes = {"methods": "stdout", "--help": "stdout", "inspect": "stderr", "melt": "stderr"}[command[0]]
    assert code == (141 if writes == stream else 0 if writes == "stdout" else 2)


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the second one in the locale C
def test_a_locale_without_the_letters_of_a_text_gets_their_numbers(errors, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors=errors))
    assert main(["methods"]) == 0
    assert b"\\u03b1" in sys.stdout.buffer.getvalue()


def test_standard_streams_that_were_closed_are_opened_before_a_file_gets_their_number(tmp_path):
    def work():
        for number in range(3):
            os.close(number)
        _open_standard_streams()
        with open(tmp_path / "file", "wb") as file:
            return file.fileno()

    assert forked(work)[0] > 2


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_the_real_command_with_closed_streams(closed):
    program = Path(sys.executable).with_name("pm-hf")
    done = subprocess.run(["sh", "-c", f"{program} --help {closed}"], capture_output=True, check=False)
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr


def test_an_error_is_not_written_to_stdout_where_stderr_is_closed():
    program = Path(sys.executable).with_name("pm-hf")
    done = subprocess.run(["sh", "-c", f"{program} melt 2>&-"], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (2, b"")


def test_names_from_files_command_no_terminal(tmp_path, capsys):
    labels = {HEAD: [HOSTILE, "y"]}
    folder = write_folder(tmp_path / "a", saved=head(2, 3), labels=labels, config={"base_model_name_or_path": HOSTILE})
    for command in (["inspect", str(folder)], ["inspect", str(folder), "--json"], ["inspect", HOSTILE]):
        main(command)
        printed = "".join(capsys.readouterr())
        assert all(character.isprintable() for character in printed.replace("\n", ""))
        assert "[2Jb" in printed


@pytest.mark.parametrize("moment", ["train", "merge_adapters"])
def test_a_run_whose_folder_is_removed_meanwhile_ends_in_one_line(
    moment, tiny_base, data, tmp_path, monkeypatch, capfd
):
    path = write_yaml(tmp_path / "c.yaml", settings(tiny_base, data, tmp_path / "run", **CHANGES))
    function, calls = getattr(pm_hf.runs.learner, moment), []

    def removing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            shutil.rmtree(tmp_path / "run")
        return function(*args, **kwargs)

    monkeypatch.setattr(pm_hf.runs.learner, moment, removing)
    assert main(["train", "--config", str(path)]) == 1
    said = capfd.readouterr().err
    assert said.splitlines()[-1].startswith(f"pm-hf: {tmp_path / 'run'} was removed while the run was at work in it; ")
    assert "Traceback" not in said
    assert not steps(tmp_path / "run")
