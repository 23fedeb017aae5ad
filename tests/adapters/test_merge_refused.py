"""What an independent review found silently wrong, ignored, or answered by a traceback: each is told now."""

import json
import threading

import pytest
import torch
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
    refused,
    saved_tensors,
    write_folder,
)
from safetensors.torch import load_file, save_file

import pm_hf.adapters.merge
from pm_hf import InputError, merge_adapters
from pm_hf.adapters.inspection import describe
from pm_hf.files import new_folder

REPORT = "merge_report.json"


@pytest.fixture
def pair(tmp_path):
    return [write_folder(tmp_path / name, seed=i) for i, name in enumerate("ab")]


def scaled(folder, factor):
    """The folder with every lora_B times a factor."""
    state = load_file(folder / WEIGHTS)
    save_file({n: t * factor if "lora_B" in n else t for n, t in state.items()}, folder / WEIGHTS)
    return folder


def test_values_that_the_storage_dtype_cannot_hold(pair, tmp_path):
    refused(
        tmp_path, "do not fit torch.float16", scaled(pair[0], 1e5), tmp_path / "out", coefficient=1, dtype="float16"
    )
    scaled(pair[0], 1e33)
    refused(tmp_path, "do not fit torch.float32", pair, tmp_path / "out", method="average", weights=[5.0, 5.0])
    assert describe(merged(pair[1], tmp_path))["warnings"] == []


def merged(folder, tmp_path):
    merge_adapters(folder, tmp_path / "fine", coefficient=1)
    return tmp_path / "fine"


def test_an_update_that_overflows_is_a_warning_of_inspect(pair):
    state = load_file(pair[0] / WEIGHTS)
    save_file({n: torch.full_like(t, 1e30) for n, t in state.items()}, pair[0] / WEIGHTS)
    edited(pair[0], lora_alpha=1e30)
    assert any("overflows float32" in warning for warning in describe(pair[0])["warnings"])


def test_a_module_trained_whole_in_one_and_by_lora_in_the_other(tmp_path):
    whole = {"layers.0.q.weight": torch.ones(12, 16)}
    first = write_folder(
        tmp_path / "a", {"layers.1.v": SHAPES["layers.1.v"]}, saved=whole, config={"modules_to_save": ["q"]}
    )
    second = write_folder(tmp_path / "b", seed=2)
    for order in ([first, second], [second, first]):
        refused(
            tmp_path, "layers.0.q is trained whole in .*/a and by LoRA in .*/b", order, tmp_path / "o", method="average"
        )


def test_embeddings_that_only_one_adapter_ties(tmp_path):
    shapes = {"model.embed_tokens": (8, 12), **SHAPES}
    first = write_folder(tmp_path / "a", shapes, seed=1)
    second = write_folder(tmp_path / "b", shapes, seed=2, config={"ensure_weight_tying": True})
    refused(tmp_path, "ensure_weight_tying is set in some", [first, second], tmp_path / "o", method="average")


def test_a_saved_module_whose_name_ends_with_the_entry(tmp_path):
    """PEFT's modules_to_save: ["classifier"] also wraps DistilBERT's pre_classifier."""
    saved = {"pre_classifier.weight": torch.ones(3, 3), f"{HEAD}.weight": torch.ones(2, 3)}
    folder = write_folder(tmp_path / "a", saved=saved)
    merge_adapters(folder, tmp_path / "out", coefficient=1)
    assert saved_tensors(tmp_path / "out").keys() == saved.keys()
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["modules_to_save"] == [HEAD]


def test_class_heads_without_names_for_their_rows(tmp_path):
    first, second, same = (
        write_folder(tmp_path / n, seed=i, saved=head(2, seed), config={"task_type": "SEQ_CLS"})
        for i, (n, seed) in enumerate([("a", 1), ("b", 2), ("c", 1)])
    )
    refused(tmp_path, "no labels.json says which class a row is", [first, second], tmp_path / "o", method="average")
    merge_adapters([first, same], tmp_path / "equal", method="average")
    for folder in (first, second):
        (folder / "labels.json").write_text(json.dumps({HEAD: ["no", "yes"]}))
    merge_adapters([first, second], tmp_path / "named", method="average")


