"""Streams x methods x seeds in one pipeline, resumable. Writes results/STREAM/METHOD/SEED.json, table.md, methods.png.

python benchmarks/streams.py clinc150-quick --data ../shared/data [--methods pm best …] [--seeds 0 1 2] [--jobs 2]
python benchmarks/streams.py clinc150-quick --table        only writes the table and the picture of what is in results/

Every stream reads its data below --data (text/, image/); those of pictures need --backbone too. A seed is also an
order where the stream is said to have orders: seed k starts with task k. --jobs: processes that work on runs side by
side, with one thread each; a run that is stopped is continued by the same command.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
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
    "frozen": "control: frozen backbone + analytic head",
    "untouched": "control: the base, untouched",
}
CLASSES = {"ACC": "ACC", "AAA": "AAA", "forgetting": "forgetting", "ACC, task given": "task_incremental"}
ANSWERS = {
    "choice among all answers": "ACC",
    "forgetting": "forgetting",
    "choice, task given": "task_incremental",
    "exact match": "exact_match",
    "bits/byte of answers": "bits_per_byte",
}
TEXT = {"bits/byte": "ACC", "AAA": "AAA", "forgetting": "forgetting", "bits/byte, held-out text": "held_out"}


@dataclass(frozen=True)
class Stream:
    """One stream: its YAML, the folder of its data below --data, its methods and the columns of its table."""

    title: str
    config: str
    data: str
    methods: Sequence[str]
    columns: dict[str, str]
    orders: bool = False  # seed k starts with task k; ± is then the 95 % t interval, and a column compares with pm


OURS = ("sequential", "merge_only", "pm", "pm_gram", "pm_gram_lda", "best", "frozen")
RIVALS = ("sequential", "average", "olora", "slao", "sfa", "merge_only", "pm", "joint", "untouched")
STREAMS = {
    "clinc150-quick": Stream("CLINC150, 10 domains", "clinc150/minilm.yaml", "text", OURS, CLASSES),
    "pacs": Stream("PACS, 4 domains", "pacs/vit.yaml", "image", (*OURS, "average", "joint"), CLASSES),
    "tinyimagenet50": Stream("Tiny-ImageNet-50", "tinyimagenet50/vit.yaml", "image", (*OURS, "joint"), CLASSES),
    "cifar10": Stream("CIFAR-10", "cifar10/vit.yaml", "image", (*OURS, "average", "joint"), CLASSES),
    "smollm2-text": Stream("SmolLM2-135M, 4 text sets", "smollm2/text.yaml", "text", RIVALS, ANSWERS, orders=True),
    "smollm2-domains": Stream(
        *("SmolLM2-135M, 4 domains of text and code", "smollm2/domains.yaml", "text"),
        ("sequential", "average", "pm", "joint", "untouched"),
        TEXT,
        orders=True,
    ),
}
# what stands for a control that is no method of its own: the base, scored and left alone
CONTROLS: dict[str, dict[str, Any]] = {"untouched": {"method": "joint", "trains": False}}


def main() -> int:
    """Run what is missing in results/, then write the table; 1 where a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stream", choices=list(STREAMS))
    parser.add_argument("--data", type=Path, help="folder with text/ and image/")
    parser.add_argument("--backbone", help="model.base in place of the YAML's")
    parser.add_argument("--methods", nargs="+", choices=list(NAMES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; more than one: one thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark"), help="folder for the runs themselves")
    parser.add_argument("--table", action="store_true", help="only write the table")
    options = parser.parse_args()
    failed = 0
    if not options.table:
        if options.data is None:
            parser.error("--data is needed")
        failed = run_missing(options)
    text, folder = table(options.stream), ROOT / "results" / options.stream
    (folder / "table.md").write_text(text, encoding="utf-8")
    print(text)
    picture(options.stream)
    return int(failed > 0)


def run_missing(options: argparse.Namespace) -> int:
    """Every run that has no result yet; the number of those that failed."""
    name, methods = options.stream, options.methods or STREAMS[options.stream].methods
    missing = [(m, seed) for seed in options.seeds for m in methods if not result_path(name, m, seed).exists()]
    if not missing:
        return 0
    prepare(name, options)
    if options.jobs == 1:
        return sum(not attempt(name, *which, options) for which in missing)
    os.environ["OMP_NUM_THREADS"] = "1"  # before a worker imports torch
    began, done, failed = time.perf_counter(), 0, 0
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(attempt, name, *which, options): which for which in missing}
        for future in as_completed(waiting):
            done, failed = done + 1, failed + (not future.result())
            left = (time.perf_counter() - began) / done * (len(missing) - done) / 60
            print(
                f"{done}/{len(missing)} runs, {failed} failed, about {left:.0f} min left", file=sys.stderr, flush=True
            )
    return failed


def prepare(name: str, options: argparse.Namespace) -> None:
    """Data that a recipe makes on this machine."""
    if name == "smollm2-domains" and not (data_folder(name, options) / "general-test.jsonl").exists():
        sys.path.insert(0, str(ROOT / "recipes"))
        from domains import write

        write(options.data / "text", data_folder(name, options))


def data_folder(name: str, options: argparse.Namespace) -> Path:
    """Where the stream's files are."""
    return options.runs / name / "data" if name == "smollm2-domains" else options.data / STREAMS[name].data


def attempt(name: str, method: str, seed: int, options: argparse.Namespace) -> bool:
    """One run; False, and why on stderr, where it failed."""
    print(f"--- {name}: {method}, seed {seed}", file=sys.stderr, flush=True)
    try:
        run(name, method, seed, options)
    except Exception as error:  # the others go on
        print(f"--- {name}: {method}, seed {seed} failed: {error!r}", file=sys.stderr, flush=True)
        return False
    return True


def run(name: str, method: str, seed: int, options: argparse.Namespace) -> None:
    """One run and its result."""
    import datasets

    from pm_hf.config import load_config
    from pm_hf.learner import learn

    datasets.disable_progress_bars()
    stream, folder = STREAMS[name], options.runs / name / f"{method}-{seed}"
    source = ROOT / "configs" / stream.config
    changes: dict[str, Any] = {"data_dir": str(data_folder(name, options)), "output_dir": str(folder), "seed": seed}
    if options.backbone:
        changes["model.base"] = options.backbone
    if stream.orders:
        changes["stream.tasks"] = order(source, seed)
    report = learn(source, **(changes | CONTROLS.get(method, {"method": method})))
    path = result_path(name, method, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    config = load_config(folder / "config.yaml").to_dict()
    config = {key: value for key, value in config.items() if key not in ("data_dir", "output_dir")}  # this machine's
    origin = {"stream": stream.title, "preset": "quick", "config": config}
    write_json(path, {**origin, **report.to_dict(), "method": method, **environment()})


def order(config: Path, seed: int) -> list[dict]:
    """The YAML's tasks, from task `seed` on, then those before it."""
    tasks = yaml.safe_load(config.read_text(encoding="utf-8"))["stream"]["tasks"]
    return tasks[seed % len(tasks) :] + tasks[: seed % len(tasks)]


def result_path(name: str, method: str, seed: int) -> Path:
    """The file of one result."""
    return ROOT / "results" / name / method / f"{seed}.json"


def table(name: str) -> str:
    """Mean ± spread over the seeds of every method in results/, as Markdown."""
    stream = STREAMS[name]
    found = {method: results(name, method) for method in NAMES}
    head = ["method", "orders" if stream.orders else "seeds", *stream.columns]
    (first, key), *_ = stream.columns.items()
    if stream.orders:
        head.append(f"{first}: minus P&M")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for method in (method for method in NAMES if found[method]):
        columns = [[value(result, of) for result in found[method].values()] for of in stream.columns.values()]
        cells = [spread(column, interval=stream.orders) for column in columns]
        if stream.orders:
            cells.append("" if method == "pm" else spread(differences(found[method], found["pm"], key), interval=True))
        lines.append(f"| {NAMES[method]} | {len(found[method])} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def results(name: str, method: str) -> dict[int, dict]:
    """The results of one method by seed."""
    folder = result_path(name, method, 0).parent
    seeds = sorted(int(path.stem) for path in folder.glob("*.json"))
    return {seed: json.loads(result_path(name, method, seed).read_text(encoding="utf-8")) for seed in seeds}


def value(result: dict, key: str) -> float | None:
    """A metric of the stream, or the mean over tasks of another one at the end."""
    if key == "held_out":
        return fmean(text["bits_per_byte"] for text in result["held_out"][-1].values())
    metrics = result["metrics"]
    if key == "task_incremental":
        return metrics[key]["ACC"]
    return metrics[key] if key in metrics else metrics["final"].get(key)


def differences(ours: dict[int, dict], theirs: dict[int, dict], key: str) -> list[float | None]:
    """A metric's difference in each seed that both have."""
    pairs = [(value(ours[seed], key), value(theirs[seed], key)) for seed in sorted(ours.keys() & theirs.keys())]
    return [one - other for one, other in pairs if one is not None and other is not None]


def picture(name: str) -> None:
    """methods.png: mean score on the tasks seen after each task, first seed of every method that has more than one."""
    reports = []
    for method in NAMES:
        for result in list(results(name, method).values())[:1]:
            if len(result["scores"]) < len(result["scores"][0]):
                continue
            scores = {"class_incremental": result["scores"], "task_incremental": result["task_incremental"]}
            known = {"metric": "class_incremental", "matrices": scores} | result  # results of before 0.2 name neither
            names = [field.name for field in fields(Report) if field.name != "folder"]
            reports.append(Report(folder=ROOT, **{name: known[name] for name in names if name in known}))
    if reports:
        plot(reports, ROOT / "results" / name / "methods.png")


def spread(values: Sequence[float | None], *, interval: bool) -> str:
    """Mean ± standard deviation, or ± half-width of the 95 % t interval; of one value: the value."""
    known = [x for x in values if x is not None]
    if len(known) < 2:
        return f"{known[0]:.3f}" if known else "–"
    factor = float(student.ppf(0.975, len(known) - 1)) / len(known) ** 0.5 if interval else 1.0
    return f"{fmean(known):.3f} ± {factor * stdev(known):.3f}"


if __name__ == "__main__":
    sys.exit(main())
