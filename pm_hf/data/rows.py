"""Rows of a task: inputs and what is to be said of each; the encoders turn them into batches."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """inputs: texts, pictures (`pm_hf.data.images.Pictures`) or prompts (text, or a list of chat messages).

    labels: the class name of each row; for language models the completion. Plain text is a completion of "".
    """

    inputs: Any  # a sequence
    labels: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Iterable[int]) -> "Rows":
        """The rows with these indices, in this order."""
        kept = list(indices)
        select = getattr(self.inputs, "select", None)
        return Rows(select(kept) if select else [self.inputs[i] for i in kept], [self.labels[i] for i in kept])

    def with_rows(self, others: "Rows") -> "Rows":
        """These rows, then the others."""
        if not len(self) or not len(others):
            return self if len(self) else others
        joined = getattr(self.inputs, "joined", None)
        inputs = joined(others.inputs) if joined else [*self.inputs, *others.inputs]
        return Rows(inputs, self.labels + others.labels)

    def content(self) -> bytes:
        """Bytes that change when a row changes."""
        digest = getattr(self.inputs, "digest", None)
        return json.dumps([digest() if digest else list(self.inputs), self.labels]).encode()


class Examples(Protocol):
    """What a Trainer can take for a data set: a sequence of dicts."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def __getitem__(self, index: int, /) -> dict:
        """One example."""
        ...


class Encoder(Protocol):
    """What turns rows into batches, one for each kind of stream.

    `labels` are the classes in row order of the head; language models do not use them. An example's own "labels" is
    its class's index, or its target token ids with -100 where nothing is predicted.
    """

    def training(self, rows: Rows, labels: Sequence[str]) -> Examples:
        """Examples to train on, augmentation included."""
        ...

    def examples(self, rows: Rows, labels: Sequence[str]) -> Examples:
        """The same rows without augmentation."""
        ...

    def collate(self, examples: list[dict]) -> dict[str, Tensor]:
        """A padded batch."""
        ...
