import datetime
import decimal

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from helpers import refusal

from pm_hf.data.columns import check_columns, label_names, spelled, text_of
from pm_hf.data.tables import TextTable, Written
from pm_hf.errors import InputError


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("7", "7"),
        (Written("1.50"), "1.50"),
        (7, "7"),
        (7.0, "7.0"),
        (True, "True"),
        (decimal.Decimal("1.50"), "1.50"),
        (datetime.date(2024, 1, 2), "2024-01-02"),
        ("", ""),
        (None, None),
        (["a"], None),
        ({"a": 1}, None),
        (b"a", None),
    ],
)
def test_cell_as_text(value, text):
    assert text_of(value) == text
    assert type(text_of(value)) in (str, type(None))


def names(*values, classes=True):
    return label_names(TextTable({"label": list(values)}), "label", "the file", classes=classes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a", ["x", "y"]], "column label holds no single label in row 1 (['x', 'y']), expected one class a row"),
        ([[0, 1, 1]], "write a row for each label, or learn text: stream.kind: causal-lm"),
        ([{"a": 1}], "holds no single label in row 0 ({'a': 1})"),
        ([b"a"], "holds no single label in row 0"),
        ([Written("1"), Written("0.5")], "column label holds a score in row 1 (0.5), expected one class a row; write"),
        ([Written("1e-3")], "holds a score"),
        ([Written("1e400")], "holds a score"),
        ([0.25], "holds a score in row 0 (0.25)"),
        ([decimal.Decimal("0.5")], "holds a score"),
        (["a", None], "column label is empty in row 1"),
        (["a", ""], "column label is empty in row 1"),
        (["a", "b", "   "], "column label is empty in row 2 ('   ')"),
        (["\u200b\ufeff"], r"column label is empty in row 0 ('\u200b\ufeff')"),
        (["\n\x07"], "column label is empty in row 0"),
    ],
)
def test_what_is_no_class_is_refused(values, message):
    assert message in refusal(names, *values)


def test_names_are_what_stands_there():
    found = names("007", "7", " a", "0.5", Written("7"), Written("7.0"), Written("true"), Written("1" * 500), 1.0, True)
    assert found == ["007", "7", " a", "0.5", "7", "7.0", "true", "1" * 500, "1.0", "True"]
    assert names(Written("0.5"), 0.25, classes=False) == ["0.5", "0.25"]
    with pytest.raises(InputError, match="column label must hold text, row 0 holds"):
        names(["x"], classes=False)


def test_yaml_s_true_is_spelled_as_the_data_are():
    assert spelled(True, ["true", "false"]) == "true"
    assert spelled(True, ["True", "False"]) == "True"
    assert spelled(7, ["7"]) == "7"


def test_column_that_stands_twice_is_refused_where_it_is_used():
    table = TextTable({"text": ["a"], "label": ["b"]}, repeated=("label",))
    check_columns(table, ["text"], "the file")
    with pytest.raises(InputError, match="the file: two columns are named label; give one of them another name"):
        check_columns(table, ["text", "label"], "the file")


def test_class_labels_are_named_and_none_is_empty():
    features = Features({"label": ClassLabel(names=["cold", "warm"]), "n": Value("int64")})
    data = Dataset.from_dict({"label": [1, None], "n": [7, 8]}, features=features)
    assert label_names(data, "n", "the file", classes=True) == ["7", "8"]
    with pytest.raises(InputError, match="column label is empty in row 1"):
        label_names(data, "label", "the file", classes=True)
