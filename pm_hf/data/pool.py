"""The pool: written rows of earlier tasks with what the solver says of them, and the batches that they make."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pm_hf.data.chat import Prompt
from pm_hf.data.language import CausalEncoder, Seq2SeqEncoder
from pm_hf.data.rows import Rows
from pm_hf.errors import InputError
from pm_hf.files import write_text
from pm_hf.models.language_model import IGNORED

SOFT_TOKENS, SOFT_WEIGHTS = "soft_tokens", "soft_weights"  # columns of a batch
MOST_CHOICES = 20  # answers of a row, or tokens of a position, that keep a probability
BASE = ""  # in place of a task's name: what the untouched base says of its own; no task has this name

SoftTarget = dict[int, float]  # {token id: probability} of one target position


@dataclass(frozen=True)
class PoolRow:
    """A written prompt, and its soft target.

    task: whose rows it stands for, BASE for a sample of the base. asked: the answer that it was written for, "" for
    free text. completion: what is likeliest after the prompt. answers: {answer: probability} of a closed list. tokens:
    of free text, for each target token of the completion [[token ids], [probabilities]].
    """

    task: str
    asked: str
    prompt: Prompt
    completion: str
    answers: dict[str, float]
    tokens: list[list[list]]


@dataclass(frozen=True)
class Pool:
    """The rows of all tasks so far, task by task; the rows of a task take turns in the answers they were written for.

    Before them may stand samples of the base, which are rehearsed and belong to no task. Its size does not depend on
    the number of tasks. `rows`: a tuple of PoolRow; `Pool()` has none.
    """

    rows: tuple[PoolRow, ...] = ()

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks that have rows, in the order of the rows."""
        return list(dict.fromkeys(row.task for row in self.of_tasks.rows))

    @property
    def of_tasks(self) -> "Pool":
        """The rows of the tasks alone."""
        return Pool(tuple(row for row in self.rows if row.task != BASE))

    @property
    def of_base(self) -> "Pool":
        """The samples of the base alone."""
        return Pool(tuple(row for row in self.rows if row.task == BASE))

    def shrunk(self, per_task: int) -> "Pool":
        """The first `per_task` rows of each task: as many of each answer as before, give or take one. The samples of
        the base stay."""
        left = dict.fromkeys(self.tasks, per_task)
        kept = list(self.of_base.rows)
        for row in self.of_tasks.rows:
            left[row.task] -= 1
            if left[row.task] >= 0:
                kept.append(row)
        return Pool(tuple(kept))

    def save(self, path: str | os.PathLike) -> None:
        """Write one JSON object a line, whole or not at all."""
        write_text(Path(path), "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in self.rows))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Pool":
        """Read the file of `save`; InputError for any other."""
        try:
            lines = Path(path).read_text(encoding="utf-8").split("\n")[:-1]
            return cls(tuple(PoolRow(**json.loads(line)) for line in lines))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{path} is no pool of written rows: {error}") from error

    def examples(self, encoder: CausalEncoder | Seq2SeqEncoder) -> list[dict]:
        """The encoder's examples of prompts and completions, with `soft`: the SoftTarget of each target token."""
        rows = Rows([row.prompt for row in self.rows], [row.completion for row in self.rows])
        return [
            example | {"soft": _soft_targets(row, targets(example), encoder)}
            for row, example in zip(self.rows, encoder.examples(rows), strict=True)
        ]


def share(pool_rows: int, tasks: int) -> int:
    """Rows of each task where so many have rows; never more than half, as the second task would cut it."""
    return max(1, pool_rows // max(tasks, 2))


def in_turns(groups: Iterable[Sequence[Any]]) -> list[Any]:
    """The first of each group, then the second of each, …"""
    groups = list(groups)
    longest = max(map(len, groups), default=0)
    return [group[at] for at in range(longest) for group in groups if at < len(group)]


def likeliest(values: Mapping[Any, float]) -> dict[Any, float]:
    """The 20 largest probabilities, summing to 1, each to six digits."""
    kept = sorted(values.items(), key=lambda item: (-item[1], item[0]))[:MOST_CHOICES]
    total = sum(value for _, value in kept)
    return {key: round(value / total, 6) for key, value in kept if value / total >= 5e-7}


def rounded(values: Mapping[Any, float]) -> dict[Any, float]:
    """Probabilities to six digits, the largest first."""
    return {key: round(value, 6) for key, value in sorted(values.items(), key=lambda item: (-item[1], item[0]))}


def soft_collate(collate: Callable[[list[dict]], dict[str, Tensor]]) -> Callable[[list[dict]], dict[str, Tensor]]:
    """A collator for rows with and without `soft`.

    Where a row has it, the batch also has soft_tokens and soft_weights, (n, K) of the n target tokens of all rows, row
    by row: token ids and their probabilities. A row without has its label with probability 1, of the labels (N, T) that
    the collator has made.
    """

    def with_soft_targets(examples: list[dict]) -> dict[str, Tensor]:
        batch = collate(examples)
        if not any("soft" in example for example in examples):
            return batch
        labels = batch["labels"].tolist()
        of_rows = (
            example.get("soft") or hard_targets({"labels": row}) for example, row in zip(examples, labels, strict=True)
        )
        soft = [target for of_row in of_rows for target in of_row]
        width = max(map(len, soft))
        rest = [[0] * (width - len(target)) for target in soft]
        tokens = [[*target, *fill] for target, fill in zip(soft, rest, strict=True)]
        weights = [[*target.values(), *fill] for target, fill in zip(soft, rest, strict=True)]
        return batch | {SOFT_TOKENS: torch.tensor(tokens), SOFT_WEIGHTS: torch.tensor(weights, dtype=torch.float32)}

    return with_soft_targets


def without_soft_targets(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch is the model's input."""
    return {name: value for name, value in batch.items() if name not in (SOFT_TOKENS, SOFT_WEIGHTS)}


def targets(example: Mapping[str, Any]) -> list[int]:
    """Target token ids of an example."""
    return [token for token in example["labels"] if token != IGNORED]


def hard_targets(example: Mapping[str, Any]) -> list[SoftTarget]:
    """The example's own target tokens as soft targets."""
    return [{token: 1.0} for token in targets(example)]


def _soft_targets(row: PoolRow, tokens: list[int], encoder: CausalEncoder | Seq2SeqEncoder) -> list[SoftTarget]:
    """One for each of the completion's tokens.

    Of a closed list it is the distribution of the next token, given the tokens before it and that an answer of the list
    is said: the sum of the answers' probabilities that go on with it.
    """
    if row.tokens:
        stored = [dict(zip(ids, weights, strict=True)) for ids, weights in row.tokens]
        return [*stored[: len(tokens)], *({token: 1.0} for token in tokens[len(stored) :])]
    paths = [(encoder.completion(row.prompt, answer), weight) for answer, weight in row.answers.items()]
    soft = []
    for at, token in enumerate(tokens):
        paths = [(path, weight) for path, weight in paths if path[:at] == tokens[:at] and len(path) > at]
        total = sum(weight for _, weight in paths)
        target: SoftTarget = {}
        for path, weight in paths:
            target[path[at]] = target.get(path[at], 0.0) + weight / total
        soft.append(target or {token: 1.0})
    return soft
