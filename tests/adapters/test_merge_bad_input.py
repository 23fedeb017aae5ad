"""Bad input of merge_adapters: one clear InputError before anything is written, the old output byte for byte whole."""

import json
import shutil
from functools import partial

import pytest
import torch
from helpers import adapter_folders
from helpers.adapter_folders import (
    CONFIG,
    HEAD,
    PREFIX,
    SHAPES,
    WEIGHTS,
    assert_same,
    curvature_sums,
    dense,
    edited,
    head,
    tree,
    write_folder,
)
from safetensors.torch import load_file, save_file

import pm_hf.adapters.folder
import pm_hf.files
from pm_hf import merge_adapters


@pytest.fixture
def pair(tmp_path):
    """(running merge, task adapter, output that exists)."""
    output = write_folder(tmp_path / "out", seed=9)
    (output / "README.md").write_text("kept until the new folder is whole")
    return write_folder(tmp_path / "merged", seed=1), write_folder(tmp_path / "task", seed=2), output


refused = partial(adapter_folders.refused, overwrite=True)  # the output exists


def tensors(**changes):
    """Damage: tensors to add or replace in the weights; None removes one."""

    def damage(folder):
        state = load_file(folder / WEIGHTS) | {PREFIX + n.replace("__", "."): t for n, t in changes.items()}
        save_file({n: t for n, t in state.items() if t is not None}, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def setting(**changes):
    """Damage: settings of adapter_config.json; ... removes one."""
    return partial(edited, **changes)


def pickle_only(folder):
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80")


def truncated(folder, size=-100):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:size])


