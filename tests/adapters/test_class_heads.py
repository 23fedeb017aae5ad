"""Class heads in a merge: whose rows nobody named, labels as the texts they stand for, hidden layers of a head."""

import itertools
import json

import pytest
import torch
from helpers import adapter_folders
from helpers.adapter_folders import saved_tensors, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from pm_hf import InputError, inspect_adapters, merge_adapters
from pm_hf.adapters.folder import open_adapter
from pm_hf.cli import main

H = 16


def layer(name, rows, seed, columns=H, bias=True):
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"{name}.weight": torch.randn(rows, columns, generator=generator)}
    return tensors | ({f"{name}.bias": torch.randn(rows, generator=generator)} if bias else {})


def folder(path, saved, labels=None, *, seed=0, roots=None, task_type=None):
    roots = roots or sorted({name.partition(".")[0] for name in saved})
    config = {"modules_to_save": roots, "task_type": task_type}
    return write_folder(path, seed=seed, saved=saved, labels=labels, config=config)


def merged(tmp_path, *folders, **more):
    report = merge_adapters(list(folders), tmp_path / "out", method="average", overwrite=True, **more)
    return saved_tensors(tmp_path / "out"), report


def written_labels(tmp_path):
    return json.loads((tmp_path / "out" / "labels.json").read_text())


def refused(tmp_path, message, *folders):
    """The one line that refuses their merge."""
    return adapter_folders.refused(tmp_path, message, list(folders), tmp_path / "out", method="average", overwrite=True)


# heads without labels
NAMES = ("classifier", "score", "head", "fc", "my_head.proj", "classifier.3", "visual.head", "dense")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("types", [(None, None), ("SEQ_CLS", None), ("CAUSAL_LM",) * 2], ids=str)
def test_heads_that_differ_without_labels_are_refused_by_name(tmp_path, name, types):
    saved = layer(name, 3, 1)
    other = {key: value[[2, 0, 1]] for key, value in saved.items()}
    pair = [folder(tmp_path / x, own, task_type=t) for x, own, t in zip("ab", (saved, other), types, strict=True)]
    text = refused(tmp_path, f"{name}.weight differs between the adapters, it may be a class head", *pair)
    assert f'labels.json that says which rows belong together into each folder, {{"{name}": [label, …]}}' in text
    for path, labels in zip(pair, (["x", "y", "z"], ["z", "x", "y"]), strict=True):  # the way out works
        (path / "labels.json").write_text(json.dumps({name: labels}))
    result, _ = merged(tmp_path, *pair)
    assert all(torch.equal(result[key], saved[key]) for key in saved)
    assert written_labels(tmp_path) == {name: ["x", "y", "z"]}


def test_all_heads_without_labels_are_told_at_once(tmp_path):
    pair = [folder(tmp_path / x, layer("first", 3, i) | layer("second", 2, i)) for i, x in enumerate("ab")]
    assert refused(tmp_path, "2 problems: first.weight .*; second.weight", *pair)


def test_other_ways_out_of_a_head_without_labels(tmp_path):
    pair = [folder(tmp_path / x, layer("fc", 3, i), seed=i) for i, x in enumerate("ab")]
    first, second = map(saved_tensors, pair)
    result, report = merged(tmp_path, *pair, rows_from=pair[1])
    assert all(torch.equal(result[key], second[key]) for key in second)
    assert report.heads == dict.fromkeys(second, f"from {pair[1]}")
    assert main(["merge", str(pair[1]), "--into", str(pair[0]), "--rows-from", str(pair[0]), "--coefficient", "0.5",
                 "--output", str(tmp_path / "out"), "--overwrite"]) == 0  # fmt: skip
    assert all(torch.equal(saved_tensors(tmp_path / "out")[key], first[key]) for key in first)
    (pair[0] / "labels.json").write_text('{"fc": null}')
    result, report = merged(tmp_path, *pair)
    assert all(torch.allclose(result[key], (first[key] + second[key]) / 2) for key in first)
    assert set(report.heads.values()) == {"by coefficient"}
    assert open_adapter(tmp_path / "out").in_order == ("fc",)
    merge_adapters(pair[1], tmp_path / "next", into=tmp_path / "out", coefficient=0.5)  # says it for the next fold


