"""Streams of pictures from the first task to what a user loads."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from helpers.models import OLD_NAME, SHAPES, encoded, image_settings, save_vit, write_npz
from helpers.processes import forked
from helpers.streams import contents, same_tensors, steps, tensors, write_yaml
from peft import PeftModel
from transformers import AutoImageProcessor, AutoModelForImageClassification

from pm_hf.adapters.folder import open_adapter
from pm_hf.cli import main
from pm_hf.config.loading import load_config
from pm_hf.data.sources import read_rows
from pm_hf.errors import InputError
from pm_hf.merging.curvature import Curvature
from pm_hf.runs.learner import evaluate, learn
from pm_hf.training.checkpoints import AtomicCheckpoints

HEAD = "classifier"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """shapes.npz, and domains.npz of 3 classes in two brightnesses."""
    folder = tmp_path_factory.mktemp("pictures")
    write_npz(folder / "domains.npz", classes=SHAPES[:3], domains=["bright", "dim"])
    write_npz(folder / "shapes.npz")
    return folder


@pytest.fixture(scope="module")
def runs(base, data, tmp_path_factory):
    """(folder, report) of a class-incremental run of each method, made when first asked for."""
    place, done = tmp_path_factory.mktemp("runs"), {}

    def run(method):
        if method not in done:
            done[method] = place / method, learn(image_settings(base, data, place / method, method))
        return done[method]

    return run


# classes


@pytest.mark.parametrize("method", ["pm", "best", "sequential"])
def test_new_classes_are_learned_with_a_head_for_each_task(runs, method):
    folder, report = runs(method)
    groups = [["bar", "box"], ["dot", "hat"], ["key", "zip"]]
    for index, task in enumerate(sorted(folder.glob("task-*"))):
        assert open_adapter(task / "adapter").labels == {HEAD: groups[index]}
        assert open_adapter(task / "merged").labels == {HEAD: sum(groups[: index + 1], [])}
    assert report.metrics["ACC"] > (0.6 if method == "best" else 1 / 6)
    own = [report.task_incremental[i][i] for i in range(3)]
    assert min(own) > 0.6
    assert report.task_incremental[2][2] >= report.scores[2][2]


def test_pm_folds_the_tasks_by_the_formula_and_keeps_their_heads(runs):
    folder, _ = runs("pm")
    coefficients = [step["coefficient"] for step in steps(folder)]
    assert coefficients[0]["raw"] == pytest.approx(1, abs=1e-6)
    assert all(0 < coefficient["used"] <= 1 for coefficient in coefficients)
    rows = [tensors(task / "adapter")[f"{HEAD}.weight"] for task in sorted(folder.glob("task-*"))]
    merged = tensors(folder / "merged")
    assert torch.equal(merged[f"{HEAD}.weight"], torch.cat(rows))
    modules = {name.removesuffix(".lora_A.weight") for name in merged if name.endswith("lora_A.weight")}
    assert len(modules) == 4
    assert all(module.rpartition(".")[2] in ("k_proj", "v_proj") for module in modules)
    assert Curvature.load(next(folder.glob("task-02-*")) / "curvature.safetensors").S.keys() == modules


def test_sequential_takes_every_task_in_full(runs):
    folder, _ = runs("sequential")
    assert [step["coefficient"]["used"] for step in steps(folder)] == [1, 1, 1]
    merged = tensors(folder / "merged")
    name = next(name for name in merged if name.endswith("lora_A.weight"))
    assert merged[name].shape[0] == 6  # 3 tasks of rank 2, nothing truncated


@pytest.mark.filterwarnings(OLD_NAME)
def test_plain_transformers_and_peft_load_the_merge_and_score_the_same(runs, base, data):
    folder, report = runs("best")
    labels = json.loads((folder / "merged" / "labels.json").read_text())[HEAD]
    assert labels == list(SHAPES)
    assert not (folder / "merged" / "config.json").exists()
    names = {"id2label": dict(enumerate(labels)), "ignore_mismatched_sizes": True}
    loaded = AutoModelForImageClassification.from_pretrained(base, **names)
    loaded = PeftModel.from_pretrained(loaded, folder / "merged").eval()
    source = load_config(image_settings(base, data, folder)).stream
    rows, _ = read_rows("image-classification", source, str(data), test=True)
    processor = AutoImageProcessor.from_pretrained(base, backend="pil")
    with torch.no_grad():
        inputs = processor([rows.inputs[i] for i in range(len(rows))], return_tensors="pt")
        found = [loaded.config.id2label[int(i)] for i in loaded(**inputs).logits.argmax(1)]
    right = [a == b for a, b in zip(found, rows.labels, strict=True)]
    size = len(rows) // 3
    mine = [sum(right[i : i + size]) / size for i in range(0, len(rows), size)]
    assert mine == pytest.approx(report.scores[2])


def test_folders_of_files_give_the_run_that_arrays_give(runs, base, data, tmp_path):
    config = image_settings(base, data, tmp_path / "run", stream__class_groups={"one": ["bar", "box"]})
    learn(config)
    for side in ("train", "test"):
        rows, _ = read_rows("image-classification", load_config(config).stream, str(data), test=side == "test")
        for index, label in enumerate(rows.labels):
            file = tmp_path / side / label / f"{index:04d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encoded(np.asarray(rows.inputs[index])))
    config["stream"] |= {"train": "train", "test": "test"}
    config |= {"data_dir": str(tmp_path), "output_dir": str(tmp_path / "files")}
    learn(config)
    assert same_tensors(tmp_path / "run" / "merged", tmp_path / "files" / "merged")
    assert steps(tmp_path / "run")[0]["scores"] == steps(tmp_path / "files")[0]["scores"]


def test_a_finished_run_is_left_alone_and_a_changed_pixel_is_refused(runs, base, data, tmp_path):
    folder = shutil.copytree(runs("pm")[0], tmp_path / "run")
    learn(image_settings(base, data, folder))
    assert contents(folder) | {"config.yaml": None} == contents(runs("pm")[0]) | {"config.yaml": None}
    with np.load(data / "shapes.npz") as arrays:
        changed = dict(arrays)
    changed["x_train"] = changed["x_train"].copy()
    changed["x_train"][0, 0, 0, 0] ^= 1
    np.savez(tmp_path / "shapes.npz", **changed)
    with pytest.raises(InputError, match="bar|classes-00|data"):
        learn(image_settings(base, tmp_path, folder))


def test_evaluate_gives_the_report_s_scores(runs, base, data):
    folder, report = runs("best")
    found = evaluate(load_config(image_settings(base, data, folder, "best")), folder / "merged")
    assert [scores["class_incremental"] for scores in found.values()] == report.scores[2]


# domains


@pytest.mark.parametrize("method", ["pm", "best", "sequential"])
def test_domains_share_one_head(base, data, tmp_path, method):
    config = image_settings(base, data, tmp_path / "run", method)
    config["stream"] = {"kind": "image-classification", "train": "domains.npz", "test": "domains.npz"}
    config["stream"]["domain_column"] = "domain"
    report = learn(config)
    assert report.scenario == "domain_incremental"
    assert report.tasks == ["bright", "dim"]
    several = int(method == "best")  # the analytic head has a row for every class and domain
    for count, task in enumerate(sorted((tmp_path / "run").glob("task-*")), start=1):
        assert open_adapter(task / "merged").labels == {HEAD: list(SHAPES[:3]) * count**several}
    assert report.metrics["ACC"] > (0.45 if method == "pm" else 0.6)  # 1/3 by chance
    first, second = (tensors(task / "merged")[f"{HEAD}.weight"] for task in sorted((tmp_path / "run").glob("task-*")))
    assert (first.shape, second.shape) == ((3, 32), (3 * 2**several, 32))
    assert not torch.equal(first, second[:3])
    if method == "pm":
        new = tensors(next((tmp_path / "run").glob("task-01-*")) / "adapter")[f"{HEAD}.weight"]
        a = steps(tmp_path / "run")[1]["coefficient"]["used"]
        assert torch.allclose(second, (1 - a) * first + a * new, atol=1e-6)


# interruption


def test_a_run_killed_in_the_middle_of_an_epoch_ends_like_one_that_was_not(base, data, tmp_path):
    changes = {
        "stream__augmentation": "crop_flip",
        "stream__class_groups": {"one": ["bar", "box"], "two": ["dot", "hat"]},
        "training__num_train_epochs": 2,
        "training__save_strategy": "steps",
        "training__save_steps": 3,  # an epoch has 4
    }
    learn(image_settings(base, data, tmp_path / "whole", **changes))
    path = write_yaml(tmp_path / "c.yaml", image_settings(base, data, tmp_path / "run", **changes))

    def work():
        save = AtomicCheckpoints._save_checkpoint

        def save_and_die(self, *args, **kwargs):
            save(self, *args, **kwargs)
            if "task-01" in self.args.output_dir:
                os.kill(os.getpid(), signal.SIGKILL)

        AtomicCheckpoints._save_checkpoint = save_and_die
        return main(["train", "--config", str(path)])

    status, said = forked(work)
    assert status == -signal.SIGKILL, said
    assert len(steps(tmp_path / "run")) == 1
    learn(path)
    for task in ("task-00-one", "task-01-two"):
        for adapter in ("adapter", "merged"):
            assert same_tensors(tmp_path / "run" / task / adapter, tmp_path / "whole" / task / adapter)


def test_augmented_runs_do_not_depend_on_the_number_of_workers(base, data, tmp_path):
    changes = {
        "stream__augmentation": "crop_flip",
        "stream__class_groups": {"one": ["bar", "box"]},
        "training__num_train_epochs": 2,
    }
    learn(image_settings(base, data, tmp_path / "none", **changes))
    workers = {"training__dataloader_num_workers": 1}
    learn(image_settings(base, data, tmp_path / "one", **changes, **workers))
    learn(image_settings(base, data, tmp_path / "plain", **changes | {"stream__augmentation": "none"}))
    assert same_tensors(tmp_path / "none" / "merged", tmp_path / "one" / "merged")
    assert not same_tensors(tmp_path / "none" / "merged", tmp_path / "plain" / "merged")
