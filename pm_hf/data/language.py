"""Prompts and completions: reading them from a data set, and making token batches of them."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from string import Formatter
from typing import Any

import torch
from datasets import ClassLabel, Dataset
from torch import Tensor

from pm_hf.data.columns import as_text, check_columns, label_names
from pm_hf.data.rows import Rows
from pm_hf.errors import InputError, raise_all
from pm_hf.models.language_model import IGNORED

Prompt = str | list[dict[str, str]]


def language_rows(
    data: Dataset,
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
    named): text, or messages. Else plain text: the text column completes the empty prompt.
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
    texts = _column(data, where, column)
    return Rows([""] * len(texts), [as_text(value, where, row, column) for row, value in enumerate(texts)])


class _PromptEncoder(ABC):
    """What the encoders of prompts and completions share: an example of each row, and how many were `cut`."""

    tokenizer: Any
    cut: int

    def training(self, rows: Rows, labels: Sequence[str] = ()) -> list[dict]:
        """Same as `examples`."""
        return self.examples(rows, labels)

    def examples(self, rows: Rows, labels: Sequence[str] = ()) -> list[dict]:
        """{"input_ids", "labels" (not shifted), "bytes": UTF-8 bytes of the completion that is kept} of each row."""
        self.cut = 0
        return [self._example(prompt, text) for prompt, text in zip(rows.inputs, rows.labels, strict=True)]

    def ends(self, rows: Rows) -> set[int]:
        """Token ids that end a completion: eos, and the special token that ends a turn of the chat template."""
        added = self.tokenizer.added_tokens_decoder
        last = {ids[-1] for ids in self.completions(rows) if ids}
        return {self.tokenizer.eos_token_id} | {token for token in last if token in added and added[token].special}

    def completions(self, rows: Rows) -> Iterator[list[int]]:
        """Token ids of each row's completion, its end included."""
        return (self.completion(prompt, text) for prompt, text in zip(rows.inputs, rows.labels, strict=True))

    @abstractmethod
    def completion(self, prompt: Prompt, text: str) -> list[int]:
        """Token ids of a completion, its end included."""

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

    def collate(self, examples: list[dict]) -> dict[str, Tensor]:
        """input_ids, attention_mask, labels, (N, T), padded on the right."""
        return self.padded([e["input_ids"] for e in examples], [e["labels"] for e in examples])

    def padded(self, ids: list[list[int]], labels: list[list[int]], *, left: bool = False) -> dict[str, Tensor]:
        """Sequences of token ids and of labels as one batch."""
        mask = [[1] * len(row) for row in ids]
        columns = {"input_ids": (ids, self.pad), "attention_mask": (mask, 0), "labels": (labels, IGNORED)}
        return {name: pad_rows(rows, value, left=left) for name, (rows, value) in columns.items()}

    def prompt(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt as it stands before its completion."""
        if not isinstance(prompt, str):
            return self._ids(self._rendered(prompt, add_generation_prompt=True))
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
        before = self._rendered(prompt, add_generation_prompt=True)
        whole = self._rendered([*prompt, {"role": "assistant", "content": text}], add_generation_prompt=False)
        if not whole.startswith(before):
            raise InputError(
                "the chat template renders a conversation otherwise than its beginning, so a completion has no tokens "
                "of its own; use prompt and completion columns with text"
            )
        return self._ids(whole[len(before) :].rstrip("\n"))

    def fitted(self, prompt: list[int], room: int) -> list[int]:
        """The right of a prompt that leaves room for a completion, with bos where it began with it."""
        most = max(self.max_length - room, 1)
        if len(prompt) <= most:
            return prompt
        begins = most > 1 and prompt[0] == self.tokenizer.bos_token_id
        return [prompt[0], *prompt[-(most - 1) :]] if begins else prompt[-most:]

    def _example(self, prompt: Prompt, text: str) -> dict:
        before, after = self.prompt(prompt), self.completion(prompt, text)
        target, size = after[: self.max_length - 1], len(text.encode())
        if len(target) < len(after):
            size = min(size, _bytes(self.tokenizer, text, target))
        source = self.fitted(before, len(target))
        self.cut += len(target) < len(after) or len(source) < len(before)
        return {"input_ids": source + target, "labels": [IGNORED] * len(source) + target, "bytes": size}

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _rendered(self, messages: Sequence[Mapping], *, add_generation_prompt: bool) -> str:
        if not self.tokenizer.chat_template:
            raise InputError("the tokenizer has no chat template; use prompt and completion columns with text")
        settings = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        return str(self.tokenizer.apply_chat_template(list(messages), **settings))


class Seq2SeqEncoder(_PromptEncoder):
    """The prompt is the encoder's input, the completion and its end are what the decoder predicts.

    Both are cut on the right to `max_length` tokens, the end included. `cut` counts the rows of the last call that
    lost something.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length, self.cut = tokenizer, _two_tokens(max_length), 0
        self.pad = tokenizer.pad_token_id or 0

    def collate(self, examples: list[dict]) -> dict[str, Tensor]:
        """input_ids and attention_mask (N, T) of the encoder, labels (N, U) of the decoder, padded on the right."""
        ids = [example["input_ids"] for example in examples]
        mask = [[1] * len(row) for row in ids]
        columns = {"input_ids": (ids, self.pad), "attention_mask": (mask, 0)}
        columns["labels"] = ([example["labels"] for example in examples], IGNORED)
        return {name: pad_rows(rows, value) for name, (rows, value) in columns.items()}

    def prompt(self, prompt: Prompt) -> list[int]:
        """Token ids of the encoder's input."""
        return self._fitted(self._prompt(prompt))

    def completion(self, prompt: Prompt, text: str) -> list[int]:
        """Token ids of the decoder's target, its end included."""
        return self._fitted(self._target(text))

    def _example(self, prompt: Prompt, text: str) -> dict:
        source, target = self._prompt(prompt), self._target(text)
        ids, labels, size = self._fitted(source), self._fitted(target), len(text.encode())
        if len(labels) < len(target):
            size = min(size, _bytes(self.tokenizer, text, labels[: len(labels) - self._ends(labels)]))
        self.cut += len(ids) < len(source) or len(labels) < len(target)
        return {"input_ids": ids, "labels": labels, "bytes": size}

    def _prompt(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            raise InputError("chat messages need stream.kind causal-lm; use prompt and completion columns with text")
        return list(self.tokenizer(prompt, verbose=False)["input_ids"])

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
    data: Dataset, where: str, *, text: str, label: str, template: str, words: Mapping | None, task: str
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
    answers = _worded(_answers(data, where, label), words, where)
    space = "" if template[-1:].isspace() else " "
    values = {name: _values(data, where, name) for name in fields}
    prompts = []
    for row in range(len(answers)):
        filled = {name: column[row] for name, column in values.items()}
        if filled and not any(filled.values()):
            raise InputError(f"{where}: column {', '.join(filled)} must hold text, row {row} holds none")
        prompts.append(template.format(**filled | {"task": task, "text": filled.get(text)}))
    return Rows(prompts, [space + answer for answer in answers])


def _values(data: Dataset, where: str, column: str) -> list[str]:
    """A column of the template as text, "" where it is empty; the names of a ClassLabel."""
    if isinstance(data.features[column], ClassLabel):
        return label_names(data, column, where)
    values = enumerate(data[column])
    return [as_text("" if value is None else value, where, row, column, empty=True) for row, value in values]


def _worded(labels: list[str], words: Mapping | None, where: str) -> list[str]:
    """The words that stand for each label; the labels themselves without `words`."""
    if words is None:
        return labels
    named = {str(label): str(word) for label, word in words.items()}
    lacking = sorted(set(labels) - set(named))
    if lacking:
        raise InputError(f"{where}: answers: no words for {', '.join(lacking[:5])}; found {', '.join(named)}")
    return [named[label] for label in labels]


def _answers(data: Dataset, where: str, column: str) -> list[str]:
    """The labels as text; the names of a ClassLabel."""
    names = label_names(data, column, where)
    if isinstance(data.features[column], ClassLabel):
        return names
    return [as_text(value, where, row, column) for row, value in enumerate(data[column])]


def _conversations(data: Dataset, where: str) -> Rows:
    prompts: list[Prompt] = []
    answers = []
    for row, messages in enumerate(data["messages"]):
        turns = [at for at, message in enumerate(messages or []) if at and message["role"] == "assistant"]
        if not turns:
            raise InputError(f"{where}: the messages of row {row} have no assistant message after another one")
        for at in turns:
            prompts.append(_chat(messages[:at], where, row, "messages"))
            answers.append(as_text(messages[at]["content"], where, row, "messages"))
    return Rows(prompts, answers)


def _pairs(data: Dataset, where: str, prompt: str, completion: str) -> Rows:
    prompts, answers = _column(data, where, prompt), _column(data, where, completion)
    if isinstance(data.features[completion], ClassLabel):
        answers = label_names(data, completion, where)
    inputs: list[Prompt] = []
    texts = []
    for row, (before, after) in enumerate(zip(prompts, answers, strict=True)):
        chat = isinstance(before, list) and before
        inputs.append(_chat(before, where, row, prompt) if chat else as_text(before, where, row, prompt, empty=True))
        after = after[0]["content"] if isinstance(after, list) and len(after) == 1 else after
        texts.append(as_text(after, where, row, completion))
    return Rows(inputs, texts)


def _chat(messages: Sequence[Mapping], where: str, row: int, column: str) -> list[dict[str, str]]:
    return [{"role": m["role"], "content": as_text(m["content"], where, row, column, empty=True)} for m in messages]


def _column(data: Dataset, where: str, name: str) -> list[Any]:
    check_columns(data, [name], where)
    return list(data[name])
