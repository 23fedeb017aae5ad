"""Rows: what a file says, against the csv and json modules and pyarrow on the same file; damaged files too."""

import csv
import datetime
import decimal
import gzip
import io
import json
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from helpers.fuzz import REFUSED, RIGHT, check, read
from pm_hf.config.schema import Source
from pm_hf.data.chat import answer_of, messages_of
from pm_hf.data.sources import read_rows

CLASSES, PROMPTS = "text-classification", "causal-lm"
ODD = [
    "007",
    "1.50",
    "1e5",
    "true",
    "+47",
    "12345678901234567890",
    "NA",
    "null",
    "2024-01-01",
    " ",
    '"',
    "a,b",
    "a\r\nb",
]
ODD += [
    "\u200b",
    "\r",
    "1_000",
    "\ufeffa",
    "é",
    "e\u0301",
    "None",
    "nan",
    "-0",
    "{x}",
    "\x1c",
    "\x85",
    "\u2028",
    " a",
    "a ",
    "\ta",
    "a\n",
]
TEXTS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=8)
CELLS = TEXTS | st.sampled_from(ODD)
LABELS = CELLS.filter(lambda text: any(c.isalnum() for c in text))
NUMBERS = st.integers() | st.floats() | st.sampled_from([1e22, 1e16, 0.1, -0.0, 2**53 + 1, 10**25, 5e-324])
LEAVES = st.none() | st.booleans() | NUMBERS | CELLS
NESTED = LEAVES | st.lists(LEAVES, max_size=2) | st.dictionaries(TEXTS, LEAVES, max_size=2)
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "text_column": st.sampled_from(["text", "prompt", "text ", ""]),
        "label_column": st.sampled_from(["label", "completion", "Label"]),
        "prompt_template": st.sampled_from(
            ["{text}:", "{text} {from}\n", "{label}", "{{}} {text}", "{text!r:>5}", "{text.x}", "{text[0]}", "{", "{0}"]
        ),
        "answers": st.just({True: "yes", 2: "two", "a": "b", "007": "seven"}),
    },
)
COLUMN_NAMES = ["text", "label", "from", "prompt", "completion", "tools", "messages", "", "Text", "text "]
DAMAGE = st.lists(
    st.tuples(st.integers(0, 3000), st.sampled_from(["put", "set", "cut"]), st.binary(max_size=3)), max_size=2
)
DAMAGES = st.sampled_from([False] * 4 + [True]).flatmap(lambda some: DAMAGE if some else st.just([]))


@st.composite
def _csv_cases(draw: Any) -> dict:
    names = draw(st.permutations(["text", "label"] + draw(st.lists(st.sampled_from(COLUMN_NAMES), max_size=2))))
    likely = draw(st.sampled_from([LABELS, LABELS, CELLS]))
    rows = draw(st.lists(st.tuples(*(likely for _ in names)), min_size=draw(st.sampled_from([0, 1, 1, 1])), max_size=5))
    ends = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    return {"format": "csv", "names": names, "rows": rows, "end": ends, "quoted": draw(st.booleans())}


