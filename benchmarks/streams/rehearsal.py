"""What generated rehearsal of language models is made of, one change at a time, on training rows that are held out.

python benchmarks/streams/rehearsal.py --streams smollm2-text --seeds 0 1 [--cells written one …]
python benchmarks/streams/rehearsal.py --unfinished RUNS/smollm2-text      what runs that were stopped had learned
python benchmarks/streams/rehearsal.py              only the table of what is in results/rehearsal/

Scored is a fifth of each task's training rows, which nothing is trained on; seed k starts with task k. A cell is a set
of settings, or something about the written rows that is no setting: who writes them, how long the writer learns, which
rows are kept, what they are labelled with. Writes results/rehearsal/STREAM/CELL-seedK.json and table.md.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from ablation import held_out
from common import SHARED, anywhere, data_settings, lacking_input, pooled, prepare, steps
from environment import ROOT, environment
from grid import STREAMS
from tables import spread, value

from pm_hf.config.loading import load_config
from pm_hf.data.pool import PoolRow, in_turns, likeliest
from pm_hf.files import write_json
from pm_hf.measuring import pool_labels
from pm_hf.measuring.pool_labels import labelled
from pm_hf.models.language_model import IGNORED, predicts_next_token, target_mask
from pm_hf.runs import learner, rehearsal
from pm_hf.runs.learner import learn
from pm_hf.runs.rehearsal import Rehearsal
from pm_hf.runs.written_rows import WrittenRows
from pm_hf.training import writer


class RunningWriter(Rehearsal):
    """The writer is trained on the running merge, not on the base."""

    def rehearsed(self, start, stop):  # noqa: D102
        self.running = start.running
        return super().rehearsed(start, stop)

    def write(self, *arguments):  # noqa: D102
        build = writer.build_task_model

        def from_running(model, lora, labels, frozen, *rest, **more):
            return build(model, lora, labels, self.running, *rest, **more)

        with mock.patch.object(writer, "build_task_model", from_running):
            return super().write(*arguments)


class Twice(Rehearsal):
    """Twice as many rows are written."""

    def _assignment(self, task, index, count):
        return super()._assignment(task, index, 2 * count)


def agreeing(rows: list[PoolRow]) -> list[PoolRow]:
    """Half of the rows, those first that the merge gives the answer they were written for."""
    return sorted(rows, key=lambda row: row.completion != row.asked)[: len(rows) // 2]


def hard(rows: list[PoolRow]) -> list[PoolRow]:
    """Labels are the merge's likeliest answer alone."""
    return [replace(row, answers={row.completion: 1.0}) for row in rows]


def asked(rows: list[PoolRow]) -> list[PoolRow]:
    """Labels are the answers that the rows were written for."""
    return [replace(row, completion=row.asked, answers={row.asked: 1.0}) for row in rows]


class Real(Rehearsal):
    """Training rows in place of written ones, labelled by the merge as those are."""

    def write(self, task, start, pool, paths, stop):  # noqa: D102
        assignment = self._assignment(task, start.index, self._share(len(pool.tasks) + 1))
        groups: dict[str, list[tuple[str, str]]] = {answer: [] for answer in assignment.form.answers}
        for text, label in zip(assignment.form.texts(task.train), task.train.labels, strict=True):
            groups[label].append((label, text))
        texts = in_turns(groups.values())[: assignment.count]
        counts = {"kept": len(texts), "copies": 0, "doubles": 0, "empty": 0}
        return WrittenRows(assignment, None, texts, counts, 0, 0, {"writer": 0.0, "write": 0.0})


class OwnAnswers:
    """The loss of new rows is over the tokens of the task's own answers (VAG, arXiv 2306.12619)."""

    per_target = True

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = torch.tensor(tokens)

    def __call__(self, model, batch, logits):  # noqa: D102
        labels = batch["labels"]
        chosen = logits[target_mask(labels, shifted=predicts_next_token(model))].float()
        own = self.tokens.to(logits.device)
        new = torch.isin(labels[labels != IGNORED], own)
        if "soft_weights" in batch:
            new &= batch["soft_weights"][:, 0] == 1
        difference = chosen[:, own].logsumexp(1) - chosen.logsumexp(1)
        return (difference * new).mean()


