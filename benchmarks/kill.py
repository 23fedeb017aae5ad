"""SIGKILL at random moments, then the same command: is the final adapter the same? Writes results/kill/TIMES.json.

python benchmarks/kill.py --times 20 [--seed 0]

The run is `pm-hf train` on the embedded demo data (three tasks, a checkpoint every few steps). One run is left alone;
then runs are started and killed after a random time, again and again, until --times kills have hit. Every run that was
killed is brought to its end by the same command, and its published adapter, its coefficients and its scores are
compared with those of the run that was left alone.
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from environment import environment

from pm_hf.files import read_json, write_json

ROOT = Path(__file__).parents[1]
LONGEST = 600.0  # seconds after which a run counts as hanging


def main() -> int:
    """Kill, continue, compare; 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs/kill"))
    options = parser.parse_args()
    shutil.rmtree(options.runs, ignore_errors=True)
    collect(options.runs / "data")
    began = time.perf_counter()
    assert wait(start(options.runs, "whole"), LONGEST) == 0, "the run that is left alone failed"
    duration = time.perf_counter() - began
    expected, kills, folders = outcome(options.runs / "whole"), list[float](), list[str]()
    moment = random.Random(options.seed)
    while len(kills) < options.times:
        folders.append(f"killed-{len(folders):02d}")
        kills += until_done(options.runs, folders[-1], moment, duration, options.times - len(kills))
        print(f"{len(kills)} kills in {len(folders)} runs", file=sys.stderr, flush=True)
    different = [name for name in folders if outcome(options.runs / name) != expected]
    path = ROOT / "results" / "kill" / f"{options.times}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    figures = {"kills": len(kills), "runs": len(folders), "different": different, "moments_s": kills}
    write_json(path, {**figures, "whole_run_s": duration, "adapter_sha256": expected["adapter"], **environment()})
    print(f"{len(kills)} kills in {len(folders)} runs, {len(different)} final adapters differ")
    return int(bool(different))


def collect(folder: Path) -> None:
    """The embedded demo's data."""
    sys.path.insert(0, str(ROOT / "recipes"))
    from demo import LIBRARIES, TEST, TRAIN, write
    from demo import collect as texts_of

    write({library: texts_of(library, TRAIN + TEST) for library in LIBRARIES}, folder)


def start(runs: Path, name: str) -> subprocess.Popen:
    """pm-hf train in a process of its own."""
    command = [sys.executable, "-m", "pm_hf.cli", "train", "--config", str(ROOT / "configs/demo/docstrings.yaml")]
    changes = {"data_dir": runs / "data", "output_dir": runs / name, "method": "pm", "stream.class_groups": 3}
    changes |= {"training.save_strategy": "steps", "training.save_steps": 7, "stream.train_per_class": 12}
    arguments = [f"{key}={value}" for key, value in changes.items()]
    log = open(runs / f"{name}.log", "a", encoding="utf-8")  # noqa: SIM115
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([*command, *arguments], stdout=log, stderr=log, env=environ, start_new_session=True)


def wait(process: subprocess.Popen, seconds: float) -> int | None:
    """Its exit status, or None while it runs on."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def until_done(runs: Path, name: str, moment: random.Random, duration: float, most: int) -> list[float]:
    """Start and kill one run until it ends by itself, left alone after `most` kills; the moments of the kills."""
    kills: list[float] = []
    while True:
        process = start(runs, name)
        after = moment.uniform(0, duration) if len(kills) < most else LONGEST
        status = wait(process, after)
        if status is None:
            assert len(kills) < most, f"{name} hangs"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills.append(round(after, 3))
        else:
            assert status == 0, f"{name} ended with {status}; see {runs / name}.log"
            return kills


def outcome(folder: Path) -> dict:
    """What must be equal: the published adapter's bytes, and every task's coefficient and scores."""
    steps = [read_json(path) for path in sorted(folder.glob("task-*/step.json"))]
    weights = (folder / "merged" / "adapter_model.safetensors").read_bytes()
    kept = [{key: step[key] for key in ("task", "coefficient", "scores", "optimizer_steps")} for step in steps]
    return {"adapter": hashlib.sha256(weights).hexdigest(), "steps": kept}


if __name__ == "__main__":
    sys.exit(main())
