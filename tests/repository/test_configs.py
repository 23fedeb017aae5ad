"""Every YAML in configs/, run on a miniature of its data set with a tiny backbone in place of the real one.

A new YAML needs a row in MINIATURES: which backbone stands in, and what writes its data (tests/helpers/miniatures.py).
"""

import contextlib
import copy
import inspect
import math
import re
from functools import partial
from pathlib import Path

import datasets
import pytest
import yaml
from helpers import datasets as miniatures
from helpers import models
from helpers.models import tiny_folder
from helpers.streams import steps

from pm_hf.adapters.folder import open_adapter
from pm_hf.config.kinds import STREAM_KINDS
from pm_hf.config.loading import load_config
from pm_hf.data.stream import load_stream
from pm_hf.errors import InputError
from pm_hf.runs.learner import Run, learn
from pm_hf.training.task_trainer import TRAINING_DEFAULTS
from pm_hf.training.trainer import PMConfig

CONFIGS = Path(__file__).parents[2] / "configs"
MINIATURES = {
    "demo.yaml": ("bert", miniatures.docstrings),
    "image/cifar10.yaml": ("vit", miniatures.arrays),
    "image/cifar100.yaml": ("vit", miniatures.cifar100),
    "image/cub200.yaml": ("vit", miniatures.cub200),
    "image/digits.yaml": ("vit", miniatures.arrays),
    "image/domainnet.yaml": ("vit", miniatures.domainnet),
    "image/imagenet-a.yaml": ("vit", miniatures.imagenet_a),
    "image/imagenet-r.yaml": ("vit", miniatures.imagenet_r),
    "image/pacs.yaml": ("vit", miniatures.arrays),
    "image/tiny-imagenet-50.yaml": ("vit", miniatures.arrays),
    "language/olora-15-tasks.yaml": ("t5", miniatures.olora),
    "language/olora-4-tasks.yaml": ("t5", miniatures.olora),
    "language/t5-text.yaml": ("t5", miniatures.prompts),
    "focus/cifar100.yaml": ("vit", miniatures.parquet_pictures),
    "focus/grocery.yaml": ("vit", miniatures.parquet_pictures),
    "focus/mini-imagenet.yaml": ("vit", miniatures.parquet_pictures),
    "focus/pacs-112.yaml": ("vit", miniatures.parquet_pictures),
    "smollm2/chat.yaml": ("llama", miniatures.chats),
    "smollm2/domains.yaml": ("llama", miniatures.domains),
    "smollm2/eight.yaml": ("llama", miniatures.prompts),
    "smollm2/text.yaml": ("llama", miniatures.prompts),
    "text/banking77.yaml": ("bert", miniatures.banking77),
    "text/clinc150-full.yaml": ("bert", miniatures.clinc150),
    "text/clinc150.yaml": ("bert", miniatures.clinc150),
    "text/ten-sets.yaml": ("bert", miniatures.prompts),
}
COUNT = 25
# P&M's own benchmarks: tasks and epochs; ImageNet-R is also published with 5 and 20 tasks
PUBLISHED = {
    "image/cifar100.yaml": (10, 10),
    "image/cub200.yaml": (10, 10),
    "image/domainnet.yaml": (5, 5),
    "image/imagenet-a.yaml": (10, 10),
    "image/imagenet-r.yaml": (10, 10),
}
# O-LoRA's orders of its tasks; the first of each file is that of its list
ORDERS = {
    "language/olora-4-tasks.yaml": {
        1: "dbpedia amazon yahoo agnews",
        2: "dbpedia amazon agnews yahoo",
        3: "yahoo amazon agnews dbpedia",
    },
    "language/olora-15-tasks.yaml": {
        4: "mnli cb wic copa qqp boolq rte imdb yelp amazon sst2 dbpedia agnews multirc yahoo",
        5: "multirc boolq wic mnli cb copa qqp rte imdb sst2 dbpedia agnews yelp amazon yahoo",
        6: "yelp amazon mnli cb copa qqp rte imdb sst2 dbpedia agnews yahoo multirc boolq wic",
    },
}
SMALLER = {
    "lora.r": 2,
    "training.max_steps": 2,
    "training.per_device_train_batch_size": 4,
    "training.dataloader_num_workers": 0,
    "curvature.samples": 4,
}


class EnoughError(Exception):
    """Task 2 is done."""


@pytest.fixture(scope="session")
def backbones(tiny_base, tmp_path_factory):
    """Folder of each tiny backbone by name, made when first asked for."""
    made = {"bert": tiny_base}
    builders = {"vit": models.save_vit} | {kind: partial(tiny_folder, kind) for kind in ("llama", "t5")}

    def backbone(name):
        if name not in made:
            made[name] = builders[name](tmp_path_factory.mktemp(name))
        return made[name]

    return backbone


