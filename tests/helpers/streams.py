"""Tiny streams: their rows and settings, and what a run of them leaves on disk."""

import csv
import json
import random
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from pm_hf.adapters.folder import open_adapter
from pm_hf.adapters.layout import ADAPTER_WEIGHTS, PEFT_PREFIX

WORDS = [f"{kind}{i}" for kind in ("apple", "bird", "car", "dog", "egg", "fog", "the", "of") for i in range(6)]
CLASSES = ("apple", "bird", "car", "dog", "egg", "fog")  # a text's class is the kind of word it has most of


def write_rows(path: Path, classes, per_class: int, seed: int, **columns) -> Path:
    """CSV of texts with `per_class` rows of each class; further columns hold a constant, or one value a row."""
    rng = random.Random(seed)
    rows = []
    for label in classes:
        for _ in range(per_class):
            kinds = [label] * 3 + rng.choices(["the", "of"], k=rng.randint(1, 4))
            rng.shuffle(kinds)
            rows.append({"text": " ".join(f"{kind}{rng.randrange(6)}" for kind in kinds), "label": label, **columns})
    with open(path, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


GROUPS = {"first": ["apple", "bird"], "second": ["car", "dog"], "third": ["egg", "fog"]}
TRAINING = {
    "num_train_epochs": 6,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 16,
    "learning_rate": 2e-2,
    "head_learning_rate": 2e-2,
}


def first(count):
    """The first groups of classes."""
    return dict(list(GROUPS.items())[:count])


def write_data(folder, per_class=24):
    """train.csv and test.csv of all classes."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "train.csv", CLASSES, per_class, seed=1)
    write_rows(folder / "test.csv", CLASSES, 8, seed=2)
    return folder


def settings(base, data, output, method="pm", groups=3, **changes):
    """Settings of a stream; `changes` are dotted keys with __ for the dot."""
    config = {
        "output_dir": str(output),
        "data_dir": str(data),
        "method": method,
        "model": {"base": str(base)},
        "stream": {"train": "train.csv", "test": "test.csv", "class_groups": first(groups), "max_length": 16},
        "lora": {"r": 2, "alpha": 4, "target_modules": ["key", "value"]},
        "curvature": {"samples": 32},
        "training": dict(TRAINING),
    }
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = config
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return config


def domains(base, data, output, method="pm", **changes):
    """Settings of a domain-incremental stream of two domains: the second one calls the classes by other words."""
    data.mkdir(parents=True, exist_ok=True)
    swapped = {"apple": "dog", "bird": "egg", "car": "fog"}
    for name, seed in (("train", 1), ("test", 2)):
        write_rows(data / f"plain-{name}.csv", swapped, 24 if name == "train" else 8, seed)
        text = write_rows(data / "words.csv", swapped.values(), 24 if name == "train" else 8, seed + 2).read_text()
        lines = [line.rsplit(",", 1) for line in text.splitlines()]
        back = {word: label for label, word in swapped.items()}
        (data / f"odd-{name}.csv").write_text("\n".join(f"{t},{back.get(y, y)}" for t, y in lines) + "\n")
    tasks = [{"name": n, "train": f"{n}-train.csv", "test": f"{n}-test.csv"} for n in ("plain", "odd")]
    config = settings(base, data, output, method, **changes)
    config["stream"] = {"scenario": "domain_incremental", "tasks": tasks, "max_length": 16}
    return config


def write_yaml(path, config):
    """The settings as a YAML file, in their own order."""
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def contents(folder):
    """{relative path: bytes} of every file."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def steps(folder):
    """step.json of every finished task, in order."""
    return [json.loads(path.read_text()) for path in sorted(Path(folder).glob("task-*/step.json"))]


def tensors(adapter):
    """{name without PEFT's prefix: tensor} of an adapter folder."""
    return {name.removeprefix(PEFT_PREFIX): value for name, value in load_file(Path(adapter) / ADAPTER_WEIGHTS).items()}


def same_tensors(left, right):
    """Whether two adapter folders hold bit-identical tensors."""
    one, two = tensors(left), tensors(right)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def dense(adapter):
    """{module: the weight update as (out, in) in float64}, straight from the file."""
    opened, values = open_adapter(adapter), tensors(adapter)
    return {
        module: scale * values[f"{module}.lora_B.weight"].double() @ values[f"{module}.lora_A.weight"].double()
        for module, scale in opened.scaling.items()
    }
