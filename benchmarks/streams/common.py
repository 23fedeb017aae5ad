"""What the scripts of this folder share: where the data are, a stream's settings on this machine, runs side by side."""

import argparse
import gc
import importlib
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

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


def prepare(name: str, options: argparse.Namespace) -> None:
    """Data that a recipe makes on this machine."""
    recipe, folder = STREAMS[name].recipe, data_folder(name, options)
    if recipe and not (folder / "made").exists():
        sys.path.insert(0, str(ROOT / "recipes"))
        importlib.import_module(recipe).write(options.data / "text", folder)
        (folder / "made").touch()


def backbone(name: str) -> str:
    """The folder's name of the stream's backbone."""
    text = (ROOT / "configs" / STREAMS[name].config).read_text(encoding="utf-8")
    return Path(yaml.safe_load(text)["model"]["base"]).name


def anywhere(config: dict[str, Any]) -> dict[str, Any]:
    """Settings without the folders of this machine."""
    return {key: value for key, value in config.items() if key not in ("data_dir", "output_dir")}


def data_settings(name: str, seed: int, folder: Path, options: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """(the stream's YAML, settings for this machine's files and the stream's order and length)."""
    stream = STREAMS[name]
    source = ROOT / "configs" / stream.config
    changes: dict[str, Any] = {"data_dir": str(data_folder(name, options)), "output_dir": str(folder)}
    if stream.data in PICTURES:
        changes["model.base"] = str(options.models / backbone(name))
    if stream.orders or stream.tasks:
        changes["stream.tasks"] = tasks(source, seed if stream.orders else 0, stream.tasks)
    return source, changes


def tasks(config: Path, first: int, count: int | None) -> list[dict]:
    """The YAML's tasks, from task `first` on, then those before it; `count` of them."""
    listed = yaml.safe_load(config.read_text(encoding="utf-8"))["stream"]["tasks"]
    first %= len(listed)
    return [*listed[first:], *listed[:first]][:count]


def steps(folder: Path) -> list[dict[str, Any]]:
    """What the step.json of each task of a run says of time, coefficient, search and written rows."""
    kept = ("task", "seconds", "coefficient", "search", "replay")
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