JSON_ROW = st.fixed_dictionaries(
    {"text": CELLS, "label": LABELS | st.integers() | st.booleans() | st.just(0.5)},
    optional={"from": LABELS | st.integers(), "prompt": LEAVES, "tools": st.none()},
)
ODD_ROW = st.dictionaries(st.sampled_from(COLUMN_NAMES), NESTED, max_size=5)
JSON_ROWS = st.lists(JSON_ROW, min_size=1, max_size=4)
ODD_ROWS = JSON_ROWS | st.lists(JSON_ROW | ODD_ROW, max_size=3)
KEYS = st.sampled_from(["name", "tool_calls", "weight", "x y"])
MORE = st.dictionaries(KEYS, st.lists(st.dictionaries(TEXTS, LEAVES, max_size=2), max_size=2) | LEAVES, max_size=2)
ROLES = st.sampled_from(["user", "assistant", "system", "tool"])
MESSAGE = st.tuples(ROLES, CELLS | st.none(), MORE).map(lambda m: {"role": m[0], "content": m[1], **m[2]})
ODD_MESSAGE = st.dictionaries(st.sampled_from(["role", "content", "type", "text"]), NESTED, max_size=3) | NESTED
SAID = st.fixed_dictionaries({"role": ROLES, "content": LABELS}) | MESSAGE.filter(lambda m: m["content"])
PLAIN_TALK = st.tuples(st.lists(SAID, min_size=1, max_size=3), SAID).map(
    lambda m: [*m[0], m[1] | {"role": "assistant"}]
)
PLAIN_TALKS = st.lists(st.fixed_dictionaries({"messages": PLAIN_TALK}), min_size=1, max_size=3)
TALKS = st.lists(st.fixed_dictionaries({"messages": st.lists(MESSAGE | MESSAGE | ODD_MESSAGE, max_size=4)}), max_size=3)
TOOLS = st.lists(st.fixed_dictionaries({"messages": st.lists(MESSAGE, min_size=2), "tools": NESTED}), max_size=2)
PAIRS = st.lists(st.fixed_dictionaries({"prompt": CELLS, "completion": LABELS | NUMBERS}), max_size=4)
JSON_STYLES = st.sampled_from(["lines", "array", "indented", "ascii", "run on"])

COLUMNS = {  # {type of Arrow: values}
    "string": LABELS,
    "large_string": CELLS,
    "category": LABELS,
    "int64": st.integers(-(2**63), 2**63 - 1),
    "uint64": st.integers(0, 2**64 - 1),
    "int8": st.integers(-128, 127),
    "float64": st.floats(),
    "float32": st.floats(width=32),
    "float16": st.floats(width=16),
    "whole": st.integers(-99, 99).map(float),
    "bool": st.booleans(),
    "binary": st.binary(max_size=3),
    "list": st.lists(TEXTS, max_size=2),
    "struct": st.fixed_dictionaries({"x": TEXTS, "y": st.integers(0, 3)}),
    "date32": st.integers(-(10**6), 10**6),
    "timestamp": st.integers(-(2**62), 2**62),
    "decimal": st.integers(-(10**6), 10**6),
    "null": st.none(),
}
ARROW = {"category": pa.string(), "whole": pa.float64(), "list": pa.list_(pa.string()), "date32": pa.date32()}
ARROW |= {"struct": pa.struct({"x": pa.string(), "y": pa.int64()}), "timestamp": pa.timestamp("us"), "bool": pa.bool_()}
ARROW |= {"decimal": pa.decimal128(12, 2), "float16": pa.float16(), "null": pa.null()}


@st.composite
def _parquet_cases(draw: Any) -> dict:
    extra = draw(st.lists(st.sampled_from(COLUMN_NAMES), max_size=1))
    length, columns = draw(st.sampled_from([0, 1, 1, 2, 3, 4])), []
    for name in draw(st.permutations(["text", "label", *extra])):
        likely = ["string"] if name == "text" else [kind for kind in COLUMNS if kind not in ("null", "binary")]
        kind = draw(st.sampled_from(list(COLUMNS) if draw(st.integers(0, 4)) == 0 else likely))
        values = st.none() | COLUMNS[kind] if draw(st.integers(0, 3)) == 0 else COLUMNS[kind]
        columns.append((name, kind, draw(st.lists(values, min_size=length, max_size=length))))
    return {"format": "parquet", "columns": columns}


def _json_cases(rows: st.SearchStrategy) -> st.SearchStrategy:
    return st.fixed_dictionaries({"format": st.just("json"), "rows": rows, "style": JSON_STYLES})


BYTES = st.binary(max_size=40) | st.text('{}[]",:\\n\r\n01e.-ax\0 ué', max_size=40).map(str.encode)
FILES = st.one_of(
    _csv_cases(),
    _json_cases(ODD_ROWS),
    _json_cases(PAIRS | TALKS | TOOLS),
    _parquet_cases(),
    st.fixed_dictionaries({"format": st.sampled_from(["csv", "json", "parquet"]), "bytes": BYTES}),
)


