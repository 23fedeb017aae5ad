"""A run that was killed and started again ends where one that was never killed ends."""

import shutil
import signal
from pathlib import Path

import pytest
from helpers.kills import die
from helpers.processes import forked
from helpers.streams import contents, same_tensors, settings, steps, write_yaml

import pm_hf.runs.records
import pm_hf.training.checkpoints
from pm_hf.cli import main
from pm_hf.runs.learner import learn
from pm_hf.training.checkpoints import AtomicCheckpoints, last_checkpoint
from pm_hf.training.trainer import PMTrainer

CHANGES = {
    "training__learning_rate": 1e-2,
    "training__num_train_epochs": 4,
    "lora__dropout": 0.1,  # so that the random state has to come back as well
    "training__lr_scheduler_type": "cosine",
}


@pytest.fixture(scope="module")
def data(stream_data):
    return stream_data(12)


@pytest.fixture(scope="module")
def whole(finished_run):
    """A run that nothing disturbed."""
    return finished_run(12, **CHANGES)


def die_inside(task, count, kind=AtomicCheckpoints):
    """From now on this process dies after `count` checkpoints of a task, as `kind` writes them."""
    save, saved = kind._save_checkpoint, []

    def save_and_die(self, *args, **kwargs):
        save(self, *args, **kwargs)
        saved.extend([1] * (task in self.args.output_dir))
        if len(saved) == count:
            die()

    kind._save_checkpoint = save_and_die


def die_between(task):
    """From now on this process dies when that task's step.json was just written."""
    write = pm_hf.runs.records.write_json

    def write_and_die(path, value):
        write(path, value)
        if path.name == "step.json" and task in str(path):
            die()

    pm_hf.runs.records.write_json = write_and_die


def kill(path, arm):
    """Run the stream in a process of its own, which `arm` has made kill itself."""

    def work():
        arm()
        return main(["train", "--config", str(path)])

    status, said = forked(work)
    assert status == -signal.SIGKILL, said


@pytest.fixture(scope="module")
def killed(tiny_base, data, tmp_path_factory):
    """What two kills left: {where: folder}; first inside task 1, then, continued, right after its step.json."""
    place = tmp_path_factory.mktemp("killed")
    config = settings(tiny_base, data, place / "run", **CHANGES)
    path, left = write_yaml(place / "c.yaml", config), {}
    task = "task-01-second"
    for where, arm in (("inside", lambda: die_inside(task, 2)), ("between", lambda: die_between(task))):
        kill(path, arm)
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
        for measured in ("seconds", "step_seconds", "process_peak_memory_mb"):
            assert mine.pop(measured) > 0
            del theirs[measured]
        assert mine.pop("files").keys() == theirs.pop("files").keys()
        assert mine == theirs


def test_kill_inside_a_task_continues_from_its_checkpoint(killed, tiny_base, data, tmp_path, monkeypatch):
    import pm_hf.training.task_trainer as training

    seen, real = [], training.last_checkpoint
    monkeypatch.setattr(training, "last_checkpoint", lambda folder: seen.append(real(folder)) or seen[-1])
    resumed(killed, "inside", tiny_base, data, tmp_path)
    assert [path and Path(path).name for path in seen] == ["checkpoint-6", None]


def test_kill_between_tasks_publishes_and_cleans_up_at_the_next_start(killed, whole, tiny_base, data, tmp_path):
    assert contents(killed["between"] / "merged") == contents(killed["between"] / "task-00-first" / "merged")
    folder = resumed(killed, "between", tiny_base, data, tmp_path)
    assert not list(folder.glob("task-*/checkpoints"))
    # one more than is needed, so that the last task can be learned again
    kept = {path.parent.name for path in folder.glob("task-*/curvature.safetensors")}
    assert kept == {"task-01-second", "task-02-third"}
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
    states = {step: (f'{{"global_step": {step}}}', '{"losses": [1.5]}') for step in (20, 3)}
    states |= {100: ('{"global_step": 100}', None), 101: (None, None)}
    for step, files in states.items():
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "optimizer.pt").write_bytes(b"x")
        for name, text in zip(("trainer_state.json", "whole.json"), files, strict=True):
            if text is not None:
                (checkpoint / name).write_text(text)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-20")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-20", "checkpoint-3"]
    assert last_checkpoint(tmp_path / "none") is None


def test_a_checkpoint_that_was_not_synced_yet_does_not_count_and_the_one_before_it_is_there(
    whole, tiny_base, data, tmp_path
):
    """Killed when Trainer had written all of it."""
    path = write_yaml(tmp_path / "c.yaml", settings(tiny_base, data, tmp_path / "run", **CHANGES))
    kill(path, lambda: die_inside("task-01-second", 2, PMTrainer))
    checkpoints = tmp_path / "run" / "task-01-second" / "checkpoints"
    assert (checkpoints / "checkpoint-6" / "trainer_state.json").is_file()
    assert last_checkpoint(checkpoints) == str(checkpoints / "checkpoint-3")
    learn(settings(tiny_base, data, tmp_path / "run", **CHANGES))
    assert same_tensors(tmp_path / "run" / "merged", whole / "merged")


def test_checkpoints_are_removed_after_the_next_one_is_synced(tiny_base, data, tmp_path, monkeypatch):
    order, rotate, sync = [], pm_hf.training.checkpoints._rotate, pm_hf.training.checkpoints.sync_folder
    monkeypatch.setattr(pm_hf.training.checkpoints, "sync_folder", lambda path: order.append(path.name) or sync(path))

    def watched(folder, limit, best):
        before = {path.name for path in folder.iterdir()}
        rotate(folder, limit, best)
        order.extend(f"-{name}" for name in sorted(before - {path.name for path in folder.iterdir()}))

    monkeypatch.setattr(pm_hf.training.checkpoints, "_rotate", watched)
    changes = {"training__num_train_epochs": 4, "training__save_total_limit": 2}
    learn(settings(tiny_base, data, tmp_path / "run", groups=1, **changes))
    assert order == [
        *("checkpoint-3", "checkpoint-6", "checkpoint-9", "-checkpoint-3"),
        *("checkpoint-12", "-checkpoint-6"),
    ]


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