def test_coefficients_learned_with_the_adapters_in_another_order(pair, tmp_path):
    from pm_hf.adapters.folder import open_adapter

    matrices = {name: {"coefficients": [0.2, 0.5]} for name in SHAPES}
    learned = {"matrices": matrices, "digests": [open_adapter(folder).digest() for folder in pair]}
    merge_adapters(pair, tmp_path / "out", method="adamerging", learned=learned)
    refused(
        tmp_path, "learned with other adapters, or in another order", pair[::-1], tmp_path / "o",
        method="adamerging", learned=learned,
    )  # fmt: skip
    for odd in ({"m": [1, 2]}, dict.fromkeys(SHAPES), {n: {"coefficients": ["x", 1]} for n in SHAPES}):
        refused(tmp_path, "learned", pair, tmp_path / "o", method="adamerging", learned={"matrices": odd})


IGNORED = {
    "coefficient of ties": ({"method": "ties", "coefficient": 0.5}, "coefficient= belongs to folding"),
    "coefficient and weights": (
        {"method": "average", "coefficient": 0.5, "weights": [1.0]},
        "coefficient= belongs to folding",
    ),
    "coefficient of opcm": ({"method": "opcm", "coefficient": 0.5, "into": "b"}, "'opcm' has no coefficient"),
    "freedom of average": ({"method": "average", "freedom": "free"}, "freedom= belongs to method 'pm'"),
    "freedom and coefficient": ({"coefficient": 0.5, "freedom": "module"}, "freedom= belongs to method 'pm'"),
    "curvature of ties": ({"method": "ties", "curvature": "x"}, "'ties' uses no curvature"),
    "coefficient as text": ({"coefficient": "much"}, "must be numbers, found 'much'"),
    "weights as text": ({"method": "ties", "weights": ["x"]}, "must be numbers"),
}


@pytest.mark.parametrize(("arguments", "message"), IGNORED.values(), ids=IGNORED)
def test_arguments_are_never_ignored(pair, tmp_path, arguments, message):
    given = arguments | ({"into": tmp_path / arguments["into"]} if "into" in arguments else {})
    refused(tmp_path, message, pair[0], tmp_path / "out", **given)


SETTINGS = {
    "r": ("8", [8], 0, -1, 2.5, True),
    "lora_alpha": ("8", [8], float("inf"), float("nan")),
    "rank_pattern": ([1], {"q": "2"}, {"q": 0}, {"[": 2}),
    "alpha_pattern": ({"q": "2"}, "q"),
    "target_modules": ("[", 5, [3]),
    "target_parameters": ([3], "x"),
    "modules_to_save": ("classifier", [1]),
    "task_type": (["SEQ_CLS"],),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in SETTINGS.items() for value in values])
def test_settings_of_another_type(pair, tmp_path, key, value):
    edited(pair[0], **{key: value})
    refused(tmp_path, f"{CONFIG} says {key} .*, expected", pair[0], tmp_path / "out", coefficient=1)


@pytest.mark.parametrize("value", [None, "GAUSSIAN", True])
def test_spellings_that_peft_accepts(pair, tmp_path, value):
    merge_adapters(pair[0], tmp_path / "usual", coefficient=1)
    edited(pair[0], init_lora_weights=value, bias=None)
    merge_adapters(pair[0], tmp_path / "out", coefficient=1)
    usual, merged = (load_file(tmp_path / name / WEIGHTS) for name in ("usual", "out"))
    assert usual.keys() == merged.keys()
    assert all(torch.equal(usual[name], merged[name]) for name in usual)


@pytest.mark.parametrize(
    "changes",
    [
        {"layers_to_transform": [0]},
        {"layers_to_transform": 1, "layers_pattern": ["layers"]},
        {"exclude_modules": ["v"]},
    ],
)
def test_weights_of_modules_that_the_configuration_leaves_out(pair, tmp_path, changes):
    edited(pair[0], **changes)
    refused(tmp_path, "1 modules are not in target_modules", pair[0], tmp_path / "out", coefficient=1)


@pytest.mark.parametrize("name", ["lora_E", "lora_A", "lora_embedding_A"])
def test_tensors_that_peft_would_leave_out(pair, tmp_path, name):
    state = load_file(pair[0] / WEIGHTS) | {f"{PREFIX}layers.0.q.{name}": torch.ones(2, 16)}
    save_file(state, pair[0] / WEIGHTS)
    refused(tmp_path, "layers.0.q has lora_", pair[0], tmp_path / "out", coefficient=1)


