"""Files as tables, against the csv and json modules as they come."""

import csv
import gzip
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import refusal

from pm_hf.data.columns import cells
from pm_hf.data.tables import Written, kind_of, read_table
from pm_hf.errors import InputError


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """file(name, content) -> its path."""
    folder = tmp_path_factory.mktemp("tables")

    def write(name, content):
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def refused(path):
    message = refusal(read_table, path, kind_of(path.name))
    assert str(path) in message
    return message


def test_numbers_of_json_stand_as_they_are_written(file):
    numbers = ["7", "7.0", "1.50", "1e5", "-0", "12345678901234567890", "0.1e-400", "9" * 5000]
    table = read_table(file("n.jsonl", "\n".join(f'{{"n": {number}, "s": "{number}"}}' for number in numbers)), "json")
    assert table.columns["n"] == table.columns["s"] == numbers
    assert {type(cell) for cell in table.columns["n"]} == {Written}
    assert {type(cell) for cell in table.columns["s"]} == {str}
    inside = read_table(file("i.jsonl", '{"x": {"n": [1.50, 7, true, null]}}'), "json")
    assert inside.columns["x"] == [{"n": [1.5, 7, True, None]}]
    assert read_table(file("c.jsonl", '{"x": NaN}{"x": -Infinity}'), "json").columns["x"] == [None, "-Infinity"]


@pytest.mark.parametrize(
    "text", ['{"a": 1}\n\n{"b": 2}\n', '{"a": 1} {"b": 2}', '[{"a": 1}, {"b": 2}]', '\ufeff{\n"a":\n1}\n{"b": 2}']
)
def test_rows_of_json_are_lines_or_an_array(file, text):
    assert read_table(file("r.json", text), "json").columns == {"a": ["1", None], "b": [None, "2"]}


def test_strings_of_an_array_are_texts(file):
    assert read_table(file("s.json", '["a", "7"]'), "json").columns == {"text": ["a", "7"]}


def test_gzip_is_seen_by_its_bytes(file):
    packed = gzip.compress(b"text,label\na,007\n")
    for name in ("p.csv", "p.csv.gz"):
        assert read_table(file(name, packed), "csv").columns == {"text": ["a"], "label": ["007"]}
    assert "ended before" in refused(file("q.csv.gz", packed[:-6]))


def test_a_cell_of_megabytes_is_read_and_the_csv_module_s_limit_is_left_as_it_was(file):
    before = csv.field_size_limit()
    assert len(read_table(file("m.csv", "text\n" + "x" * 2_000_000), "csv").columns["text"][0]) == 2_000_000
    assert csv.field_size_limit() == before


BAD = {
    "empty.jsonl": ("", "it is empty"),
    "empty.csv": ("", "it is empty"),
    "blank.jsonl": ("\n \n", "it is empty"),
    "none.json": ("[]", "holds no rows"),
    "header.csv": ("text,label\n", "holds no rows"),
    "numbers.jsonl": ("1\n2\n", "row 0 is 1, expected an object"),
    "list.jsonl": ('{"a": 1}\n[1, 2]\n', "row 1 is a list of 2, expected an object"),
    "deep.json": ("[" * 100_000 + "]" * 100_000, "nested too deep"),
    "deeper.jsonl": ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deep"),
    "cell.jsonl": ('{"a":' + "[" * 200 + "]" * 200 + "}", "nested more than 100 deep"),
    "twice.jsonl": ('{"a": 1, "a": 2}', "an object has the key 'a' twice"),
    "cut.jsonl": ('{"a": "b"}\n{"a": "', "Unterminated string starting at: line 2 column 7"),
    "comma.jsonl": ('{"a": "b"},\n{"a": "b"}', "Expecting value: line 1 column 11"),
    "half.jsonl": ('{"a": "b"}{"a": {"x": "\\ud800"}}', "row 1 holds one half of a character"),
    "latin.csv": ("text\ncafé\n".encode("latin-1"), "byte 0xe9 in line 2 is not UTF-8; save it as UTF-8"),
    "latin.jsonl": ('{"a": "é"}'.encode("latin-1"), "byte 0xe9 in line 1 is not UTF-8"),
    "utf16.csv": ("text\na\n".encode("utf-16"), "it is UTF-16; save it as UTF-8"),
    "utf16.jsonl": ('{"a": 1}'.encode("utf-16-le"), "line 1 holds a NUL byte"),
    "utf32.csv": ("text\na\n".encode("utf-32"), "it is UTF-32"),
    "nul.csv": ("text\na\nb\0\n", "line 3 holds a NUL byte"),
    "quote.csv": ('text,label\na,b\n"c,d\n', "line 3: unexpected end of data; is a quote unbalanced?"),
    "short.csv": ("text,label\na,b\nc\n", "line 3 has 1 cells, the header has 2"),
    "long.csv": ("text,label\n\na,b,c\n", "line 3 has 3 cells, the header has 2"),
    "no.parquet": (b"PAR1", "cannot be read as parquet"),
    "empty.parquet": (b"", "cannot be read as parquet"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_one_clear_line(file, name):
    content, message = BAD[name]
    assert message in refused(file(name, content))


def parquet(file, **columns):
    path = file("c.parquet", b"")
    pq.write_table(pa.table(columns), path)
    return path


def test_parquet_without_rows_or_with_a_name_twice_is_refused(file):
    assert "holds no rows" in refused(parquet(file, a=pa.array([], pa.string())))
    path = file("d.parquet", b"")
    pq.write_table(pa.table([["a"], ["b"]], names=["x", "x"]), path)
    assert "two columns are named 'x'" in refused(path)


def test_parquet_has_the_types_of_its_schema(file):
    columns = {
        "int": pa.array([1, None]),
        "float": pa.array([0.5, math.nan]),
        "single": pa.array([0.1, math.nan], pa.float32()),
        "category": pa.array(["u", "v"]).dictionary_encode(),
        "large": pa.array(["u", None], pa.large_string()),
        "none": pa.array([None, None]),
        "list": pa.array([["a"], None]),
        "object": pa.array([{"x": 1, "y": None}, {"x": None, "y": 2}]),
    }
    table = read_table(parquet(file, **columns), "parquet")
    found = {name: cells(table, name, "t") for name in columns}
    assert found == {
        "int": [1, None],
        "float": [0.5, None],
        "single": ["0.1", None],
        "category": ["u", "v"],
        "large": ["u", None],
        "none": [None, None],
        "list": [["a"], None],
        "object": [{"x": 1}, {"y": 2}],  # Arrow gives every object all keys
    }


@pytest.mark.parametrize("column", [pa.array([b"\xff"]).view(pa.string()), pa.array([2**62], pa.timestamp("ms"))])
def test_value_of_parquet_that_is_none_is_refused(file, column):
    table = read_table(parquet(file, x=column), "parquet")
    with pytest.raises(InputError, match="t: column x cannot be read: "):
        cells(table, "x", "t")