@pytest.fixture
def until_task_2(tmp_path, monkeypatch):
    """A run of a YAML with changed settings, ended after its second task; the run's folder."""
    learn_task = Run.learn_task
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def limited(run, index, stop):
        if index == 2:
            raise EnoughError
        learn_task(run, index, stop)

    def run(path, **changes):
        monkeypatch.setattr(Run, "learn_task", limited)
        with contextlib.suppress(EnoughError):
            learn(path, output_dir=str(tmp_path / "run"), **changes)
        return tmp_path / "run"

    return run


def read(name):
    return yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))


def leaves(tree, path=""):
    """(dotted key, value) of every setting in a YAML."""
    for key, value in tree.items():
        if isinstance(value, dict) and not path:
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def resolved_without(config, key):
    """The resolved settings without this key, None where it is required."""
    left = copy.deepcopy(config)
    group, _, setting = key.partition(".")
    (left[group] if setting else left).pop(setting or group)
    try:
        return load_config(left).to_dict()
    except InputError:
        return None


def test_every_yaml_has_a_miniature():
    every = [path.relative_to(CONFIGS) for path in CONFIGS.rglob("*.yaml")]
    names = sorted(str(path) for path in every if path.parent.name != "launch")  # whose files are the launcher's
    assert names == sorted(MINIATURES)
    assert len(names) == COUNT


@pytest.mark.parametrize("name", sorted(MINIATURES))
def test_yaml_runs_to_the_end_of_task_2_on_a_miniature(name, backbones, until_task_2, tmp_path):
    config = read(name)
    backbone, write = MINIATURES[name]
    data = tmp_path / "data"
    data.mkdir()
    write(data, config["stream"])
    tiny = {"model.base": str(backbones(backbone)), "model.gguf_file": None, "data_dir": str(data)}
    if backbone == "bert":
        tiny["stream.max_length"] = min(config["stream"].get("max_length", 32), 32)  # its positions
    folder = until_task_2(CONFIGS / name, **tiny, **SMALLER)
    done = steps(folder)
    assert len(done) == 2
    for step, seen in zip(done, (1, 2), strict=True):
        assert step["optimizer_steps"] == 2
        for scores in step["scores"].values():
            assert len(scores) == seen
            assert all(math.isfinite(score) for score in scores)
    modules = list(open_adapter(next(folder.glob("task-01-*")) / "merged").scaling)
    targets = config["lora"]["target_modules"]
    if isinstance(targets, list):
        assert {module.rpartition(".")[2] for module in modules} == set(targets)
    else:
        assert all(re.fullmatch(targets, module) for module in modules)


@pytest.mark.parametrize("name", sorted(MINIATURES))
def test_yaml_repeats_no_default(name):
    config = read(name)
    resolved = load_config(config).to_dict()
    trainer = {key: value.default for key, value in inspect.signature(PMConfig).parameters.items()} | TRAINING_DEFAULTS
    for key, value in leaves(config):
        group, _, setting = key.partition(".")
        if group == "training" and setting in STREAM_KINDS[resolved["stream"]["kind"]].training:
            continue  # a benchmark states its learning rate and epochs, whatever the kind's are
        if group == "training":
            assert trainer[setting] != resolved["training"][setting], key
        else:
            assert resolved_without(config, key) != resolved, f"{key}: {value} is the default"


@pytest.mark.parametrize("name", ORDERS)
def test_orders_of_olora_are_the_list_and_what_the_comments_say(name, backbones, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    text = (CONFIGS / name).read_text(encoding="utf-8")
    told = re.findall(r"^#   '(stream\.order=\[.+\])'$", text, flags=re.M)
    miniatures.olora(tmp_path, read(name)["stream"])
    tiny = {"model.base": str(backbones("t5")), "data_dir": str(tmp_path)}
    plain, *others = [load_stream(load_config(CONFIGS / name, order, tiny)).tasks for order in ((), *zip(told))]
    assert [[task.name for task in tasks] for tasks in (plain, *others)] == [
        order.split() for order in ORDERS[name].values()
    ]
    rows = {task.name: task.train.inputs for task in plain}
    assert all(task.train.inputs == rows[task.name] for tasks in others for task in tasks)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_benchmarks_keep_the_published_protocol(name):
    config = load_config(CONFIGS / name)
    assert (config.method, config.merge.method, config.curvature.kind) == ("pm", "pm", "fisher")
    assert config.model.base == "google/vit-base-patch16-224"
    assert (config.lora.r, config.lora.alpha, config.lora.target_modules) == (10, 10, ["k_proj", "v_proj"])
    assert config.perturbation.scale == 0.5
    assert config.merge.max_rank is None
    assert config.head.kind == "linear"
    assert config.stream.augmentation == "crop_flip"
    training = config.training
    assert (config.stream.class_groups, training["num_train_epochs"]) == PUBLISHED[name]
    assert training["per_device_train_batch_size"] == 256
    assert (training["learning_rate"], training["head_learning_rate"]) == (1e-3, 1e-2)