def without_prefix(folder):
    state = {name.removeprefix(PREFIX): value for name, value in load_file(folder / WEIGHTS).items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def not_json(folder):
    (folder / CONFIG).write_text("{")


Q = "layers__0__q__lora_"
NAN, INF = torch.full((2, 16), torch.nan), torch.full((2, 16), torch.inf)
FOLDERS = {
    "no folder": (shutil.rmtree, "is not a folder"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), f"has no {CONFIG}"),
    "broken config": (not_json, "cannot be read as JSON"),
    "list as config": (lambda folder: (folder / CONFIG).write_text("[]"), CONFIG),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"expected {WEIGHTS}, not found"),
    "pickle only": (pickle_only, "adapter_model.bin.*pickles are never loaded"),
    "truncated": (truncated, "not a whole safetensors file"),
    "header cut": (lambda folder: truncated(folder, 20), "not a whole safetensors file"),
    "empty file": (lambda folder: truncated(folder, 0), "not a whole safetensors file"),
    "NaN": (tensors(**{Q + "A__weight": NAN}), "layers.0.q.lora_A.weight holds NaN or infinite"),
    "infinite": (tensors(**{Q + "A__weight": INF}), "layers.0.q.lora_A.weight holds NaN or infinite"),
    "A without B": (tensors(**{Q + "B__weight": None}), "layers.0.q has lora_A only; the file is incomplete"),
    "B without A": (tensors(**{Q + "A__weight": None}), "layers.0.q has lora_B only; the file is incomplete"),
    "unfit factors": (tensors(**{Q + "A__weight": torch.ones(3, 16)}), "lora_A .3, 16. and lora_B .12, 2. are not"),
    "empty tensor": (tensors(**{Q + "A__weight": torch.ones(0)}), "A.weight is empty; gather the shards .*lora_A .0,."),
    "half of a compiled layer": (tensors(_orig_mod__q__lora_A__weight=torch.ones(2, 9)), "q has lora_A only"),
    "true or false": (tensors(**{Q + "A__weight": torch.ones(2, 16) > 0}), "A.weight holds true or false values"),
    "complex": (tensors(**{Q + "B__weight": torch.ones(12, 2) * 1j}), "B.weight holds complex values, expected real"),
    "two names of one tensor": (
        tensors(**{"_orig_mod__" + Q + "A__weight": torch.ones(2, 16)}),
        "are two tensors for layers.0.q.lora_A.weight",
    ),
    "two adapters": (
        tensors(**{f"k__lora_A__{n}__weight": torch.ones(2, 16) for n in ("a", "b")}),
        r"of several adapters, a, b; .* model.save_pretrained\(folder, selected_adapters=\[name\]\)",
    ),
    "long alpha": (setting(lora_alpha=10**400), "says lora_alpha 10+…, expected a finite number"),
    "long rank": (setting(r=10**400), "says r 10+…, expected a positive integer"),
    "infinite alpha": (setting(lora_alpha=float("inf")), "says lora_alpha inf, expected a finite number"),
    "alphas": (setting(alpha_pattern={"q": -(10**400)}), "says alpha_pattern .*, expected .expression: number"),
    "layers": (setting(layers_to_transform="0"), "says layers_to_transform '0', expected a layer's number"),
    "layers' pattern": (
        setting(layers_to_transform=[0], layers_pattern="("),
        "says layers_pattern '.', expected an ex",
    ),
    "escape codes": (
        tensors(**{"\x1b[2Jq\n\u202e__lora_A__weight": torch.ones(2, 9)}),
        r"\\x1b\[2Jq\\x0a\\u202e.lora_A.weight is not part",
    ),
    "half a convolution": (tensors(**{Q + "A__weight": torch.ones(2, 16, 1, 1)}), "are not the factors of a matrix"),
    "no factors": (
        lambda folder: save_file({"x": torch.ones(1)}, folder / WEIGHTS),
        "start with base_model.model., found x",
    ),
    "other names": (without_prefix, "base_model.model"),
    "rank": (setting(r=4), "adapter_config.json says rank 4, the weights have rank 2"),
    "rank_pattern": (setting(rank_pattern={"q": 3}), "layers.0.q: .* says rank 3, the weights have rank 2"),
    "no rank": (setting(r=...), rf"{CONFIG} has no 'r'"),
    "no alpha": (setting(lora_alpha=...), rf"{CONFIG} has no 'lora_alpha'"),
    "DoRA": (setting(use_dora=True), "use_dora=True makes the update more than .* train with use_dora=False"),
    "PiSSA": (
        setting(init_lora_weights="pissa_niter_4"),
        "init_lora_weights='pissa_niter_4' rewrites .* path_initial_model_for_weight_conversion",
    ),
    "OLoRA": (setting(init_lora_weights="olora"), "init_lora_weights='olora' rewrites the base weights"),
    "LoftQ": (setting(init_lora_weights="loftq"), "init_lora_weights='loftq' rewrites the base weights"),
    "LoRA-GA": (setting(init_lora_weights="lora_ga"), "init_lora_weights='lora_ga' rewrites the base weights"),
    "lora_bias": (setting(lora_bias=True), "says lora_bias True, but layers.0.q lacks its lora_B.bias"),
    "bias tensor": (tensors(**{Q + "B__bias": torch.ones(12)}), "lora_bias False, but layers.0.q has a lora_B.bias"),
    "bias": (setting(bias="all"), "bias='all' trains the base's biases"),
    "parameters": (setting(target_parameters=["experts.w"]), "different target_parameters cannot be merged"),
    "no target": (setting(target_modules=["k"]), "2 modules are not in target_modules"),
    "no target by regex": (setting(target_modules=r".*\.q"), "1 modules are not in target_modules .*layers.1.v"),
    "extra tensor": (tensors(layers__0__q__weight=torch.ones(12, 16)), "is neither LoRA nor in modules_to_save"),
    "replication": (setting(layer_replication=[[0, 2]]), "layer_replication=.* makes the update more than"),
    "tokens": (setting(trainable_token_indices=[3]), "trainable_token_indices=.* makes the update more than"),
    "future key": (
        setting(use_future_trick={"gain": 2}),
        f"use_future_trick=.* pm_hf does not know; if it only concerned the training, remove it from {CONFIG}",
    ),
    "peft_type": (setting(peft_type="LOHA"), "expected peft_type LORA, found LOHA"),
    "no peft_type": (setting(peft_type=...), "has no peft_type; expected LORA"),
    "embedding": (tensors(words__lora_embedding_A=torch.ones(2, 9)), "words has lora_embedding_A only"),
    "magnitude": (tensors(q__lora_magnitude_vector=torch.ones(9)), "lora_magnitude_vector is not part of a plain"),
    "two problems": (setting(use_dora=True, bias="all"), "2 problems: .*bias='all'.*; use_dora"),
    "other base": (setting(base_model_name_or_path="other/base"), "adapters of different base models .*other/base"),
}


