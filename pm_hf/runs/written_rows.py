"""Rows that a writer writes for a finished task and that a model then labels: in a run, and for training scripts."""

import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from pm_hf.config.schema import LoraSettings, ModelSettings, RunConfig, StreamSettings
from pm_hf.data.copies import TrainingTexts
from pm_hf.data.language import CausalEncoder, Seq2SeqEncoder, language_rows
from pm_hf.data.pool import Pool, share
from pm_hf.data.rows import Rows
from pm_hf.data.stream import Task, closed_answers
from pm_hf.data.writing import Assignment, check_writable
from pm_hf.distributed import on_main_process
from pm_hf.environment import release_memory
from pm_hf.errors import InputError
from pm_hf.measuring.language_scores import LanguageScorer
from pm_hf.measuring.pool_labels import labelled
from pm_hf.runs.writers import Collected, collect
from pm_hf.training.writer import SAME_AS_SOLVER, WriterAdapter, train_writer


@dataclass(frozen=True)
class WrittenRows:
    """What was written for a task, before it is labelled, and the adapter of its writer, if any.

    texts: (answer that it was written for, text), the answers in turns. counts: all that was written by what became of
    it: kept, copies, doubles, empty. longest_run: tokens that a kept text has in a row as a training text has them, 7
    at most, as 8 make it a copy; longest_written_run: the same of all that was written, those dropped too. seconds: of
    the writer's training and of the writing.
    """

    assignment: Assignment
    adapter: WriterAdapter | None
    texts: list[tuple[str, str]]
    counts: dict[str, int]
    longest_run: int
    longest_written_run: int
    seconds: dict[str, float]


def write_rows(
    base: str,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset | Iterable[Mapping[str, Any]],
    *,
    task: str,
    count: int = 256,
    target_modules: Sequence[str] | str | None = None,
    max_length: int = 512,
    training: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> WrittenRows:
    """Texts like those of a finished task, written by a throw-away adapter of the base: what `pm-hf train` does with
    `strategy.replay: generated`.

    A LoRA of rank 8 on `target_modules` is trained from the untouched base on "Answer: …" → text (learning rate 1e-3,
    4 epochs, batches of 8), writes `count` texts, as many for each answer (temperature 1, top-p .95, at most as long as
    the longest training text), and is thrown away. Empty texts, doubles, and exact or near copies of the rows (8 tokens
    in a row, or .8 of the tokens) are dropped and asked for again a few times, so fewer may be left. A pure function of
    the arguments; the texts are shared out among the processes of a launcher, all of which must call this.

    base: model id or folder, as from_pretrained takes it, or `package:NAME`. rows: the task's training rows, with
    prompt and completion, messages, or text. Up to 200 different completions are answers to choose among, more are free
    text.
    training: of bf16, fp16, tf32, use_cpu, gradient_checkpointing and gradient_checkpointing_kwargs, for the writer.
    Raises InputError for rows that cannot be read or written, and other settings of the training.
    """
    if unknown := sorted(set(training or {}) - set(SAME_AS_SOLVER)):
        raise InputError(f"training: {unknown[0]} is not for a writer; there are {', '.join(SAME_AS_SOLVER)}")
    if count < 1:
        raise InputError(f"count must be at least 1, found {count}")
    table = rows if isinstance(rows, Dataset) else Dataset.from_list([dict(row) for row in rows])
    if not len(table):
        raise InputError(f"task {task!r} has no rows to write others like them")
    targets = target_modules if isinstance(target_modules, str | None) else list(target_modules)
    config = RunConfig(
        seed=seed,
        model=ModelSettings(base=str(base)),
        stream=StreamSettings(kind="causal-lm", max_length=max_length),
        lora=LoraSettings(target_modules=targets),
        training=dict(training or {}),
    )
    read, encoder = language_rows(table, f"task {task!r}"), CausalEncoder(tokenizer, max_length)
    answers = closed_answers(read, read)
    of_task = Task(task, answers, read, Rows([], []), answers)
    check_writable(of_task)
    device = torch.device("cuda" if torch.cuda.is_available() and not config.training.get("use_cpu") else "cpu")
    assignment = Assignment.of(of_task, encoder, count, f"{seed}/{task}")
    with tempfile.TemporaryDirectory() as folder:
        return written_for(config, of_task, assignment, encoder, 0, Path(folder), device)


def label_rows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    written: WrittenRows,
    pool: Pool | None = None,
    *,
    pool_rows: int = 512,
    max_length: int = 512,
    batch_size: int = 16,
    autocast: torch.dtype | None = None,
) -> Pool:
    """The pool after a task: the written rows with what the merged model says of them, beside the older tasks' rows.

    Of a closed list a row gets the model's distribution over the answers of all tasks in the pool; of free text its own
    completion with the 20 likeliest tokens of each place. It is stored once. Every task keeps pool_rows / tasks rows,
    half of them at most. model: the running merge, the task included; its mode and weights are left as they were. pool:
    of the earlier tasks, unchanged. The first of a launcher's processes labels, all get the pool.
    Raises InputError where the pool has rows of the task already.
    """
    before, assignment = Pool() if pool is None else pool, written.assignment
    if assignment.task in before.tasks:
        raise InputError(f"the pool has rows of task {assignment.task!r} already; give the task a name of its own")
    each = share(pool_rows, len(before.tasks) + 1)
    scorer = LanguageScorer(model, CausalEncoder(tokenizer, max_length), batch_size, autocast)
    texts, own = written.texts[:each], assignment.form.answers if assignment.form.closed else ()
    answers = answers_of((row.asked for row in before.rows), own)
    rows = on_main_process(lambda: labelled(scorer, assignment, texts, answers))
    return Pool((*before.shrunk(each).rows, *rows))


