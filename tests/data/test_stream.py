import gzip
import json

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from helpers import refusal
from helpers.streams import CLASSES, write_rows

from pm_hf.config.loading import load_config
from pm_hf.data.encoders import TextEncoder
from pm_hf.data.rows import Rows
from pm_hf.data.stream import batches, load_stream, sample
from pm_hf.models.loading import load_tokenizer
from pm_hf.runs.paths import RunPaths

TRAIN = [("null", "b"), ("NA", "a"), ("drei, ä\n", "b"), ("vier", "a"), ("", "a")]
TEST = [("fünf", "a"), ("sechs", "b")]


def write(path, rows, text="text", label="label"):
    """The rows in the format that the name asks for."""
    records = [{text: t, label: y} for t, y in rows]
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    plain = path.with_name("plain." + kind)
    if kind == "parquet":
        Dataset.from_list(records).to_parquet(plain)
    elif kind == "jsonl":
        plain.write_text("\n".join(json.dumps(r) for r in records), encoding="utf-8")
    elif kind == "json":
        plain.write_text(json.dumps(records), encoding="utf-8")
    else:
        import csv

        with open(plain, "w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, [text, label])
            writer.writeheader()
            writer.writerows(records)
    path.write_bytes(gzip.compress(plain.read_bytes()) if path.suffix == ".gz" else plain.read_bytes())
    return path


def stream(folder, overrides=(), **settings):
    config = {"output_dir": "unused", "model": {"base": "unused"}, "data_dir": str(folder), "stream": settings}
    return load_stream(load_config(config, overrides))


def rows_of(task):
    return list(zip(task.train.inputs, task.train.labels, strict=True))


def files(folder, train=TRAIN, test=TEST):
    write(folder / "train.jsonl", train)
    write(folder / "test.jsonl", test)
    return {"train": "train.jsonl", "test": "test.jsonl"}


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "parquet", "csv.gz", "json.gz", "jsonl.gz"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    write(tmp_path / f"train.{suffix}", TRAIN)
    write(tmp_path / f"test.{suffix}", TEST)
    (task,) = stream(tmp_path, train=f"train.{suffix}", test=f"test.{suffix}", class_groups=1).tasks
    assert rows_of(task) == TRAIN
    assert task.test == Rows(["fünf", "sechs"], ["a", "b"])


def test_columns_have_the_names_of_the_yaml(tmp_path):
    write(tmp_path / "train.csv", TRAIN, "utterance", "intent")
    write(tmp_path / "test.csv", TEST, "utterance", "intent")
    names = {"text_column": "utterance", "label_column": "intent"}
    (task,) = stream(tmp_path, train="train.csv", test="test.csv", class_groups=1, **names).tasks
    assert rows_of(task) == TRAIN


def hub_folder(folder, train_labels=(1, 0, 1), test_labels=(0, 1)):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["cold", "warm"])})
    folder.mkdir()
    for name, labels in (("train", train_labels), ("validation", test_labels)):
        rows = {"text": [f"text {i}" for i in range(len(labels))], "label": list(labels)}
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{name}.parquet")
    return {"dataset": folder.name, "test_split": "validation"}


def test_data_set_folder_with_class_labels_gives_names(tmp_path):
    (task,) = stream(tmp_path, **hub_folder(tmp_path / "hub"), class_groups=1).tasks
    assert task.labels == ("cold", "warm")
    assert task.train.labels == ["warm", "cold", "warm"]
    assert task.test.labels == ["cold", "warm"]


def test_missing_split_of_a_data_set_is_one_clear_error(tmp_path):
    settings = hub_folder(tmp_path / "hub") | {"test_split": "nope"}
    assert "split nope cannot be loaded" in refusal(stream, tmp_path, **settings, class_groups=1)


def test_unlabelled_split_of_a_data_set_is_one_clear_error(tmp_path):
    settings = hub_folder(tmp_path / "hub", test_labels=(0, -1))  # as the hidden test splits on the Hub
    assert "label" in refusal(stream, tmp_path, **settings, class_groups=1)


def test_number_of_class_groups_splits_sorted_labels_evenly(tmp_path):
    rows = [(f"text {label}", label) for label in "gfedcba"]
    found = stream(tmp_path, **files(tmp_path, rows, rows), class_groups=3).tasks
    assert [task.labels for task in found] == [("a", "b", "c"), ("d", "e"), ("f", "g")]
    assert [sorted(set(task.test.labels)) for task in found] == [list(task.labels) for task in found]


