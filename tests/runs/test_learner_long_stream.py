"""What eight tasks leave on disk and in memory: no more after the eighth than after the second."""

import gc
import weakref

import pytest
from helpers.streams import settings, steps, tensors, write_rows
from safetensors.torch import load_file

import pm_hf.measuring.scores
import pm_hf.runs.learner
from pm_hf.merging.curvature import Curvature
from pm_hf.runs.folder import RunFolder
from pm_hf.runs.learner import learn
from pm_hf.training.task_trainer import TaskTrainer

TASKS, RANK = 8, 4


class Watched:
    """Weak references to what is made, and how many of them live at moments of the run."""

    def __init__(self):
        self.made, self.living, self.objects, self.sizes = [], {}, [], []

    def keep(self, thing):
        self.made.append(weakref.ref(thing))
        return thing

    def count(self, moment):
        living = sum(reference() is not None for reference in self.made)
        self.living.setdefault(moment, []).append(living)


@pytest.fixture(scope="module")
def watched(tiny_base, tmp_path_factory):
    """(run folder, what was watched) of a stream of eight tasks of two classes each."""
    data, seen = tmp_path_factory.mktemp("data"), Watched()
    for name, rows, seed in (("train", 8, 1), ("test", 4, 2)):
        write_rows(data / f"{name}.csv", ("apple", "bird"), rows, seed)
    config = settings(tiny_base, data, data / "run", merge__max_rank=RANK)
    tasks = [{"name": f"t{i}", "train": "train.csv", "test": "test.csv"} for i in range(TASKS)]
    config["stream"] = {"tasks": tasks, "max_length": 16}
    config["training"] |= {"num_train_epochs": 1, "save_strategy": "no"}
    with pytest.MonkeyPatch.context() as patched:
        watch(patched, seen)
        learn(config)
    return data / "run", seen


def watch(patched, seen):
    build, load = pm_hf.runs.learner.build_task_model, pm_hf.measuring.scores.load_merged
    start, save, merge = TaskTrainer.__init__, Curvature.save, pm_hf.runs.learner.merge_adapters
    begin = RunFolder.begin_task

    def started(self, *args, **kwargs):
        seen.keep(self)
        start(self, *args, **kwargs)

    def built(*args, **kwargs):
        task_model = build(*args, **kwargs)
        seen.keep(task_model.model)
        return task_model

    def saved(self, path):
        save(self, path)
        seen.sizes.append({name: tensor.nbytes for name, tensor in load_file(path).items()})

    def merged(*args, **kwargs):
        seen.count("merging")
        return merge(*args, **kwargs)

    def begun(self, index):
        seen.count("beginning")
        gc.collect()
        seen.objects.append(len(gc.get_objects()))
        return begin(self, index)

    patched.setattr(TaskTrainer, "__init__", started)
    patched.setattr(pm_hf.runs.learner, "build_task_model", built)
    patched.setattr(pm_hf.measuring.scores, "load_merged", lambda *a, **k: seen.keep(load(*a, **k)))
    patched.setattr(Curvature, "save", saved)
    patched.setattr(pm_hf.runs.learner, "merge_adapters", merged)
    patched.setattr(RunFolder, "begin_task", begun)


def test_curvature_has_the_same_tensors_after_every_task(watched):
    folder, seen = watched
    assert seen.sizes == [seen.sizes[0]] * TASKS
    assert len(seen.sizes[0]) == 2 * 4  # S and M of four matrices
    assert {step["curvature_bytes"] for step in steps(folder)} == {sum(seen.sizes[0].values())}


def test_the_last_two_curvatures_are_kept(watched):
    found = [path.parent.name for path in watched[0].glob("task-*/curvature.safetensors")]
    assert sorted(found) == [f"task-{i:02d}-t{i}" for i in (TASKS - 2, TASKS - 1)]


def test_merged_adapter_grows_by_the_rows_of_the_new_classes_alone(watched):
    found = [tensors(path / "merged") for path in sorted(watched[0].glob("task-*"))]
    for t, merged in enumerate(found):
        for name, value in merged.items():
            if "lora_" in name:
                assert min(value.shape) == min(2 * (t + 1), RANK)
            else:
                assert len(value) == 2 * (t + 1)


def test_no_model_and_no_trainer_outlives_its_phase(watched):
    _, seen = watched
    assert len(seen.made) == 1 + 3 * TASKS  # the first one checks the settings, without weights
    assert seen.living == {"beginning": [0] * TASKS, "merging": [0] * TASKS}


def test_objects_in_memory_hardly_grow(watched):
    objects = watched[1].objects
    assert len(objects) == TASKS
    assert objects[-1] - objects[2] < 100 * (TASKS - 3)