def _cases(files: st.SearchStrategy, kinds: list[str], settings: st.SearchStrategy) -> st.SearchStrategy:
    return st.fixed_dictionaries(
        {
            "file": files,
            "kind": st.sampled_from(kinds),
            "settings": settings,
            "extra": st.sampled_from([None] * 7 + ["from"]),
            "marked": st.booleans(),
            "packed": st.booleans(),
            "damage": DAMAGES,
        }
    )


NO_SETTINGS: st.SearchStrategy[dict] = st.just({})
CASES = st.one_of(
    *(
        _cases(files, [CLASSES, CLASSES, PROMPTS], NO_SETTINGS)
        for files in (_csv_cases(), _json_cases(JSON_ROWS), _parquet_cases())
    ),
    _cases(_json_cases(PLAIN_TALKS | PAIRS), [PROMPTS], NO_SETTINGS),
    _cases(FILES, [CLASSES, PROMPTS], SETTINGS),
)


def judge(case: Mapping, folder: Path) -> str:
    """RIGHT or REFUSED; SilentError for rows that the csv or json module or pyarrow does not have in this file."""
    path, whole = _write(case, folder)
    settings, extra = case["settings"], case["extra"]
    made, said = read(
        lambda: read_rows(case["kind"], Source(train=path.name, **settings), str(folder), test=False, extra=extra)
    )
    try:
        table = _reference(path, case["file"]["format"])
        wanted = _wanted(table, case["kind"], settings)
        domains = [_name(_get(row, extra)) for row in table] if extra else []
    except _NoneError as error:
        check(said is not None, "accepted, though", error, ":", made)
        return REFUSED
    if said is not None:
        check(not whole or wanted is None, "refused:", said, "though it is", wanted)
        return REFUSED
    rows, values = made
    check(len(rows.inputs) == len(rows.labels) > 0 and bool(rows.content()), "rows", rows)
    check(all(type(label) is str for label in [*rows.labels, *values]), "labels", rows.labels, values)
    if wanted is not None:
        check([*zip(map(_plain, rows.inputs), rows.labels, strict=True)] == wanted, "rows are", rows, "not", wanted)
        check(case["kind"] == PROMPTS or values == domains, "domains are", values, "not", domains)
    return RIGHT


class _NoneError(Exception):
    """The file, or a row, holds none of what is asked for."""


def _write(case: Mapping, folder: Path) -> tuple[Path, bool]:
    """(the file, whether it is as the libraries wrote it)."""
    file, form = case["file"], case["file"]["format"]
    content = file["bytes"] if "bytes" in file else {"csv": _csv, "json": _json, "parquet": _parquet}[form](file)
    if form != "parquet" and case["marked"]:
        content = b"\xef\xbb\xbf" + content
    if form != "parquet" and case["packed"]:
        content = gzip.compress(content, mtime=0)
    damaged = content
    for place, how, piece in case["damage"]:
        at = place % (len(damaged) + 1)
        damaged = (
            damaged[:at] + {"put": piece + damaged[at:], "set": piece + damaged[at + len(piece) :], "cut": b""}[how]
        )
    path = folder / f"any.{form}{'.gz' if form != 'parquet' and case['packed'] else ''}"
    path.write_bytes(damaged)
    return path, damaged == content and "bytes" not in file


def _csv(file: Mapping) -> bytes:
    cells = [cell for row in file["rows"] for cell in row]
    bare = file["end"] == "\r" or any("\r" in cell for cell in cells)  # which the writer leaves unquoted
    quoting = csv.QUOTE_ALL if bare or file["quoted"] else csv.QUOTE_MINIMAL
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator=file["end"], quoting=quoting).writerows([file["names"], *file["rows"]])
    return buffer.getvalue().encode()


def _json(file: Mapping) -> bytes:
    rows, style = file["rows"], file["style"]
    if style in ("lines", "run on"):
        return ("\n" if style == "lines" else " ").join(map(json.dumps, rows)).encode()
    return json.dumps(rows, indent=1 if style == "indented" else None, ensure_ascii=style == "ascii").encode()


