"""Prompts and completions: reading them from a data set, and making token batches of them."""

from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Any

import torch
from datasets import ClassLabel, Dataset
from torch import Tensor

from pm_hf.errors import InputError, raise_all
from pm_hf.rows import Rows

IGNORED = -100  # label of a position where nothing is predicted
Prompt = str | list[dict[str, str]]


def language_rows(
    data: Dataset,
    where: str,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    prompt_template: str | None = None,
    task: str = "",
) -> Rows:
    """Prompts and completions of a data set, by the columns that it has:

    `prompt_template`, filled with any of its columns, {text} (the text column) and {task}: completed by the label, with
    a space between where the template does not end in white space. `messages` (chat): every assistant message
    completes what stands before it, one row each. `prompt` and `completion` (or the two columns named): text, or
    messages. Else plain text: the text column completes the empty prompt.
    """
    names = data.column_names
    if prompt_template is not None:
        return _templated(data, where, text_column or "text", label_column or "label", prompt_template, task)
    if text_column is None and "messages" in names:
        return _conversations(data, where)
    if (text_column is None and {"prompt", "completion"} <= set(names)) or label_column is not None:
        return _pairs(data, where, text_column or "prompt", label_column or "completion")
    texts = _column(data, where, text_column or "text")
    return Rows([""] * len(texts), [_text(value, where, row) for row, value in enumerate(texts)])


class CausalEncoder:
    """Tokens of a prompt and its completion; only the completion and its end are predicted.

    A text prompt has the tokens that it has alone; nothing is put between the two, and the completion ends with eos.
    The empty prompt is bos (or eos). Chat prompts are rendered by the tokenizer's chat template, and the completion
    ends as the template ends a turn. What is longer than `max_length` tokens loses the left of the prompt first, then
    the right of the completion. `cut` counts the rows that lost something.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length, self.cut = tokenizer, max_length, 0
        if tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has no end-of-text token (eos_token); set one")
        self.pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def training(self, rows: Rows, labels: Sequence[str] = ()) -> list[dict]:
        """Same as `examples`."""
        return self.examples(rows, labels)

    def examples(self, rows: Rows, labels: Sequence[str] = ()) -> list[dict]:
        """{"input_ids", "labels" (not shifted), "bytes": UTF-8 bytes of the completion that is kept} of each row."""
        self.cut = 0
        return [self._example(prompt, text) for prompt, text in zip(rows.inputs, rows.labels, strict=True)]

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
        ids = list(self.tokenizer(prompt)["input_ids"])
        if ids and ids[-1] == self.tokenizer.eos_token_id and prompt:
            ids = ids[:-1]
        start = self.tokenizer.bos_token_id
        return ids or [self.tokenizer.eos_token_id if start is None else start]

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
        kept, size = after[: self.max_length - 1], len(text.encode())
        if len(kept) < len(after):
            size = len(self.tokenizer.decode(kept, skip_special_tokens=True).encode())
        left = self.fitted(before, len(kept))
        self.cut += len(kept) < len(after) or len(left) < len(before)
        return {"input_ids": left + kept, "labels": [IGNORED] * len(left) + kept, "bytes": size}

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _rendered(self, messages: Sequence[Mapping], *, add_generation_prompt: bool) -> str:
        if not self.tokenizer.chat_template:
            raise InputError("the tokenizer has no chat template; use prompt and completion columns with text")
        settings = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        return str(self.tokenizer.apply_chat_template(list(messages), **settings))


class Seq2SeqEncoder:
    """The prompt is the encoder's input, the completion and its end are what the decoder predicts.

    Both are cut on the right to `max_length` tokens.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.pad = tokenizer.pad_token_id or 0

    def training(self, rows: Rows, labels: Sequence[str] = ()) -> list[dict]:
        """Same as `examples`."""
        return self.examples(rows, labels)

    def examples(self, rows: Rows, labels: Sequence[str] = ()) -> list[dict]:
        """{"input_ids", "labels", "bytes": UTF-8 bytes of the completion that is kept} of each row."""
        return [self._example(prompt, text) for prompt, text in zip(rows.inputs, rows.labels, strict=True)]

    def collate(self, examples: list[dict]) -> dict[str, Tensor]:
        """input_ids and attention_mask (N, T) of the encoder, labels (N, U) of the decoder, padded on the right."""
        ids = [example["input_ids"] for example in examples]
        mask = [[1] * len(row) for row in ids]
        columns = {"input_ids": (ids, self.pad), "attention_mask": (mask, 0)}
        columns["labels"] = ([example["labels"] for example in examples], IGNORED)
        return {name: pad_rows(rows, value) for name, (rows, value) in columns.items()}

    def prompt(self, prompt: Prompt) -> list[int]:
        """Token ids of the encoder's input."""
        if not isinstance(prompt, str):
            raise InputError("chat messages need stream.kind causal-lm; use prompt and completion columns with text")
        return list(self.tokenizer(prompt, truncation=True, max_length=self.max_length)["input_ids"])

    def completion(self, prompt: Prompt, text: str) -> list[int]:
        """Token ids of the decoder's target, its end included."""
        return list(self.tokenizer(text_target=text, truncation=True, max_length=self.max_length)["input_ids"])

    def _example(self, prompt: Prompt, text: str) -> dict:
        target = self.completion(prompt, text)
        whole = len(target) < self.max_length
        size = len((text if whole else self.tokenizer.decode(target, skip_special_tokens=True)).encode())
        return {"input_ids": self.prompt(prompt), "labels": target, "bytes": size}


