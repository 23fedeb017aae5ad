"""CLINC150 as ten tasks: methods x seeds in one pipeline, resumable. Writes results/clinc150-quick/.

python benchmarks/clinc150.py --data ../shared/data/text [--methods pm best …] [--seeds 0 1 2]
python benchmarks/clinc150.py --table        prints the table of what is in results/ and writes table.md
"""

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path
from statistics import fmean, stdev

from environment import environment

from pm_hf.files import write_json
from pm_hf.report import Report, plot

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "clinc150" / "minilm.yaml"
RESULTS = ROOT / "results" / "clinc150-quick"
METHODS = {
    "sequential": "sequential LoRA (α = 1)",
    "merge_only": "merging alone (Fisher α)",
    "pm": "P&M: perturbation + Fisher α",
    "pm_gram": "perturbation + free Gram",
    "pm_gram_lda": "perturbation + free Gram + analytic head",
    "best": "`best`: merging alone + analytic head",
    "frozen": "control: frozen backbone + analytic head",
}


def main() -> int:
    """Run what is missing in results/, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with clinc150_{train,test}.csv.gz and clinc150_domains.json")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", default="runs/benchmark-clinc150", help="folder for the runs themselves")
    parser.add_argument("--table", action="store_true", help="only print the table")
    options = parser.parse_args()
    if not options.table:
        if options.data is None:
            parser.error("--data is needed")
        for seed in options.seeds:
            for method in options.methods:
                run(method, seed, options.data, Path(options.runs))
    text = table()
    (RESULTS / "table.md").write_text(text, encoding="utf-8")
    print(text)
    picture()
    return 0


def run(method: str, seed: int, data: str, runs: Path) -> None:
    """One run; nothing to do when its result is there."""
    import datasets

    from pm_hf.config import load_config
    from pm_hf.learner import learn

    path = RESULTS / method / f"{seed}.json"
    if path.exists():
        return
    datasets.disable_progress_bars()
    folder = runs / f"{method}-{seed}"
    print(f"--- {method}, seed {seed}", file=sys.stderr, flush=True)
    report = learn(CONFIG, method=method, seed=seed, data_dir=data, output_dir=str(folder))
    path.parent.mkdir(parents=True, exist_ok=True)
    config = load_config(folder / "config.yaml").to_dict()
    config = {key: value for key, value in config.items() if key not in ("data_dir", "output_dir")}  # this machine's
    origin = {"stream": "CLINC150, 10 domains", "preset": "quick", "config": config}
    write_json(path, {**origin, **report.to_dict(), **environment()})


def table() -> str:
    """Mean ± standard deviation over the seeds of every method in results/, as Markdown."""
    lines = ["| method | seeds | ACC | AAA | forgetting | ACC, task given |", "|---|---|---|---|---|---|"]
    for method, name in METHODS.items():
        found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((RESULTS / method).glob("*.json"))]
        if not found:
            continue
        metrics = [result["metrics"] for result in found]
        cells = [spread([m[key] for m in metrics]) for key in ("ACC", "AAA", "forgetting")]
        cells.append(spread([m["task_incremental"]["ACC"] for m in metrics]))
        lines.append(f"| {name} | {len(found)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def picture() -> None:
    """methods.png: mean accuracy on the tasks seen after each task, first seed of every method."""
    reports = []
    for method in METHODS:
        for path in sorted((RESULTS / method).glob("*.json"))[:1]:
            result = json.loads(path.read_text(encoding="utf-8"))
            names = [field.name for field in fields(Report) if field.name != "folder"]
            reports.append(Report(folder=path.parent, **{name: result[name] for name in names if name in result}))
    plot(reports, RESULTS / "methods.png")


def spread(values: list[float]) -> str:
    """Mean ± standard deviation (of one value: the value)."""
    return f"{fmean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


if __name__ == "__main__":
    sys.exit(main())