def test_class_groups_by_mapping_and_by_file_are_the_same(tmp_path):
    groups = {"second": ["c"], "first": ["b", "a"]}
    rows = [(f"text {label}", label) for label in "abc"]
    (tmp_path / "groups.json").write_text(json.dumps(groups))
    by_mapping = stream(tmp_path, **files(tmp_path, rows, rows), class_groups=groups)
    assert by_mapping == stream(tmp_path, **files(tmp_path, rows, rows), class_groups="groups.json")
    assert [task.name for task in by_mapping.tasks] == ["second", "first"]
    assert [task.train.labels for task in by_mapping.tasks] == [["c"], ["a", "b"]]


def test_domain_column_makes_a_task_of_each_value_in_order_of_appearance(tmp_path):
    rows = [("w1", "a", "web"), ("m1", "b", "mail"), ("w2", "b", "web"), ("m2", "a", "mail")]
    table = [dict(zip(("text", "label", "from"), row, strict=True)) for row in rows]
    for name in ("train", "test"):
        (tmp_path / f"{name}.json").write_text(json.dumps(table))
    settings = {"train": "train.json", "test": "test.json", "scenario": "domain_incremental", "domain_column": "from"}
    found = stream(tmp_path, **settings).tasks
    assert [task.name for task in found] == ["web", "mail"]
    assert [task.train.inputs for task in found] == [["w1", "w2"], ["m1", "m2"]]
    assert [task.labels for task in found] == [("a", "b"), ("a", "b")]


def two_tasks(folder):
    write(folder / "a.csv", [("x", "pos"), ("y", "neg")])
    write(folder / "b.csv", [("z", "pos"), ("w", "other")])
    return [{"name": "one", "train": "a.csv", "test": "a.csv"}, {"name": "two", "train": "b.csv", "test": "b.csv"}]


def test_labels_of_listed_tasks_are_qualified(tmp_path):
    found = stream(tmp_path, tasks=two_tasks(tmp_path)).tasks
    assert [task.labels for task in found] == [("one/neg", "one/pos"), ("two/other", "two/pos")]
    assert found[1].train.labels == ["two/pos", "two/other"]


def test_shared_labels_keep_their_names(tmp_path):
    found = stream(tmp_path, tasks=two_tasks(tmp_path), shared_labels=True).tasks
    assert [task.labels for task in found] == [("neg", "pos"), ("other", "pos")]


def test_listed_domains_share_all_labels(tmp_path):
    found = stream(tmp_path, tasks=two_tasks(tmp_path), scenario="domain_incremental").tasks
    assert [task.labels for task in found] == [("neg", "other", "pos")] * 2


def test_a_task_s_entry_overrides_the_stream_s_source(tmp_path):
    tasks = two_tasks(tmp_path)
    del tasks[1]["test"]
    write(tmp_path / "common.csv", [("common", "pos")])
    found = stream(tmp_path, tasks=tasks, test="common.csv").tasks
    assert [task.test.inputs for task in found] == [["x", "y"], ["common"]]


def test_a_task_s_own_files_override_the_stream_s_data_set(tmp_path):
    tasks = [{"name": "hub"}, *two_tasks(tmp_path)]
    found = stream(tmp_path, tasks=tasks, **hub_folder(tmp_path / "hub")).tasks
    assert found[0].train.inputs == ["text 0", "text 1", "text 2"]
    assert found[1].train.inputs == ["x", "y"]


def thin(folder, per_class, seed=0):
    return stream(
        folder, [f"seed={seed}"], train="train.csv", test="test.csv", class_groups=2, train_per_class=per_class
    ).tasks


def test_train_per_class_is_exact_seeded_and_in_order(tmp_path):
    write_rows(tmp_path / "train.csv", CLASSES, 9, seed=1)
    write_rows(tmp_path / "test.csv", CLASSES, 3, seed=2)
    whole, thinned = thin(tmp_path, None), thin(tmp_path, 4)
    for before, after in zip(whole, thinned, strict=True):
        assert all(after.train.labels.count(label) == 4 for label in after.labels)
        places = [rows_of(before).index(row) for row in rows_of(after)]
        assert places == sorted(places)
        assert after.test == before.test
    assert thin(tmp_path, 4) == thinned
    assert thin(tmp_path, 4, seed=1) != thinned
    assert thin(tmp_path, 100) == whole  # fewer rows than asked for: all of them


