"""Streams x methods x seeds in one pipeline, resumable. Writes results/STREAM/METHOD/SEED.json, table.md, methods.png.

python benchmarks/streams.py clinc150-quick --data ../shared/data [--methods pm best …] [--seeds 0 1 2]
python benchmarks/streams.py clinc150-quick --table        only writes the table and the picture of what is in results/

Every stream reads its data below --data (text/, image/); those of pictures need --backbone too. A seed is also an
order where the stream is said to have orders: seed k starts with task k.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml
from environment import environment
from scipy.stats import t as student

from pm_hf.files import write_json
from pm_hf.report import Report, plot

ROOT = Path(__file__).parents[1]
NAMES = {
    "sequential": "sequential LoRA (α = 1)",
    "average": "running mean (α = 1/t)",
    "coma": "CoMA (α = 0.4)",
    "cofima": "CoFiMA (λ = 0.4)",
    "magmax": "MagMax",
    "opcm": "OPCM",
    "slao": "SLAO",
    "sfa": "SFA",
    "ewc": "EWC",
    "olora": "O-LoRA",
    "base_kl": "KL to the base",
    "replay": "replay, 5 rows a class",
    "merge_only": "merging alone (Fisher α)",
    "pm": "P&M: perturbation + Fisher α",
    "pm_gram": "perturbation + free Gram",
    "pm_gram_lda": "perturbation + free Gram + analytic head",
    "best": "`best`: merging alone + analytic head",
    "individual": "one adapter a task (upper bound)",
    "joint": "joint training (upper bound)",
    "frozen": "control: backbone untouched",
}
CLASSES = {"ACC": "ACC", "AAA": "AAA", "forgetting": "forgetting", "ACC, task given": "task_incremental"}
ANSWERS = {
    "choice among all answers": "ACC",
    "forgetting": "forgetting",
    "choice, task given": "task_incremental",
    "exact match": "exact_match",
    "bits/byte of answers": "bits_per_byte",
}
TEXT = {"bits/byte": "ACC", "AAA": "AAA", "forgetting": "forgetting", "held-out text": "held_out"}


@dataclass(frozen=True)
class Stream:
    """One stream: its YAML, the folder of its data, its methods and what the table shows."""

    title: str
    config: str
    data: str
    methods: Sequence[str]
    columns: dict[str, str]
    orders: bool = False  # seed k starts with task k
    interval: bool = False  # ± is the half-width of the 95 % t interval, not the standard deviation


OURS = ("sequential", "merge_only", "pm", "pm_gram", "pm_gram_lda", "best", "frozen")
RIVALS = ("sequential", "average", "olora", "slao", "sfa", "merge_only", "pm", "joint", "frozen")
STREAMS = {
    "clinc150-quick": Stream("CLINC150, 10 domains", "clinc150/minilm.yaml", "text", OURS, CLASSES),
    "pacs": Stream("PACS, 4 domains", "pacs/vit.yaml", "image", (*OURS, "average", "joint"), CLASSES),
    "tinyimagenet50": Stream("Tiny-ImageNet-50", "tinyimagenet50/vit.yaml", "image", (*OURS, "joint"), CLASSES),
    "cifar10": Stream("CIFAR-10", "cifar10/vit.yaml", "image", (*OURS, "average", "joint"), CLASSES),
    "smollm2-text": Stream("SmolLM2-135M", "smollm2/text.yaml", "text", RIVALS, ANSWERS, orders=True, interval=True),
    "smollm2-domains": Stream(
        "SmolLM2-135M, domains", "smollm2/domains.yaml", "text", RIVALS, TEXT, orders=True, interval=True
    ),
}


def main() -> int:
    """Run what is missing in results/, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stream", choices=list(STREAMS))
    parser.add_argument("--data", type=Path, help="folder with text/ and image/")
    parser.add_argument("--backbone", help="model.base in place of the YAML's")
    parser.add_argument("--methods", nargs="+", choices=list(NAMES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark"), help="folder for the runs themselves")
    parser.add_argument("--table", action="store_true", help="only write the table")
    options = parser.parse_args()
    if not options.table:
        if options.data is None:
            parser.error("--data is needed")
        for seed in options.seeds:
            for method in options.methods or STREAMS[options.stream].methods:
                run(options.stream, method, seed, options)
    text, folder = table(options.stream), ROOT / "results" / options.stream
    (folder / "table.md").write_text(text, encoding="utf-8")
    print(text)
    picture(options.stream)
    return 0


def run(name: str, method: str, seed: int, options: argparse.Namespace) -> None:
    """One run; nothing to do when its result is there."""
    import datasets

    from pm_hf.config import load_config
    from pm_hf.learner import learn

    stream, path = STREAMS[name], ROOT / "results" / name / method / f"{seed}.json"
    if path.exists():
        return
    datasets.disable_progress_bars()
    folder = options.runs / name / f"{method}-{seed}"
    print(f"--- {name}: {method}, seed {seed}", file=sys.stderr, flush=True)
    changes: dict[str, Any] = {"data_dir": str(options.data / stream.data), "output_dir": str(folder)}
    if options.backbone:
        changes["model.base"] = options.backbone
    source = ROOT / "configs" / stream.config
    if stream.orders:
        tasks = yaml.safe_load(source.read_text(encoding="utf-8"))["stream"]["tasks"]
        changes["stream.tasks"] = tasks[seed % len(tasks) :] + tasks[: seed % len(tasks)]
    report = learn(source, method=method, seed=seed, **changes)
    path.parent.mkdir(parents=True, exist_ok=True)
    config = load_config(folder / "config.yaml").to_dict()
    config = {key: value for key, value in config.items() if key not in ("data_dir", "output_dir")}  # this machine's
    origin = {"stream": stream.title, "preset": "quick", "config": config}
    write_json(path, {**origin, **report.to_dict(), **environment()})


def table(name: str) -> str:
    """Mean ± spread over the seeds of every method in results/, as Markdown."""
    stream = STREAMS[name]
    lines = [f"| method | {'orders' if stream.orders else 'seeds'} | " + " | ".join(stream.columns) + " |"]
    lines.append("|---" * (len(stream.columns) + 2) + "|")
    for method, title in NAMES.items():
        found = results(name, method)
        if not found:
            continue
        cells = [spread([value(result, key) for result in found], stream.interval) for key in stream.columns.values()]
        lines.append(f"| {title} | {len(found)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def results(name: str, method: str) -> list[dict]:
    """The results of one method, by seed."""
    folder = ROOT / "results" / name / method
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def value(result: dict, key: str) -> float | None:
    """A metric of the stream, or the mean over tasks of another one at the end."""
    if key == "held_out":
        return fmean(text["bits_per_byte"] for text in result["held_out"][-1].values())
    metrics = result["metrics"]
    if key == "task_incremental":
        return metrics[key]["ACC"]
    return metrics[key] if key in metrics else metrics["final"].get(key)


def picture(name: str) -> None:
    """methods.png: mean score on the tasks seen after each task, first seed of every method."""
    reports = []
    for method in NAMES:
        for result in results(name, method)[:1]:
            scores = {"class_incremental": result["scores"], "task_incremental": result["task_incremental"]}
            known = {"metric": "class_incremental", "matrices": scores} | result  # results of before 0.2 name neither
            names = [field.name for field in fields(Report) if field.name != "folder"]
            reports.append(Report(folder=ROOT, **{name: known[name] for name in names if name in known}))
    plot(reports, ROOT / "results" / name / "methods.png")


def spread(values: list[float | None], interval: bool) -> str:
    """Mean ± standard deviation, or ± half-width of the 95 % t interval; of one value: the value."""
    known = [x for x in values if x is not None]
    if len(known) < 2:
        return f"{known[0]:.3f}" if known else "–"
    factor = float(student.ppf(0.975, len(known) - 1)) / len(known) ** 0.5 if interval else 1.0
    return f"{fmean(known):.3f} ± {factor * stdev(known):.3f}"


if __name__ == "__main__":
    sys.exit(main())
