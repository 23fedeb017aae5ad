"""The kinds of stream: what each one loads, reads and publishes, one row a kind.

Whoever asks what a kind is reads it here: models, data, cards and the rules between settings. A new kind is a row, an
encoder in `data/encoders.py` and, where it is judged by something new, its scores in `measuring`. Classes stand as
texts, so that this imports nothing.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class StreamKind:
    """One kind of stream.

    auto_model: class of transformers that loads the model. task_type: PEFT's name for the task, None where it has none.
    pipeline: the task's name on the Hub. rows: what a row holds, and so how it is read. has_head: whether the model has
    a classification head (otherwise it is a language model). settings: those of `stream` that only kinds which name
    them have a use for.
    """

    auto_model: str
    task_type: str | None
    pipeline: str
    rows: Literal["texts", "pictures", "prompts"]
    has_head: bool
    settings: tuple[str, ...] = ()


_PROMPT_SETTINGS = ("prompt_template", "answers", "held_out")

STREAM_KINDS: dict[str, StreamKind] = {
    "text-classification": StreamKind(
        "AutoModelForSequenceClassification", "SEQ_CLS", "text-classification", "texts", has_head=True
    ),
    "image-classification": StreamKind(
        "AutoModelForImageClassification",
        None,
        "image-classification",
        "pictures",
        has_head=True,
        settings=("augmentation", "image_column"),
    ),
    "causal-lm": StreamKind(
        "AutoModelForCausalLM", "CAUSAL_LM", "text-generation", "prompts", has_head=False, settings=_PROMPT_SETTINGS
    ),
    "seq2seq-lm": StreamKind(
        "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM", "text-generation", "prompts", has_head=False, settings=_PROMPT_SETTINGS
    ),
}