def test_fingerprint_follows_labels_rows_and_name(tmp_path):
    settings = files(tmp_path)
    prints = {stream(tmp_path, **settings, class_groups=1).tasks[0].fingerprint()}
    assert stream(tmp_path, **settings, class_groups=1).tasks[0].fingerprint() in prints
    prints.add(stream(tmp_path, **settings, class_groups={"other": ["a", "b"]}).tasks[0].fingerprint())
    changed_train, changed_test = [*TRAIN[:-1], ("changed", "a")], [*TEST[:-1], ("changed", "b")]
    relabelled = [*TRAIN[:-1], (TRAIN[-1][0], "b")]
    for i, data in enumerate([(changed_train, TEST), (TRAIN, changed_test), (relabelled, TEST)]):
        (tmp_path / f"v{i}").mkdir()
        files(tmp_path / f"v{i}", *data)
        prints.add(stream(tmp_path / f"v{i}", **settings, class_groups=1).tasks[0].fingerprint())
    assert len(prints) == 5


def test_a_file_s_new_content_is_read_even_with_the_old_time_stamp(tmp_path):
    import os

    settings = files(tmp_path, [("old", "a")], [("old", "a")])
    before = (tmp_path / "train.jsonl").stat()
    assert stream(tmp_path, **settings, class_groups=1).tasks[0].train.inputs == ["old"]
    write(tmp_path / "train.jsonl", [("new", "a")])
    os.utime(tmp_path / "train.jsonl", ns=(before.st_atime_ns, before.st_mtime_ns))  # as rsync -t, cp -p and tar do
    assert stream(tmp_path, **settings, class_groups=1).tasks[0].train.inputs == ["new"]


@pytest.fixture(scope="module")
def tokenizer(tiny_base):
    settings = load_config({"output_dir": "x", "model": {"base": str(tiny_base)}, "stream": {"class_groups": 1}}).model
    return load_tokenizer(settings)


def test_encode_truncates_and_indexes_labels(tokenizer):
    encoded = TextEncoder(tokenizer, 5).examples(Rows(["the0 " * 9, "of1"], ["b", "a"]), ("a", "b"))
    assert [len(row["input_ids"]) for row in encoded] == [5, 3]
    assert [row["labels"] for row in encoded] == [1, 0]
    assert encoded[1]["input_ids"] == tokenizer("of1")["input_ids"]


def test_batches_pad_and_keep_the_order(tokenizer):
    texts = ["the0", "of1 of2 of3", "apple0 apple1", "the2 the3", "of4"]
    encoder = TextEncoder(tokenizer, 16)
    encoded = encoder.examples(Rows(texts, list("abcde")), list("abcde"))
    found = list(batches(encoder, encoded, 2))
    assert [tuple(batch["input_ids"].shape) for batch in found] == [(2, 5), (2, 4), (1, 3)]
    assert torch.cat([batch["labels"] for batch in found]).tolist() == [0, 1, 2, 3, 4]
    for batch, start in zip(found, (0, 2, 4), strict=True):
        for ids, mask, row in zip(batch["input_ids"], batch["attention_mask"], encoded[start:], strict=False):
            assert ids[mask.bool()].tolist() == row["input_ids"]
            assert (ids[~mask.bool()] == tokenizer.pad_token_id).all()


