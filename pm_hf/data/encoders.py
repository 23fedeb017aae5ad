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
from pm_hf.models.loading import load_image_processor, load_tokenizer


class TextEncoder:
    """Texts and their class, tokenised, cut to `max_length` tokens, padded to the longest of a batch."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self._pad = DataCollatorWithPadding(tokenizer)

    def training(self, rows: Rows, labels: Sequence[str]) -> list[dict]:
        """Same as `examples`."""
        return self.examples(rows, labels)

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
    return ImageEncoder(load_image_processor(config.model), config.stream.augmentation, config.seed)


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
    """Encode the first of each rows; InputError where the tokenizer cannot (no chat template, messages for a T5)."""
    if isinstance(encoder, CausalEncoder | Seq2SeqEncoder):
        for some in rows:
            encoder.examples(some.take(range(min(1, len(some)))))


def check_length(config: RunConfig, model: Any) -> None:
    """InputError where texts of `max_length` tokens have more positions than the model (a transformers config) has."""
    positions, length = getattr(model, "max_position_embeddings", None), config.stream.max_length
    if config.kind.rows != "pictures" and positions is not None and length > positions:
        raise InputError(f"stream.max_length {length} is more than the {positions} positions of {config.model.base}")
