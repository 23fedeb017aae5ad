"""Fifty tasks in one process: is the last as cheap as the second? results/running/long-stream-N.json

python benchmarks/running/long_stream.py --data ../shared/data/text [--tasks 50] [--method pm]

CLINC150 in --tasks class groups, MiniLM, P&M. Compared are task T and task 2: the median seconds of an optimizer
step over five tasks at either end, the bytes of the curvature's sums, and the process's peak resident memory so far.
Texts are cut to 10 tokens, so that every task's batches have the same shape. In float32: with bf16 on a CPU oneDNN
keeps a compiled kernel for each shape it has met, up to 1024 of them, which the first tasks fill with 10 to 20 MB each
(LRU_CACHE_CAPACITY=1 and ONEDNN_PRIMITIVE_CACHE_CAPACITY=1 forbid that). Scoring is on all tasks seen, so its time
grows with their number, as it must; it is not part of a step.
"""

import argparse
import shutil
import sys
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

from environment import ROOT, environment

from pm_hf.files import read_json, write_json

TARGETS = {"step_seconds": 1.10, "curvature_bytes": 1.0, "peak_memory": 1.05}


def main() -> int:
    """Run the stream, compare its ends, write and print the figures; 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with clinc150_{train,test}.csv.gz")
    parser.add_argument("--tasks", type=int, default=50)
    parser.add_argument("--method", default="pm")
    parser.add_argument("--runs", type=Path, default=Path("runs/long-stream"))
    options = parser.parse_args()
    steps = run(options.data, options.tasks, options.method, options.runs / f"{options.method}-{options.tasks}")
    figures = compare(steps)
    method = "" if options.method == "pm" else f"{options.method}-"
    path = ROOT / "results" / "running" / f"long-stream-{method}{options.tasks}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"tasks": options.tasks, "method": options.method, **figures, **environment()})
    for key, target in TARGETS.items():
        print(f"{key}: task {options.tasks} over task 2: {figures['ratios'][key]:.3f} (target {target})")
    return int(any(figures["ratios"][key] > target for key, target in TARGETS.items()))


def run(data: str, tasks: int, method: str, folder: Path) -> list[dict]:
    """step.json of every task of a fresh run."""
    import datasets

    from pm_hf.runs.learner import learn

    datasets.disable_progress_bars()
    shutil.rmtree(folder, ignore_errors=True)
    changes = {
        "stream.class_groups": tasks,
        "stream.train_per_class": 20,
        "stream.test_rows": 9,
        "stream.max_length": 10,
        "training.bf16": False,
        "training.num_train_epochs": 4,
        "training.per_device_train_batch_size": 12,
        "curvature.samples": 60,
    }
    learn(
        ROOT / "configs" / "text" / "clinc150.yaml",
        data_dir=data,
        output_dir=str(folder),
        method=method,
        **changes,
    )
    return [read_json(path) for path in sorted(folder.glob("task-*/step.json"))]


def compare(steps: list[dict]) -> dict:
    """Figures of the second and of the last task, and their ratios."""
    seconds = [step["step_seconds"] for step in steps]
    first, last = median(seconds[1:6]), median(seconds[-5:])
    memory, size = ([step[key] for step in steps] for key in ("process_peak_memory_mb", "curvature_bytes"))
    ratios = {
        "step_seconds": last / first,
        "curvature_bytes": size[-1] / size[1],
        "peak_memory": memory[-1] / memory[1],
    }
    errors, seconds_of_task = ([step[key] for step in steps] for key in ("merge_error", "seconds"))
    ranks = {"merge_error_last": errors[-1], "merge_error_largest": max(errors)}
    return {
        "ratios": ratios,
        "step_seconds": seconds,
        "peak_memory_mb": memory,
        "curvature_bytes": size,
        "task_seconds": seconds_of_task,
        **ranks,
    }


if __name__ == "__main__":
    sys.exit(main())
