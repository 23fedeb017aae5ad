"""A run that was killed and started again ends where one that was never killed ends."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from streams import contents, same_tensors, settings, steps, write_data, write_yaml

from pm_hf.learner import learn
from pm_hf.training import last_checkpoint

ROOT = Path(__file__).parent.parent
CHANGES = {
    "training__learning_rate": 1e-2,
    "training__num_train_epochs": 4,
    "lora__dropout": 0.1,  # so that the random state has to come back as well
    "training__lr_scheduler_type": "cosine",
}
# runs the stream and kills itself: after N checkpoints of a task, or when that task's step.json was just written
KILLED = """
import os, signal, sys
from pathlib import Path
import pm_hf.learner as learner
from pm_hf.cli import main
from pm_hf.trainer import PMTrainer

config, where, task, count = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
die = lambda: os.kill(os.getpid(), signal.SIGKILL)

if where == "inside":
    save, saved = PMTrainer._save_checkpoint, []
    def save_and_die(self, *args, **kwargs):
        save(self, *args, **kwargs)
        if task in self.args.output_dir:
            saved.append(1)
            if len(saved) == count:
                die()
    PMTrainer._save_checkpoint = save_and_die
else:
    write = learner.write_json
    def write_and_die(path, value):
        write(path, value)
        if path.name == "step.json" and task in str(path):
            die()
    learner.write_json = write_and_die
main(["train", "--config", config])
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), per_class=12)


@pytest.fixture(scope="module")
def whole(tiny_base, data, tmp_path_factory):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    learn(settings(tiny_base, data, folder, **CHANGES))
    return folder


