"""Is α right? Loss and score along the merge line of runs that suite.py made. Writes results/coefficient/.

python benchmarks/streams/coefficient.py --streams pacs four-sets --methods pm merge_only [--seeds 0]

STREAM-METHOD-seedK.json has what `pm-hf inspect --coefficient RUN` writes and the .png beside it the line of the second
task; table.md has a row for each task.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from environment import ROOT, environment
from grid import NAMES, STREAMS

from pm_hf.files import write_json
from pm_hf.reports.charts import write_chart
from pm_hf.reports.run_charts import line_charts
from pm_hf.runs.merge_line import merge_line
from pm_hf.runs.records import read_runs

FOLDER = ROOT / "results" / "coefficient"


def main() -> None:
    """Measure what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", nargs="+", choices=list(STREAMS), default=[])
    parser.add_argument("--methods", nargs="+", choices=list(NAMES), default=["pm"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark"), help="folder of the suite's runs")
    options = parser.parse_args()
    for name in options.streams:
        for method in options.methods:
            for seed in options.seeds:
                measure(name, method, seed, options.runs / name / f"{method}-{seed}")
    text = table()
    (FOLDER / "table.md").write_text(text, encoding="utf-8")
    print(text)


def measure(name: str, method: str, seed: int, run: Path) -> None:
    """The lines of one run, unless they are there."""
    path = FOLDER / f"{name}-{method}-seed{seed}.json"
    if path.exists():
        return
    print(f"--- {run}", file=sys.stderr, flush=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_json(path, {"stream": name, "method": method, "seed": seed, **merge_line(run), **environment()})
    write_chart(line_charts(read_runs([run])[0], 1, 1)[0], path.with_suffix(".png"))


def table() -> str:
    """α as chosen, 1/t and the best one of the line for score and loss; what the first two lose to it."""
    head = ["stream", "method", "task", "α", "1/t", "best score at", "best loss at"]
    head += ["α loses (score)", "1/t loses (score)", "α loses (nats)", "1/t loses (nats)"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for path in sorted(FOLDER.glob("*.json")):
        scan = json.loads(path.read_text(encoding="utf-8"))
        title = [STREAMS[scan["stream"]].title, NAMES[scan["method"]]]
        for task in scan["tasks"]:
            alphas = [f"{task[key]:.2f}" for key in ("chosen", "one_over_t", "best_score", "best_loss")]
            lines.append("| " + " | ".join([*title, str(task["t"]), *alphas, *lost(scan, task["regret"])]) + " |")
        if len(scan["tasks"]) > 1:
            lines.append("| " + " | ".join([*title, "mean", *[""] * 4, *lost(scan, scan["mean_regret"])]) + " |")
    return "\n".join(lines) + "\n"


def lost(scan: Mapping, regret: Mapping) -> list[str]:
    """Cells of the regret."""
    unit = " points" if scan["regret_unit"] == "points" else ""
    score = [f"{regret[key]['score']:.2f}{unit}" for key in ("chosen", "one_over_t")]
    return [*score, *(f"{regret[key]['loss']:.3f}" for key in ("chosen", "one_over_t"))]


if __name__ == "__main__":
    main()
