"""SIGTERM, the lock of a run's folder, and what is said when a run goes on under other conditions."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest
from helpers import edited_json
from helpers.processes import forked
from helpers.streams import contents, same_tensors, settings, steps, write_yaml

import pm_hf.runs.learner
from pm_hf import InputError
from pm_hf.cli import main
from pm_hf.files import locked
from pm_hf.runs.learner import learn
from pm_hf.training.callbacks import StoppedError, stop_on_sigterm
from pm_hf.training.trainer import PMTrainer

CHANGES = {"training__num_train_epochs": 2, "lora__dropout": 0.1, "training__lr_scheduler_type": "cosine"}


@pytest.fixture(scope="module")
def data(stream_data):
    return stream_data(12)


@pytest.fixture(scope="module")
def whole(finished_run):
    return finished_run(12, **CHANGES)


def stop_inside_a_step(path):
    """Run the stream and get SIGTERM in the middle of a training step of the second task."""
    step = PMTrainer.training_step

    def stop(self, *args, **kwargs):
        if "task-01" in self.args.output_dir and self.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    PMTrainer.training_step = stop
    return main(["train", "--config", str(path)])


@pytest.fixture(scope="module")
def stopped(tiny_base, data, tmp_path_factory):
    """(exit code, last line on stderr, folder) of a run that got SIGTERM inside task 1."""
    place = tmp_path_factory.mktemp("stopped")
    path = write_yaml(place / "c.yaml", settings(tiny_base, data, place / "run", **CHANGES))
    code, said = forked(lambda: stop_inside_a_step(path))
    return code, said.strip().splitlines()[-1], place / "run"


def test_sigterm_inside_a_step_saves_it_and_ends_with_one_line(stopped):
    code, line, folder = stopped
    assert code == 1
    assert line == "pm-hf: stopped by SIGTERM; the same command continues from here"
    assert len(steps(folder)) == 1
    checkpoint = folder / "task-01-second" / "checkpoints" / "checkpoint-2"  # of 3 in the first epoch
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == 2
    assert not (folder / ".lock").exists()


def test_a_stopped_run_goes_on_to_the_same_adapters_bit_for_bit(stopped, whole, tiny_base, data, tmp_path):
    folder = shutil.copytree(stopped[2], tmp_path / "run")
    learn(settings(tiny_base, data, folder, **CHANGES))
    assert same_tensors(folder / "merged", whole / "merged")
    assert contents(folder).keys() == contents(whole).keys()


def test_a_run_that_goes_on_with_other_threads_says_so(stopped, tiny_base, data, tmp_path, capsys):
    folder = shutil.copytree(stopped[2], tmp_path / "run")
    edited_json(folder / "task-01-second" / "rows.json", threads=99)
    report = learn(settings(tiny_base, data, folder, **CHANGES))
    note = "task second: continued with threads 1 instead of 99: equal up to rounding only"
    assert note in report.notes
    assert note in capsys.readouterr().err


def test_sigterm_between_trainings_ends_at_once_and_can_be_continued(whole, tiny_base, data, tmp_path, monkeypatch):
    measure = pm_hf.runs.learner.estimate_curvature
    monkeypatch.setattr(
        pm_hf.runs.learner,
        "estimate_curvature",
        lambda *_, **__: signal.raise_signal(signal.SIGTERM) or pytest.fail("on"),
    )
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError, match="the same command continues"):
        learn(settings(tiny_base, data, tmp_path / "run", **CHANGES))
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.setattr(pm_hf.runs.learner, "estimate_curvature", measure)
    learn(settings(tiny_base, data, tmp_path / "run", **CHANGES))
    assert same_tensors(tmp_path / "run" / "merged", whole / "merged")


def test_other_threads_leave_signals_alone():
    before, found = signal.getsignal(signal.SIGTERM), []

    def work():
        with stop_on_sigterm():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


def test_two_runs_in_one_folder_are_refused(tiny_base, data, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with (
        locked(folder),
        pytest.raises(InputError, match=rf"run is in use by process {os.getpid()}; wait for it or choose another"),
    ):
        learn(settings(tiny_base, data, folder, **CHANGES))
    assert list(folder.iterdir()) == []


def test_the_lock_of_a_dead_process_holds_nobody(tmp_path):
    program = "import os, signal, sys; from pathlib import Path; from pm_hf.files import locked\n"
    program += "with locked(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert (tmp_path / ".lock").exists()
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
    assert list(tmp_path.iterdir()) == []