def kill(yaml_file, where, task, count=1):
    """Run the stream in a process of its own until it is killed."""
    command = [sys.executable, "-c", KILLED, str(yaml_file), where, task, str(count)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.fixture(scope="module")
def killed(tiny_base, data, tmp_path_factory):
    """What two kills left: {where: folder}; first inside task 1, then, continued, right after its step.json."""
    place = tmp_path_factory.mktemp("killed")
    config = settings(tiny_base, data, place / "run", **CHANGES)
    path, left = write_yaml(place / "c.yaml", config), {}
    for where, count in (("inside", 2), ("between", 1)):
        kill(path, where, "task-01-second", count)
        left[where] = shutil.copytree(place / "run", place / where)
    return left


def resumed(killed, where, base, data, tmp_path):
    folder = shutil.copytree(killed[where], tmp_path / "run")
    learn(settings(base, data, folder, **CHANGES))
    return folder


@pytest.mark.parametrize("where", ["inside", "between"])
def test_killed_run_ends_with_the_same_adapters_bit_for_bit(whole, killed, tiny_base, data, tmp_path, where):
    left = killed[where]
    assert len(steps(left)) == (1 if where == "inside" else 2)
    assert (left / "task-01-second" / "checkpoints").is_dir()
    folder = resumed(killed, where, tiny_base, data, tmp_path)
    for task in sorted(path.name for path in whole.glob("task-*")):
        assert same_tensors(folder / task / "adapter", whole / task / "adapter")
        assert same_tensors(folder / task / "merged", whole / task / "merged")
    for mine, theirs in zip(steps(folder), steps(whole), strict=True):
        for key in ("scores", "coefficient", "fingerprint", "optimizer_steps"):
            assert mine[key] == theirs[key]


def test_kill_inside_a_task_continues_from_its_checkpoint(killed, tiny_base, data, tmp_path, monkeypatch):
    import pm_hf.training as training

    seen, real = [], training.last_checkpoint
    monkeypatch.setattr(training, "last_checkpoint", lambda folder: seen.append(real(folder)) or seen[-1])
    resumed(killed, "inside", tiny_base, data, tmp_path)
    assert [path and Path(path).name for path in seen] == ["checkpoint-6", None]


def test_kill_between_tasks_publishes_and_cleans_up_at_the_next_start(killed, whole, tiny_base, data, tmp_path):
    assert contents(killed["between"] / "merged") == contents(killed["between"] / "task-00-first" / "merged")
    folder = resumed(killed, "between", tiny_base, data, tmp_path)
    assert not list(folder.glob("task-*/checkpoints"))
    assert [path.parent.name for path in folder.glob("task-*/curvature.safetensors")] == ["task-02-third"]
    assert contents(folder / "merged").keys() == contents(whole / "merged").keys()


def test_finished_run_cleans_up_what_the_last_kill_left(whole, tiny_base, data, tmp_path):
    """Killed between the last step.json and the removal of what it makes superfluous."""
    folder = shutil.copytree(whole, tmp_path / "run")
    (folder / "task-02-third" / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    shutil.copy(folder / "task-02-third" / "curvature.safetensors", folder / "task-01-second")
    shutil.rmtree(folder / "merged")
    learn(settings(tiny_base, data, folder, **CHANGES))
    assert contents(folder).keys() == contents(whole).keys()
    assert contents(folder / "merged") == contents(folder / "task-02-third" / "merged")
    assert not (folder / "task-02-third" / "checkpoints").exists()


def test_half_written_checkpoint_is_dropped(tmp_path):
    for step, state in ((3, "{}"), (6, None), (9, '{"global')):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "optimizer.pt").write_bytes(b"x")
        if state is not None:
            (checkpoint / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    assert last_checkpoint(tmp_path / "none") is None


def test_run_with_a_half_written_checkpoint_goes_on_from_the_whole_one(killed, whole, tiny_base, data, tmp_path):
    folder = shutil.copytree(killed["inside"], tmp_path / "run")
    checkpoints = folder / "task-01-second" / "checkpoints"
    half = shutil.copytree(checkpoints / "checkpoint-6", checkpoints / "checkpoint-9")
    (half / "trainer_state.json").unlink()
    (half / "task" / "adapter_model.safetensors").write_bytes(b"half")
    learn(settings(tiny_base, data, folder, **CHANGES))
    assert same_tensors(folder / "merged", whole / "merged")


def test_leftovers_of_a_killed_merge_are_removed(killed, whole, tiny_base, data, tmp_path):
    folder = shutil.copytree(killed["inside"], tmp_path / "run")
    task = folder / "task-01-second"
    for stale in (task / "adapter", task / "merged", task / ".merged.tmp-4194305", folder / ".merged.old-4194305"):
        stale.mkdir()
        (stale / "adapter_model.safetensors").write_bytes(b"half")
    (task / "curvature.safetensors").write_bytes(b"half")
    (task / ".step.json.tmp-4194305").mkdir()
    (task / ".step.json.tmp-4194305" / "step.json").write_text("{")
    learn(settings(tiny_base, data, folder, **CHANGES))
    assert same_tensors(folder / "merged", whole / "merged")
    assert contents(folder).keys() == contents(whole).keys()
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}


def test_checkpoint_of_other_data_is_not_continued(killed, tiny_base, data, tmp_path):
    """The interrupted task's rows may still change; what was trained on the old ones must not go on."""
    changed = shutil.copytree(data, tmp_path / "data")
    lines = (changed / "train.csv").read_text().splitlines()
    swap = {"car": "dog", "dog": "car"}
    flipped = [f"{text},{swap.get(label, label)}" for text, label in (line.rsplit(",", 1) for line in lines)]
    (changed / "train.csv").write_text("\n".join(flipped) + "\n")
    folder = shutil.copytree(killed["inside"], tmp_path / "run")
    learn(settings(tiny_base, changed, folder, **CHANGES))
    learn(settings(tiny_base, changed, tmp_path / "fresh", **CHANGES))
    assert same_tensors(folder / "merged", tmp_path / "fresh" / "merged")


def test_truncated_step_file_is_one_clear_error(whole, tiny_base, data, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    (folder / "task-01-second" / "step.json").write_text('{"task"')
    with pytest.raises(ValueError, match="step.json cannot be read as JSON"):
        learn(settings(tiny_base, data, folder, **CHANGES))
