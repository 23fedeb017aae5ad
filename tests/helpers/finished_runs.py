"""Folders of finished runs without any training: what pm-hf train leaves, made in a moment."""

import shutil
from pathlib import Path

from helpers.adapter_folders import HEAD, head, write_folder
from pm_hf.config.loading import load_config, save_config
from pm_hf.files import write_json
from pm_hf.merging.coefficient import fixed_coefficient
from pm_hf.runs.records import Report

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
        coefficients=[None, fixed_coefficient(0.4, 2)],
        seconds=12.4,
        notes=[f"rows of {folder}/task-00-news cut"],
    )
