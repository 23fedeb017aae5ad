"""The encoder of each kind of stream: what turns its rows into batches."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from transformers import DataCollatorWithPadding

from pm_hf.config.schema import RunConfig
from pm_hf.data.images import ImageEncoder
from pm_hf.data.language import CausalEncoder, Seq2SeqEncoder
from pm_hf.data.rows import Encoder, Rows
from pm_hf.errors import InputError
from pm_hf.models.loading import load_image_processor, load_tokenizer, resolve_base

CHECKED_TOGETHER = 1000  # rows


class TextEncoder:
    """Texts and their class, tokenised, cut to `max_length` tokens, padded to the longest of a batch."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self._pad = DataCollatorWithPadding(tokenizer)

    def training(self, rows: Rows, labels: Sequence[str]) -> list[dict]:
        """Same as `examples`."""
        return self.examples(rows, labels)

    def texts(self, text: str, label: str) -> tuple[str]:
        """What the tokenizer is given for a row."""
        return (text,)

    def examples(self, rows: Rows, labels: Sequence[str]) -> list[dict]:
        """Token ids of each row, and `labels` as its class's index in `labels`."""
        index = {label: i for i, label in enumerate(labels)}
        tokens = self.tokenizer(list(rows.inputs), truncation=True, max_length=self.max_length)
        columns = list(tokens.keys())
        return [
            {**{key: tokens[key][i] for key in columns}, "labels": index[label]} for i, label in enumerate(rows.labels)
        ]

    def collate(self, examples: list[dict]) -> dict[str, Tensor]:
        """A padded batch."""
        return dict(self._pad(examples))


def _of_tokens(encoder: Callable[[Any, int], Encoder]) -> Callable[[RunConfig], Encoder]:
    """How an encoder that takes the tokenizer and the longest length is made."""
    return lambda config: encoder(load_tokenizer(config.model), config.stream.max_length)


def _of_pictures(config: RunConfig) -> Encoder:
    processor = load_image_processor(resolve_base(config.model.base), config.model.revision)
    return ImageEncoder(processor, config.stream.augmentation, config.seed)


ENCODERS: dict[str, Callable[[RunConfig], Encoder]] = {
    "text-classification": _of_tokens(TextEncoder),
    "image-classification": _of_pictures,
    "causal-lm": _of_tokens(CausalEncoder),
    "seq2seq-lm": _of_tokens(Seq2SeqEncoder),
}


def make_encoder(config: RunConfig) -> Encoder:
    """The encoder of the config's kind, with the checkpoint's own tokenizer or image processor."""
    return ENCODERS[config.stream.kind](config)


def check_encoding(encoder: Encoder, rows: Iterable[Rows]) -> None:
    """Put every row through the chat template and the tokenizer; InputError that names the first which they refuse."""
    if isinstance(encoder, TextEncoder | CausalEncoder | Seq2SeqEncoder):
        for some in rows:
            for start in range(0, len(some), CHECKED_TOGETHER):
                _check_part(encoder, some, range(start, min(start + CHECKED_TOGETHER, len(some))))


def _check_part(encoder: TextEncoder | CausalEncoder | Seq2SeqEncoder, rows: Rows, part: Sequence[int]) -> None:
    texts = [_texts(encoder, rows, index) for index in part]
    try:
        ids = encoder.tokenizer([text for of_row in texts for text in of_row], verbose=False)["input_ids"]
    except Exception as error:  # tokenizers raise plain ones
        for index in part if len(part) > 1 else ():
            _check_part(encoder, rows, [index])
        words = " ".join(str(error).split())[:300]
        raise InputError(
            f"{rows.places.name(part[0])}: the tokenizer refuses the text: {words}; change or remove the row"
        ) from error
    empty = next((index for index, tokens in zip(part, ids, strict=False) if not tokens), None)
    if empty is not None and isinstance(encoder, TextEncoder):
        raise InputError(f"{rows.places.name(empty)}: the text has no token; change or remove the row")


def _texts(encoder: TextEncoder | CausalEncoder | Seq2SeqEncoder, rows: Rows, index: int) -> tuple[str, ...]:
    try:
        return encoder.texts(rows.inputs[index], rows.labels[index])
    except InputError as error:
        raise InputError(f"{rows.places.name(index)}: {error}") from error


def check_length(config: RunConfig, model: Any) -> None:
    """InputError where texts of `max_length` tokens have more positions than the model (a transformers config) has."""
    positions, length = getattr(model, "max_position_embeddings", None), config.stream.max_length
    if config.kind.rows != "pictures" and positions is not None and length > positions:
        raise InputError(f"stream.max_length {length} is more than the {positions} positions of {config.model.base}")
