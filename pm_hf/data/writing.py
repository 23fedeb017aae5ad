"""What a writer is asked for and answers, and the rows of a task that its texts make."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pm_hf.data.chat import Messages
from pm_hf.data.language import CausalEncoder, Seq2SeqEncoder
from pm_hf.data.rows import Rows
from pm_hf.data.stream import Task
from pm_hf.errors import InputError
from pm_hf.models.language_model import IGNORED

MOST_REPEATS = 4  # times that a writer sees a rare answer's row in an epoch


@dataclass(frozen=True)
class WritingForm:
    """How the prompts of one task are written: "Answer: {answer}\\nText:" is completed by " {text}".

    The text is what differs between the task's prompts: `before` and `after` stand around it in all of them. Of a chat
    it is the last message, `system` the message that most rows begin with, if any. answers: those of the task's rows;
    where the completions are free text there is one, "", and the source is "Text:". plain: the rows have no prompt, the
    text is their completion. single_line: no training text has a line break.
    """

    answers: tuple[str, ...]
    before: str = ""
    after: str = ""
    chat: bool = False
    system: str | None = None
    plain: bool = False
    single_line: bool = True

    @classmethod
    def of(cls, task: Task) -> "WritingForm":
        """The form of a task's training rows."""
        inputs, known = task.train.inputs, set(task.train.labels)
        chat, plain = not isinstance(inputs[0], str), not any(inputs)
        texts = _wholes(task.train, plain)
        before, after = ("", "") if plain else _frame(texts)
        openings = Counter(_system(prompt) for prompt in inputs) if chat else Counter[str | None]()
        return cls(
            answers=tuple(answer for answer in task.own if answer in known) or ("",),
            before=before,
            after=after,
            chat=chat,
            system=openings.most_common(1)[0][0] if openings else None,
            plain=plain,
            single_line=not any("\n" in _inner(text, before, after) for text in texts),
        )

    @property
    def closed(self) -> bool:
        """Whether there are answers to write for, not free text."""
        return self.answers != ("",)

    def source(self, answer: str) -> str | Messages:
        """What the writer is asked for a text with this answer."""
        asked = f"Answer: {answer.strip()}\nText:" if answer else "Text:"
        return [{"role": "user", "content": asked}] if self.chat else asked

    def texts(self, rows: Rows) -> list[str]:
        """The text of each row."""
        return [_inner(text, self.before, self.after) for text in _wholes(rows, self.plain)]

    def training(self, rows: Rows) -> Rows:
        """What a writer is trained on: sources, completed by the texts; rows without a text are left out.

        An answer with fewer rows than the mean has them several times, up to the mean and 4 times each at most, so that
        the writer learns to write for it and does not learn its rows by heart.
        """
        labels = rows.labels if self.closed else [""] * len(rows)
        pairs = [(label, text) for label, text in zip(labels, self.texts(rows), strict=True) if text]
        by_answer: dict[str, list[str]] = {}
        for label, text in pairs:
            by_answer.setdefault(label, []).append(text)
        mean = len(pairs) // max(1, len(by_answer))
        for label, texts in by_answer.items():
            again = (MOST_REPEATS - 1) * texts
            pairs += [(label, text) for text in again[: max(0, mean - len(texts))]]
        space = "" if self.chat else " "
        return Rows([self.source(label) for label, _ in pairs], [space + text for _, text in pairs])

    def text(self, said: str) -> str:
        """The text in what a writer has said."""
        said = said.strip()
        return said.partition("\n")[0].strip() if self.single_line else said

    def row(self, text: str) -> tuple[str | Messages, str]:
        """(prompt, completion) with this text; the completion of a prompt is "", as it is the solver's to say."""
        if self.plain:
            return "", text
        whole = f"{self.before}{text}{self.after}"
        if not self.chat:
            return whole, ""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": whole}], ""


@dataclass(frozen=True)
class Assignment:
    """What is written for a task, and how it is answered.

    count: texts. key: what their draws depend on besides the writer. answer_longest, answer_ends: of free text, tokens
    that a completion may have and token ids that end it.
    """

    task: str
    form: WritingForm
    count: int
    key: str
    answer_longest: int = 0
    answer_ends: tuple[int, ...] = ()

    @classmethod
    def of(cls, task: Task, encoder: CausalEncoder | Seq2SeqEncoder, count: int, key: str) -> "Assignment":
        """So many texts like those of a task."""
        form = WritingForm.of(task)
        if form.closed or form.plain:
            return cls(task.name, form, count, key)
        longest = max(
            len(example["labels"]) - example["labels"].count(IGNORED) for example in encoder.examples(task.train)
        )
        ends = encoder.ends(encoder.completions(task.train))
        return cls(task.name, form, count, key, longest, tuple(sorted(ends)))


def check_writable(task: Task) -> None:
    """InputError where the task's prompts are more than text: chats with tools, with answers that are no text, or with
    pictures."""
    for prompt in task.train.inputs:
        if isinstance(prompt, dict) or not all(isinstance(text, str) for text in _contents(prompt)):
            raise InputError(
                f"strategy.replay: generated: task {task.name!r} has chats with tools, structured answers or content "
                "that is no text, which are not written; use replay_per_class"
            )
    if len({isinstance(prompt, str) for prompt in task.train.inputs}) > 1:
        raise InputError(f"strategy.replay: generated: task {task.name!r} has chats and texts as prompts; split it")


def _contents(prompt: str | Messages) -> list[Any]:
    return [prompt] if isinstance(prompt, str) else [message.get("content") for message in prompt]


def _wholes(rows: Rows, plain: bool) -> Sequence[str]:
    """What of each row is written: of plain text the completion, else the prompt."""
    return rows.labels if plain else [_last(prompt) for prompt in rows.inputs]


def _last(prompt: str | Messages) -> str:
    return str(_contents(prompt)[-1])


def _system(prompt: str | Messages) -> str | None:
    chat = not isinstance(prompt, str) and len(prompt) > 1
    return prompt[0]["content"] if chat and prompt[0]["role"] == "system" else None  # type: ignore[index]


def _inner(text: str, before: str, after: str) -> str:
    return text[len(before) : len(text) - len(after)].strip()


def _frame(texts: Sequence[str]) -> tuple[str, str]:
    """What all texts begin and end with, in whole words."""
    before = os.path.commonprefix(list(texts))
    while before and not before[-1].isspace():
        before = before[:-1]
    after = os.path.commonprefix([text[len(before) :][::-1] for text in texts])[::-1]
    while after and not after[0].isspace():
        after = after[1:]
    return before, after