def test_heads_of_other_sizes_cannot_be_called_the_same(tmp_path):
    pair = [folder(tmp_path / x, layer("fc", 3 + i, i), {"fc": None}) for i, x in enumerate("ab")]
    text = refused(tmp_path, r"fc.weight has different shapes \[\(3, 16\), \(4, 16\)\] in the adapters", *pair)
    assert "rows_from" in text
    result, _ = merged(tmp_path, *pair, rows_from=pair[0])
    assert len(result["fc.weight"]) == 3


@pytest.mark.parametrize("labelled", ["", "a", "b", "ab"])
def test_equal_heads_merge_without_labels(tmp_path, labelled):
    saved, labels = layer("score", 3, 1), {"score": ["x", "y", "z"]}
    pair = [folder(tmp_path / x, saved, labels if x in labelled else None, seed=i) for i, x in enumerate("ab")]
    result, _ = merged(tmp_path, *pair)
    assert all(torch.equal(result[key], saved[key]) for key in saved)
    assert open_adapter(tmp_path / "out").labels == (labels if labelled else {})


def test_a_head_of_one_adapter_needs_no_labels(tmp_path):
    pair = [folder(tmp_path / "a", layer("fc", 3, 1)), write_folder(tmp_path / "b", seed=2)]
    result, report = merged(tmp_path, *pair)
    assert torch.equal(result["fc.weight"], saved_tensors(pair[0])["fc.weight"])
    assert set(report.heads.values()) == {"from the only adapter that has it"}


def test_a_head_of_convolutions_by_label(tmp_path):
    pair, labels = [], (["x", "y"], ["z", "y"])
    for i, own in enumerate(labels):
        saved = {"decode_head.classifier.weight": torch.randn(2, H, 1, 1, generator=torch.Generator().manual_seed(i))}
        pair.append(folder(tmp_path / str(i), saved, {"decode_head.classifier": own}))
    result, _ = merged(tmp_path, *pair)
    first, second = (saved_tensors(path)["decode_head.classifier.weight"] for path in pair)
    wanted = torch.stack([first[0], (first[1] + second[1]) / 2, second[0]])
    assert torch.allclose(result["decode_head.classifier.weight"], wanted)
    assert written_labels(tmp_path) == {"decode_head.classifier": ["x", "y", "z"]}


# labels are texts
SPELLINGS = {
    "numbers and texts": ([0, 1, 2], ["0", "1", "2"], ["0", "1", "2"]),
    "in another order": ([2, 0, 1], ["0", "1", "2"], ["2", "0", "1"]),
    "numbers in both": ([0, 1, 2], [0, 1, 2], ["0", "1", "2"]),
    "truth values": ([False, True, "x"], ["false", "true", "x"], ["false", "true", "x"]),
    "fractions": ([0.5, 1.5, 2.0], ["2.0", "0.5", "1.5"], ["0.5", "1.5", "2.0"]),
    "leading zeros stay": (["07", "7", "1"], [7, 1, "x"], ["07", "7", "1", "x"]),
}