@pytest.mark.parametrize(
    "content", [[], {}, {"tasks": None}, {"tasks": "x"}, {"tasks": -3}, {"tasks": 2, "measured": -1}]
)
def test_a_report_that_makes_no_sense(pair, tmp_path, content):
    (pair[1] / REPORT).write_text(json.dumps(content))
    refused(tmp_path, "is no report of a merge", pair[0], tmp_path / "out", into=pair[1], method="average")


@pytest.mark.parametrize(
    "state", [{}, [], *({"scale": scale, "mean_norm": 1, "tasks": 2} for scale in (None, 10**400)), "x"]
)
def test_a_state_that_makes_no_sense(pair, tmp_path, state):
    (pair[1] / REPORT).write_text(json.dumps({"tasks": 2, "state": state}))
    refused(
        tmp_path, "state must hold scale, mean_norm and tasks", pair[0], tmp_path / "o", into=pair[1], method="opcm"
    )


def test_a_state_of_before_another_method_folded_is_not_used(pair, tmp_path):
    third = write_folder(tmp_path / "c", seed=3)
    merge_adapters(pair[1], tmp_path / "1", into=pair[0], method="opcm")
    merge_adapters(third, tmp_path / "2", into=tmp_path / "1", method="average")
    report = merge_adapters(third, tmp_path / "3", into=tmp_path / "2", method="opcm")
    assert report.state["tasks"] == 2
    assert report.tasks == 4


@pytest.mark.parametrize("weights", [[0.0, 0.0, 1.0], [0.5, -0.5, 1.0], [-0.2, 0.3, 0.9]])
def test_weights_that_are_no_mean_of_what_two_adapters_saved(tmp_path, weights):
    kinds = {"a": {"saved": head(2, 0), "labels": {"classifier": None}}, "b": {"saved": head(2, 1)}, "c": {}}
    folders = [write_folder(tmp_path / name, seed=i, **kinds[name]) for i, name in enumerate(kinds)]
    refused(tmp_path, "expected weights of 0 or more", folders, tmp_path / "o", method="average", weights=weights)


def test_an_output_that_cannot_be_is_told_before_any_work(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(pm_hf.adapters.merge, "make_plan", lambda *_: pytest.fail("work has begun"))
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for output in ("file", "file/x", "n" * 240, "loop/x", "a\0b"):
        refused(tmp_path, "cannot be written|File name too long", pair[0], f"{tmp_path}/{output}", overwrite=True)


def test_what_only_an_earlier_adapter_says_of_the_base_is_kept(pair, tmp_path):
    edited(pair[0], revision="v1", task_type="CAUSAL_LM")
    edited(pair[1], revision=None, task_type=None)
    merge_adapters(pair, tmp_path / "out", method="average")
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (config["revision"], config["task_type"]) == ("v1", "CAUSAL_LM")
    edited(pair[1], revision="v2")
    refused(tmp_path, "different revisions of the base model", pair, tmp_path / "o", method="average")


def test_a_card_in_the_output_is_kept(pair, tmp_path):
    merge_adapters(pair[0], tmp_path / "out", coefficient=1)
    (tmp_path / "out" / "README.md").write_text("by hand")
    merge_adapters(pair[1], tmp_path / "out", coefficient=1, overwrite=True)
    assert (tmp_path / "out" / "README.md").read_text() == "by hand"
    assert_same(dense(tmp_path / "out"), dense(pair[1]))


def test_an_output_that_another_process_wrote_meanwhile_is_left_alone(tmp_path):
    def race():
        with new_folder(tmp_path / "out", overwrite=False) as folder:
            (folder / "mine").write_text("1")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").write_text("2")

    with pytest.raises(InputError, match="exists now"):
        race()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_threads_that_write_one_output_leave_one_of_the_results(pair, tmp_path):
    def work(source):
        for _ in range(5):
            merge_adapters(source, tmp_path / "out", coefficient=1, overwrite=True)

    threads = [threading.Thread(target=work, args=(folder,)) for folder in pair]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = dense(tmp_path / "out")
    assert any(all(torch.allclose(found[n], m, rtol=1e-6) for n, m in dense(folder).items()) for folder in pair)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out"]


def test_lot_takes_a_curvature_for_one_adapter_too(pair, tmp_path):
    sums, _ = curvature_sums("gram", [dense(pair[0])], [{}])
    merge_adapters(pair[:1], tmp_path / "out", method="lot", curvature=[sums])
    assert_same(dense(tmp_path / "out"), dense(pair[0]), 1e-5)