@pytest.mark.parametrize("side", ["task", "into"])
@pytest.mark.parametrize(("damage", "message"), FOLDERS.values(), ids=FOLDERS)
def test_unusable_adapter_folder(pair, tmp_path, damage, message, side):
    merged, task, output = pair
    damage(task if side == "task" else merged)
    refused(tmp_path, message, task, output, into=merged, coefficient=0.3)


RECORDS = {
    "measured more": {"tasks": 2, "measured": 5},
    "measured less than nothing": {"tasks": 2, "measured": -1},
    "measured true": {"tasks": 2, "measured": True},
    "half a task": {"tasks": 1.5},
    "no task": {"tasks": 0},
    "text": {"tasks": "2"},
    "list": [2],
    "nothing": None,
}


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_a_record_of_a_merge_that_makes_no_sense(pair, tmp_path, record):
    (pair[0] / "merge_report.json").write_text(json.dumps(record))
    message = "no report of a merge: expected tasks ≥ 1 and measured from 0 to tasks, found .*; merge again, or remove"
    refused(tmp_path, message, pair[1], pair[2], into=pair[0], coefficient=0.3)


LABELS = {
    "too few": ({HEAD: ["x"]}, "labels.json names 1 labels for classifier, which has 2 rows"),
    "too many": ({HEAD: ["x", "y", "z"]}, "labels.json names 3 labels for classifier, which has 2 rows"),
    "no such head": ({"score": ["x", "y"]}, "labels.json names 2 labels for score, which has 0 rows"),
    "a text": ({HEAD: "xy"}, "labels.json"),
    "a list": (["x", "y"], "labels.json"),
}


@pytest.mark.parametrize(("labels", "message"), LABELS.values(), ids=LABELS)
def test_labels_that_do_not_fit_the_head(pair, tmp_path, labels, message):
    task = write_folder(tmp_path / "labelled", seed=3, saved=head(2, 3), labels=labels)
    refused(tmp_path, message, task, pair[2], into=pair[0], coefficient=0.3)


def test_labels_of_no_form_are_named_with_what_else_is_wrong(pair, tmp_path):
    task = write_folder(tmp_path / "labelled", seed=3, saved=head(2, 3), labels=["x", "y"])
    tensors(layers__0__q__weight=torch.ones(12, 16))(task)
    message = r"2 problems: labels.json must hold .*; null for a .*; tensor layers.0.q.weight is neither LoRA nor"
    refused(tmp_path, message, task, pair[2], into=pair[0], coefficient=0.3)


def test_head_with_nan(pair, tmp_path):
    saved = head(2, 3) | {f"{HEAD}.bias": torch.tensor([0.0, torch.nan])}
    task = write_folder(tmp_path / "labelled", seed=3, saved=saved, labels={HEAD: ["x", "y"]})
    refused(tmp_path, "classifier.bias holds NaN", task, pair[2], into=pair[0], coefficient=0.3)


def test_modules_of_different_shapes(pair, tmp_path):
    wide = write_folder(tmp_path / "wide", SHAPES | {"layers.1.v": (10, 20)}, seed=3)
    message = r"layers\.1\.v has different shapes in the adapters: \[\(10, 16\), \(10, 20\)\]"
    refused(tmp_path, message, wide, pair[2], into=pair[0], coefficient=0.3)
    refused(tmp_path, message, [wide, pair[0]], pair[2], method="average")


def test_output_that_exists(pair, tmp_path):
    refused(tmp_path, "out exists; .* overwrite=True", pair[1], pair[2], overwrite=False)