@pytest.mark.parametrize(("first", "second", "wanted"), SPELLINGS.values(), ids=SPELLINGS)
def test_labels_are_compared_as_the_texts_they_stand_for(tmp_path, first, second, wanted):
    pair = [folder(tmp_path / str(i), layer("fc", 3, i), {"fc": own}) for i, own in enumerate((first, second))]
    result, _ = merged(tmp_path, *pair)
    assert written_labels(tmp_path) == {"fc": wanted}
    tables = [
        dict(
            zip(
                [x if isinstance(x, str) else json.dumps(x) for x in own], saved_tensors(path)["fc.weight"], strict=True
            )
        )
        for own, path in zip((first, second), pair, strict=True)
    ]
    for label, row in zip(wanted, result["fc.weight"], strict=True):
        having = [table[label] for table in tables if label in table]
        assert torch.allclose(row, sum(having) / len(having))
    assert inspect_adapters([pair[0]])["adapters"][0]["labels"] == {"fc": list(tables[0])}


@pytest.mark.parametrize(
    "labels",
    [[True, 1, 2], [1, 1.0, 2], [0, False, 2], ["1", 1, 2], ["true", True, 2], [1e3, 1000, 2], ["0.5", 0.5, 2]],
)
def test_one_label_written_in_two_ways_in_one_list(tmp_path, labels):
    path = folder(tmp_path / "a", layer("fc", 3, 1), {"fc": labels})
    first, second = map(json.dumps, labels[:2])
    message = f"labels.json names one label of fc in two ways, {first} and {second}; write every label as the text"
    refused(tmp_path, message, path)


@pytest.mark.parametrize("labels", list(itertools.permutations([[0, 1, 2], [0.0, 1.0, 2.0], [False, True, 2]], 2)))
def test_one_number_written_in_two_ways_in_two_adapters(tmp_path, labels):
    pair = [folder(tmp_path / str(i), layer("fc", 3, i), {"fc": own}) for i, own in enumerate(labels)]
    refused(tmp_path, "labels.json names one label of fc .* in one adapter and .* in another; write every label", *pair)


@pytest.mark.parametrize(
    "labels", [[None, "x"], [["x"], "y"], [{"a": 1}, "y"], [float("nan"), "y"], "xy", 2, {"0": "x"}]
)
def test_what_is_no_list_of_labels(tmp_path, labels):
    path = folder(tmp_path / "a", layer("fc", 2, 1), {"fc": labels})
    refused(tmp_path, r"labels.json must hold \{head module: \[label, …\]\}, labels texts or numbers", path)


LABELS = st.sampled_from(["a", "0", "1", "1.0", "true", 0, 1, 2, 1.0, 0.5, True, False, None]) | st.lists(st.none())


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("any") / "adapter", layer("fc", 3, 1))


@settings(max_examples=100, deadline=None)
@given(labels=st.lists(LABELS, min_size=2, max_size=4) | LABELS)
def test_any_labels_are_texts_or_one_error(labelled, labels):
    (labelled / "labels.json").write_text(json.dumps({"fc": labels}))
    try:
        adapter = open_adapter(labelled)
    except InputError:
        return
    if labels is None:
        assert (adapter.labels, adapter.in_order) == ({}, ("fc",))
        return
    assert adapter.labels == {"fc": [x if isinstance(x, str) else json.dumps(x) for x in labels]}
    assert all(first is second or first != second for first, second in itertools.combinations(labels, 2))


# rows
@pytest.mark.parametrize(("weight", "bias"), [(2, 3), (3, 2)])
def test_labels_name_the_rows_of_weight_and_bias(tmp_path, weight, bias):
    saved = {"fc.weight": torch.zeros(weight, H), "fc.bias": torch.zeros(bias)}
    odd = "weight" if weight == 2 else "bias"
    path = folder(tmp_path / "a", saved, {"fc": ["x", "y", "z"]})
    refused(tmp_path, f"labels.json names 3 labels for fc, which has 2 rows in fc.{odd}", path)


def test_labels_of_an_entry_whose_layers_lie_below_it(tmp_path):
    path = folder(tmp_path / "a", layer("classifier.out_proj", 2, 1), {"classifier": ["x", "y"]})
    message = (
        "labels.json names 2 labels for classifier, which has 0 rows in the adapter; its modules are classifier.out_"
    )
    refused(tmp_path, message, path)


