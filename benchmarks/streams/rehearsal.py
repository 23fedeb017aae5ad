"""What generated rehearsal of language models is made of, one change at a time, on training rows that are held out.

python benchmarks/streams/rehearsal.py --streams smollm2-text --seeds 0 1 [--cells written one …]
python benchmarks/streams/rehearsal.py              only the table of what is in results/rehearsal/

Scored is a fifth of each task's training rows, which nothing is trained on; seed k starts with task k. A cell is a set
of settings, or something about the written rows that is no setting: who writes them, how long the writer learns, which
rows are kept, what they are labelled with. Writes results/rehearsal/STREAM/CELL-seedK.json and table.md.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
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
from tables import spread

from pm_hf.adapters.folder import open_adapter
from pm_hf.config.loading import load_config
from pm_hf.data.pool import Pool, PoolRow, in_turns
from pm_hf.data.writing import WritingForm
from pm_hf.files import write_json
from pm_hf.models.language_model import IGNORED, predicts_next_token, target_mask
from pm_hf.runs import learner
from pm_hf.runs.learner import learn
from pm_hf.runs.rehearsal import Rehearsal, Written
from pm_hf.training import writer


class RunningWriter(Rehearsal):
    """The writer is trained on the running merge, not on the base."""

    def write(self, task, index, pool, paths, stop):  # noqa: D102
        build, merged = writer.build_task_model, None if pool is None else open_adapter(pool.parent / "merged")
        with mock.patch.object(
            writer,
            "build_task_model",
            lambda model, lora, labels, frozen, *rest, **more: build(model, lora, labels, merged, *rest, **more),
        ):
            return super().write(task, index, pool, paths, stop)


class Agreeing(Rehearsal):
    """Twice as many rows are written, and those kept first that the merge gives the answer they were written for."""

    factor = 2

    def write(self, task, index, pool, paths, stop):  # noqa: D102
        self.factor = 2
        try:
            return super().write(task, index, pool, paths, stop)
        finally:
            self.factor = 1

    def _share(self, pool):
        return self.factor * super()._share(pool)

    def _labelled(self, scorer, written, task, answers):
        rows = super()._labelled(scorer, written, task, answers)
        return sorted(rows, key=lambda row: row.completion != row.asked)[: len(rows) // 2]


class Hard(Rehearsal):
    """Labels are the merge's likeliest answer alone."""

    def _labelled(self, scorer, written, task, answers):
        rows = super()._labelled(scorer, written, task, answers)
        return [replace(row, answers={row.completion: 1.0}) for row in rows]


class Asked(Rehearsal):
    """Labels are the answers that the rows were written for."""

    def _labelled(self, scorer, written, task, answers):
        return [
            PoolRow(row.task, row.asked, row.prompt, row.asked, {row.asked: 1.0}, [])
            for row in super()._labelled(scorer, written, task, answers)
        ]


class Real(Rehearsal):
    """Training rows in place of written ones, labelled by the merge as those are."""

    def write(self, task, index, pool, paths, stop):  # noqa: D102
        form, count = WritingForm.of(task), self._share(Pool() if pool is None else Pool.load(pool))
        groups: dict[str, list[tuple[str, str]]] = {answer: [] for answer in form.answers}
        for text, label in zip(form.texts(task.train), task.train.labels, strict=True):
            groups[label].append((label, text))
        texts = in_turns(groups.values())[:count]
        counts = {"kept": len(texts), "copies": 0, "doubles": 0, "empty": 0}
        return Written(form, texts, counts, 0, {"writer": 0.0, "write": 0.0})


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

    def with_penalty(self, built, task, start, stop):
        tokens = sorted({token for answer in task.own for token in self.encoder.completion("", answer)})
        with mock.patch.object(learner, "make_penalties", return_value=[OwnAnswers(tokens)]):
            return train(self, built, task, start, stop)

    with mock.patch.object(learner.Run, "_train", with_penalty):
        yield


def kind(cls: type[Rehearsal]):
    """Another Rehearsal."""
    return lambda: mock.patch.object(learner, "Rehearsal", cls)


def writing(**training: Any):
    """The writer's training."""
    return lambda: mock.patch.dict(writer.WRITER_TRAINING, training)


GENERATED: dict[str, Any] = {
    "method": "average",
    "strategy.replay": "generated",
    "merge.coefficient": "search",
}
ONE = {"merge.coefficient": 1.0}
# {name in paths: (title, settings, what else is patched)}
CELLS: dict[str, tuple[str, dict[str, Any], tuple]] = {
    "joint": ("joint training", {"method": "joint"}, ()),
    "sequential": ("sequential", {"method": "sequential"}, ()),
    "written": ("written rows, α by search, 512 rows, writer from the base, 2 epochs, soft labels", GENERATED, ()),
    "one": ("α = 1", GENERATED | ONE, ()),
    "mean": ("α = 1/t", GENERATED | {"merge.coefficient": None}, ()),
    "epochs-4": ("writer 4 epochs", GENERATED, (writing(num_train_epochs=4),)),
    "epochs-8": ("writer 8 epochs", GENERATED, (writing(num_train_epochs=8),)),
    "rows-128": ("128 rows", GENERATED | {"strategy.pool_rows": 128}, ()),
    "rows-256": ("256 rows", GENERATED | {"strategy.pool_rows": 256}, ()),
    "rows-1024": ("1024 rows", GENERATED | {"strategy.pool_rows": 1024}, ()),
    "running": ("writer from the running merge", GENERATED, (kind(RunningWriter),)),
    "hard": ("hard labels of the merge", GENERATED, (kind(Hard),)),
    "asked": ("labels: what was asked for", GENERATED, (kind(Asked),)),
    "agreeing": ("half of twice as many, the agreeing first", GENERATED, (kind(Agreeing),)),
    "agreeing-4": (
        "the same, writer 4 epochs",
        GENERATED,
        (kind(Agreeing), writing(num_train_epochs=4)),
    ),
    "own": ("loss over the task's own answers", GENERATED, (own_answers,)),
    "perturbed": ("perturbed, ε = 0.5", GENERATED | {"perturbation.scale": 0.5}, ()),
    "real": ("training rows in place of written ones", GENERATED, (kind(Real),)),
    "best-guess": (
        "1024 rows, agreeing first, writer 4 epochs, α = 1",
        GENERATED | ONE | {"strategy.pool_rows": 1024},
        (kind(Agreeing), writing(num_train_epochs=4)),
    ),
}


def main() -> int:
    """Run what is missing in results/rehearsal/, then write the table; 1 where a cell failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", nargs="*", choices=list(STREAMS), default=[])
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), default=list(CELLS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--data", type=Path, default=SHARED / "data", help="folder with text/")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="cells at a time, one thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/rehearsal"), help="folder for the runs themselves")
    options = parser.parse_args()
    options.backbone = None
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


def table() -> str:
    """ACC, forgetting and agreement of every cell, a table for each stream, as Markdown."""
    parts = []
    for name in STREAMS:
        lines = [f"### {STREAMS[name].title}", "", "| cell | orders | ACC | forgetting | agreement | seconds a task |"]
        lines.append("|---" * 6 + "|")
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
            columns = [
                spread([result["metrics"][key] for result in found], interval=True) for key in ("ACC", "forgetting")
            ]
            columns.append(f"{fmean(agreed):.2f}" if agreed else "–")
            columns.append(f"{fmean(step['seconds'] for result in found for step in result['steps']):.0f}")
            lines.append(f"| {title} | {len(found)} | " + " | ".join(columns) + " |")
        if len(lines) > 4:
            parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