def _parquet(file: Mapping) -> bytes:
    arrays = []
    for _, kind, values in file["columns"]:
        given = [None if v is None else decimal.Decimal(v) / 100 for v in values] if kind == "decimal" else values
        given = [None if v is None else np.float16(v) for v in values] if kind == "float16" else given
        array = pa.array(given, ARROW.get(kind) or getattr(pa, kind)())
        arrays.append(array.dictionary_encode() if kind == "category" else array)
    buffer = io.BytesIO()
    pq.write_table(pa.table(arrays, names=[name for name, _, _ in file["columns"]]), buffer)
    return buffer.getvalue()


# ---- the file by the libraries alone


class _Number(str):
    """A number of JSON as it stands in the file."""


def _reference(path: Path, form: str) -> list[dict[str, Any]]:
    """{column: cell} of every row; of a name that stands twice the cells are refused."""
    try:
        if form == "parquet":
            table = pq.read_table(path)
            if len(set(table.column_names)) < len(table.column_names):
                raise _NoneError("two columns have one name")
            kinds = {field.name: str(field.type) for field in table.schema}
            rows = [{name: _arrow(value, kinds[name]) for name, value in row.items()} for row in table.to_pylist()]
        else:
            data = path.read_bytes()
            text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
            rows = _csv_rows(text) if form == "csv" else _json_rows(text)
    except (OSError, EOFError, ValueError, OverflowError, csv.Error, pa.ArrowException, RecursionError) as error:
        raise _NoneError(error) from error
    except Exception as error:  # zlib
        raise _NoneError(error) from error
    if not rows:
        raise _NoneError("no rows")
    return rows


def _csv_rows(text: str) -> list[dict[str, Any]]:
    header, *rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    if any(len(row) != len(header) for row in rows):
        raise _NoneError("a row has another number of cells")
    twice = {name: _NoneError("two columns") for name in header if header.count(name) > 1}
    return [dict(zip(header, row, strict=True)) | twice for row in rows]


def _json_rows(text: str) -> list[dict[str, Any]]:
    keep = {
        "parse_int": _Number,
        "parse_float": _Number,
        "parse_constant": lambda n: None if n == "NaN" else _Number(n),
    }
    decoder, values, at = json.JSONDecoder(**keep), [], 0
    while text[at:].strip(" \t\r\n"):
        at = len(text) - len(text[at:].lstrip(" \t\r\n"))
        value, at = decoder.raw_decode(text, at)
        values.append(value)
    rows = values[0] if len(values) == 1 and isinstance(values[0], list) else values
    rows = [{"text": row} if type(row) is str and rows is values[0] else row for row in rows]
    if not all(isinstance(row, dict) for row in rows):
        raise _NoneError("a row is no object")
    json.dumps(rows, ensure_ascii=False).encode()  # no half characters
    names = [name for row in rows for name in row]
    return [{name: _cell(row.get(name)) for name in names} for row in rows]


def _cell(value: Any) -> Any:
    return _Number(str(value).lower()) if isinstance(value, bool) else value


def _arrow(value: Any, kind: str) -> Any:
    """A value of a schema: a float of half or single size by its shortest text."""
    if isinstance(value, float) and value != value:
        return None
    if value is not None and kind in ("float", "halffloat"):
        return _Number(np.float16(value) if kind == "halffloat" else np.float32(value))
    return value


# ---- what rows are asked for, word for word


def _wanted(table: list[dict], kind: str, settings: Mapping) -> list[tuple[Any, str]] | None:
    """(input, label) of every row; _NoneError where one is none, None where the reference has no opinion."""
    text, label = settings.get("text_column") or "text", settings.get("label_column") or "label"
    if kind == CLASSES:
        return [(_text(row, text), _class(row, label)) for row in table]
    names = list(table[0])
    if settings.get("prompt_template"):
        return _templated(table, settings, text, label)
    if settings.get("answers") is not None:
        raise _NoneError("answers without a template")
    if settings.get("text_column") is None and "messages" in names:
        return _talks(table)
    if (settings.get("text_column") is None and {"prompt", "completion"} <= set(names)) or settings.get("label_column"):
        pair = settings.get("text_column") or "prompt", settings.get("label_column") or "completion"
        if any(isinstance(row.get(name), list | dict) for row in table for name in pair) or "tools" in names:
            return None
        return [(_words(row, pair[0], empty=True), _words(row, pair[1])) for row in table]
    return [("", _words(row, text)) for row in table]


