"""Finished runs made up by hand: their folders, adapters and records."""

import json
import random
import shutil
from pathlib import Path

import yaml

from helpers.adapter_folders import HEAD, head, write_folder
from pm_hf.config.loading import load_config, save_config
from pm_hf.environment import versions
from pm_hf.files import write_json
from pm_hf.measuring.metrics import summary
from pm_hf.merging.coefficient import fixed_coefficient
from pm_hf.reports.page import page
from pm_hf.reports.run_charts import charts
from pm_hf.runs.records import LOWER_IS_BETTER, Report

TASKS = ["news", "a|b <i>"]
TEXT = "text-classification"


def settings(folder: Path, kind: str = TEXT, **changes) -> dict:
    """Settings of a stream of two tasks whose base and data lie in local folders."""
    language = kind in ("causal-lm", "seq2seq-lm")
    return {
        "output_dir": str(folder),
        "data_dir": str(folder.parent / "my data"),
        "model": {"base": str(folder.parent / "tiny base"), "dtype": "float32"},
        "stream": {"kind": kind, "train": "deep/train.csv", "test": str(folder.parent / "secret/test.csv")}
        | {"tasks": [{"name": name} for name in TASKS]}
        | ({} if language else {"class_groups": None}),
        "training": {"num_train_epochs": 1},
        **changes,
    }


def finished_run(folder: Path, kind: str = TEXT, metric: str = "class_incremental", **changes) -> Path:
    """The folder of a finished run of two tasks with random adapters."""
    folder.mkdir(parents=True)
    save_config(load_config(settings(folder, kind, **changes)), folder / "config.yaml")
    classes = ["x", "y", "z", "w"] if "classification" in kind else []
    for index, name in enumerate(("task-00-news", "task-01-a-b--i-")):
        task = folder / name
        for seed, part in enumerate(("adapter", "merged"), start=10 * index):
            rows = {"saved": head(len(classes), seed), "labels": {HEAD: classes}} if classes else {}
            config = {"base_model_name_or_path": str(folder.parent / "tiny base")}
            write_folder(task / part, seed=seed, config=config, **rows)
        write_json(task / "merged" / "merge_report.json", {"tasks": index + 1, "inputs": [str(task / "adapter")]})
        write_json(task / "step.json", {"task": name})
        (task / "curvature.safetensors").write_bytes(b"sums over the data")
    shutil.copytree(task / "merged", folder / "merged")
    report(folder, metric).save()
    return folder


def report(folder: Path, metric: str) -> Report:
    """Its report: scores, a coefficient, and a note that names a local path."""
    return Report(
        folder=folder,
        method="pm",
        seed=3,
        scenario="class_incremental",
        tasks=TASKS,
        metric=metric,
        matrices={metric: [[0.9, None], [0.7, 0.8]]},
        test_rows=[10, 30],
        alphas=[None, fixed_coefficient(0.4, 2)],
        seconds=12.4,
        notes=[f"rows of {folder}/task-00-news cut"],
    )


HOSTILE = "<script>alert('x')</script> & \"quotes\""


def matrix(count, seed=0, low=0.1, high=0.99):
    """A lower triangle of scores."""
    rng = random.Random(seed)
    return [[rng.uniform(low, high) if i <= t else None for i in range(count)] for t in range(count)]


def step(task, index, seed=0):
    """What step.json says of a task, as far as it is shown."""
    rng = random.Random(f"{seed} {index}")
    drawn = [rng.choice([0.5, 1.0, 1.5]) for _ in range(20)]
    return {
        "task": task,
        "merge_error": 1e-3 * index,
        "curvature_bytes": 2**20,
        "step_seconds": 0.01,
        "training_loss": 0.5,
        "optimizer_steps": 20,
        "factors": {f"{f:g}": drawn.count(f) for f in sorted(set(drawn))},
        "log": [[at + 1, 1 / (at + 1), factor] for at, factor in enumerate(drawn)],
        "seconds": 2.0 + index,
        "process_peak_memory_mb": 500.0 + index,
        "device": "cpu",
        "threads": 1,
        "processes": 1,
    }


def write_run(folder, tasks, method="pm", seed=0, metric="class_incremental", R=None, joint=False, **config):
    """A run's folder; R: the matrix of its metric."""
    R = matrix(len(tasks), seed) if R is None else R
    R = R[-1:] if joint else R
    filled = [score for score in R[-1] if score is not None]
    alone = {"ACC": sum(filled) / len(filled), "AAA": None, "BWT": None, "forgetting": None}
    complete = not joint and all(row[i] is not None for t, row in enumerate(R) for i in range(t + 1))
    inside = [[None if score is None else 1 - score / 2 for score in row] for row in R]
    alphas = [
        {"raw": 1 / (t + 1) + 0.5 * (t == 1), "used": 1 / (t + 1), "one_over_t": 1 / (t + 1)} for t in range(len(R))
    ]
    folder.mkdir(parents=True)
    report = {
        "method": method,
        "seed": seed,
        "tasks": list(tasks),
        "metric": metric,
        "scores": R,
        "matrices": {metric: R, "task_incremental": inside},
        "metrics": summary(R, lower_is_better=metric in LOWER_IS_BETTER) if complete else alone,
        "coefficients": alphas,
        "seconds": 12.5,
        "notes": [f"task {tasks[0]}: a note"],
        "versions": versions(("torch",)),
    }
    (folder / "report.json").write_text(json.dumps(report))
    settings = {"method": method, "seed": seed, "training": {"learning_rate": 0.01, "hub_token": "hf_secret"}, **config}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    for index, task in enumerate(["all"] if joint else tasks):
        place = folder / f"task-{index:02d}-x"
        place.mkdir()
        (place / "step.json").write_text(json.dumps(step(task, index, seed)))
    return folder


def page_of(runs):
    """The page of runs, with all their charts."""
    return page(runs, charts(runs))