def test_sample_is_seeded_and_draws_without_repetition():
    rows = Rows(list(range(40)), [str(i) for i in range(40)])
    drawn = sample(rows, 10, seed=3).inputs
    assert len(set(drawn)) == 10
    assert drawn == sample(rows, 10, seed=3).inputs
    assert drawn != sample(rows, 10, seed=4).inputs
    assert sorted(sample(rows, None, seed=3).inputs) == list(range(40))
    assert sample(rows, 10, seed=3).labels == [str(i) for i in drawn]
    assert len(sample(rows, 99, seed=3)) == 40


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_column": "intent"}, "missing column intent; found text, label"),
        ({"text_column": "body", "label_column": "intent"}, "missing column body, intent; found text, label"),
        ({"train": "none.csv"}, "none.csv does not exist; set data_dir=FOLDER if it lies elsewhere"),
        ({"train": "train.xlsx"}, "ending in .csv, .json, .jsonl (.gz too) or .parquet, found train.xlsx"),
        ({"train": "train.gz"}, "or .parquet, found train.gz"),
        ({"train": "train.parquet.gz"}, "or .parquet, found train.parquet.gz"),
        ({"test": None}, "no test file and no dataset given"),
        ({"class_groups": 3}, "expected 1 to 2 groups for 2 classes, found 3"),
        ({"class_groups": 0}, "expected 1 to 2 groups for 2 classes, found 0"),
        ({"class_groups": "none.json"}, "none.json does not exist"),
        ({"class_groups": {"x": ["a", "zebra"]}}, "labels without a training row: ['zebra']"),
        ({"class_groups": {"x": ["a", "b"], "y": ["b"]}}, "labels in two groups: ['b']"),
        ({"class_groups": {"x": ["a", "a", "c"]}}, "2 problems"),
        ({"class_groups": {"x": "a"}}, "expected {task: [label, …]}"),
        ({"class_groups": {}}, "no tasks"),
        ({"class_groups": {"x": ["a"], "y": []}}, "task 'y' is empty: no training rows"),
    ],
)
def test_bad_stream_is_one_clear_error(tmp_path, settings, message):
    assert message in refusal(stream, tmp_path, **({**files(tmp_path), "class_groups": 1} | settings))


def test_class_groups_file_that_is_no_json_is_one_clear_error(tmp_path):
    (tmp_path / "groups.json").write_text("{bad")
    assert "groups.json" in refusal(stream, tmp_path, **files(tmp_path), class_groups="groups.json")


