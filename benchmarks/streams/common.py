"""What the scripts of this folder share: where the data are, a stream's settings on this machine, runs side by side."""

import argparse
import gc
import importlib
import json
import multiprocessing
import os
import random
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import yaml
from environment import ROOT
from grid import STREAMS
from tqdm import tqdm

SHARED = ROOT.parent / "shared"
PICTURES = ("image", "image112")  # folders of data whose backbones are in --models


def lacking_input(names: list[str], options: argparse.Namespace) -> str | None:
    """What is missing on this machine, None where nothing is."""
    for name in names:
        folder = options.data / STREAMS[name].data
        if not folder.is_dir():
            return f"{name} needs data in {folder}; name the folder that has it with --data"
        base = options.models / backbone(name)
        if STREAMS[name].data in PICTURES and not base.is_dir():
            return f"{name} needs a ViT in {base}; name the folder that has it with --models"
    return None


def data_folder(name: str, options: argparse.Namespace) -> Path:
    """Where the stream's files are."""
    return options.runs / name / "data" if STREAMS[name].recipe else options.data / STREAMS[name].data


def base_folder(name: str, options: argparse.Namespace) -> Path:
    """Where the base is that a recipe makes."""
    return options.runs / name / "base"


def held_out_folder(_: str, options: argparse.Namespace) -> Path:
    """Where the texts are that no task has."""
    return options.runs / "held-out"


def pictures_folder(name: str, options: argparse.Namespace) -> Path:
    """Where the pictures of the stream's YAML are kept as the model takes them."""
    return options.runs / "pictures" / Path(STREAMS[name].config).stem


def prepare(name: str, options: argparse.Namespace) -> None:
    """What is made on this machine before the runs of a stream: data, base and held-out texts of recipes, pictures as
    the model takes them."""
    stream = STREAMS[name]
    texts = "make_held_out" if stream.held_out else None
    made = ((stream.recipe, data_folder), (stream.base_recipe, base_folder), (texts, held_out_folder))
    for recipe, place in made:
        if recipe and not ((folder := place(name, options)) / "made").exists():
            sys.path.insert(0, str(ROOT / "recipes"))
            importlib.import_module(recipe).write(options.data / "text", folder)
            (folder / "made").touch()
    if stream.data == "image112":
        from pictures import keep

        from pm_hf.config.loading import load_config

        config = load_config(ROOT / "configs" / stream.config, values=files(name, options.runs, options))
        keep(config, pictures_folder(name, options), options.jobs)


def backbone(name: str) -> str:
    """The folder's name of the stream's backbone."""
    text = (ROOT / "configs" / STREAMS[name].config).read_text(encoding="utf-8")
    return Path(yaml.safe_load(text)["model"]["base"]).name


def anywhere(config: dict[str, Any]) -> dict[str, Any]:
    """Settings without the folders of this machine."""
    texts = [text | {"test": Path(text["test"]).name} for text in config["stream"]["held_out"] or []]
    settings = {key: value for key, value in config.items() if key not in ("data_dir", "output_dir")}
    return settings | {"stream": config["stream"] | {"held_out": texts or None}}


def files(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Settings for this machine's files."""
    changes: dict[str, Any] = {"data_dir": str(data_folder(name, options)), "output_dir": str(folder)}
    if STREAMS[name].data in PICTURES:
        changes["model.base"] = str(options.models / backbone(name))
    if STREAMS[name].base_recipe:
        changes["model.base"] = str(base_folder(name, options))
    if STREAMS[name].held_out:
        texts = {text: held_out_folder(name, options) / f"{text}.jsonl" for text in STREAMS[name].held_out}
        changes["stream.held_out"] = [
            {"name": text, "test": str(file.absolute()), "prompt_template": ""} for text, file in texts.items()
        ]
    return changes


def data_settings(name: str, seed: int, folder: Path, options: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """(the stream's YAML, settings for this machine's files and the stream's order and length)."""
    stream, changes = STREAMS[name], files(name, folder, options)
    source = ROOT / "configs" / stream.config
    if not torch.cuda.is_available() and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        changes["training.bf16"] = False  # emulated there, five times slower than float32
    listed = yaml.safe_load(source.read_text(encoding="utf-8"))["stream"]
    if "tasks" in listed and (stream.orders or stream.tasks):
        changes["stream.tasks"] = tasks(source, seed if stream.orders else 0, stream.tasks)
    if isinstance(listed.get("class_groups"), int) and (stream.shuffled or stream.tasks):
        labels = class_names(source, changes)
        changes["stream.class_groups"] = class_groups(
            labels, listed["class_groups"], seed if stream.shuffled else 0, stream.tasks
        )
    return source, changes


def tasks(config: Path, first: int, count: int | None) -> list[dict]:
    """The YAML's tasks, from task `first` on, then those before it; `count` of them."""
    listed = yaml.safe_load(config.read_text(encoding="utf-8"))["stream"]["tasks"]
    first %= len(listed)
    return [*listed[first:], *listed[:first]][:count]


def class_names(source: Path, changes: dict[str, Any]) -> list[str]:
    """The classes of a stream's training rows, sorted."""
    from pm_hf.config.loading import load_config
    from pm_hf.data.sources import read_rows

    config = load_config(source, values=changes)
    return sorted(set(read_rows(config.stream.kind, config.stream, config.data_dir, test=False)[0].labels))


def class_groups(labels: Sequence[str], groups: int, seed: int, count: int | None) -> dict[str, list[str]]:
    """The first `count` of so many groups of classes, of nearly equal size; seed k > 0 shuffles the classes before."""
    order = list(labels)
    if seed:
        random.Random(f"classes/{seed}").shuffle(order)
    size, more = divmod(len(order), groups)
    starts = [i * size + min(i, more) for i in range(groups + 1)]
    parts = [order[start:end] for start, end in zip(starts, starts[1:], strict=False)]
    return {f"classes-{i:02d}": part for i, part in enumerate(parts[:count])}


def steps(folder: Path) -> list[dict[str, Any]]:
    """What the step.json of each task of a run says of time, scores, coefficient, search and written rows."""
    kept = ("task", "seconds", "scores", "coefficient", "search", "replay", "step_seconds", "device", "versions")
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("task-*/step.json"))]
    return [{key: step[key] for key in kept if key in step} for step in found]


def pooled(work: Callable, jobs: Sequence[tuple], options: argparse.Namespace, done: int = 0) -> int:
    """work(job, options) for every job, options.jobs at a time; the number of those that failed.

    done: jobs that were finished before; they count in the bar, whose time left follows from those done here.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # before a worker imports torch
    failed = 0
    with (
        tqdm(total=done + len(jobs), initial=done, unit="run", smoothing=0) as bar,
        ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn"), initializer=begin) as pool,
    ):
        waiting = {pool.submit(work, job, options): " ".join(map(str, job)) for job in jobs}
        for future in as_completed(waiting):
            job, error = waiting[future], future.exception()
            if error is not None:  # the others go on
                failed += 1
                bar.write(f"{job} failed: {error!r}", file=sys.stderr)
            bar.set_postfix_str(f"{failed} failed, last {job}", refresh=False)
            bar.update()
    return failed


def begin() -> None:
    """Of a worker: no progress bars of data sets; and what imports left is never garbage, so that a Trainer's
    collections (three a task) do not look through it again and again."""
    import datasets

    import pm_hf.runs.learner  # noqa: F401

    datasets.disable_progress_bars()
    gc.collect()
    gc.freeze()
