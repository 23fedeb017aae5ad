"""Generated rehearsal: rows of the earlier tasks without having kept any.

A throw-away writer makes them, the merge says what they mean, and a pool of constant size keeps them.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import nn

from pm_hf.config.schema import RunConfig
from pm_hf.data.chat import Prompt
from pm_hf.data.copies import TrainingTexts
from pm_hf.data.language import CausalEncoder, Seq2SeqEncoder
from pm_hf.data.pool import MOST_CHOICES, Pool, PoolRow, in_turns, likeliest, targets
from pm_hf.data.rows import Rows
from pm_hf.data.stream import Task, TaskStream
from pm_hf.data.writing import WritingForm, check_writable
from pm_hf.environment import release_memory
from pm_hf.measuring.language_scores import LanguageScorer
from pm_hf.measuring.line_search import COEFFICIENT_GRID, Point, search_points
from pm_hf.measuring.scores import Scorer
from pm_hf.models.contexts import scaled_adapter
from pm_hf.models.lora import adapted_layers
from pm_hf.models.task_model import TASK_ADAPTER, TaskModel
from pm_hf.runs.paths import TaskPaths
from pm_hf.training.callbacks import Stop
from pm_hf.training.writer import Writer, train_writer

ROUNDS = 5  # how often texts are asked for in place of those that were dropped
ADVISED_ROWS = 64  # of each task
SAMPLES = 4  # written rows of each task that step.json and the report show
SEARCH_ROWS = 128  # of the pool, that the coefficient is searched with


@dataclass(frozen=True)
class Written:
    """What was written for a task: texts by the answer they were asked for, in turns, and what was dropped.

    counts: texts by what became of them: kept, copies, doubles, empty. longest_run: tokens that a kept text has in a
    row as a training text has them. seconds: of the writer's training and of the writing.
    """

    form: WritingForm
    texts: list[tuple[str, str]]
    counts: dict[str, int]
    longest_run: int
    seconds: dict[str, float]


class Rehearsal:
    """What a run does with written rows around a task's training: `strategy.replay: generated`."""

    def __init__(
        self, config: RunConfig, stream: TaskStream, encoder: CausalEncoder | Seq2SeqEncoder, scorer: Scorer
    ) -> None:
        self.config, self.stream, self.encoder, self.scorer = config, stream, encoder, scorer
        for task in stream.tasks:
            check_writable(task)

    def examples(self, pool: Path | None) -> list[dict]:
        """What the pool gives to train on."""
        return _load(pool).examples(self.encoder)

    def search(self, built: TaskModel, task: Task, pool: Path | None) -> list[Point]:
        """J(α) on the grid 0, .1, …, 1 for the trained task, whose adapter is scaled; [] without a written row.

        New rows are those held out of the training, old ones up to 128 rows of the pool, as many of each task.
        """
        rows = _load(pool)
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

    def write(self, task: Task, index: int, pool: Path | None, paths: TaskPaths, stop: Stop) -> Written:
        """Train a writer on the task's rows, let it write the task's share of the pool, and throw it away.

        A pure function of seed, task and training rows. All processes must call this.
        """
        form, began = WritingForm.of(task), time.perf_counter()
        writer = train_writer(self.config, form.training(task.train), self.encoder, index, paths.writer, [stop])
        trained = time.perf_counter()
        writer.model.to(self.scorer.device)
        key = f"{self.config.seed}/{index}/{task.name}"
        written = self._selected(writer, form, task, self._share(_load(pool)), key)
        seconds = {"writer": trained - began, "write": time.perf_counter() - trained}
        del writer
        release_memory()
        return Written(form, *written, seconds)

    def finish(
        self, model: nn.Module, written: Written, task: Task, index: int, pool: Path | None, paths: TaskPaths
    ) -> dict[str, Any]:
        """Label the written rows with the model of the task's merge and save the pool; `replay` of step.json."""
        began, before = time.perf_counter(), _load(pool)
        seen = [*(row.asked for row in before.rows if row.asked)]
        seen += [answer for learned in self.stream.tasks[: index + 1] for answer in learned.own]
        rows = self._labelled(self.scorer.language_scorer(model), written, task, list(dict.fromkeys(seen)))
        share = self._share(before)
        after = Pool((*before.shrunk(share).rows, *rows))
        after.save(paths.pool)
        agreeing = [float(row.completion == row.asked) for row in rows if row.asked]
        return {
            "written": sum(written.counts.values()),
            **written.counts,
            "agreement": fmean(agreeing) if agreeing else None,
            "longest_common_run": written.longest_run,
            "rows_asked": share,
            "pool_rows": len(after.rows),
            "samples": [{"asked": row.asked, "prompt": row.prompt, "says": row.completion} for row in rows[:SAMPLES]],
            "seconds": {**written.seconds, "label": time.perf_counter() - began},
        }

    def _share(self, pool: Pool) -> int:
        """Rows of each task once one more is in the pool."""
        return max(1, self.config.strategy.pool_rows // (len(pool.tasks) + 1))

    def _selected(
        self, writer: Writer, form: WritingForm, task: Task, count: int, key: str
    ) -> tuple[list[tuple[str, str]], dict[str, int], int]:
        """(texts, counts, longest run): `count` texts that are neither empty nor twice nor copied, as many of each
        answer, as far as a few rounds of writing give them."""
        training = TrainingTexts([self._tokens(text) for text in form.texts(task.train)])
        each, more = divmod(count, len(form.answers))
        missing = {answer: each + (at < more) for at, answer in enumerate(form.answers)}
        kept: dict[str, list[str]] = {answer: [] for answer in form.answers}
        counts, known, longest = Counter(kept=0, copies=0, doubles=0, empty=0), set[tuple[int, ...]](), 0
        for number in range(ROUNDS):
            asked = [answer for answer in form.answers for _ in range(missing[answer])]
            if not asked:
                break
            said = writer.write([form.source(answer) for answer in asked], f"{key}/{number}")
            for answer, text in zip(asked, map(form.text, said), strict=True):
                tokens = tuple(self._tokens(text))
                fate = self._fate(tokens, known, training)
                counts[fate] += 1
                if fate == "kept":
                    known.add(tokens)
                    kept[answer].append(text)
                    missing[answer] -= 1
                    longest = max(longest, training.longest_run(tokens))
        texts = in_turns([[(answer, text) for text in texts] for answer, texts in kept.items()])
        return texts, dict(counts), longest

    def _fate(self, tokens: tuple[int, ...], known: set[tuple[int, ...]], training: TrainingTexts) -> str:
        if not tokens:
            return "empty"
        if tokens in known:
            return "doubles"
        return "copies" if training.copied(tokens) else "kept"

    def _tokens(self, text: str) -> list[int]:
        """Token ids to compare texts by: case and spacing make no difference."""
        words = text.lower().split()
        return list(self.encoder.tokenizer(f" {' '.join(words)}", add_special_tokens=False)["input_ids"]) * bool(words)

    def _labelled(self, scorer: LanguageScorer, written: Written, task: Task, answers: Sequence[str]) -> list[PoolRow]:
        """The rows with the solver's distribution over the answers seen; of free text with its own completion."""
        asked = [answer for answer, _ in written.texts]
        pairs = [written.form.row(text) for _, text in written.texts]
        rows = Rows([prompt for prompt, _ in pairs], [completion for _, completion in pairs])
        if not len(rows):
            return []
        if task.own:
            probabilities = scorer.answer_probabilities(rows, answers).tolist()
            soft = [likeliest(dict(zip(answers, values, strict=True))) for values in probabilities]
            return [
                PoolRow(task.name, answer, prompt, max(target, key=lambda key: target[key]), target, [])
                for answer, prompt, target in zip(asked, rows.inputs, soft, strict=True)
            ]
        if not written.form.plain:
            examples = self.encoder.examples(task.train)
            longest = max(len(targets(example)) for example in examples)
            rows = Rows(
                rows.inputs, scorer.completions(rows, longest, self.encoder.ends(self.encoder.completions(task.train)))
            )
        return self._with_tokens(scorer, rows, task.name)

    def _with_tokens(self, scorer: LanguageScorer, rows: Rows, task: str) -> list[PoolRow]:
        prompts: Sequence[Prompt] = rows.inputs
        tokens = scorer.likeliest_tokens(self.encoder.examples(rows), MOST_CHOICES)
        soft = [[[list(part), list(part.values())] for part in map(likeliest, of_row)] for of_row in tokens]
        return [
            PoolRow(task, "", prompt, completion, {}, tokens)
            for prompt, completion, tokens in zip(prompts, rows.labels, soft, strict=True)
        ]


def replay_note(replay: dict[str, Any]) -> str:
    """What the report and the card say of a task's written rows."""
    dropped = ", ".join(
        f"{replay[key]} {name}"
        for key, name in (("copies", "near copies of training rows"), ("doubles", "doubles"), ("empty", "empty"))
    )
    agreement = replay["agreement"]
    parts = [
        f"{replay['kept']} synthetic rows of {replay['written']} written are kept ({dropped} dropped)",
        f"longest run in common with a training row {replay['longest_common_run']} tokens",
    ]
    if agreement is not None:
        parts.append(f"the merge agrees with {100 * agreement:.0f} % of the answers they were written for")
    if replay["kept"] < replay["rows_asked"]:
        parts.append(f"{replay['rows_asked']} were asked for")
    if replay["rows_asked"] < ADVISED_ROWS:
        parts.append(f"at least {ADVISED_ROWS} a task are advised (strategy.pool_rows)")
    return "; ".join([*parts, f"the pool has {replay['pool_rows']}"])


def _load(pool: Path | None) -> Pool:
    return Pool() if pool is None else Pool.load(pool)
