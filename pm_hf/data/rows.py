"""Rows of a task: inputs and what is to be said of each; the encoders turn them into batches."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Places:
    """Where rows stand: (file or data set, numbers of its rows) of one part after the other."""

    parts: Sequence[tuple[str, Sequence[int]]] = ()

    @classmethod
    def of(cls, where: str, count: int) -> "Places":
        """All rows of one file."""
        return cls([(where, range(count))])

    def name(self, index: int) -> str:
        """The place of a row in words."""
        for where, numbers in self.parts:
            if index < len(numbers):
                return f"{where}, row {numbers[index]}"
            index -= len(numbers)
        return f"row {index}"

    def take(self, indices: Sequence[int]) -> "Places":
        """The places of the rows with these indices, in this order."""
        if len(self.parts) == 1:
            where, numbers = self.parts[0]
            return Places([(where, [numbers[i] for i in indices])])
        flat = [(where, number) for where, numbers in self.parts for number in numbers]
        taken = groupby([flat[i] for i in indices] if flat else [], key=lambda place: place[0])
        return Places([(where, [number for _, number in places]) for where, places in taken])


@dataclass(frozen=True)
class Rows:
    """inputs: texts, pictures (`pm_hf.data.images.Pictures`) or prompts (text, messages, or `pm_hf.data.chat.Chat`).

    labels: the class name of each row; for language models the completion. Plain text is a completion of "".
    places: what messages call the rows, where that is known.
    """

    inputs: Any  # a sequence
    labels: list[str]
    places: Places = field(default_factory=Places, compare=False)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Iterable[int]) -> "Rows":
        """The rows with these indices, in this order."""
        kept = list(indices)
        select = getattr(self.inputs, "select", None)
        inputs = select(kept) if select else [self.inputs[i] for i in kept]
        return Rows(inputs, [self.labels[i] for i in kept], self.places.take(kept))

    def with_rows(self, others: "Rows") -> "Rows":
        """These rows, then the others."""
        if not len(self) or not len(others):
            return self if len(self) else others
        joined = getattr(self.inputs, "joined", None)
        inputs = joined(others.inputs) if joined else [*self.inputs, *others.inputs]
        known = self.places.parts and others.places.parts
        places = Places([*self.places.parts, *others.places.parts] if known else [])
        return Rows(inputs, self.labels + others.labels, places)

    def content(self) -> bytes:
        """Bytes that change when a row changes."""
        digest = getattr(self.inputs, "digest", None)
        return json.dumps([digest() if digest else list(self.inputs), self.labels], default=str).encode()


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