def _get(row: dict, name: str) -> Any:
    if name not in row or isinstance(row[name], _NoneError):
        raise _NoneError(f"no column {name}")
    return row[name]


def _text(row: dict, name: str) -> str:
    if type(_get(row, name)) is not str:
        raise _NoneError(f"no text: {row[name]!r}")
    return row[name]


def _said(value: Any) -> str | None:
    """A value as text."""
    scalar = bool, int, float, str, decimal.Decimal, datetime.date, datetime.time, datetime.timedelta
    return str(value) if isinstance(value, scalar) else None


def _words(row: dict, name: str, *, empty: bool = False) -> str:
    said = _said(_get(row, name))
    if said is None or not (said or empty):
        raise _NoneError(f"no text: {row[name]!r}")
    return said


def _name(value: Any) -> str:
    said = _said(value)
    if said is None or all(c.isspace() or unicodedata.category(c) in ("Cc", "Cf") for c in said):
        raise _NoneError(f"no name: {value!r}")
    return said


def _class(row: dict, name: str) -> str:
    value, said = _get(row, name), _name(_get(row, name))
    number = isinstance(value, _Number | float | decimal.Decimal) and said not in ("true", "false")
    if number and not float(said).is_integer():
        raise _NoneError(f"a score: {said}")
    return said


def _templated(table: list[dict], settings: Mapping, text: str, label: str) -> list[tuple[str, str]] | None:
    template, words = settings["prompt_template"], settings.get("answers")
    if template in ("{text.x}", "{text[0]}", "{", "{0}"):
        raise _NoneError("a template that is none")
    known = {str(key): word for key, word in words.items()} if words is not None else None
    made = []
    for row in table:
        used = {name for name in ("text", "from", "label") if f"{{{name}" in template}
        columns = {name: text if name == "text" else name for name in used}
        values = {name: "" if _get(row, at) is None else _words(row, at, empty=True) for name, at in columns.items()}
        if values and not any(values.values()):
            raise _NoneError("an empty prompt")
        answer = _name(_get(row, label))
        if known is not None:
            answer = known.get({"true": "True"}.get(answer, answer), _NoneError("no words"))
            if isinstance(answer, _NoneError):
                raise answer
        space = "" if template[-1:].isspace() else " "
        made.append((template.format(**{"text": "", "task": ""} | values), space + answer))
    return made


def _talks(table: list[dict]) -> list[tuple[Any, str]] | None:
    """Every message of an assistant after another one, with all that stands before it, in conversations of texts."""
    made: list[tuple[Any, str]] = []
    for row in table:
        talk = row["messages"]
        if (
            not isinstance(talk, list)
            or not all(map(_is_plain, talk))
            or row.get("tools")
            or any(not _serial(m) for m in talk)
        ):
            return None
        talk = [{key: value for key, value in _value(m).items() if value is not None} for m in talk]
        turns = [at for at, m in enumerate(talk) if at and m["role"] == "assistant"]
        if not turns:
            raise _NoneError("no answer")
        for at in turns:
            rest = {key: value for key, value in talk[at].items() if key not in ("role", "content")}
            made.append(((talk[:at], rest), talk[at]["content"]))
    return made


def _is_plain(message: Any) -> bool:
    """Whether a message has a role and text."""
    content = message.get("content") if isinstance(message, dict) else None
    return type(content) is str and content != "" and message.get("role") in ("user", "assistant", "system", "tool")


def _serial(value: Any) -> bool:
    """Whether all numbers of JSON content are finite."""
    return "Infinity" not in json.dumps(value)


def _value(value: Any) -> Any:
    """JSON content with Python's numbers."""
    if isinstance(value, dict):
        return {key: _value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_value(item) for item in value]
    return json.loads(value) if isinstance(value, _Number) else value


def _plain(prompt: Any) -> Any:
    """A prompt as text, or (messages, the rest of the answer)."""
    return str(prompt) if isinstance(prompt, str) else (messages_of(prompt), answer_of(prompt))
