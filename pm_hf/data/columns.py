"""Cells of a table as text: the one place that decides what a label, a text or a prompt's column says."""

import datetime
import decimal
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Value

from pm_hf.data.names import check_named
from pm_hf.data.tables import Table, TextTable, Written
from pm_hf.errors import InputError

_WRITTEN_AS_TEXT = (bool, int, float, decimal.Decimal, datetime.date, datetime.time, datetime.timedelta)


def check_columns(data: Table, columns: Sequence[str], where: str) -> None:
    """InputError that lists the columns which the table lacks, or has more than once."""
    lacking = [column for column in columns if column not in data.column_names]
    if lacking:
        raise InputError(f"{where}: missing column {', '.join(lacking)}; found {', '.join(data.column_names)}")
    twice = [column for column in columns if isinstance(data, TextTable) and column in data.repeated]
    if twice:
        raise InputError(f"{where}: two columns are named {twice[0]}; give one of them another name")


def cells(data: Table, column: str, where: str) -> list[Any]:
    """A column's values: names of a ClassLabel, None for what is empty (null, NaN), else as `pm_hf.data.tables` has
    them or as the data set's schema does. InputError for a class that is hidden or a text that is broken."""
    if isinstance(data, TextTable):
        return data.columns[column]
    feature = data.features[column]
    if not isinstance(feature, Value | ClassLabel):
        return [_without_none(value) for value in data[column]]
    try:
        values = data.select_columns([column]).with_format("arrow")[:].column(0).to_pylist()
    except (ValueError, OverflowError) as error:  # bytes that are no UTF-8, dates that are none
        raise InputError(f"{where}: column {column} cannot be read: {' '.join(str(error).split())}") from error
    if isinstance(feature, ClassLabel):
        count = feature.num_classes
        hidden = next((row for row, value in enumerate(values) if value is not None and not 0 <= value < count), None)
        if hidden is not None:
            raise InputError(
                f"{where}: column {column} holds no class in row {hidden} ({values[hidden]}); hidden labels?"
            )
        return [None if value is None else str(feature.names[value]) for value in values]
    if feature.dtype in ("float16", "float32"):  # the shortest text that is the same number
        short = np.float16 if feature.dtype == "float16" else np.float32
        return [None if value is None or value != value else Written(short(value)) for value in values]
    return [None if value != value else value for value in values]


def text_of(value: Any) -> str | None:
    """A cell as text: numbers, true, false and dates as they are written; None for lists, objects and bytes."""
    if isinstance(value, str):
        return str(value)
    return str(value) if isinstance(value, _WRITTEN_AS_TEXT) else None


def label_names(data: Table, column: str, where: str, *, classes: bool = False) -> list[str]:
    """A column as names; InputError for an empty one and for lists, objects and bytes.

    classes: of the rows of a class head, which are no scores (numbers that are not whole) either.
    """
    names: list[str] = []
    known = set[str]()  # names that were looked at
    for row, value in enumerate(cells(data, column, where)):
        if type(value) is str and value in known:
            names.append(value)
            continue
        if classes and value is not None:
            _check_class(value, f"{where}: column {column}", row)
        names.append("" if value is None else as_text(value, where, row, column, empty=True))
        known.add(names[-1])
    check_named(names, f"{where}: column {column}")
    return names


def _check_class(value: Any, what: str, row: int) -> None:
    """InputError for what is no class: several labels, a score."""
    place, way_out = f"in row {row} ({value!r:.80}), expected one class a row", "stream.kind: causal-lm"
    if text_of(value) is None:
        raise InputError(f"{what} holds no single label {place}; write a row for each label, or learn text: {way_out}")
    if _is_score(value):
        raise InputError(f"{what} holds a score {place}; write classes as text, or learn text: {way_out}")


def spelled(name: Any, names: Sequence[str]) -> str:
    """A name of the settings as the data spell it: YAML's true is "true" in a file and "True" in a data set."""
    lower = str(name).lower()
    return lower if isinstance(name, bool) and lower in names else str(name)


def as_text(value: Any, where: str, row: int, column: str, *, empty: bool = False) -> str:
    """A cell as text; InputError for lists, objects and bytes, and unless `empty` for what is empty."""
    text = text_of(value)
    if text is None or not (text or empty):
        raise InputError(f"{where}: column {column} must hold text, row {row} holds {value!r:.80}")
    return text


def _is_score(value: Any) -> bool:
    if isinstance(value, Written):
        whole = value in ("true", "false") or value.removeprefix("-").isdigit()
        return not whole and not float(value).is_integer()
    return isinstance(value, float | decimal.Decimal) and not float(value).is_integer()


def _without_none(value: Any) -> Any:
    """A value of a schema without the keys that its row did not have: Arrow gives every object all keys."""
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    if isinstance(value, dict):
        return {k: _without_none(item) for k, item in value.items() if item is not None or k == "content"}
    return value