@pytest.mark.parametrize(
    ("name", "content"),
    [("t.csv.gz", b"\x1f\x8bnot gzip"), ("t.parquet", b"PAR1"), ("t.csv", b""), ("t.csv", b"\xe4,b\n")],
)
def test_broken_file_is_one_clear_error(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert f"{name} cannot be read as" in refusal(stream, tmp_path, **files(tmp_path) | {"train": name}, class_groups=1)


def test_text_column_that_holds_numbers_is_refused(tmp_path):
    message = refusal(stream, tmp_path, **files(tmp_path, [(1, "a"), (2, "b")]), class_groups=1)
    assert "column text must hold text, row 0 holds 1" in message


def test_text_that_is_null_is_refused(tmp_path):
    message = refusal(stream, tmp_path, **files(tmp_path, [("x", "a"), (None, "b")]), class_groups=1)
    assert "column text must hold text, row 1 holds None" in message


@pytest.mark.parametrize("empty", ["", None])
def test_empty_label_is_refused(tmp_path, empty):
    message = refusal(stream, tmp_path, **files(tmp_path, [("x", "a"), ("y", empty)]), class_groups=1)
    assert "column label is empty in row 1" in message


def test_all_problems_of_listed_tasks_stand_in_one_error(tmp_path):
    good, other = two_tasks(tmp_path)
    bad = [{**good, "train": "none.csv"}, {**other, "label_column": "intent"}, {"train": "a.csv"}]
    message = refusal(stream, tmp_path, tasks=bad)
    assert "3 problems" in message
    for part in ("task one: file", "task two:", "missing column intent", "tasks[2] has no name"):
        assert part in message


def test_test_labels_empty_tasks_and_repeated_names_stand_in_one_error(tmp_path):
    (tmp_path / "empty.json").write_text("[]")
    write(tmp_path / "strange.csv", [("x", "zebra")])
    tasks = two_tasks(tmp_path)
    message = refusal(
        stream,
        tmp_path,
        tasks=[{**tasks[0], "test": "strange.csv"}, {**tasks[1], "name": "one"}],
    )
    assert "2 problems" in message
    assert "two tasks are named 'one'" in message
    assert "task 'one': labels in test that train lacks: ['one/zebra']" in message


@pytest.mark.parametrize("groups", [1, 2, {"all": ["a", "b"]}, {"only a": ["a"]}], ids=str)
def test_label_in_test_that_train_lacks_is_refused_in_a_split_data_set(tmp_path, groups):
    settings = files(tmp_path, test=[*TEST, ("sieben", "zebra")])
    assert "labels in test that train lacks: ['zebra']" in refusal(stream, tmp_path, **settings, class_groups=groups)


def test_domain_in_test_that_train_lacks_is_refused(tmp_path):
    for name, domains in (("train", ("web", "mail")), ("test", ("web", "mail", "fax"))):
        rows = [{"text": "x", "label": "a", "from": domain} for domain in domains]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    settings = {"train": "train.json", "test": "test.json", "domain_column": "from"}
    assert "fax" in refusal(stream, tmp_path, **settings, scenario="domain_incremental")


def test_label_of_another_domain_is_fine_in_test(tmp_path):
    write(tmp_path / "a.csv", [("x", "pos"), ("y", "neg")])
    write(tmp_path / "b.csv", [("z", "pos")])
    tasks = [{"name": "one", "train": "a.csv", "test": "a.csv"}, {"name": "two", "train": "b.csv", "test": "a.csv"}]
    assert stream(tmp_path, tasks=tasks, scenario="domain_incremental").tasks[1].test.labels == ["pos", "neg"]
    assert "labels in test that train lacks" in refusal(stream, tmp_path, tasks=tasks)


def test_thinning_a_task_leaves_every_class_a_row(tiny_base, tmp_path):
    rare = [(f"rare{i}", f"rare{i}") for i in range(6)]
    write(tmp_path / "train.csv", [(f"apple{i}", "apple") for i in range(60)] + rare)
    write(tmp_path / "test.csv", [("apple0", "apple")])
    task = {"name": "one", "train": "train.csv", "test": "test.csv"}
    base = {"output_dir": str(tmp_path / "run"), "data_dir": str(tmp_path), "model": {"base": str(tiny_base)}}
    for seed in range(4):
        stream = {"tasks": [task], "train_rows": 12, "shared_labels": True}
        found = load_stream(load_config({**base, "seed": seed, "stream": stream})).tasks[0].train
        assert len(found) == 12
        assert set(found.labels) == {"apple", *(label for _, label in rare)}
        assert len(set(found.inputs)) == 12


@pytest.mark.parametrize(
    "split", [{"class_groups": {"x": ["a"], "y": ["b"]}}, {"class_groups": 2}, {"tasks": ["x", "y"]}], ids=str
)
def test_order_is_that_of_the_names(tmp_path, split):
    settings = files(tmp_path)
    if "tasks" in split:
        split = {"tasks": [{"name": name} for name in split["tasks"]]}
    names = [task.name for task in stream(tmp_path, **settings, **split).tasks]
    turned = stream(tmp_path, **settings, **split, order=names[::-1]).tasks
    assert [task.name for task in turned] == names[::-1]
    before = {task.name: rows_of(task) for task in stream(tmp_path, **settings, **split).tasks}
    assert {task.name: rows_of(task) for task in turned} == before


@pytest.mark.parametrize("order", [["x"], ["x", "y", "z"], ["x", "x"]])
def test_order_names_every_task_once(tmp_path, order):
    settings = files(tmp_path) | {"class_groups": {"x": ["a"], "y": ["b"]}}
    assert "stream.order: expected each of x, y once, found " + ", ".join(order) in refusal(
        stream, tmp_path, **settings, order=order
    )


def test_labels_that_look_alike_are_named_in_one_note(tmp_path):
    rows = [
        (f"text {i}", label) for i, label in enumerate(["apple", "apple ", "Apple", "caf\u00e9", "cafe\u0301", "bird"])
    ]
    found = stream(tmp_path, **files(tmp_path, rows, rows), class_groups=1)
    assert found.notes == (
        "labels that differ only in blanks, case or form are kept apart: 'Apple' and 'apple' and 'apple '; "
        "'cafe\\u0301' and 'caf\\xe9'",
    )
    assert len(found.tasks[0].labels) == 6
    left = stream(tmp_path, **files(tmp_path, rows, rows), class_groups={"x": ["apple", "Apple"]})
    assert [note[:10] for note in left.notes] == ["4 labels a", "labels tha"]
    assert stream(tmp_path, **files(tmp_path, TEST, TEST), class_groups=1).notes == ()


def test_label_of_the_test_rows_that_is_written_otherwise_is_named_with_what_was_meant(tmp_path):
    settings = files(tmp_path, [("x", "apple"), ("y", "pear")], [("x", "apple "), ("y", "plum")])
    message = "labels in test that train lacks: ['apple ', 'plum'] (they differ only in blanks, case or form: "
    assert message + "'apple ' and 'apple')" in refusal(stream, tmp_path, **settings, class_groups=1)
    assert "'apple ' and 'apple')" in refusal(stream, tmp_path, tasks=[{"name": "x", **settings}], shared_labels=True)


@pytest.mark.parametrize(("test", "noted"), [(" a", ()), ("A", ("' A' and ' a'",)), ("b", ()), ("c", ())])
def test_answers_that_would_be_closed_if_they_were_written_alike_are_named(tmp_path, test, noted):
    write(tmp_path / "train.csv", [("x", "a"), ("y", "b")])
    write(tmp_path / "test.csv", [("x", test.strip())])
    task = {"name": "one", "train": "train.csv", "test": "test.csv"}
    found = stream(tmp_path, kind="causal-lm", prompt_template="{text}", tasks=[task])
    assert tuple(note.partition("apart: ")[2] for note in found.notes) == noted


def test_empty_texts_are_counted_in_a_note(tmp_path):
    settings = files(tmp_path, [("x", "a"), (" ", "a"), ("y", "b")], [("", "a"), ("z", "b")])
    assert stream(tmp_path, **settings, class_groups={"all": ["a", "b"]}).notes == (
        "task all: 1 of 3 training texts are empty",
        "task all: 1 of 2 test texts are empty",
    )


def test_domains_that_look_alike_are_named_in_one_note(tmp_path):
    rows = [{"text": "x", "label": label, "from": name} for name in ("web", "Web ", "mail") for label in "ab"]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    settings = {"train": "t.json", "test": "t.json", "scenario": "domain_incremental", "domain_column": "from"}
    (note,) = stream(tmp_path, **settings).notes
    assert note == "tasks that differ only in blanks, case or form are kept apart: 'web' and 'Web '"


def test_labels_of_different_listed_tasks_are_told_apart_by_the_task(tmp_path):
    write(tmp_path / "a.csv", [("x", "pos")])
    write(tmp_path / "b.csv", [("x", "Pos")])
    tasks = [{"name": name, "train": f"{name}.csv", "test": f"{name}.csv"} for name in "ab"]
    assert stream(tmp_path, tasks=tasks).notes == ()
    assert len(stream(tmp_path, tasks=tasks, shared_labels=True).notes) == 1


@pytest.mark.parametrize("empty", ["", "  ", "\u200b"])
def test_task_whose_texts_are_all_empty_is_refused(tmp_path, empty):
    rows = [("x", "a"), (empty, "b"), (empty + " ", "b")]
    settings = files(tmp_path, rows, [("x", "a"), ("x", "b")])
    assert len(stream(tmp_path, **settings, class_groups=1).tasks) == 1
    assert "task 'classes-01': every training text is empty" in refusal(stream, tmp_path, **settings, class_groups=2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("   ", "tasks[0] has no name, found '   '"),
        ("\u200b", "tasks[0] has no name"),
        ("x" * 300, "a task's name of 300 bytes, 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx'…, is longer than 240"),
        ("\u00e4" * 121, "a task's name of 242 bytes"),
        ("a\0b", r"stream.tasks[0].name: expected text, found 'a\x00b' with a character that no file holds"),
        ("a\ud800", r"stream.tasks[0].name: expected text, found 'a\ud800' with a character that no file holds"),
    ],
)
def test_task_name_that_no_folder_can_have_is_refused(tmp_path, name, message):
    assert message in refusal(stream, tmp_path, tasks=[{"name": name, **files(tmp_path)}])


