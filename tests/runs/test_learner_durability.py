"""SIGTERM at any moment, a full disk and a diverged loss: one line, and the same command goes on to the same result."""

import json
import re
import resource
import signal

import pytest
import torch
from helpers.models import tiny_folder
from helpers.processes import forked
from helpers.streams import contents, same_tensors, settings, steps, write_yaml

import pm_hf.adapters.merge
import pm_hf.runs.folder
import pm_hf.runs.learner
import pm_hf.training.checkpoints
from pm_hf.cli import main
from pm_hf.files import WriteError
from pm_hf.measuring.scores import Scorer
from pm_hf.merging.curvature import Curvature
from pm_hf.models.task_model import TASK_ADAPTER
from pm_hf.runs.folder import RunFolder
from pm_hf.runs.learner import learn
from pm_hf.training.callbacks import StoppedError
from pm_hf.training.checkpoints import AtomicCheckpoints
from pm_hf.training.task_trainer import DivergedError, TaskTrainer

CHANGES = {"groups": 2, "training__num_train_epochs": 2, "lora__dropout": 0.1}
SECOND = "task-01-second"


@pytest.fixture(scope="module")
def data(stream_data):
    return stream_data(12)


@pytest.fixture(scope="module")
def whole(finished_run):
    """A run that nothing disturbed."""
    return finished_run(12, **CHANGES)


def assert_goes_on(base, data, folder, whole):
    """The same settings again end with the same adapters and leave the same files."""
    learn(settings(base, data, folder, **CHANGES))
    assert same_tensors(folder / "merged", whole / "merged")
    assert contents(folder).keys() == contents(whole).keys()


def before_call(number, owner, name, act):
    """(owner, name, the function of that name, which does `act` at the beginning of its call with this number)."""
    function, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            act()
        return function(*args, **kwargs)

    return owner, name, wrapped


