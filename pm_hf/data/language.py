"""Prompts and completions: reading them from a data set, and making token batches of them."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from string import Formatter
from typing import Any

import torch
from torch import Tensor

from pm_hf.data import chat
from pm_hf.data.chat import Prompt
from pm_hf.data.columns import as_text, cells, check_columns, label_names, spelled
from pm_hf.data.rows import Places, Rows
from pm_hf.data.tables import Table
from pm_hf.errors import InputError, raise_all
from pm_hf.models.language_model import IGNORED


def language_rows(
    data: Table,
    where: str,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    prompt_template: str | None = None,
    answers: Mapping | None = None,
    task: str = "",
) -> Rows:
    """Prompts and completions of a data set, by the columns that it has:

    `prompt_template`, filled with any of its columns, {text} (the text column) and {task}: completed by the label, with
    a space between where the template does not end in white space. Some of the template's columns may be empty in a
    row, not all. `answers` are the words for each label; a label without is an error. `messages` (chat): every
    assistant message completes what stands before it, one row each. `prompt` and `completion` (or the two columns
    named): text, or messages. All that messages hold, and the column `tools` beside them, is for the chat template.
    Else plain text: the text column completes the empty prompt.
    """
    names = data.column_names
    if answers is not None and not prompt_template:
        raise InputError(f"{where}: answers belong to a prompt_template; the completions are the column's own text")
    if prompt_template:
        text, label = text_column or "text", label_column or "label"
        return _templated(data, where, text=text, label=label, template=prompt_template, words=answers, task=task)
    if text_column is None and "messages" in names:
        return _conversations(data, where)
    if (text_column is None and {"prompt", "completion"} <= set(names)) or label_column:
        return _pairs(data, where, text_column or "prompt", label_column or "completion")
    column = text_column or "text"
    texts = [as_text(value, where, row, column) for row, value in enumerate(_column(data, where, column))]
    return Rows([""] * len(texts), texts, Places.of(where, len(texts)))


class _PromptEncoder(ABC):
    """What the encoders of prompts and completions share: an example of each row, how many were `cut`, and batches."""

    tokenizer: Any
    pad: int
    cut: int

    def prompts(self, rows: Rows) -> list[list[int]]:
        """Token ids of each row's prompt without its completion, cut to max_length; `cut` counts the shorter ones."""
        whole = [self._prompt(prompt) for prompt in rows.inputs]
        kept = [self.fitted(ids, 0) for ids in whole]
        self.cut = sum(len(ids) < len(before) for ids, before in zip(kept, whole, strict=True))
        return kept

    def collate(self, examples: list[dict]) -> dict[str, Tensor]:
        """input_ids and attention_mask (N, T), labels (N, T), of an encoder-decoder (N, U), padded on the right."""
        ids, labels = ([example[name] for example in examples] for name in ("input_ids", "labels"))
        mask = [[1] * len(row) for row in ids]
        columns = {"input_ids": (ids, self.pad), "attention_mask": (mask, 0), "labels": (labels, IGNORED)}
        return {name: pad_rows(rows, value) for name, (rows, value) in columns.items()}

    def training(self, rows: Rows, labels: Sequence[str] = ()) -> list[dict]:
        """Same as `examples`."""
        return self.examples(rows, labels)

    def examples(self, rows: Rows, labels: Sequence[str] = ()) -> list[dict]:
        """{"input_ids", "labels" (not shifted), "bytes": UTF-8 bytes of the completion that is kept} of each row."""
        self.cut = 0
        return [self._example(prompt, text) for prompt, text in zip(rows.inputs, rows.labels, strict=True)]

    def ends(self, completions: Iterable[list[int]]) -> set[int]:
        """Token ids that end one of these: eos, and the special token that ends a turn of the chat template."""
        added = self.tokenizer.added_tokens_decoder
        last = {ids[-1] for ids in completions if ids}
        return {self.tokenizer.eos_token_id} | {token for token in last if token in added and added[token].special}

    def completions(self, rows: Rows) -> Iterator[list[int]]:
        """Token ids of each row's completion, its end included."""
        return (self.completion(prompt, text) for prompt, text in zip(rows.inputs, rows.labels, strict=True))

    @abstractmethod
    def prompt(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt as it stands before its completion."""

    @abstractmethod
    def fitted(self, prompt: list[int], room: int) -> list[int]:
        """What is kept of a prompt beside a completion of `room` tokens."""

    @abstractmethod
    def completion(self, prompt: Prompt, text: str) -> list[int]:
        """Token ids of a completion, its end included."""

    @abstractmethod
    def texts(self, prompt: Prompt, text: str) -> tuple[str, str]:
        """What the tokenizer is given for a row; InputError for a prompt that cannot be encoded."""
        ...

    def compared(self, prompt: Prompt, text: str) -> str:
        """What a generation must say to be the completion."""
        return text

    @abstractmethod
    def _prompt(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, however long."""

    @abstractmethod
    def _example(self, prompt: Prompt, text: str) -> dict: ...


class CausalEncoder(_PromptEncoder):
    """Tokens of a prompt and its completion; only the completion and its end are predicted.

    A text prompt has the tokens that it has alone; nothing is put between the two, and the completion ends with eos.
    The empty prompt is bos (or eos). Chat prompts are rendered by the tokenizer's chat template, and the completion
    ends as the template ends a turn. What is longer than `max_length` tokens loses the left of the prompt first, then
    the right of the completion. `cut` counts the rows of the last call that lost something.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length, self.cut = tokenizer, _two_tokens(max_length), 0
        if tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has no end-of-text token (eos_token); set one")
        self.pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def prompt(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt as it stands before its completion."""
        if not isinstance(prompt, str):
            return self._ids(chat.rendered(self.tokenizer, prompt))
        ids, end = list(self.tokenizer(prompt, verbose=False)["input_ids"]), [self.tokenizer.eos_token_id]
        plain = self._ids(prompt)
        if ids[-1:] == end and ids[-len(plain) :] != plain:  # the tokenizer's own end, not the text's
            ids = ids[:-1]
        start = self.tokenizer.bos_token_id
        return ids or (end if start is None else [start])

    def completion(self, prompt: Prompt, text: str) -> list[int]:
        """Token ids of a completion, its end included."""
        if isinstance(prompt, str):
            return [*self._ids(text), self.tokenizer.eos_token_id]
        return self._ids(self.texts(prompt, text)[1])

    def texts(self, prompt: Prompt, text: str) -> tuple[str, str]:
        """The prompt and the completion, those of a chat as the template writes them."""
        if isinstance(prompt, str):
            return prompt, text
        before = chat.rendered(self.tokenizer, prompt)
        answer = {"role": "assistant", "content": text} | chat.answer_of(prompt)
        whole = chat.rendered(self.tokenizer, prompt, answer)
        if not whole.startswith(before):
            raise InputError(
                "the chat template renders a conversation otherwise than its beginning, so a completion has no tokens "
                "of its own; use prompt and completion columns with text"
            )
        after = whole[len(before) :].rstrip("\n")
        if not after:
            raise InputError(
                "the chat template writes nothing for the assistant's message, so there is nothing to learn"
            )
        return before, after

    def compared(self, prompt: Prompt, text: str) -> str:
        """The text; of an answer that holds more, all that the template writes of it."""
        if not chat.answer_of(prompt):
            return text
        return self._said(self.completion(prompt, text))

    def _prompt(self, prompt: Prompt) -> list[int]:
        return self.prompt(prompt)

    def _said(self, completion: list[int]) -> str:
        return str(self.tokenizer.decode(completion, skip_special_tokens=True))

    def fitted(self, prompt: list[int], room: int) -> list[int]:
        """The right of a prompt that leaves room for a completion, with bos where it began with it."""
        most = max(self.max_length - room, 1)
        if len(prompt) <= most:
            return prompt
        begins = most > 1 and prompt[0] == self.tokenizer.bos_token_id
        return [prompt[0], *prompt[-(most - 1) :]] if begins else prompt[-most:]

    def _example(self, prompt: Prompt, text: str) -> dict:
        if isinstance(prompt, str):
            before, after = self.prompt(prompt), self.completion(prompt, text)
        else:
            before, after = map(self._ids, self.texts(prompt, text))
        if chat.answer_of(prompt):
            text = self._said(after)
        target, size = after[: self.max_length - 1], len(text.encode())
        if len(target) < len(after):
            size = min(size, _bytes(self.tokenizer, text, target))
        source = self.fitted(before, len(target))
        self.cut += len(target) < len(after) or len(source) < len(before)
        return {"input_ids": source + target, "labels": [IGNORED] * len(source) + target, "bytes": size}

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


class Seq2SeqEncoder(_PromptEncoder):
    """The prompt is the encoder's input, the completion and its end are what the decoder predicts.

    Both are cut on the right to `max_length` tokens, the end included. `cut` counts the rows of the last call that
    lost something.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length, self.cut = tokenizer, _two_tokens(max_length), 0
        self.pad = tokenizer.pad_token_id or 0

    def prompt(self, prompt: Prompt) -> list[int]:
        """Token ids of the encoder's input."""
        return self._fitted(self._prompt(prompt))

    def fitted(self, prompt: list[int], room: int) -> list[int]:
        """The left of a prompt, its end kept; a completion takes no room from it."""
        return self._fitted(prompt)

    def completion(self, prompt: Prompt, text: str) -> list[int]:
        """Token ids of the decoder's target, its end included."""
        return self._fitted(self._target(text))

    def texts(self, prompt: Prompt, text: str) -> tuple[str, str]:
        """The two as they are."""
        if not isinstance(prompt, str):
            raise InputError("chat messages need stream.kind causal-lm; use prompt and completion columns with text")
        return prompt, text

    def _example(self, prompt: Prompt, text: str) -> dict:
        source, target = self._prompt(prompt), self._target(text)
        ids, labels, size = self._fitted(source), self._fitted(target), len(text.encode())
        if len(labels) < len(target):
            size = min(size, _bytes(self.tokenizer, text, labels[: len(labels) - self._ends(labels)]))
        self.cut += len(ids) < len(source) or len(labels) < len(target)
        return {"input_ids": ids, "labels": labels, "bytes": size}

    def _prompt(self, prompt: Prompt) -> list[int]:
        return list(self.tokenizer(self.texts(prompt, "")[0], verbose=False)["input_ids"])

    def _target(self, text: str) -> list[int]:
        return list(self.tokenizer(text_target=text, verbose=False)["input_ids"])

    def _ends(self, ids: list[int]) -> bool:
        return ids[-1:] == [self.tokenizer.eos_token_id]

    def _fitted(self, ids: list[int]) -> list[int]:
        """Token ids without what is too long, their end kept."""
        if len(ids) <= self.max_length:
            return ids
        return [*ids[: self.max_length - 1], ids[-1]] if self._ends(ids) else ids[: self.max_length]


def pad_rows(rows: Sequence[Sequence[int]], value: int, *, left: bool = False) -> Tensor:
    """Rows of unequal length as one (N, T) tensor."""
    longest = max(len(row) for row in rows)
    filled = [[value] * (longest - len(row)) for row in rows]
    return torch.tensor([[*fill, *row] if left else [*row, *fill] for row, fill in zip(rows, filled, strict=True)])


def _two_tokens(max_length: int) -> int:
    if max_length < 2:
        raise InputError(f"stream.max_length must be at least 2 for language models, found {max_length}")
    return max_length


def _bytes(tokenizer: Any, text: str, tokens: list[int]) -> int:
    """UTF-8 bytes of the text that its first tokens `tokens` stand for, at least 1."""
    if tokenizer.is_fast:
        ends = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"][: len(tokens)]
        return max(1, len(text[: ends[-1][1]].encode()) if ends else 0)
    return max(1, len(tokenizer.decode(tokens, skip_special_tokens=True).encode()))


def _templated(
    data: Table, where: str, *, text: str, label: str, template: str, words: Mapping | None, task: str
) -> Rows:
    try:
        asked = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise InputError(f"prompt_template {template!r}: {error}; a brace of the text is written twice") from error
    fields = list(dict.fromkeys(text if name == "text" else name for name in asked if name != "task"))
    unknown = [name for name in fields if name not in data.column_names]
    names = ", ".join(data.column_names)
    problems = [f"prompt_template: no column for {{{name}}}; found {names}, text, task" for name in unknown]
    problems += [f"missing column {label}; found {names}"] * (label not in data.column_names)
    raise_all(problems, where)
    check_columns(data, [*fields, label], where)
    answers = _worded(label_names(data, label, where), words, where)
    space = "" if template[-1:].isspace() else " "
    values = {name: _values(data, where, name) for name in fields}
    prompts = []
    for row in range(len(answers)):
        filled = {name: column[row] for name, column in values.items()}
        if filled and not any(filled.values()):
            raise InputError(f"{where}: column {', '.join(filled)} must hold text, row {row} holds none")
        try:
            prompts.append(template.format(**filled | {"task": task, "text": filled.get(text)}))
        except (ValueError, LookupError, AttributeError) as error:
            raise InputError(f"prompt_template {template!r}: {error}; a place is {{column}} alone") from error
    return Rows(prompts, [space + answer for answer in answers], Places.of(where, len(prompts)))


def _values(data: Table, where: str, column: str) -> list[str]:
    """A column of the template as text, "" where it is empty; the names of a ClassLabel."""
    values = enumerate(cells(data, column, where))
    return [as_text("" if value is None else value, where, row, column, empty=True) for row, value in values]


def _worded(labels: list[str], words: Mapping | None, where: str) -> list[str]:
    """The words that stand for each label; the labels themselves without `words`."""
    if words is None:
        return labels
    named = {spelled(label, labels): str(word) for label, word in words.items()}
    lacking = sorted(set(labels) - set(named))
    if lacking:
        raise InputError(f"{where}: answers: no words for {', '.join(lacking[:5])}; found {', '.join(named)}")
    return [named[label] for label in labels]


def _conversations(data: Table, where: str) -> Rows:
    prompts: list[Prompt] = []
    answers: list[str] = []
    numbers: list[int] = []
    tools = _tools(data, where)
    for row, cell in enumerate(cells(data, "messages", where)):
        if cell is not None and not isinstance(cell, list):
            raise InputError(f"{where}: column messages must hold a list of messages, row {row} holds {cell!r:.80}")
        messages = chat.conversation(cell or [], where, row, "messages")
        turns = [at for at, message in enumerate(messages) if at and message["role"] == "assistant"]
        if not turns:
            raise InputError(f"{where}: the messages of row {row} have no assistant message after another one")
        for at in turns:
            prompt, answer = _turn(messages[:at], messages[at], tools[row], where, row, "messages")
            prompts.append(prompt)
            answers.append(answer)
            numbers.append(row)
    return Rows(prompts, answers, Places([(where, numbers)]))


def _pairs(data: Table, where: str, prompt: str, completion: str) -> Rows:
    columns = _column(data, where, prompt), _column(data, where, completion)
    inputs: list[Prompt] = []
    texts, tools = [], _tools(data, where)
    for row, (before, after) in enumerate(zip(*columns, strict=True)):
        message = _completing(after, where, row, completion)
        if isinstance(before, list) and before:
            made = _turn(chat.conversation(before, where, row, prompt), message, tools[row], where, row, completion)
        else:
            text, more = chat.completion_of(message)
            if more:
                keys = ", ".join(more)
                raise InputError(
                    f"{where}: column {completion}, row {row} holds {keys}; column {prompt} must be messages too, then"
                )
            made = as_text(before, where, row, prompt, empty=True), text
        inputs.append(made[0])
        texts.append(made[1])
    return Rows(inputs, texts, Places.of(where, len(texts)))


def _completing(cell: Any, where: str, row: int, column: str) -> dict[str, Any]:
    """The message of a completion: text, or a list of one."""
    if not isinstance(cell, list):
        return {"role": "assistant", "content": as_text(cell, where, row, column)}
    if len(cell) != 1:
        raise InputError(
            f"{where}: column {column} must hold text, row {row} holds {len(cell)} messages; one completes a prompt, a "
            "column messages holds more"
        )
    (message,) = chat.conversation(cell, where, row, column)
    return message


def _turn(
    before: chat.Messages, message: dict[str, Any], tools: list | None, where: str, row: int, column: str
) -> tuple[Prompt, str]:
    """(prompt, completion) of a message after others; InputError where it says nothing."""
    text, answer = chat.completion_of(message)
    if not answer:
        as_text(text, where, row, column)
    return chat.prompt_of(before, tools, answer), text


def _tools(data: Table, where: str) -> list[list | None]:
    """The column `tools` that stands beside messages."""
    if "tools" not in data.column_names:
        return [None] * len(data)
    check_columns(data, ["tools"], where)
    return [chat.tools_of(value, where, row) for row, value in enumerate(cells(data, "tools", where))]


def _column(data: Table, where: str, name: str) -> list[Any]:
    check_columns(data, [name], where)
    return cells(data, name, where)
