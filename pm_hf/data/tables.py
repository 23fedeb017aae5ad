"""A file of rows as a table: what the file says is what the cells hold, no type is guessed.

CSV cells are the text that stands in the file. JSON strings stay strings; numbers, true and false are `Written` as they
stand; lists and objects are Python values. Parquet has the types of its schema.
"""

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow
import pyarrow.parquet
from datasets import Dataset

from pm_hf.errors import InputError

MOST_NESTED = 100  # lists and objects inside each other in a JSON cell
KINDS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_MARKS = {b"\xff\xfe\x00\x00": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}  # that a file may begin with
_BLANKS = re.compile(r"[ \t\n\r]*")  # between the values of a JSON file
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # escape of half a character


class Written(str):
    """A number, true or false of a JSON file, as it stands there."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True)
class TextTable:
    """Columns of a CSV or JSON file: {name: a cell for each row}; a cell is str, `Written`, None, a list or a dict.

    repeated: names that more than one column has; only the first is in `columns`.
    """

    columns: Mapping[str, list]
    repeated: tuple[str, ...] = ()

    @property
    def column_names(self) -> list[str]:
        """In the order of the file."""
        return list(self.columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def take(self, rows: Sequence[int]) -> "TextTable":
        """The rows with these indices, in this order."""
        return TextTable({name: [cells[i] for i in rows] for name, cells in self.columns.items()}, self.repeated)

    def with_rows(self, *others: "TextTable") -> "TextTable":
        """These rows, then the others'; a column that one of them lacks is None there."""
        tables = (self, *others)
        names = dict.fromkeys(name for table in tables for name in table.columns)
        joined = {
            name: [cell for table in tables for cell in table.columns.get(name, [None] * len(table))] for name in names
        }
        return TextTable(joined, tuple(dict.fromkeys(name for table in tables for name in table.repeated)))


Table: TypeAlias = Dataset | TextTable


def kind_of(name: str) -> str | None:
    """csv, json or parquet by the end of a file's name (.gz may follow the first two), None for any other."""
    suffix = Path(name.removesuffix(".gz")).suffix
    return None if name.endswith(".parquet.gz") else KINDS.get(suffix)


def read_table(path: Path, kind: str) -> Table:
    """All rows of exactly this file; InputError, with the line where there is one, for what cannot be read."""
    try:
        if kind == "parquet":
            table: Table = _parquet(path)
        else:
            table = _csv(_text(path)) if kind == "csv" else _json(_text(path))
    except RecursionError as error:
        raise InputError(f"{path} cannot be read as {kind}: its lists or objects are nested too deep") from error
    except (OSError, EOFError, ValueError, csv.Error, zlib.error, pyarrow.ArrowException) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(f"{path} cannot be read as {kind}: {' '.join(reason.split())[:300]}") from error
    if not len(table):
        raise InputError(f"{path} holds no rows")
    return table


def _text(path: Path) -> str:
    """The file's text, unpacked where it is gzip; ValueError for what is no UTF-8."""
    data = path.read_bytes()
    if data.startswith(b"\x1f\x8b"):
        data = gzip.decompress(data)
    mark = next((name for mark, name in _MARKS.items() if data.startswith(mark)), None)
    if mark:
        raise ValueError(f"it is {mark}; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"byte 0x{data[error.start]:02x} in line {line} is not UTF-8; save it as UTF-8") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"line {line} holds a NUL byte, which no text has; is it UTF-16? save it as UTF-8")
    if not text.strip():
        raise ValueError("it is empty")
    return text


def _csv(text: str) -> TextTable:
    """Comma-separated, quoted by "…" where a cell has commas, quotes or line ends; blank lines do not count."""
    before = csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = []
        for row in reader:
            if row:
                rows.append(row)
                if len(row) != len(rows[0]):
                    raise ValueError(f"line {reader.line_num} has {len(row)} cells, the header has {len(rows[0])}")
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}; is a quote unbalanced?") from error
    finally:
        csv.field_size_limit(before)
    header, *rows = rows
    cells = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in header]
    columns = dict(zip(reversed(header), reversed(cells), strict=True))  # the first of a name stays
    repeated = tuple(name for name, count in Counter(header).items() if count > 1)
    return TextTable({name: columns[name] for name in dict.fromkeys(header)}, repeated)


def _json(text: str) -> TextTable:
    """Objects one after the other (JSON lines), or one array of them; an array's strings are rows of a column text."""
    values = list(_json_values(text))
    if len(values) == 1 and isinstance(values[0], list):
        values = [{"text": row} if isinstance(row, str) and not isinstance(row, Written) else row for row in values[0]]
    for number, row in enumerate(values):
        if not isinstance(row, dict):
            raise ValueError(f'row {number} is {_short(row)}, expected an object {{"column": value, …}}')
    names = dict.fromkeys(name for row in values for name in row)
    columns = {name: [_cell(row.get(name)) for row in values] for name in names}
    if _SURROGATE.search(text):
        for number, row in enumerate(values):
            if any("\ud800" <= character <= "\udfff" for character in json.dumps(row, ensure_ascii=False)):
                raise ValueError(f"row {number} holds one half of a character (\\ud800 to \\udfff alone)")
    return TextTable(columns)


def _json_values(text: str) -> Iterator[Any]:
    at = _after_blanks(text, 0)
    while at < len(text):
        value, at = _DECODER.raw_decode(text, at)
        yield value
        at = _after_blanks(text, at)


def _after_blanks(text: str, at: int) -> int:
    match = _BLANKS.match(text, at)
    return at if match is None else match.end()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"an object has the key {twice!r} twice")
    return made


def _constant(name: str) -> Written | None:
    return None if name == "NaN" else Written(name)


_DECODER = json.JSONDecoder(parse_float=Written, parse_int=Written, parse_constant=_constant, object_pairs_hook=_object)


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return Written("true" if value else "false")
    return _plain(value) if isinstance(value, list | dict) else value


def _plain(value: Any, depth: int = 1) -> Any:
    """A list or object with numbers as Python has them; ValueError where it is nested more than MOST_NESTED deep."""
    if depth > MOST_NESTED:
        raise ValueError(f"a cell's lists or objects are nested more than {MOST_NESTED} deep")
    if isinstance(value, list):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item, depth + 1) for name, item in value.items()}
    return json.loads(value) if isinstance(value, Written) else value


def _short(value: Any) -> str:
    return f"a list of {len(value)}" if isinstance(value, list) else repr(value)[:60]


def _parquet(path: Path) -> Dataset:
    with pyarrow.OSFile(str(path)) as source:
        table = pyarrow.parquet.ParquetFile(source).read()
    twice = [name for name, count in Counter(table.column_names).items() if count > 1]
    if twice:
        raise ValueError(f"two columns are named {twice[0]!r}")
    for at, field in enumerate(table.schema):
        if pyarrow.types.is_dictionary(field.type):  # as pandas writes categories
            table = table.set_column(at, field.name, table.column(at).cast(field.type.value_type))
    try:
        return Dataset(table, fingerprint="file")
    except (KeyError, TypeError, AttributeError, NotImplementedError) as error:
        raise ValueError(f"its schema is none that data sets have: {error}") from error