MOMENTS = {  # (call, function) in which SIGTERM comes
    "starting": (1, RunFolder, "begin_run"),
    "building": (3, pm_hf.runs.learner, "build_task_model"),
    "measuring": (2, pm_hf.runs.learner, "estimate_curvature"),
    "saving the curvature": (2, Curvature, "save"),
    "merging": (2, pm_hf.adapters.merge, "write_adapter"),
    "scoring": (3, Scorer, "_forward"),
    "publishing": (2, pm_hf.runs.folder, "copy_folder"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_sigterm_at_any_moment_ends_the_run_and_the_next_one_goes_on(
    moment, whole, tiny_base, data, tmp_path, monkeypatch
):
    with monkeypatch.context() as patched:
        patched.setattr(*before_call(*MOMENTS[moment], lambda: signal.raise_signal(signal.SIGTERM)))
        with pytest.raises(StoppedError):
            learn(settings(tiny_base, data, tmp_path / "run", **CHANGES))
    assert not (tmp_path / "run" / ".lock").exists()
    assert len(steps(tmp_path / "run")) == {"starting": 0, "publishing": 2}.get(moment, 1)
    assert_goes_on(tiny_base, data, tmp_path / "run", whole)


def test_a_stop_that_something_swallowed_takes_place_after_the_phase(tiny_base, data, tmp_path, monkeypatch):
    measure = pm_hf.runs.learner.estimate_curvature

    def swallowed(*args, **kwargs):
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:
            return measure(*args, **kwargs)

    monkeypatch.setattr(pm_hf.runs.learner, "estimate_curvature", swallowed)
    with pytest.raises(StoppedError):
        learn(settings(tiny_base, data, tmp_path / "run", **CHANGES))
    assert not list(tmp_path.glob("run/task-*/adapter"))


def prompts(folder, base):
    """Settings of two tasks of prompts and completions."""
    for name, answers in (("one", ("red", "blue")), ("two", ("gold", "dark"))):
        lines = [{"prompt": f"{answers[i % 2]}{i % 5} :", "completion": answers[i % 2]} for i in range(12)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = settings(base, folder, folder / "run", lora__target_modules=["q_proj", "v_proj"])
    tasks = [{"name": name, "train": f"{name}.jsonl", "test": f"{name}.jsonl"} for name in ("one", "two")]
    config["stream"] = {"kind": "causal-lm", "tasks": tasks, "max_length": 16}
    config["training"] = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    return config


def test_sigterm_in_a_language_stream_is_as_good(tmp_path, monkeypatch):
    base, places = tiny_folder("llama", tmp_path / "base"), {}
    for moment in ("whole", "training", "scoring"):
        (tmp_path / moment).mkdir()
        config = prompts(tmp_path / moment, base)
        places[moment] = tmp_path / moment / "run" / "merged"
        owner, call = {"training": (TaskTrainer, "training_step"), "scoring": (Scorer, "score_loaded")}.get(
            moment, (None, None)
        )
        if owner:
            with monkeypatch.context() as patched:
                patched.setattr(*before_call(2, owner, call, lambda: signal.raise_signal(signal.SIGTERM)))
                with pytest.raises(StoppedError):
                    learn(config)
        learn(config)
    assert same_tensors(places["training"], places["whole"])
    assert same_tensors(places["scoring"], places["whole"])


def fill_disk(size=0):
    """From now on no file of this process may become larger than `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


FULL = {  # (call, function) after which the disk is full, what the one line says, finished tasks
    "settings": (1, RunFolder, "begin_run", "run/config.yaml could not be written: File too large", 0),
    "checkpoint": (4, AtomicCheckpoints, "_save_checkpoint", "checkpoint-6 could not be written: .*MB free", 1),
    "end of a checkpoint": (4, pm_hf.training.checkpoints, "_seal", "checkpoint-6/whole.json could not be written", 1),
    "curvature": (2, Curvature, "save", r"curvature.safetensors \(0 MB\) cannot be written: .*File too large", 1),
    "adapter": (2, pm_hf.runs.learner, "save_adapter", f"{SECOND}/adapter could not be written: File too large", 1),
    "merge": (2, pm_hf.adapters.merge, "write_adapter", f"{SECOND}/merged could not be written: File too large", 1),
    "step": (2, RunFolder, "finish_task", "step.json could not be written: File too large", 1),
    "publication": (2, pm_hf.runs.folder, "copy_folder", "run/merged could not be written: File too large", 2),
}


@pytest.mark.parametrize("moment", FULL)
def test_a_full_disk_is_one_line_and_the_same_command_goes_on_when_there_is_space(
    moment, whole, tiny_base, data, tmp_path
):
    *call, message, finished = FULL[moment]
    path = write_yaml(tmp_path / "c.yaml", settings(tiny_base, data, tmp_path / "run", **CHANGES))

    def work():
        setattr(*before_call(*call, fill_disk))
        return main(["train", "--config", str(path)])

    status, text = forked(work)
    said = [line for line in text.splitlines() if not line.startswith(("task ", "curvature: "))]
    assert (status, len(said)) == (1, 1), text
    assert said[0].startswith("pm-hf: ")
    assert len(steps(tmp_path / "run")) == finished
    assert re.search(message, said[0]), said[0]
    assert_goes_on(tiny_base, data, tmp_path / "run", whole)


def test_a_checkpoint_that_did_not_fit_is_removed_and_the_one_before_it_is_kept(tiny_base, data, tmp_path, monkeypatch):
    def full():
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")

    monkeypatch.setattr(*before_call(2, TaskTrainer, "_save_rng_state", full))
    with pytest.raises(WriteError, match="checkpoint-6 could not be written: .*MB free"):
        learn(settings(tiny_base, data, tmp_path / "run", **CHANGES))
    left = tmp_path / "run" / "task-00-first" / "checkpoints"
    assert [path.name for path in left.iterdir()] == ["checkpoint-3"]


# losses


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_a_loss_that_is_not_finite_is_one_line_and_leaves_a_state_to_go_on_from(
    bad, whole, tiny_base, data, tmp_path, monkeypatch, capsys
):
    path = write_yaml(tmp_path / "c.yaml", settings(tiny_base, data, tmp_path / "run", **CHANGES))
    compute = TaskTrainer.compute_loss

    def broken(self, model, *args, **kwargs):
        loss = compute(self, model, *args, **kwargs)
        return loss * float(bad) if self.args.task_index == 1 and self.state.global_step == 4 else loss

    with monkeypatch.context() as patched:
        patched.setattr(TaskTrainer, "compute_loss", broken)
        assert main(["train", "--config", str(path)]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"pm-hf: the training loss is {bad} at step 5 of the task; lower the learning rate")
    assert len(steps(tmp_path / "run")) == 1
    assert [p.name for p in (tmp_path / "run" / SECOND / "checkpoints").iterdir()] == ["checkpoint-3"]
    assert_goes_on(tiny_base, data, tmp_path / "run", whole)


def test_a_training_that_diverges_by_itself_ends_before_a_parameter_is_lost(tiny_base, data, tmp_path, monkeypatch):
    seen = []

    def look(self, *args):
        parameters = dict(self.model.named_parameters())
        seen.append(all(p.isfinite().all() for name, p in parameters.items() if f".{TASK_ADAPTER}." in name))

    monkeypatch.setattr(TaskTrainer, "store_flos", look)
    changes = CHANGES | {"training__learning_rate": 1e30, "training__max_grad_norm": 0}
    with pytest.raises(DivergedError, match="is not finite|loss is (nan|inf)"):
        learn(settings(tiny_base, data, tmp_path / "run", **changes))
    assert torch.tensor(seen).all()
    assert not list(tmp_path.glob("run/task-*/step.json"))