@contextmanager
def own_answers() -> Iterator[None]:
    """OwnAnswers in every task's training."""
    train = learner.Run._train

    def with_penalty(self, built, task, *arguments):
        tokens = sorted({token for answer in task.own for token in self.encoder.completion("", answer)})
        with mock.patch.object(learner, "make_penalties", return_value=[OwnAnswers(tokens)]):
            return train(self, built, task, *arguments)

    with mock.patch.object(learner.Run, "_train", with_penalty):
        yield


def likeliest_alone():
    """Probabilities of the 20 likeliest tokens sum to 1, so that no other token can follow."""
    return mock.patch.object(pool_labels, "rounded", likeliest)


def kind(cls: type[Rehearsal]):
    """Another Rehearsal."""
    return lambda: mock.patch.object(learner, "Rehearsal", cls)


def labels(change: Callable[[list[PoolRow]], list[PoolRow]]):
    """What `change` makes of each task's labelled rows."""
    return lambda: mock.patch.object(rehearsal, "labelled", lambda *parts: change(labelled(*parts)))


def writing(**training: Any):
    """The writer's training."""
    return lambda: mock.patch.dict(writer.WRITER_TRAINING, training)


# {name in paths: (title, settings, what else is patched)}: one change of `best`
CHANGES: dict[str, tuple[str, dict[str, Any], tuple]] = {
    "rows-128": ("128 rows", {"strategy.pool_rows": 128}, ()),
    "rows-256": ("256 rows", {"strategy.pool_rows": 256}, ()),
    "rows-1024": ("1024 rows", {"strategy.pool_rows": 1024}, ()),
    "no-samples": ("no samples of the base", {"strategy.base_samples": 0}, ()),
    "likeliest": ("the 20 likeliest tokens taken for all", {}, (likeliest_alone,)),
    "epochs-2": ("writer 2 epochs", {}, (writing(num_train_epochs=2),)),
    "epochs-8": ("writer 8 epochs", {}, (writing(num_train_epochs=8),)),
    "faster": ("writer's learning rate 2e-3", {}, (writing(learning_rate=2e-3),)),
    "running": ("writer from the running merge", {}, (kind(RunningWriter),)),
    "hard": ("hard labels of the merge", {}, (labels(hard),)),
    "asked": ("labels: what was asked for", {}, (labels(asked),)),
    "agreeing": ("half of twice as many, the agreeing first", {}, (kind(Twice), labels(agreeing))),
    "own": ("loss over the task's own answers", {}, (own_answers,)),
    "perturbed": ("perturbed, ε = 0.5", {"perturbation.scale": 0.5}, ()),
    "real": ("training rows in place of written ones", {}, (kind(Real),)),
}
SEARCH = {"merge.coefficient": "search"}
CELLS: dict[str, tuple[str, dict[str, Any], tuple]] = {
    "joint": ("joint training", {"method": "joint"}, ()),
    "sequential": ("sequential", {"method": "sequential"}, ()),
    "best": ("`best`: written rows, α = 1", {"method": "best"}, ()),
    "mean": ("α = 1/t", {"method": "best", "merge.coefficient": "average"}, ()),
    "search": ("α by search", {"method": "best"} | SEARCH, ()),
    **{name: (title, {"method": "best"} | changes, patches) for name, (title, changes, patches) in CHANGES.items()},
    **{
        f"search-{name}": (f"α by search, {title}", {"method": "best"} | SEARCH | changes, patches)
        for name, (title, changes, patches) in CHANGES.items()
    },
}


DEFAULT = [cell for cell in CELLS if not cell.startswith("search-")]


