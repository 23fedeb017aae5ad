"""The encoder of each kind of stream: what turns its rows into batches."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.data.data_collator import pad_without_fast_tokenizer_warning

from pm_hf.config.schema import RunConfig
from pm_hf.data.images import ImageEncoder
from pm_hf.data.language import CausalEncoder, Seq2SeqEncoder
from pm_hf.data.rows import Encoder, Rows
from pm_hf.errors import InputError
from pm_hf.models.loading import load_image_processor, load_tokenizer
from pm_hf.models.released import vocabulary_size
from pm_hf.models.sharded import transformer_of

CHECKED_TOGETHER = 1000  # rows


class TextEncoder:
    """Texts and their class, tokenised, cut to `max_length` tokens, padded to the longest of a batch.

    Padding stands on the right, whatever the tokenizer says, so that a row's positions do not depend on its batch. A
    tokenizer without a pad token pads with its end-of-text token, else with the first special token that it has.
    `cut` counts the rows of the last call that lost something.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length, self.cut = tokenizer, max_length, 0
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = _token_for_padding(tokenizer)

    def training(self, rows: Rows, labels: Sequence[str]) -> list[dict]:
        """Same as `examples`."""
        return self.examples(rows, labels)

    def texts(self, text: str, label: str) -> tuple[str]:
        """What the tokenizer is given for a row."""
        return (text,)

    def examples(self, rows: Rows, labels: Sequence[str]) -> list[dict]:
        """Token ids of each row, and `labels` as its class's index in `labels`."""
        index = {label: i for i, label in enumerate(labels)}
        texts = list(rows.inputs)
        tokens = self.tokenizer(texts, truncation=True, max_length=self.max_length)
        columns = list(tokens.keys())
        full = [text for text, ids in zip(texts, tokens["input_ids"], strict=True) if len(ids) >= self.max_length]
        whole = self.tokenizer(full, verbose=False)["input_ids"] if full else []
        self.cut = sum(len(ids) > self.max_length for ids in whole)
        return [
            {**{key: tokens[key][i] for key in columns}, "labels": index[label]} for i, label in enumerate(rows.labels)
        ]

    def collate(self, examples: list[dict]) -> dict[str, Tensor]:
        """A padded batch."""
        settings = {"padding_side": "right", "return_tensors": "pt"}
        return dict(pad_without_fast_tokenizer_warning(self.tokenizer, examples, **settings))


def _token_for_padding(tokenizer: Any) -> str:
    """What takes the place of the pad token that a tokenizer lacks; InputError where it has no special token."""
    for name in ("eos_token", "unk_token", "bos_token", "sep_token", "cls_token", "mask_token"):
        if (token := getattr(tokenizer, name, None)) is not None:
            return str(token)
    raise InputError(
        f"the tokenizer {tokenizer.name_or_path} has neither a pad token nor another special token to make a batch of "
        'texts of unequal length; name one in its tokenizer_config.json: "pad_token"'
    )


def match_padding(model: Any, encoder: Encoder) -> None:
    """Tell a classifier of texts with which token the encoder pads: decoders classify by the last token before it."""
    if isinstance(encoder, TextEncoder):
        config = transformer_of(model).config
        for part in (config, config.get_text_config()):
            part.pad_token_id = encoder.tokenizer.pad_token_id


def _of_tokens(encoder: Callable[[Any, int], Encoder]) -> Callable[[RunConfig, Sequence[Path]], Encoder]:
    """How an encoder that takes the tokenizer and the longest length is made."""
    return lambda config, adapters: encoder(load_tokenizer(config.model, adapters), config.stream.max_length)


def _of_pictures(config: RunConfig, _: Sequence[Path]) -> Encoder:
    return ImageEncoder(load_image_processor(config.model), config.stream.augmentation, config.seed)


ENCODERS: dict[str, Callable[[RunConfig, Sequence[Path]], Encoder]] = {
    "text-classification": _of_tokens(TextEncoder),
    "image-classification": _of_pictures,
    "causal-lm": _of_tokens(CausalEncoder),
    "seq2seq-lm": _of_tokens(Seq2SeqEncoder),
}


def make_encoder(config: RunConfig, adapter: Path | None = None) -> Encoder:
    """The encoder of the config's kind, with the checkpoint's own image processor or tokenizer.

    A tokenizer that stands beside `adapter`, or else beside the adapter that the run starts from, is theirs and goes
    before the checkpoint's: their embeddings have its tokens.
    """
    start = None if config.start_from is None else Path(config.start_from).expanduser()
    return ENCODERS[config.stream.kind](config, [folder for folder in (adapter, start) if folder is not None])


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
    """InputError where texts of `max_length` tokens have more positions than the model has."""
    positions, length = _positions(model), config.stream.max_length
    if config.kind.rows != "pictures" and positions is not None and length > positions:
        raise InputError(f"stream.max_length {length} is more than the {positions} positions of {config.model.base}")


def _positions(model: nn.Module) -> int | None:
    """Tokens that a transformers model has positions for: RoBERTa and its kin leave out their table's first rows."""
    positions: int | None = getattr(model.config, "max_position_embeddings", None)
    for name, table in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(table, nn.Embedding) and table.padding_idx is not None:
            rows = table.num_embeddings - table.padding_idx - 1
            positions = rows if positions is None else min(positions, rows)
    return positions


def check_tokens(encoder: Encoder, model: Any) -> None:
    """InputError where the tokenizer has tokens that the model (a transformers model) has no embedding of."""
    tokenizer, rows = getattr(encoder, "tokenizer", None), vocabulary_size(model)
    if tokenizer is not None and rows is not None and len(tokenizer) > rows:
        raise InputError(
            f"the tokenizer {tokenizer.name_or_path} has {len(tokenizer)} tokens, the embeddings have {rows} rows; use "
            "the tokenizer that the model was trained with"
        )
