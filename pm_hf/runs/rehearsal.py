"""Generated rehearsal: rows of the earlier tasks without having kept any.

A throw-away writer makes them, the merge says what they mean, and a pool of constant size keeps them; or the writers
are kept and make them again before every task.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from torch import nn

from pm_hf.config.schema import RunConfig
from pm_hf.data.language import CausalEncoder, Seq2SeqEncoder
from pm_hf.data.pool import BASE, Pool, PoolRow, share
from pm_hf.data.rows import Rows
from pm_hf.data.stream import Task, TaskStream
from pm_hf.data.writing import Assignment, check_writable
from pm_hf.distributed import on_all_processes, on_main_process
from pm_hf.environment import release_memory
from pm_hf.measuring.line_search import COEFFICIENT_GRID, Point, search_points
from pm_hf.measuring.pool_labels import labelled, with_likeliest_tokens
from pm_hf.measuring.scores import Scorer
from pm_hf.models.contexts import scaled_adapter
from pm_hf.models.lora import adapted_layers
from pm_hf.models.task_model import TASK_ADAPTER, TaskModel
from pm_hf.runs.paths import TaskPaths
from pm_hf.runs.start import TaskStart
from pm_hf.runs.writers import keep_writer, kept_writers, load_kept, written_again
from pm_hf.runs.written_rows import WrittenRows, answers_of, written_for
from pm_hf.training.callbacks import Stop
from pm_hf.training.writer import base_writer

ADVISED_ROWS = 64  # of each task
SAMPLES = 4  # written rows of each task that step.json and the report show
SEARCH_ROWS = 128  # of the pool, that the coefficient is searched with
BASE_TOKENS = 32  # of a sample of the base


@dataclass(frozen=True)
class Rehearsed:
    """What is rehearsed beside a task. notes: what is to be said of it; seconds: what it took to make."""

    pool: Pool = Pool()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0


class Rehearsal:
    """What a run does with written rows around a task's training: `strategy.replay: generated`."""

    def __init__(
        self, config: RunConfig, stream: TaskStream, encoder: CausalEncoder | Seq2SeqEncoder, scorer: Scorer
    ) -> None:
        self.config, self.stream, self.encoder, self.scorer = config, stream, encoder, scorer
        for task in stream.tasks:
            check_writable(task)

    def rehearsed(self, start: TaskStart, stop: Stop) -> Rehearsed:
        """What the earlier tasks left: the pool, or what their writers write again and the merge before this task says
        of it; and samples of the base, which are written once, or again where nothing written is kept.

        A pure function of what they left. All processes must call this.
        """
        began, notes = time.perf_counter(), list[str]()
        if start.running is None:
            pool = Pool()
        elif self.config.strategy.replay_pool:
            pool = Pool() if start.pool is None else Pool.load(start.pool)
        else:
            pool, notes = self._written_again(start, stop)
        base = pool.of_base.rows[: self.config.strategy.base_samples] or self._base_rows()
        release_memory()
        stop.check()
        return Rehearsed(Pool((*base, *pool.of_tasks.rows)), tuple(notes), time.perf_counter() - began)

    def search(self, built: TaskModel, task: Task, pool: Pool) -> list[Point]:
        """J(α) on the grid 0, .1, …, 1 for the trained task, whose adapter is scaled; [] without a written row.

        New rows are those held out of the training, old ones up to 128 rows of the pool, as many of each task.
        """
        rows = pool.of_tasks
        if not rows.rows:
            return []
        held_out = self.encoder.examples(task.eval)
        old = rows.shrunk(max(1, SEARCH_ROWS // len(rows.tasks))).examples(self.encoder)
        layers = list(adapted_layers(built.model, TASK_ADAPTER).values())
        model = built.model.to(self.scorer.device)
        scorer, losses = self.scorer.language_scorer(model), {}
        for alpha in COEFFICIENT_GRID:
            with scaled_adapter(layers, TASK_ADAPTER, alpha):
                losses[alpha] = scorer.row_losses(held_out), scorer.row_losses(old)
        return search_points(losses, len(rows.tasks))

    def write(self, task: Task, start: TaskStart, pool: Pool, paths: TaskPaths, stop: Stop) -> WrittenRows:
        """Train a writer on the task's rows and let it write the task's share of the pool.

        A pure function of seed, task and training rows. All processes must call this.
        """
        assignment = self._assignment(task, start.index, self._share(len(pool.tasks) + 1))
        return written_for(
            self.config, task, assignment, self.encoder, start.index, paths.writer, self.scorer.device, [stop]
        )

    def finish(
        self, model: nn.Module, written: WrittenRows, rehearsed: Rehearsed, start: TaskStart, paths: TaskPaths
    ) -> dict[str, Any]:
        """Label the written rows with the model of the task's merge, save the pool or the writers; `replay` of
        step.json."""
        began, before, assignment = time.perf_counter(), rehearsed.pool, written.assignment
        answers = self._answers((row.asked for row in before.rows), start.index + 1)
        rows = labelled(self.scorer.language_scorer(model), assignment, written.texts, answers)
        after = Pool((*before.shrunk(self._share(len(before.tasks) + 1)).rows, *rows))
        kept: dict[str, Any] = {"pool_rows": 0, "samples": []}
        if written.adapter is None or not self.config.keeps_writers:
            after.save(paths.pool)
            shown = [{"asked": row.asked, "prompt": row.prompt, "says": row.completion} for row in rows[:SAMPLES]]
            kept = {"pool_rows": len(after.of_tasks.rows), "samples": shown}
        else:
            kept["writer_bytes"] = keep_writer(paths.writers, start.writers, written.adapter, assignment, written.texts)
        agreeing = [float(row.completion == row.asked) for row in rows if row.asked]
        having = {answer for answer, _ in written.texts}
        return {
            "written": sum(written.counts.values()),
            **written.counts,
            "agreement": fmean(agreeing) if agreeing else None,
            "longest_common_run": written.longest_run,
            "longest_written_run": written.longest_written_run,
            "rows_asked": assignment.count,
            "base_rows": len(before.of_base.rows),
            "answers_without_rows": [answer.strip() for answer in assignment.form.answers if answer not in having],
            **kept,
            "seconds": {**written.seconds, "label": time.perf_counter() - began, "pool": rehearsed.seconds},
        }

    def _share(self, tasks: int) -> int:
        return share(self.config.strategy.pool_rows, tasks)

    def _assignment(self, task: Task, index: int, count: int) -> Assignment:
        return Assignment.of(task, self.encoder, count, f"{self.config.seed}/{index}/{task.name}")

    def _answers(self, asked: Iterable[str], learned: int) -> list[str]:
        """The answers that rows of earlier tasks were written for and those of so many tasks of the stream."""
        return answers_of(asked, (answer for task in self.stream.tasks[:learned] for answer in task.own))

    def _written_again(self, start: TaskStart, stop: Stop) -> tuple[Pool, list[str]]:
        """The rows of all earlier tasks, as their writers write them again, and what is to be said of those that were
        not the same again."""
        folders, texts, notes = kept_writers(start.writers), list[tuple[Assignment, list[tuple[str, str]]]](), []
        for folder in folders:
            stop.check()
            writer, kept = on_all_processes(
                lambda folder=folder: load_kept(folder, self.config, self.encoder, self.scorer)  # type: ignore[misc]
            )
            again = written_again(writer, kept)
            texts.append((kept.assignment, again[: self._share(len(folders))]))
            if len(again) < len(kept.texts):
                notes.append(
                    f"the writer of {kept.assignment.task} wrote {len(again)} of {len(kept.texts)} texts again as they "
                    "were; the others were not compared with training rows and are left out"
                )
            del writer
            release_memory()
        asked = [[answer for answer, _ in of_task] for _, of_task in texts]
        before, last = [answer for of_task in asked[:-1] for answer in of_task], asked[-1] if asked else []
        answers = list(dict.fromkeys([*self._answers(before, start.index), *filter(None, last)]))

        def label() -> list[PoolRow]:
            assert start.running is not None
            scorer = self.scorer.language_scorer(self.scorer.load(start.running.path, None)[0])
            return [row for task, of_task in texts for row in labelled(scorer, task, of_task, answers)]

        rows = on_main_process(label)
        release_memory()
        return Pool(tuple(rows)), notes

    def _base_rows(self) -> list[PoolRow]:
        """Samples of the untouched base after nothing, with its likeliest tokens; an encoder-decoder has none."""
        count, encoder = self.config.strategy.base_samples, self.encoder
        if not count or not isinstance(encoder, CausalEncoder):
            return []
        longest = max(1, min(BASE_TOKENS, encoder.max_length - 2))
        writer = on_all_processes(lambda: base_writer(self.config, encoder, longest, self.scorer.autocast))
        scorer = self.scorer.language_scorer(writer.model.to(self.scorer.device))
        texts = [text for text in writer.write([""] * count, f"{self.config.seed}/base") if text.strip()]
        return on_main_process(lambda: with_likeliest_tokens(scorer, Rows([""] * len(texts), texts), BASE))


def replay_note(replay: dict[str, Any]) -> str:
    """What the report and the card say of a task's written rows."""
    dropped = ", ".join(
        f"{replay[key]} {name}"
        for key, name in (("copies", "near copies of training rows"), ("doubles", "doubles"), ("empty", "empty"))
    )
    agreement, writer, without = replay["agreement"], replay.get("writer_bytes"), replay["answers_without_rows"]
    kept = "are kept" if writer is None else "passed"
    parts = [
        f"{replay['kept']} synthetic rows of {replay['written']} written {kept} ({dropped} dropped)",
        f"longest run in common with a training row {replay['longest_common_run']} tokens",
    ]
    if (longest := replay.get("longest_written_run")) is not None:
        parts[-1] += f", {longest} in all that was written"
    if agreement is not None:
        parts.append(f"the merge agrees with {100 * agreement:.0f} % of the answers they were written for")
    if replay["kept"] < replay["rows_asked"]:
        parts.append(f"{replay['rows_asked']} were asked for")
    if replay["rows_asked"] < ADVISED_ROWS:
        parts.append(f"at least {ADVISED_ROWS} a task are advised (strategy.pool_rows)")
    if without:
        shown = ", ".join(without[:5]) + (", …" if len(without) > 5 else "")
        parts.append(f"{len(without)} answers have no row ({shown})")
    if replay["base_rows"]:
        parts.append(f"{replay['base_rows']} samples of the base were rehearsed beside the earlier tasks")
    if writer is not None:
        parts.append(
            f"no text is kept but the task's writer ({writer} bytes), which writes them again before each task"
        )
    return "; ".join([*parts, *([f"the pool has {replay['pool_rows']}"] if writer is None else [])])
