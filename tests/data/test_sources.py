"""Files and data sets by their names, and what is read from them."""

import json

import pytest
from datasets import config
from helpers import refusal

from pm_hf.config.schema import Source
from pm_hf.data.sources import read_rows

TEXTS, PROMPTS = "text-classification", "causal-lm"


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    """Data sets of folders are cached under tmp_path."""
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")


def read(folder, kind=TEXTS, *, test=False, extra=None, **source):
    return read_rows(kind, Source(**source), str(folder), test=test, extra=extra)


def refused(folder, kind=TEXTS, **source):
    return refusal(read, folder, kind, **source)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


NAMES = ["a::b#c.csv", "st*r.csv", "x[1].csv", "q?.csv", "{a,b}.csv", "a b ä.csv", "%20.csv", "~x.csv", "-r.csv"]
NAMES += ["hf:x.csv", "zip::y.csv", "**/deep[0]/x.csv", "$HOME.csv", "'\".csv", "https:/x/y.csv", "..csv"]


@pytest.mark.parametrize("name", NAMES)
def test_exactly_the_file_of_that_name_is_read(tmp_path, name):
    for other in ("a.csv", "x1.csv", "qq.csv", "star.csv", "b.csv", "deep0/x.csv", "x.csv"):
        write(tmp_path / other, "text,label\nother,other\n")
    assert "does not exist; set data_dir=FOLDER" in refused(tmp_path, train=name)
    write(tmp_path / name, "text,label\nmine,007\n")
    rows, _ = read(tmp_path, train=name)
    assert (rows.inputs, rows.labels) == (["mine"], ["007"])
    assert rows.places.name(0) == f"{tmp_path / name}, row 0"


@pytest.mark.parametrize("name", ["~nosuchuser.csv", "~nosuchuser/x.csv", "a\0b.csv", "http://x/y.csv", "*.csv"])
def test_name_of_no_file_is_one_clear_error(tmp_path, name):
    assert "does not exist" in refused(tmp_path, train=name)
    assert "does not exist" in refused("~nosuchuser", train="x.csv")


def test_name_that_the_system_cannot_hold_is_one_clear_error(tmp_path):
    assert "cannot be opened: File name too long" in refused(tmp_path, train="x" * 300 + ".csv")


ANSWERS = ["007", "1.50", "1e5", "true", "+47", "12345678901234567890", "NA", "2024-01-01", "1_000", " x ", "None"]


@pytest.mark.parametrize("label", ANSWERS)
def test_labels_answers_and_columns_of_a_csv_are_what_stands_there(tmp_path, label):
    write(tmp_path / "t.csv", f"text,label,from,note\n7,{label},{label},{label}\n08,x,y,\n")
    rows, domains = read(tmp_path, train="t.csv", extra="from")
    assert (rows.inputs, rows.labels, domains) == (["7", "08"], [label, "x"], [label, "y"])
    rows, _ = read(tmp_path, PROMPTS, train="t.csv", prompt_template="{text} {note}:")
    assert (rows.inputs, rows.labels) == ([f"7 {label}:", "08 :"], [f" {label}", " x"])
    rows, _ = read(tmp_path, PROMPTS, train="t.csv", text_column="text", label_column="label")
    assert (rows.inputs, rows.labels) == (["7", "08"], [label, "x"])


def test_a_late_row_changes_no_earlier_one(tmp_path):
    write(tmp_path / "t.csv", "text,label\n" + "".join(f"t{i},{i % 3:02d}\n" for i in range(10_500)) + "z,other\n")
    labels = read(tmp_path, train="t.csv")[0].labels
    assert labels == [f"{i % 3:02d}" for i in range(10_500)] + ["other"]


def test_strings_and_numbers_of_json_are_what_stands_there(tmp_path):
    write(tmp_path / "t.jsonl", '{"text": "2024-01-01", "label": "007"}\n{"text": "b", "label": 7}\n')
    rows, _ = read(tmp_path, train="t.jsonl")
    assert (rows.inputs, rows.labels) == (["2024-01-01", "b"], ["007", "7"])
    write(tmp_path / "p.jsonl", '{"prompt": 1.50, "completion": 7.0}\n{"prompt": "x", "completion": true}\n')
    rows, _ = read(tmp_path, PROMPTS, train="p.jsonl")
    assert (rows.inputs, rows.labels) == (["1.50", "x"], ["7.0", "true"])
    assert "row 0 holds 1.50" in refused(tmp_path, train="p.jsonl", text_column="prompt", label_column="completion")


def test_files_of_a_data_set_folder_without_a_schema_are_read_as_they_stand(tmp_path):
    for name, row in (
        ("csv", "text,label\na,007\nNA,1\nc,x\n"),
        ("json", '{"text": "2024-01-01", "label": "007"}\n{"text": "b", "label": 1}\n'),
    ):
        write(tmp_path / name / f"train.{name}", row)
        write(tmp_path / name / f"test.{name}", row)
    rows, _ = read(tmp_path, dataset="csv")
    assert (rows.inputs, rows.labels) == (["a", "NA", "c"], ["007", "1", "x"])
    assert read(tmp_path, dataset="csv", train_split="train[1:]+test[:1]")[0].labels == ["1", "x", "007"]
    rows, _ = read(tmp_path, dataset="json", test=True)
    assert (rows.inputs, rows.labels) == (["2024-01-01", "b"], ["007", "1"])
    assert "split nope cannot be loaded" in refused(tmp_path, dataset="csv", train_split="nope")


def test_schema_of_a_data_set_folder_stands(tmp_path):
    write(tmp_path / "named" / "train.csv", "text,label\na,1\nb,0\n")
    classes = {"class_label": {"names": {"0": "cold", "1": "warm"}}}
    features = [{"name": "text", "dtype": "string"}, {"name": "label", "dtype": classes}]
    write(tmp_path / "named" / "README.md", f"---\ndataset_info:\n  features: {json.dumps(features)}\n---\n")
    assert read(tmp_path, dataset="named")[0].labels == ["warm", "cold"]


def test_data_set_folder_whose_name_is_a_pattern_is_refused(tmp_path):
    for name in ("fold1", "fold[1]"):
        write(tmp_path / name / "train.csv", f"text,label\n{name},x\n")
    assert "the name of a data set has no [; rename the folder" in refused(tmp_path, dataset="fold[1]")


def test_unreadable_data_set_is_one_line(tmp_path, caplog, capsys):
    write(tmp_path / "bad" / "train.parquet", "PAR1")
    write(tmp_path / "bad2" / "train.jsonl", "1\n2\n")
    for name in ("bad", "bad2"):
        assert name in refused(tmp_path, dataset=name)
    assert not caplog.records
    assert capsys.readouterr().err == ""


def test_domain_of_a_conversation_is_that_of_each_of_its_answers(tmp_path):
    talk = [{"role": role, "content": role} for role in ("user", "assistant")]
    rows = [{"messages": talk * 2, "from": "web"}, {"messages": talk, "from": "mail"}]
    write(tmp_path / "t.jsonl", "\n".join(map(json.dumps, rows)))
    rows, domains = read(tmp_path, PROMPTS, train="t.jsonl", extra="from")
    assert [len(prompt) for prompt in rows.inputs] == [1, 3, 1]
    assert domains == ["web", "web", "mail"]
