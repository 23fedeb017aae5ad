"""Columns of a data set as text: the same refusals for labels, texts and prompts."""

from collections.abc import Sequence
from typing import Any

from datasets import ClassLabel, Dataset

from pm_hf.errors import InputError


def check_columns(data: Dataset, columns: Sequence[str], where: str) -> None:
    """InputError that lists the columns which the data set lacks."""
    lacking = [column for column in columns if column not in data.column_names]
    if lacking:
        raise InputError(f"{where}: missing column {', '.join(lacking)}; found {', '.join(data.column_names)}")


def label_names(data: Dataset, column: str, where: str) -> list[str]:
    """A column as names, those of a ClassLabel included; InputError for an empty or hidden one."""
    feature, values = data.features[column], list(data[column])
    empty = next((row for row, value in enumerate(values) if value is None or value == ""), None)
    if empty is not None:
        raise InputError(f"{where}: column {column} is empty in row {empty}")
    if not isinstance(feature, ClassLabel):
        return [str(value) for value in values]
    hidden = next((row for row, value in enumerate(values) if not 0 <= value < feature.num_classes), None)
    if hidden is not None:
        raise InputError(f"{where}: column {column} holds no class in row {hidden} ({values[hidden]}); hidden labels?")
    return [str(feature.int2str(value)) for value in values]


def as_text(value: Any, where: str, row: int, column: str, *, empty: bool = False) -> str:
    """A text, or a number as one; InputError for anything else, and unless `empty` for the empty text."""
    if isinstance(value, bool | int | float):
        return str(value)
    if not isinstance(value, str) or not (value or empty):
        raise InputError(f"{where}: column {column} must hold text, row {row} holds {value!r}")
    return value