@pytest.mark.parametrize(
    "name", ["..", "a/b", ".", "CON", "x" * 240, "\u00e4" * 120, "\N{SLIGHTLY SMILING FACE}" * 200, "a\nb"]
)
def test_task_name_of_which_a_folder_s_is_made_is_fine(tmp_path, name):
    (task,) = stream(tmp_path, tasks=[{"name": name, **files(tmp_path)}]).tasks
    assert task.name == name
    folder = RunPaths(tmp_path).task(0, name).folder
    folder.mkdir()
    assert folder.parent == tmp_path


def test_domain_and_class_group_of_blanks_are_refused(tmp_path):
    rows = [{"text": "x", "label": label, "from": " "} for label in "ab"]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    settings = {"train": "t.json", "test": "t.json", "domain_column": "from", "scenario": "domain_incremental"}
    assert "column from is empty in row 0 (' ')" in refusal(stream, tmp_path, **settings)
    assert "a task's name holds nothing to read: ' '" in refusal(
        stream, tmp_path, **files(tmp_path), class_groups={" ": ["a"]}
    )


def test_class_groups_name_labels_as_the_file_has_them(tmp_path):
    write(tmp_path / "t.csv", [("x", "true"), ("y", "false"), ("z", "7")])
    groups = {"x": [True, False], "y": [7]}
    found = stream(tmp_path, train="t.csv", test="t.csv", class_groups=groups).tasks
    assert [task.labels for task in found] == [("false", "true"), ("7",)]