def main() -> int:
    """Run what is missing in results/rehearsal/, then write the table; 1 where a cell failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", nargs="*", choices=list(STREAMS), default=[])
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), default=DEFAULT)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--data", type=Path, default=SHARED / "data", help="folder with text/")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="cells at a time, one thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/rehearsal"), help="folder for the runs themselves")
    parser.add_argument("--unfinished", type=Path, help="folder of a stream's runs that were stopped")
    options = parser.parse_args()
    if options.unfinished:
        unfinished(options.unfinished)
    options.models = SHARED / "models"
    if lacking := lacking_input(options.streams, options):
        parser.error(lacking)
    asked = [(name, cell, seed) for name in options.streams for seed in options.seeds for cell in options.cells]
    for name in options.streams:
        prepare(name, options)
    failed = pooled(cell_result, [job for job in asked if not result_path(*job).exists()], options)
    (ROOT / "results" / "rehearsal" / "table.md").write_text(text := table(), encoding="utf-8")
    print(text)
    return int(failed > 0)


def result_path(name: str, cell: str, seed: int) -> Path:
    """The file of one cell."""
    return ROOT / "results" / "rehearsal" / name / f"{cell}-seed{seed}.json"


def cell_result(job: tuple[str, str, int], options: argparse.Namespace) -> None:
    """One run and its file."""
    name, cell, seed = job
    folder = options.runs / name / f"{cell}-{seed}"
    source, changes = data_settings(name, seed, folder, options)
    title, settings, patches = CELLS[cell]
    with ExitStack() as patched:
        for patch in patches:
            patched.enter_context(patch())
        report = learn(source, seed=seed, **(changes | held_out(source, changes) | settings))
    path = result_path(*job)
    path.parent.mkdir(parents=True, exist_ok=True)
    config = anywhere(load_config(folder / "config.yaml").to_dict())
    origin = {"stream": name, "cell": cell, "title": title, "seed": seed, "config": config}
    write_json(path, {**origin, **report.to_dict(), "steps": steps(folder), **environment()})


def unfinished(runs: Path) -> None:
    """The files of cells without a result from what their runs, named CELL-SEED, had learned."""
    for folder in sorted(path for path in runs.iterdir() if path.is_dir()):
        cell, _, seed = folder.name.rpartition("-")
        path, learned = result_path(runs.name, cell, int(seed)), steps(folder)
        if learned and not path.exists():
            write_json(path, {"stream": runs.name, "cell": cell, "seed": int(seed), "steps": learned})


def after_two(result: dict) -> float | None:
    """Mean accuracy among all answers on the first two tasks after the second."""
    scores = [
        step["scores"]["class_incremental"] for step in result["steps"] if "class_incremental" in step.get("scores", {})
    ]
    return next((fmean(of_step) for of_step in scores if len(of_step) == 2), None)


def table() -> str:
    """Scores, agreement and seconds of every cell, a table for each stream, as Markdown; seconds of the second task."""
    parts = []
    for name in STREAMS:
        head = ["cell", "orders", "ACC", "forgetting", "after two tasks", "agreement", "seconds of the second task"]
        head.append("bits/byte, held-out text, change in %")
        lines = [f"### {STREAMS[name].title}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for cell, (title, _, _) in CELLS.items():
            paths = sorted((ROOT / "results" / "rehearsal" / name).glob(f"{cell}-seed*.json"))
            found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
            if not found:
                continue
            agreed = [
                step["replay"]["agreement"]
                for result in found
                for step in result["steps"]
                if step.get("replay") and step["replay"]["agreement"] is not None
            ]
            metrics = [result["metrics"] for result in found if "metrics" in result]
            columns = [spread([of_run[key] for of_run in metrics], interval=True) for key in ("ACC", "forgetting")]
            columns.append(spread([after_two(result) for result in found], interval=True))
            columns.append(f"{fmean(agreed):.2f}" if agreed else "–")
            second = [result["steps"][1]["seconds"] for result in found if len(result["steps"]) > 1]
            columns.append(f"{fmean(second):.0f}" if second else "–")
            columns.append(spread([value(result, "held_out_change") for result in found], interval=True))
            lines.append(f"| {title} | {len(found)} | " + " | ".join(columns) + " |")
        if len(lines) > 4:
            parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
