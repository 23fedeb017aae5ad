"""Streams x methods x seeds in one pipeline, resumable. Writes results/STREAM/METHOD/SEED.json, table.md, methods.png.

python benchmarks/suite.py --preset quick       half an hour on two cores: three streams, seven methods, one seed
python benchmarks/suite.py --preset standard    every stream, three seeds (orders for language models): many hours
python benchmarks/suite.py --preset methods     every other method and strategy on two streams, one seed
python benchmarks/suite.py --streams pacs --methods pm best --seeds 0 1     what you name
python benchmarks/suite.py --table              only the tables and pictures of what is in results/

The data are in --data (text/, image/); streams of pictures need --backbone. --jobs: processes that work on runs side
by side, one thread each. What has a result is not run again, and a run that was stopped is continued by the same
command. A seed is also an order where the stream is said to have orders: seed k starts with task k.
"""

import argparse
import gc
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from environment import environment
from grid import NAMES, PRESETS, STREAMS, VARIANTS
from tables import ROOT, overview, result_path, write
from tqdm import tqdm

from pm_hf.files import write_json

SHARED = ROOT.parent / "shared"


class Job(NamedTuple):
    """One run."""

    stream: str
    method: str
    seed: int


def main() -> int:
    """Run what is missing in results/, then write the tables; 1 where a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--preset", choices=list(PRESETS))
    what.add_argument("--streams", nargs="+", choices=list(STREAMS))
    what.add_argument("--table", action="store_true", help="only write the tables")
    parser.add_argument("--data", type=Path, default=SHARED / "data", help="folder with text/ and image/")
    parser.add_argument("--backbone", type=Path, default=SHARED / "models" / "vit-tiny-imagenet150", help="of pictures")
    parser.add_argument("--methods", nargs="+", choices=list(NAMES))
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark"), help="folder for the runs themselves")
    options = parser.parse_args()
    if options.table:
        names = [name for name in STREAMS if (ROOT / "results" / name).is_dir()]
        failed = 0
    else:
        found = jobs(options)
        names = list(dict.fromkeys(job.stream for job in found))
        if lacking := lacking_input(names, options):
            parser.error(lacking)
        failed = run_missing(found, options)
    for name in names:
        print(f"## {STREAMS[name].title}\n\n{write(name)}")
    (ROOT / "results" / "overview.md").write_text(overview(), encoding="utf-8")
    return int(failed > 0)


def jobs(options: argparse.Namespace) -> list[Job]:
    """Every run that is asked for, done or not; the streams in turn, so that the first tables come early."""
    preset = PRESETS[options.preset] if options.preset else None
    seeds = options.seeds or (preset.seeds if preset else (0, 1, 2))
    methods = options.methods or (preset.methods if preset else None)
    streams = preset.streams if preset else options.streams
    return [
        Job(name, method, seed) for name in streams for seed in seeds for method in methods or STREAMS[name].methods
    ]


def lacking_input(names: list[str], options: argparse.Namespace) -> str | None:
    """What is missing on this machine, None where nothing is."""
    for name in names:
        folder = options.data / STREAMS[name].data
        if not folder.is_dir():
            return f"{name} needs data in {folder}; name the folder that has it with --data"
        if STREAMS[name].data == "image" and not options.backbone.is_dir():
            return f"{name} needs a ViT in {options.backbone}; name another with --backbone"
    return None


def run_missing(found: list[Job], options: argparse.Namespace) -> int:
    """Every run that has no result yet; the number of those that failed."""
    missing = [job for job in found if not result_path(*job).exists()]
    for name in {job.stream for job in missing}:
        prepare(name, options)
    return pooled(run, missing, options, done=len(found) - len(missing))


def pooled(work: Callable, jobs: Sequence[tuple], options: argparse.Namespace, done: int = 0) -> int:
    """work(job, options) for every job, options.jobs at a time; the number of those that failed.

    done: jobs that were finished before; they count in the bar, whose time left follows from those done here.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # before a worker imports torch
    failed = 0
    with (
        tqdm(total=done + len(jobs), initial=done, unit="run", smoothing=0) as bar,
        ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn"), initializer=begin) as pool,
    ):
        waiting = {pool.submit(work, job, options): " ".join(map(str, job)) for job in jobs}
        for future in as_completed(waiting):
            job, error = waiting[future], future.exception()
            if error is not None:  # the others go on
                failed += 1
                bar.write(f"{job} failed: {error!r}", file=sys.stderr)
            bar.set_postfix_str(f"{failed} failed, last {job}", refresh=False)
            bar.update()
    return failed


def begin() -> None:
    """Of a worker: no progress bars of data sets; and what imports left is never garbage, so that a Trainer's
    collections (three a task) do not look through it again and again."""
    import datasets

    import pm_hf.runs.learner  # noqa: F401

    datasets.disable_progress_bars()
    gc.collect()
    gc.freeze()


def prepare(name: str, options: argparse.Namespace) -> None:
    """Data that a recipe makes on this machine."""
    if name == "smollm2-domains" and not (data_folder(name, options) / "general-test.jsonl").exists():
        sys.path.insert(0, str(ROOT / "recipes"))
        from domains import write as write_domains

        write_domains(options.data / "text", data_folder(name, options))


def data_folder(name: str, options: argparse.Namespace) -> Path:
    """Where the stream's files are."""
    return options.runs / name / "data" if name == "smollm2-domains" else options.data / STREAMS[name].data


def run(job: Job, options: argparse.Namespace) -> None:
    """One run and its result."""
    from pm_hf.config.loading import load_config
    from pm_hf.runs.learner import learn

    stream, folder = STREAMS[job.stream], options.runs / job.stream / f"{job.method}-{job.seed}"
    source, changes = data_settings(job.stream, job.seed, folder, options)
    report = learn(source, seed=job.seed, **(changes | VARIANTS.get(job.method, {"method": job.method})))
    path = result_path(*job)
    path.parent.mkdir(parents=True, exist_ok=True)
    config = anywhere(load_config(folder / "config.yaml").to_dict())
    origin = {"stream": stream.title, "preset": options.preset, "config": config}
    write_json(path, {**origin, **report.to_dict(), "method": job.method, **environment()})


def anywhere(config: dict[str, Any]) -> dict[str, Any]:
    """Settings without the folders of this machine."""
    return {key: value for key, value in config.items() if key not in ("data_dir", "output_dir")}


def data_settings(name: str, seed: int, folder: Path, options: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """(the stream's YAML, settings for this machine's files and the stream's order and length)."""
    stream = STREAMS[name]
    source = ROOT / "configs" / stream.config
    changes: dict[str, Any] = {"data_dir": str(data_folder(name, options)), "output_dir": str(folder)}
    if stream.data == "image":
        changes["model.base"] = str(options.backbone)
    if stream.orders or stream.tasks:
        changes["stream.tasks"] = tasks(source, seed if stream.orders else 0, stream.tasks)
    return source, changes


def tasks(config: Path, first: int, count: int | None) -> list[dict]:
    """The YAML's tasks, from task `first` on, then those before it; `count` of them."""
    found = yaml.safe_load(config.read_text(encoding="utf-8"))["stream"]["tasks"]
    first %= len(found)
    return [*found[first:], *found[:first]][:count]


if __name__ == "__main__":
    sys.exit(main())