MONTHS = {"may": "ab", "june": "bc", "july": "ac"}  # classes that are new and that come back


def monthly(folder, per_class=4):
    rows = [
        (f"{month} {label} {i}", label, month)
        for month, own in MONTHS.items()
        for label in own
        for i in range(per_class)
    ]
    lines = ["text,label,month", *(",".join(row) for row in rows)]
    (folder / "all.csv").write_text("\n".join(lines))
    for month in MONTHS:
        own = [f"{text},{label}" for text, label, of in rows if of == month]
        (folder / f"{month}.csv").write_text("\n".join(["text,label", *own]))


def test_a_column_of_tasks_has_classes_that_are_new_and_that_come_back(tmp_path):
    monthly(tmp_path)
    made = stream(tmp_path, train="all.csv", test_share=0.25, task_column="month")
    assert made.scenario == "class_incremental"
    assert [(task.name, "".join(task.labels)) for task in made.tasks] == list(MONTHS.items())
    for task in made.tasks:
        assert all(text.startswith(f"{task.name} {label} ") for text, label in rows_of(task))
        assert len(task.train) == 6
        assert sorted(task.test.labels) == sorted(task.labels)  # one of four of each class and month
    assert not made.notes


def test_a_column_of_tasks_with_test_rows_of_its_own(tmp_path):
    monthly(tmp_path)
    made = stream(tmp_path, train="all.csv", test="all.csv", task_column="month", order=["july", "may", "june"])
    assert [task.name for task in made.tasks] == ["july", "may", "june"]
    assert [len(task.test) for task in made.tasks] == [8, 8, 8]


def test_files_by_a_pattern_are_the_tasks_that_a_column_makes(tmp_path):
    monthly(tmp_path)
    (tmp_path / "months").mkdir()
    for month in MONTHS:
        (tmp_path / f"{month}.csv").rename(tmp_path / "months" / f"{month}.csv")
    made = stream(tmp_path, task_files="months/*.csv", test_share=0.25)
    assert [(task.name, "".join(task.labels)) for task in made.tasks] == sorted(MONTHS.items())
    assert [len(task.train) for task in made.tasks] == [6, 6, 6]
    message = refusal(stream, tmp_path, task_files="years/*.csv", test_share=0.25)
    assert "stream.task_files: no file is named" in message
    assert "set stream.test_share" in refusal(stream, tmp_path, task_files="months/*.csv")


def test_configurations_of_a_data_set_are_tasks(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["cold", "warm"])})
    for name in ("en", "fr"):
        for split in ("train", "test"):
            rows = {"text": [f"{name} {split} {i}" for i in range(4)], "label": [0, 1, 0, 1]}
            (tmp_path / "sets" / name).mkdir(parents=True, exist_ok=True)
            Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "sets" / name / f"{split}.parquet")
    (tmp_path / "sets" / "README.md").write_text(
        "---\nconfigs:\n"
        + "".join(
            f"- config_name: {name}\n  data_files:\n  - {{split: train, path: {name}/train.parquet}}\n"
            f"  - {{split: test, path: {name}/test.parquet}}\n"
            for name in ("en", "fr")
        )
        + "---\n"
    )
    made = stream(tmp_path, dataset="sets", task_configs=["fr", "en"])
    assert [(task.name, task.train.inputs[0], task.labels) for task in made.tasks] == [
        ("fr", "fr train 0", ("cold", "warm")),
        ("en", "en train 0", ("cold", "warm")),
    ]
    assert "stream.task_configs: names configurations of stream.dataset" in refusal(
        stream, tmp_path, task_configs=["a"]
    )


def test_a_class_that_two_listed_tasks_have_is_told_how_to_be_one(tmp_path):
    monthly(tmp_path)
    listed = [{"name": month, "train": f"{month}.csv"} for month in MONTHS]
    made = stream(tmp_path, tasks=listed, test_share=0.25)
    assert "3 classes of different tasks have one name and are kept apart (a, b, c)" in made.notes[0]
    assert "set stream.shared_labels: true" in made.notes[0]
    assert not stream(tmp_path, tasks=listed, test_share=0.25, shared_labels=True).notes
