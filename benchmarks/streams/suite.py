"""Streams x methods x seeds in one pipeline, resumable. Writes what results/streams/ holds and its tables.

python benchmarks/streams/suite.py --preset quick      half an hour on two cores: three streams, seven methods, one seed
python benchmarks/streams/suite.py --preset standard   every stream, three seeds (orders for language models): hours
python benchmarks/streams/suite.py --preset methods    every other method and strategy on two streams, one seed
python benchmarks/streams/suite.py --streams pacs --methods pm best --seeds 0 1     what you name
python benchmarks/streams/suite.py --table             only the tables and pictures of what is in results/

The data are in --data (text/, image/); streams of pictures need --models. --jobs: processes that work on runs side
by side, one thread each. What has a result is not run again, and a run that was stopped is continued by the same
command. A seed is also an order where the stream is said to have orders: seed k starts with task k. Written are
results/streams/STREAM/METHOD-seedK.json, the stream's table.md and methods.png, and the tables of results/README.md.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import SHARED, anywhere, data_settings, lacking_input, pictures_folder, pooled, prepare, steps
from environment import ROOT, environment
from grid import LANGUAGE, NAMES, PRESETS, STREAMS, VARIANTS
from pictures import kept
from tables import result_path, write, write_readme

from pm_hf.files import write_json


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
    parser.add_argument("--models", type=Path, default=SHARED / "models", help="folder with the ViTs")
    parser.add_argument("--methods", nargs="+", choices=list(NAMES))
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark"), help="folder for the runs themselves")
    options = parser.parse_args()
    if options.table:
        names = [name for name in STREAMS if (ROOT / "results" / "streams" / name).is_dir()]
        failed = 0
    else:
        asked = jobs(options)
        names = list(dict.fromkeys(job.stream for job in asked))
        if lacking := lacking_input(names, options):
            parser.error(lacking)
        failed = run_missing(asked, options)
    for name in names:
        print(f"## {STREAMS[name].title}\n\n{write(name)}")
    write_readme()
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


def run_missing(asked: list[Job], options: argparse.Namespace) -> int:
    """Every run that has no result yet; the number of those that failed."""
    missing = [job for job in asked if not result_path(*job).exists()]
    for name in {job.stream for job in missing}:
        prepare(name, options)
    return pooled(run, missing, options, done=len(asked) - len(missing))


def run(job: Job, options: argparse.Namespace) -> None:
    """One run and its result."""
    from pm_hf.config.loading import load_config
    from pm_hf.runs.learner import learn

    stream, folder = STREAMS[job.stream], options.runs / job.stream / f"{job.method}-{job.seed}"
    source, changes = data_settings(job.stream, job.seed, folder, options)
    changes["seed"] = job.seed
    given: Path | dict[str, Any] = source
    if job.method == "classifier":
        from classifier import as_classes, register

        register()
        rows = load_config(source, values=changes | {"method": "average"})
        given, changes = as_classes(rows, folder.with_name(f"{folder.name}-rows")), {}
    with kept(pictures_folder(job.stream, options)):
        report = learn(given, **(changes | VARIANTS.get(job.method, {"method": job.method})))
    path = result_path(*job)
    path.parent.mkdir(parents=True, exist_ok=True)
    config = anywhere(load_config(folder / "config.yaml").to_dict())
    origin = {"stream": stream.title, "preset": options.preset, "config": config}
    if stream.methods is LANGUAGE:
        origin["steps"] = steps(folder)
    write_json(path, {**origin, **report.to_dict(), "method": job.method, **environment()})


if __name__ == "__main__":
    sys.exit(main())