def pad_rows(rows: Sequence[Sequence[int]], value: int, *, left: bool = False) -> Tensor:
    """Rows of unequal length as one (N, T) tensor."""
    longest = max(len(row) for row in rows)
    filled = [[value] * (longest - len(row)) for row in rows]
    return torch.tensor([[*fill, *row] if left else [*row, *fill] for row, fill in zip(rows, filled, strict=True)])


def _templated(data: Dataset, where: str, text: str, label: str, template: str, task: str) -> Rows:
    asked = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    fields = [text if name == "text" else name for name in asked if name != "task"]
    unknown = [name for name in fields if name not in data.column_names]
    found = ", ".join(data.column_names)
    problems = [f"prompt_template: no column for {{{name}}}; found {found}, text, task" for name in unknown]
    problems += [f"missing column {label}; found {found}"] * (label not in data.column_names)
    raise_all(problems, where)
    answers = _answers(data, where, label)
    space = "" if template[-1:].isspace() else " "
    columns = {name: list(data[name]) for name in dict.fromkeys(fields)}
    prompts = []
    for row in range(len(answers)):
        filled = {name: _text(values[row], where, row, name) for name, values in columns.items()}
        prompts.append(template.format(**filled | {"task": task} | ({"text": filled[text]} if text in filled else {})))
    return Rows(prompts, [space + answer for answer in answers])


def _answers(data: Dataset, where: str, column: str) -> list[str]:
    feature, values = data.features[column], list(data[column])
    if isinstance(feature, ClassLabel):
        hidden = [row for row, value in enumerate(values) if value is None or not 0 <= value < feature.num_classes]
        if hidden:
            raise InputError(f"{where}: column {column} holds no class in row {hidden[0]}; hidden labels?")
        return [str(feature.int2str(value)) for value in values]
    found = ["" if value is None else str(value) for value in values]
    if "" in found:
        raise InputError(f"{where}: column {column} is empty in row {found.index('')}")
    return found


def _conversations(data: Dataset, where: str) -> Rows:
    prompts: list[Prompt] = []
    answers = []
    for row, messages in enumerate(data["messages"]):
        found = [at for at, message in enumerate(messages or []) if at and message["role"] == "assistant"]
        if not found:
            raise InputError(f"{where}: the messages of row {row} have no assistant message after another one")
        for at in found:
            prompts.append([{"role": m["role"], "content": m["content"]} for m in messages[:at]])
            answers.append(_text(messages[at]["content"], where, row, "messages"))
    return Rows(prompts, answers)


def _pairs(data: Dataset, where: str, prompt: str, completion: str) -> Rows:
    prompts, answers = _column(data, where, prompt), _column(data, where, completion)
    if isinstance(data.features[completion], ClassLabel):
        answers = _answers(data, where, completion)
    inputs: list[Prompt] = []
    texts = []
    for row, (before, after) in enumerate(zip(prompts, answers, strict=True)):
        chat = isinstance(before, list)
        inputs.append([dict(message) for message in before] if chat else _text(before, where, row, prompt, empty=True))
        after = after[0]["content"] if isinstance(after, list) and len(after) == 1 else after
        texts.append(_text(after, where, row, completion))
    return Rows(inputs, texts)


def _column(data: Dataset, where: str, name: str) -> list[Any]:
    if name not in data.column_names:
        raise InputError(f"{where}: missing column {name}; found {', '.join(data.column_names)}")
    return list(data[name])


def _text(value: Any, where: str, row: int, column: str = "text", *, empty: bool = False) -> str:
    if isinstance(value, bool | int | float):
        return str(value)
    if not isinstance(value, str) or not (value or empty):
        raise InputError(f"{where}: column {column} must hold text, row {row} holds {value!r}")
    return value
