"""pm-hf init: what is proposed for files, folders and data sets of every form runs as it is."""

import json

import numpy as np
import pytest
import yaml
from datasets import ClassLabel, Dataset, Features, Value
from helpers import refusal
from helpers.streams import CLASSES, write_rows
from PIL import Image

from pm_hf.cli import main
from pm_hf.config.loading import load_config
from pm_hf.data.proposal import SCHEMA_FILE, propose_config
from pm_hf.data.stream import load_stream

WORDS = {
    "lost": "my card is gone",
    "fee": "why do i pay so much",
    "pin": "the code is wrong",
    "limit": "how much can i spend",
}


def write_csv(path, classes, per_class=6, names=("utterance", "intent"), **columns):
    rows = [[f"{WORDS[name]} {i}", name, *columns.values()] for name in classes for i in range(per_class)]
    path.write_text("\n".join(",".join(row) for row in [[*names, *columns], *rows]) + "\n")
    return str(path)


def proposed(*data, **settings):
    """(the settings as written, the stream that they make)."""
    text = propose_config([str(name) for name in data], **settings)
    config = load_config(yaml.safe_load(text))
    return yaml.safe_load(text), load_stream(config)


def tasks_of(stream):
    return {task.name: "".join(label[0] for label in task.labels) for task in stream.tasks}


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        ((["lost", "fee"], ["pin", "limit"]), {}),
        ((["lost", "fee"], ["fee", "pin"]), {"shared_labels": True}),
        ((["lost", "fee"], ["fee", "lost"]), {"scenario": "domain_incremental"}),
    ],
    ids=["new classes", "classes that come back", "the same classes"],
)
def test_files_are_tasks_in_the_order_given(tmp_path, classes, said):
    files = [write_csv(tmp_path / f"{name}.csv", own) for name, own in zip("ba", classes, strict=True)]
    settings, stream = proposed(*files)
    group = settings["stream"]
    assert (group["kind"], group["text_column"], group["label_column"]) == (
        "text-classification",
        "utterance",
        "intent",
    )
    assert [task["name"] for task in group["tasks"]] == ["b", "a"]
    assert {key: group[key] for key in ("shared_labels", "scenario") if key in group} == said
    assert [len(task.test) for task in stream.tasks] == [2, 2]
    assert not stream.notes


def test_files_of_training_and_test_rows_belong_together(tmp_path):
    files = [
        write_csv(tmp_path / f"{month}-{side}.csv", own)
        for month, own in (("may", ["lost", "fee"]), ("june", ["pin", "limit"]))
        for side in ("train", "test")
    ]
    settings, stream = proposed(*files)
    assert [task.name for task in stream.tasks] == ["may", "june"]
    assert "test_share" not in settings["stream"]
    assert all(len(task.train) == len(task.test) == 12 for task in stream.tasks)


def test_one_file_is_split_by_its_classes(tmp_path):
    settings, stream = proposed(write_csv(tmp_path / "all.csv", WORDS, names=("text", "label")))
    assert settings["stream"]["class_groups"] == 2
    assert not {"text_column", "label_column"} & settings["stream"].keys()
    assert tasks_of(stream) == {"classes-00": "fl", "classes-01": "lp"}


def test_one_file_is_split_by_a_column_of_months(tmp_path):
    for month, own in (("may", ["lost", "fee"]), ("june", ["fee"])):
        write_csv(tmp_path / f"{month}.csv", own, month=month)
    rows = [line for month in ("may", "june") for line in (tmp_path / f"{month}.csv").read_text().splitlines()]
    (tmp_path / "all.csv").write_text("\n".join(dict.fromkeys(rows)))
    settings, stream = proposed(tmp_path / "all.csv")
    assert settings["stream"]["task_column"] == "month"
    assert tasks_of(stream) == {"may": "fl", "june": "f"}


def test_columns_of_other_names_are_told_by_what_they_hold(tmp_path):
    settings, _ = proposed(write_csv(tmp_path / "x.csv", WORDS, names=("was er schrieb", "worum es geht")))
    group = settings["stream"]
    assert (group["text_column"], group["label_column"]) == ("was er schrieb", "worum es geht")


