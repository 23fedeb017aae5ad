"""SIGKILL at random moments, then the same command: is everything the same in the end? results/running/kill-N.json

python benchmarks/running/kill.py [--times 60] [--each 7] [--seed 0] [--replay]

The run is `pm-hf train` on docstrings (MiniLM, P&M, three tasks, LoRA dropout, a checkpoint every few steps); --replay:
a tiny language model with generated rehearsal, perturbation and a search of the coefficient on three tasks of the tests
(results/running/kill-replay-N.json). One run is left alone. Then runs are started and killed, started again and killed
again, --each times at most, until --times kills have hit. Each kill has a phase of the run (training, measuring, …, in
turn) and comes a random part of that phase's duration after the run has entered it for the first or second time since
its start; the phase in which it really landed is read afterwards. After every third kill, as soon as there is a
checkpoint, the newest one is damaged: a file of it is overwritten with zeros, cut, removed, or has one bit changed; two
checkpoints are kept. Every run that was killed is brought to its end by the same command, and compared with the run
that was left alone: the tensors of every adapter and of the curvature bit for bit, every pool of written rows byte for
byte, and every step.json without its seconds, megabytes and digests.
"""

import argparse
import hashlib
import importlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parents[1]))

from environment import ROOT, environment

from pm_hf.files import read_json, write_json

LIBRARIES = ("accelerate", "aiohttp", "fsspec", "jinja2", "networkx", "huggingface_hub")
SETTINGS = {
    "lora.dropout": 0.1,
    "training.bf16": False,
    "training.per_device_train_batch_size": 8,
    "training.num_train_epochs": 3,
    "training.save_strategy": "steps",
    "training.save_steps": 7,
    "training.save_total_limit": 2,
}
ROWS = 40  # for training and as many for testing, of each library
DAMAGES = ("zeros", "cut", "missing", "flipped bit")  # in turn
LONGEST = 1800.0  # seconds after which a run counts as hanging
MEASURED = ("seconds", "step_seconds", "process_peak_memory_mb", "files")  # digests of files that hold seconds