ARGUMENTS = {
    "method": ({"method": "magic"}, "unknown merging method 'magic'; valid: pm, average, sequential"),
    "option": (
        {"options": {"speed": "1"}},
        "method pm: unknown option 'speed'; valid: on_zero_curvature, unmeasured_past",
    ),
    "no options": (
        {"method": "sequential", "options": {"a": "1"}},
        "method sequential: unknown option 'a'; valid: none",
    ),
    "prior of a given": (
        {"method": "average", "coefficient": 0.5, "options": {"prior": 1}},
        "prior counts the base in a fold of one adapter; leave it out here",
    ),
    "value": (
        {"options": {"on_zero_curvature": "x"}},
        "on_zero_curvature .*: expected one of error, average, found 'x'",
    ),
    "rank": ({"max_rank": 0}, "max_rank must be at least 1, or 'full', found 0"),
    "energy": ({"energy": 1.5}, r"energy must be in \(0, 1\], found 1.5"),
    "energy nan": ({"energy": float("nan")}, r"energy must be in \(0, 1\], found nan"),
    "dtype": ({"dtype": "int8"}, "dtype must be one of float32, float16, bfloat16, found 'int8'"),
    "torch dtype": ({"dtype": torch.int8}, "dtype must be one of float32, float16, bfloat16"),
    "freedom": ({"freedom": "total"}, "freedom must be global, module or free, found 'total'"),
    "weights": ({"weights": [1.0]}, "weights need one value for each adapter .*, found 1 for 1"),
    "coefficient nan": ({"coefficient": float("nan")}, "coefficient must be finite, found nan"),
    "coefficient inf": ({"coefficient": float("inf")}, "coefficient must be finite, found inf"),
    "two": ({"method": "x", "into": "a"}, "unknown merging method 'x'"),
    "all at once": ({"max_rank": 0, "dtype": "f8", "coefficient": 0.3}, "2 problems: max_rank .*; dtype"),
    "no curvature": ({}, r"method 'pm' needs curvature= \(the file saved with the task\) or coefficient="),
    "missing file": ({"curvature": "none.safetensors"}, "curvature file none.safetensors does not exist"),
}


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_of_a_fold(pair, tmp_path, arguments, message):
    refused(tmp_path, message, pair[1], pair[2], **({"into": pair[0]} | arguments))


SEVERAL = {
    "fold only": ({}, r"method 'pm' folds one adapter into a running merge \(into=\), found 2 adapters"),
    "into": ({"method": "average", "into": "x"}, "into= folds one adapter, found 2"),
    "too few weights": ({"method": "average", "weights": [1.0]}, "weights need one value .* found 1 for 2"),
    "weights nan": ({"method": "average", "weights": [0.5, float("nan")]}, "weights must be finite"),
    "coefficient": ({"method": "average", "coefficient": 0.3}, "coefficient= belongs to folding one adapter"),
}


@pytest.mark.parametrize(("arguments", "message"), SEVERAL.values(), ids=SEVERAL)
def test_arguments_of_several_adapters(pair, tmp_path, arguments, message):
    refused(tmp_path, message, list(pair[:2]), pair[2], **arguments)


@pytest.mark.parametrize("extra", ["curvature", "freedom"])
def test_settings_that_several_adapters_cannot_use_are_not_ignored(pair, tmp_path, extra):
    sums, _ = curvature_sums("fisher", [dense(pair[1])], [{}])
    arguments = {"curvature": sums} if extra == "curvature" else {"freedom": "module"}
    refused(
        tmp_path, f"{extra}= belongs to folding one adapter", list(pair[:2]), pair[2], method="average", **arguments
    )


def test_no_adapter_at_all(pair, tmp_path):
    refused(tmp_path, "no adapter given", [], pair[2], method="average")