@pytest.mark.parametrize("form", ["messages", "prompt", "text"])
def test_rows_without_classes_are_for_a_language_model(tmp_path, form):
    turn = lambda i: [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]  # noqa: E731
    row = {
        "messages": lambda i: {"messages": turn(i)},
        "prompt": lambda i: {"prompt": f"q{i}", "completion": f"a{i}"},
        "text": lambda i: {"text": f"a long text of which there is one, {i}"},
    }[form]
    for name in ("law", "code"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row(i)) for i in range(20)))
    settings, stream = proposed(tmp_path / "law.jsonl", tmp_path / "code.jsonl")
    assert settings["stream"]["kind"] == "causal-lm"
    assert [task.name for task in stream.tasks] == ["law", "code"]
    _, alone = proposed(tmp_path / "law.jsonl")
    assert [task.name for task in alone.tasks] == ["law"]


def pictures(folder, classes):
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(5):
            Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(folder / name / f"{i}.png")
    return folder


def test_folders_of_pictures(tmp_path):
    pictures(tmp_path / "one" / "train", "ab")
    pictures(tmp_path / "one" / "test", "ab")
    settings, stream = proposed(tmp_path / "one")
    assert (settings["stream"]["kind"], tasks_of(stream)) == (
        "image-classification",
        {"classes-00": "a", "classes-01": "b"},
    )
    months = [pictures(tmp_path / month, own) for month, own in (("may", "ab"), ("june", "bc"))]
    settings, stream = proposed(*months)
    assert settings["stream"]["shared_labels"] is True
    assert tasks_of(stream) == {"may": "ab", "june": "bc"}


def test_a_data_set_with_classes_of_its_own(tmp_path):
    features = Features({"sentence": Value("string"), "mood": ClassLabel(names=["cold", "warm"])})
    for split in ("train", "validation"):
        rows = {"sentence": [f"text {i}" for i in range(8)], "mood": [0, 1] * 4}
        (tmp_path / "set").mkdir(exist_ok=True)
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set" / f"{split}.parquet")
    (tmp_path / "set" / "README.md").write_text("a data set")
    settings, stream = proposed(tmp_path / "set")
    group = settings["stream"]
    assert (group["text_column"], group["label_column"], group["test_split"]) == ("sentence", "mood", "validation")
    assert tasks_of(stream) == {"classes-00": "cw"}


def test_what_cannot_be_looked_at_is_one_line(tmp_path):
    (tmp_path / "a.csv").write_text("text;label\nx;y\n")
    assert "its cells are separated by ';', not by commas" in refusal(propose_config, [str(tmp_path / "a.csv")])
    (tmp_path / "a.txt").write_text("x")
    assert "expected files ending in .csv" in refusal(propose_config, [str(tmp_path / "a.txt")])
    assert "none.csv does not exist" in refusal(propose_config, [str(tmp_path / "none.csv"), str(tmp_path)])
    only = write_csv(tmp_path / "one-class.csv", ["lost"])
    assert "column intent has one class only" in refusal(propose_config, [only])
    assert "only files of test rows" in refusal(propose_config, [write_csv(tmp_path / "test.csv", WORDS)])


def test_what_is_written_runs_as_it_is(tiny_base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = list(CLASSES)
    for month, own in (("may", names[:2]), ("june", names[1:3])):
        write_rows(tmp_path / f"{month}.csv", own, 8, seed=1)
    init = ["init", "may.csv", "june.csv", "--base", str(tiny_base)]
    assert main(init) == 0
    assert "written: stream.yaml; next: pm-hf train --config stream.yaml" in capsys.readouterr().out
    text = (tmp_path / "stream.yaml").read_text()
    assert "target_modules: [query, value]  # PEFT's choice for bert" in text
    assert json.loads((tmp_path / SCHEMA_FILE).read_text())["properties"]["lora"]
    assert main(init) == 2
    assert "stream.yaml exists" in capsys.readouterr().err
    assert main([*init, "--overwrite"]) == 0
    assert main(["train", "--config", "stream.yaml", "training.max_steps=1"]) == 0
    assert "merged adapter: runs/first/merged" in capsys.readouterr().out