def test_values_that_are_not_one_for_each_class_go_by_the_weights(tmp_path):
    pair = []
    for i, own in enumerate((["x", "y"], ["y", "z"])):
        saved = layer("fc", 2, i) | {"fc.temperature": torch.tensor([1.0 + i]), "fc.count": torch.tensor(3 * i)}
        pair.append(folder(tmp_path / str(i), saved, {"fc": own}))
    result, report = merged(tmp_path, *pair)
    assert len(result["fc.weight"]) == len(result["fc.bias"]) == 3
    assert result["fc.temperature"].tolist() == [1.5]
    assert report.heads["fc.temperature"] == "by coefficient"


# hidden layers
HEADS = {
    "RoBERTa": (["classifier"], "classifier.dense", "classifier.out_proj"),
    "DistilBERT": (["pre_classifier", "classifier"], "pre_classifier", "classifier"),
    "DeBERTa": (["pooler", "classifier"], "pooler.dense", "classifier"),
    "ModernBERT": (["head", "classifier"], "head.dense", "classifier"),
    "an MLP": (["head"], "head.0", "head.2"),
}


def two_layers(tmp_path, roots, hidden, last, labels, columns=H):
    pair = []
    for i, own in enumerate(labels):
        saved = layer(hidden, columns, i) | layer(last, len(own), 10 + i, columns)
        pair.append(folder(tmp_path / str(i), saved, {last: own}, seed=i, roots=roots))
    return pair


@pytest.mark.parametrize(("roots", "hidden", "last"), HEADS.values(), ids=HEADS)
def test_a_hidden_layer_of_a_head_goes_by_the_weights(tmp_path, roots, hidden, last):
    pair = two_layers(tmp_path, roots, hidden, last, (["x", "y"], ["y", "z", "x"]))
    result, report = merged(tmp_path, *pair)
    first, second = map(saved_tensors, pair)
    for name in (f"{hidden}.weight", f"{hidden}.bias"):
        assert torch.allclose(result[name], (first[name] + second[name]) / 2)
        assert report.heads[name] == "by coefficient, a hidden layer"
    assert report.heads[f"{last}.weight"] == "by label, 3 rows"
    assert written_labels(tmp_path) == {last: ["x", "y", "z"]}


def test_a_head_with_as_many_classes_as_units_is_told_from_its_hidden_layer_by_its_labels(tmp_path):
    labels = [[f"{i}" for i in range(H)], [f"{i}" for i in reversed(range(H))]]
    pair = two_layers(tmp_path, ["classifier"], "classifier.dense", "classifier.out_proj", labels)
    result, report = merged(tmp_path, *pair)
    first, second = (saved_tensors(path)["classifier.out_proj.weight"] for path in pair)
    assert torch.allclose(result["classifier.out_proj.weight"], (first + second.flip(0)) / 2)
    assert report.heads["classifier.dense.weight"] == "by coefficient, a hidden layer"


def test_hidden_layers_of_other_widths(tmp_path):
    pair = [two_layers(tmp_path / x, *HEADS["an MLP"], (["x", "y"],), n)[0] for x, n in (("a", 8), ("b", 6))]
    message = r"head.2.weight has different row shapes: \[\(6,\), \(8,\)\]; train heads of one shape"
    refused(tmp_path, message, *pair)


def test_labels_made_up_for_a_hidden_layer(tmp_path):
    roots, hidden, last = HEADS["RoBERTa"]
    pair = two_layers(tmp_path, roots, hidden, last, (["x", "y"], ["y", "x"]))
    for i, path in enumerate(pair):
        labels = json.loads((path / "labels.json").read_text()) | {hidden: [f"{i}-{row}" for row in range(H)]}
        (path / "labels.json").write_text(json.dumps(labels))
    refused(tmp_path, "labels.json names rows of classifier.dense, a hidden layer: .* remove its entry", *pair)