def test_curvature_that_does_not_belong_to_the_fold(pair, tmp_path):
    merged, task = dense(pair[0]), dense(pair[1])
    both, _ = curvature_sums("fisher", [merged, task], [{}, merged])
    alone, _ = curvature_sums("fisher", [task], [{}])
    other, _ = curvature_sums("fisher", [merged, {n: 2 * t for n, t in task.items()}], [{}, merged])
    less, _ = curvature_sums("fisher", [{"layers.0.q": t["layers.0.q"]} for t in (merged, task)], [{}, merged])
    wide = {name: torch.cat([t, t], dim=1) for name, t in task.items()}
    shapes, _ = curvature_sums("fisher", [wide, wide], [{}, wide])
    fold = {"into": pair[0]}
    refused(tmp_path, "was measured with another task adapter", pair[1], pair[2], curvature=other, **fold)
    refused(tmp_path, "1 modules stand in only one of them, first layers.1.v", pair[1], pair[2], curvature=less, **fold)
    refused(tmp_path, r"layers.0.q is \(12, 16\) in it, \(12, 32\)", pair[1], pair[2], curvature=shapes, **fold)
    refused(tmp_path, r"covers 1 task\(s\), but there is the running merge", pair[1], pair[2], curvature=alone, **fold)
    refused(tmp_path, r"covers 2 task\(s\), but there is no running merge", pair[1], pair[2], curvature=both)


def test_curvature_with_fewer_tasks_than_the_running_merge(pair, tmp_path):
    merge_adapters([pair[0], pair[0]], tmp_path / "two", method="average")  # 2 tasks; the fold makes 3
    merged, task = dense(tmp_path / "two"), dense(pair[1])
    both, _ = curvature_sums("fisher", [merged, task], [{}, merged])
    refused(tmp_path, r"covers 2 task\(s\)", pair[1], pair[2], into=tmp_path / "two", curvature=both)


def test_overwrite_never_deletes_a_folder_that_is_no_adapter(pair, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    refused(tmp_path, "thesis .*adapter", pair[1], tmp_path / "thesis")


@pytest.mark.parametrize("place", ["under a file", "a file"])
def test_output_that_is_or_lies_under_a_file(pair, tmp_path, place):
    (tmp_path / "file").write_text("mine")
    refused(tmp_path, "file", pair[1], tmp_path / "file" / ("out" if place == "under a file" else ""))


def test_overwrite_follows_a_link_and_leaves_nothing_behind(pair, tmp_path):
    (tmp_path / "link").symlink_to(pair[2], target_is_directory=True)
    names = sorted(path.name for path in tmp_path.iterdir())
    merge_adapters(pair[1], tmp_path / "link", overwrite=True)
    assert_same(dense(tmp_path / "link"), dense(pair[1]))
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_output_named_by_a_dot(pair, monkeypatch):
    monkeypatch.chdir(pair[2])
    merge_adapters(pair[1], ".", overwrite=True)
    assert_same(dense(pair[2]), dense(pair[1]))


def fail(*_, **__):
    raise KeyboardInterrupt


PLACES = {
    "weights": (pm_hf.adapters.folder, "save_tensors"),
    "config": (pm_hf.adapters.folder, "write_json"),
    "check": (pm_hf.adapters.folder, "_compare"),
    "sync": (pm_hf.files, "sync"),
    "swap": (pm_hf.files, "_swap"),
}


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize(("module", "name"), PLACES.values(), ids=PLACES)
def test_interruption_leaves_the_old_folder_whole(pair, tmp_path, monkeypatch, module, name, exists):
    output = pair[2] if exists else tmp_path / "new"
    before = tree(tmp_path)
    monkeypatch.setattr(module, name, fail)
    with pytest.raises(KeyboardInterrupt):
        merge_adapters(pair[1], output, into=pair[0], coefficient=0.3, overwrite=True)
    assert tree(tmp_path) == before


def test_a_folder_that_does_not_read_back_is_never_published(pair, tmp_path, monkeypatch):
    before, save = tree(tmp_path), pm_hf.adapters.folder.save_tensors

    def damaged(state, path, metadata):
        save({name: torch.zeros_like(value) for name, value in state.items()}, path, metadata)

    monkeypatch.setattr(pm_hf.adapters.folder, "save_tensors", damaged)
    with pytest.raises(RuntimeError, match="does not read back as it was written; the old one is untouched"):
        merge_adapters(pair[1], pair[2], into=pair[0], coefficient=0.3, overwrite=True)
    assert tree(tmp_path) == before
