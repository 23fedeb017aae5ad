"""Which test rows a model got right, so that two models are compared row by row."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RightRows:
    """Of one task. rows: digest of its test rows; count: how many; bits: one for each, the first row's first, packed
    into bytes and written in hexadecimal; 1: right among all classes, or answers, seen."""

    rows: str
    count: int
    bits: str

    @classmethod
    def of(cls, right: Sequence[bool], rows: str) -> "RightRows":
        """Of one truth value for each row."""
        return cls(rows, len(right), np.packbits(np.asarray(right, dtype=bool)).tobytes().hex())

    def mask(self) -> np.ndarray:
        """Whether each row is right: bool, (count,)."""
        return np.unpackbits(np.frombuffer(bytes.fromhex(self.bits), np.uint8), count=self.count).astype(bool)


def same_rows(left: Mapping[str, RightRows], right: Mapping[str, RightRows]) -> bool:
    """Whether both are of the same test rows of the same tasks, at least one."""
    return bool(left) and {task: of.rows for task, of in left.items()} == {task: of.rows for task, of in right.items()}


def paired_difference(left: Mapping[str, RightRows], right: Mapping[str, RightRows]) -> tuple[float, float]:
    """(difference of the mean accuracies over tasks, its standard error) from the differences of the same rows.

    With dᵢ ∈ {-1, 0, 1} in the n rows of a task the error is √(Σ_tasks var(d)/n) / tasks: rows that both get right, or
    both wrong, add nothing to it (McNemar, Psychometrika 12, 1947).
    """
    gaps = [of.mask().astype(float) - right[task].mask() for task, of in left.items()]
    error = math.sqrt(sum(float(gap.var()) / len(gap) for gap in gaps)) / len(gaps)
    return sum(float(gap.mean()) for gap in gaps) / len(gaps), error


def discordant(left: Mapping[str, RightRows], right: Mapping[str, RightRows]) -> tuple[int, int]:
    """(rows that only the left one gets right, rows that only the right one does), over all tasks."""
    pairs = [(of.mask(), right[task].mask()) for task, of in left.items()]
    return sum(int((a & ~b).sum()) for a, b in pairs), sum(int((b & ~a).sum()) for a, b in pairs)
