"""The kinds of stream: what each one loads, reads and publishes, one row a kind.

Whoever asks what a kind is reads it here: models, data, cards and the rules between settings. A new kind is a row, an
encoder in `data/encoders.py` and, where it is judged by something new, its scores in `measuring`. Classes stand as
texts, so that this imports nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class StreamKind:
    """One kind of stream.

    auto_model: class of transformers that loads the model. task_type: PEFT's name for the task, None where it has none.
    pipeline: the task's name on the Hub. rows: what a row holds, and so how it is read. has_head: whether the model has
    a classification head (otherwise it is a language model). settings: those of `stream` that only kinds which name
    them have a use for. method: what stands for `method:` where a YAML has none. training: what stands for a learning
    rate and what goes with it, and for the epochs. They are chosen on held-out training rows (results/defaults).
    """

    auto_model: str
    task_type: str | None
    pipeline: str
    rows: Literal["texts", "pictures", "prompts"]
    has_head: bool
    method: str
    training: Mapping[str, float | str]
    settings: tuple[str, ...] = ()


_CLASSIFIERS_TRAINING: dict[str, float | str] = {
    "learning_rate": 2e-3,
    "head_learning_rate": 1e-2,
    "lr_scheduler_type": "cosine",
    "per_device_train_batch_size": 16,
    "num_train_epochs": 5,
}
_LANGUAGE_TRAINING: dict[str, float | str] = {
    "learning_rate": 5e-4,
    "lr_scheduler_type": "cosine",
    "per_device_train_batch_size": 8,
    "num_train_epochs": 3,
}
_PROMPT_SETTINGS = ("prompt_template", "answers", "held_out")

STREAM_KINDS: dict[str, StreamKind] = {
    "text-classification": StreamKind(
        "AutoModelForSequenceClassification",
        "SEQ_CLS",
        "text-classification",
        rows="texts",
        has_head=True,
        method="best",
        training=_CLASSIFIERS_TRAINING,
    ),
    "image-classification": StreamKind(
        "AutoModelForImageClassification",
        None,
        "image-classification",
        rows="pictures",
        has_head=True,
        method="best",
        training=_CLASSIFIERS_TRAINING,
        settings=("augmentation", "image_column"),
    ),
    "causal-lm": StreamKind(
        "AutoModelForCausalLM",
        "CAUSAL_LM",
        "text-generation",
        rows="prompts",
        has_head=False,
        method="best",
        training=_LANGUAGE_TRAINING,
        settings=_PROMPT_SETTINGS,
    ),
    "seq2seq-lm": StreamKind(
        "AutoModelForSeq2SeqLM",
        "SEQ_2_SEQ_LM",
        "text-generation",
        rows="prompts",
        has_head=False,
        method="best",
        training=_LANGUAGE_TRAINING,
        settings=_PROMPT_SETTINGS,
    ),
}