def answers_of(asked: Iterable[str], own: Iterable[str]) -> list[str]:
    """The answers that rows were written for ("" of free text is none), then those of tasks, each once."""
    return list(dict.fromkeys([*filter(None, asked), *own]))


def written_for(
    config: RunConfig,
    task: Task,
    assignment: Assignment,
    encoder: CausalEncoder | Seq2SeqEncoder,
    index: int,
    folder: Path,
    device: torch.device,
    callbacks: Sequence[TrainerCallback] = (),
) -> WrittenRows:
    """Train a writer on a task's rows and let it write on a device what the assignment asks for.

    A pure function of config, task and assignment. All processes must call this. folder: see `train_writer`.
    """
    form, began = assignment.form, time.perf_counter()
    writer, adapter = train_writer(config, form.training(task.train), encoder, index, folder, callbacks)
    trained = time.perf_counter()
    writer.model.to(device)
    fates = Fates(encoder, form.texts(task.train))
    collected: Collected = collect(writer, assignment, fates)
    seconds = {"writer": trained - began, "write": time.perf_counter() - trained}
    del writer
    release_memory()
    runs = fates.longest_runs()
    return WrittenRows(assignment, adapter, collected.texts, collected.counts, *runs, seconds)


class Fates:
    """What becomes of written texts one after the other: "kept", "empty", "doubles" of those kept, or "copies" of the
    training texts (see `TrainingTexts`). Case and spacing make no difference."""

    def __init__(self, encoder: CausalEncoder | Seq2SeqEncoder, training: Iterable[str]) -> None:
        self._tokenizer = encoder.tokenizer
        self._training = TrainingTexts([self._tokens(text) for text in training])
        self._kept, self._written = set[tuple[int, ...]](), set[tuple[int, ...]]()

    def __call__(self, text: str) -> str:
        """What becomes of the next text."""
        tokens = self._tokens(text)
        self._written.add(tokens)
        if not tokens:
            return "empty"
        if tokens in self._kept:
            return "doubles"
        if self._training.copied(tokens):
            return "copies"
        self._kept.add(tokens)
        return "kept"

    def longest_runs(self) -> tuple[int, int]:
        """Tokens of the longest run that a kept text, and that any written text, has in common with a training text."""
        return self._training.longest_run(self._kept), self._training.longest_run(self._written)

    def _tokens(self, text: str) -> tuple[int, ...]:
        words = text.lower().split()
        return tuple(self._tokenizer(f" {' '.join(words)}", add_special_tokens=False)["input_ids"]) * bool(words)