def main() -> int:
    """Kill, continue, compare; 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=60)
    parser.add_argument("--each", type=int, default=7, help="kills of one run at most; then it is left alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replay", action="store_true", help="a language model with generated rehearsal")
    parser.add_argument("--runs", type=Path, default=Path("runs/kill"))
    options = parser.parse_args()
    began, draw, subject = time.perf_counter(), random.Random(options.seed), REPLAY if options.replay else DEMO
    options.runs = options.runs.resolve()
    shutil.rmtree(options.runs, ignore_errors=True)
    subject.prepare(options.runs / "data")
    durations, kills, folders = undisturbed(options.runs, subject), list[dict](), list[str]()
    while len(kills) < options.times:
        folders.append(f"killed-{len(folders):02d}")
        kills += until_done(options, subject, folders[-1], draw, durations, kills)
        print(f"{len(kills)} kills in {len(folders)} runs", file=sys.stderr, flush=True)
    expected = outcome(options.runs / "whole")
    different = {name: differences(outcome(options.runs / name), expected) for name in folders}
    different = {name: keys for name, keys in different.items() if keys}
    landed = Counter(kill["landed"] for kill in kills)
    damages = Counter(kill["damage"].partition(": ")[0] for kill in kills if kill["damage"])
    logs = "".join((options.runs / f"{name}.log").read_text(encoding="utf-8") for name in folders)
    figures = {
        "kills": len(kills),
        "damaged": dict(damages.most_common()),
        "went_on_from_the_older": logs.count("the training goes on from "),
        "began_anew": logs.count(": the task begins anew"),
        "runs": len(folders),
        "different": different,
        "landed": dict(landed.most_common()),
        "compared": sorted(expected),
        "phase_seconds": durations,
        "moments": kills,
        "seconds": time.perf_counter() - began,
    }
    path = ROOT / "results" / "running" / f"kill-{'replay-' if options.replay else ''}{options.times}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**figures, **environment()})
    where = ", ".join(f"{phase} {count}" for phase, count in landed.most_common())
    hurt = sum(damages.values())
    print(
        f"{len(kills)} kills in {len(folders)} runs ({where}), {hurt} followed by damage to the newest checkpoint, "
        f"{len(different)} runs ended otherwise"
    )
    return int(bool(different) or hurt < len(kills) // 3)


def docstrings(folder: Path) -> None:
    """Docstrings of six libraries, as the embedded demo collects them."""
    sys.path.insert(0, str(ROOT / "recipes"))
    import demo

    demo.TRAIN, demo.TEST = ROWS, ROWS
    demo.write({library: demo.collect(library, 2 * ROWS) for library in LIBRARIES}, folder)


def prompts(folder: Path) -> None:
    """Prompts and answers of three tasks and a tiny language model, as the tests have them; run.json: settings."""
    sys.path.insert(0, str(ROOT / "tests"))
    settings = importlib.import_module("helpers.rehearsal").settings
    write = importlib.import_module("helpers.streams").write_language_data
    folder.mkdir(parents=True)
    write_json(folder / "run.json", settings(write(folder), ""))


@dataclass(frozen=True)
class Subject:
    """A run that is killed. prepare: writes its data into a folder; config: relative to that; phases: aimed at."""

    prepare: Callable[[Path], None]
    config: Path
    changes: dict[str, object]
    phases: tuple[str, ...]


TRAINED = ("training", "checkpoint", "measuring", "saving", "merging")
ENDING = ("scoring", "finishing", "publishing")
REHEARSED = ("training", "checkpoint", "searching", "writer", "writing", "merging", "labelling")
DEMO = Subject(
    docstrings, ROOT / "configs" / "demo.yaml", {"method": "pm", "stream.class_groups": 3}, (*TRAINED, *ENDING)
)
REPLAY = Subject(prompts, Path("run.json"), {"perturbation.scale": 0.5}, (*REHEARSED, *ENDING))


def undisturbed(runs: Path, subject: Subject) -> dict[str, float]:
    """Run once to the end; the median seconds of each phase that is aimed at."""
    status = wait(start(runs, "whole", subject), LONGEST)
    assert status == 0, f"the run that is left alone ended with {status}; see {runs / 'whole.log'}"
    entered = [(float(at), phase) for phase, at in (line.split() for line in read(runs / "whole.phases"))]
    spans: dict[str, list[float]] = {}
    for (begin, phase), (end, _) in zip(entered, entered[1:], strict=False):
        spans.setdefault(phase, []).append(end - begin)
    assert set(subject.phases) <= set(spans), f"the run went through {sorted(spans)} only"
    return {phase: median(spans[phase]) for phase in subject.phases}


def start(runs: Path, name: str, subject: Subject) -> subprocess.Popen:
    """pm-hf train in a process of its own, which notes its phases."""
    (runs / f"{name}.phases").unlink(missing_ok=True)
    changes = {"data_dir": runs / "data", "output_dir": runs / name, **SETTINGS, **subject.changes}
    arguments = ["--config", str(runs / "data" / subject.config), *(f"{k}={v}" for k, v in changes.items())]
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import kill; sys.exit(kill.worker())"
    command = [sys.executable, "-c", program, str(runs / f"{name}.phases"), *arguments]
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    with open(runs / f"{name}.log", "a", encoding="utf-8") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environ, start_new_session=True)


def worker() -> int:
    """What runs in that process: the command line, with a line in the file of phases wherever one begins."""
    import pm_hf.runs.learner as learner
    import pm_hf.runs.written_rows as written_rows
    from pm_hf.cli import main as command_line
    from pm_hf.measuring.scores import Scorer
    from pm_hf.runs.folder import RunFolder
    from pm_hf.runs.rehearsal import Rehearsal
    from pm_hf.training.checkpoints import AtomicCheckpoints

    phases = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(phase: str) -> None:
        os.write(phases, f"{phase} {time.perf_counter()}\n".encode())

    def noted(owner: object, name: str, phase: str, after: str) -> None:
        function = getattr(owner, name)

        def wrapped(*args, **kwargs):
            note(phase)
            result = function(*args, **kwargs)
            note(after)
            return result

        setattr(owner, name, wrapped)

    for owner, name, phase, after in (
        (learner, "build_task_model", "building", "between"),
        (learner, "train", "training", "between"),
        (AtomicCheckpoints, "_save_checkpoint", "checkpoint", "training"),
        (learner, "estimate_curvature", "measuring", "saving"),
        (Rehearsal, "search", "searching", "between"),
        (written_rows, "train_writer", "writer", "between"),
        (written_rows, "collect", "writing", "between"),
        (learner, "merge_adapters", "merging", "between"),
        (Rehearsal, "finish", "labelling", "between"),
        (Scorer, "score_loaded", "scoring", "between"),
        (RunFolder, "finish_task", "finishing", "between"),
        (RunFolder, "promote", "publishing", "between"),
    ):
        noted(owner, name, phase, after)
    return command_line(["train", *sys.argv[2:]])


def until_done(
    options: argparse.Namespace,
    subject: Subject,
    name: str,
    draw: random.Random,
    durations: dict[str, float],
    before: list[dict],
) -> list[dict]:
    """Start and kill one run until it ends by itself, left alone after `options.each` kills; what each kill was.
    before: the kills of earlier runs."""
    kills: list[dict] = []
    runs, done = options.runs, len(before)
    while True:
        process = start(runs, name, subject)
        if len(kills) == options.each or done + len(kills) == options.times:
            status = wait(process, LONGEST)
        else:
            phase, entry = subject.phases[(done + len(kills)) % len(subject.phases)], draw.choice((1, 2))
            after = draw.uniform(0, durations[phase])
            status = enter(process, runs / f"{name}.phases", phase, entry)
            if status is None and (status := wait(process, after)) is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                landed = read(runs / f"{name}.phases")[-1].split()[0]
                step = len(list((runs / name).glob("task-*/step.json")))
                damaged = sum(kill["damage"] is not None for kill in [*before, *kills])
                damage = hurt(runs / name, damaged, draw) if 3 * damaged < done + len(kills) + 1 else None
                kills.append({"run": name, "aim": phase, "after_s": after, "landed": landed, "finished_tasks": step})
                kills[-1]["damage"] = damage
                continue
        assert status == 0, f"{name} ended with {status}; see {runs / name}.log"
        return kills


def hurt(folder: Path, number: int, draw: random.Random) -> str | None:
    """Damage a file of the newest checkpoint; which way and which file, None where there is no checkpoint yet."""
    checkpoints = list(folder.glob("task-*/checkpoints/checkpoint-*"))
    if not checkpoints:
        return None
    newest = max(checkpoints, key=lambda path: (path.parts[-3], int(path.name.rpartition("-")[2])))
    files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
    if not files:
        return None
    file, kind = draw.choice(files), DAMAGES[number % len(DAMAGES)]
    content = bytearray(file.read_bytes())
    if kind == "zeros":
        content = bytearray(len(content))
    elif kind == "cut":
        del content[draw.randrange(len(content)) :]
    elif kind == "flipped bit":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    if kind == "missing":
        file.unlink()
    else:
        file.write_bytes(bytes(content))
    return f"{kind}: {file.relative_to(folder)}"


def enter(process: subprocess.Popen, phases: Path, phase: str, entry: int) -> int | None:
    """Wait until the run enters a phase for the `entry`-th time; its exit status if it ends before, else None."""
    until = time.perf_counter() + LONGEST
    while (status := process.poll()) is None:
        if sum(line.split()[0] == phase for line in read(phases)) >= entry:
            return None
        assert time.perf_counter() < until, f"{phases.stem} hangs"
        time.sleep(0.002)
    return status


def read(phases: Path) -> list[str]:
    """Whole lines of a file of phases."""
    return [] if not phases.exists() else phases.read_text(encoding="utf-8").splitlines()


def wait(process: subprocess.Popen, seconds: float) -> int | None:
    """Its exit status, or None while it runs on."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def outcome(folder: Path) -> dict[str, object]:
    """What must be equal: {file: digest, or what a step.json says without what it measured}."""
    contents: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == "step.json":
            record = {key: value for key, value in read_json(path).items() if key not in MEASURED}
            record.get("replay", {}).pop("seconds", None)
            contents[name] = record
        elif path.suffix == ".safetensors":
            contents[name] = tensors_digest(path)
        elif path.name in ("labels.json", "adapter_config.json", "pool.jsonl"):
            contents[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.is_file():
            contents[name] = "there"
    return contents


def tensors_digest(path: Path) -> str:
    """Digest of the metadata (safetensors writes them in any order) and of every tensor's name, kind and bytes."""
    digest = hashlib.sha256()
    with safe_open(path, "pt") as file:
        digest.update(repr(sorted((file.metadata() or {}).items())).encode())
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def differences(left: dict, right: dict) -> list[str]:
    """Names of the files that differ or are missing on one side."""
    return sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))


if __name__ == "__main__":
    sys.exit(main())
