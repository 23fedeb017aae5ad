"""Heads and other modules_to_save in a merge: absolute values, rows joined by label."""

import json

import pytest
import torch
from helpers.adapter_folders import (
    HEAD,
    SHAPES,
    assert_same,
    curvature_sums,
    dense,
    distance,
    head,
    saved_tensors,
    times,
    write_folder,
)

from pm_hf import InputError, merge_adapters

W, B = f"{HEAD}.weight", f"{HEAD}.bias"


def with_head(path, labels, seed, **more):
    saved = head(len(labels), seed, **{key: more.pop(key) for key in ("dtype", "bias") if key in more})
    return write_folder(path, seed=seed, saved=saved, labels={HEAD: labels}, **more)


def rows(path):
    """{label: [weight | bias]} of an adapter folder, float64."""
    saved, labels = saved_tensors(path), json.loads((path / "labels.json").read_text())[HEAD]
    matrix = torch.cat([saved[W], saved[B][:, None]], dim=1) if B in saved else saved[W]
    assert len(labels) == len(matrix)
    return dict(zip(labels, matrix.double(), strict=True))


@pytest.fixture
def pair(tmp_path):
    """A running merge with labels a, b, c and a task adapter with d, b."""
    return with_head(tmp_path / "merged", ["a", "b", "c"], 1), with_head(tmp_path / "task", ["d", "b"], 2)


def test_new_labels_append_rows_and_the_same_label_is_blended(pair, tmp_path):
    old, new = rows(pair[0]), rows(pair[1])
    report = merge_adapters(pair[1], tmp_path / "out", into=pair[0], coefficient=0.3)
    found = rows(tmp_path / "out")
    assert list(found) == ["a", "b", "c", "d"]
    assert_same(found, {"a": old["a"], "b": 0.7 * old["b"] + 0.3 * new["b"], "c": old["c"], "d": new["d"]})
    assert all(torch.equal(found[x], (old | new)[x]) for x in "acd")  # untouched rows bit for bit
    assert report.heads == {W: "by label, 4 rows", B: "by label, 4 rows"}


def test_several_rows_of_one_label_stand_side_by_side(tmp_path):
    folders = [with_head(tmp_path / "merged", ["a", "b", "a"], 1), with_head(tmp_path / "task", ["b", "c"], 2)]
    report = merge_adapters(folders[1], tmp_path / "out", into=folders[0], coefficient=0.3)
    old, new = (saved_tensors(folder) for folder in folders)
    found = saved_tensors(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "labels.json").read_text())[HEAD] == ["a", "b", "a", "b", "c"]
    assert all(torch.equal(found[name], torch.cat([old[name], new[name]])) for name in (W, B))
    assert report.heads == {W: "side by side, 5 rows", B: "side by side, 5 rows"}


@pytest.mark.parametrize("has_it", ["merged", "task"])
def test_head_of_one_side_only_is_taken_as_it_is(tmp_path, has_it):
    folders = {
        name: with_head(tmp_path / name, ["x", "y"], 1) if name == has_it else write_folder(tmp_path / name, seed=2)
        for name in ("merged", "task")
    }
    report = merge_adapters(folders["task"], tmp_path / "out", into=folders["merged"], coefficient=0.3)
    found, expected = saved_tensors(tmp_path / "out"), saved_tensors(folders[has_it])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert report.heads[W] == "by label, 2 rows"
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["modules_to_save"] == [HEAD]


@pytest.mark.parametrize("coefficient", [None, 0.5])
def test_first_task_keeps_its_head_whatever_the_coefficient(tmp_path, coefficient):
    task = with_head(tmp_path / "task", ["x", "y"], 1)
    merge_adapters(task, tmp_path / "out", coefficient=coefficient)
    found = saved_tensors(tmp_path / "out")
    assert all(torch.equal(found[name], value) for name, value in saved_tensors(task).items())


def test_saved_module_whose_rows_are_the_same_in_all_is_blended_by_the_coefficient(tmp_path):
    old = write_folder(tmp_path / "merged", seed=1, saved=head(3, 1), labels={HEAD: None})
    new = write_folder(tmp_path / "task", seed=2, saved=head(3, 2))
    report = merge_adapters(new, tmp_path / "out", into=old, coefficient=0.3)
    first, second, found = saved_tensors(old), saved_tensors(new), saved_tensors(tmp_path / "out")
    assert_same(found, {name: 0.7 * first[name].double() + 0.3 * second[name].double() for name in first})
    assert set(report.heads.values()) == {"by coefficient"}
    assert json.loads((tmp_path / "out" / "labels.json").read_text()) == {HEAD: None}  # the next fold asks no more


def test_half_precision_rows_are_blended_in_float32(tmp_path):
    old = with_head(tmp_path / "merged", ["a", "b"], 1, dtype=torch.bfloat16)
    new = with_head(tmp_path / "task", ["b", "c"], 2, dtype=torch.float16)
    merge_adapters(new, tmp_path / "out", into=old, coefficient=0.3)
    first, second, found = rows(old), rows(new), rows(tmp_path / "out")
    assert_same(found, {"a": first["a"], "b": 0.7 * first["b"] + 0.3 * second["b"], "c": second["c"]})
    assert saved_tensors(tmp_path / "out")[W].dtype == torch.float32


@pytest.mark.parametrize("weights", [None, [0.6, 0.3, 0.1]])
def test_average_of_several_heads(tmp_path, weights):
    folders = [with_head(tmp_path / f"t{i}", ["x", f"own{i}"], i) for i in range(3)]
    merge_adapters(folders, tmp_path / "out", method="average", weights=weights)
    parts, values = [rows(folder) for folder in folders], weights or [1 / 3] * 3
    expected = {f"own{i}": part[f"own{i}"] for i, part in enumerate(parts)}
    expected["x"] = sum(w * part["x"] for w, part in zip(values, parts, strict=True))
    assert_same(rows(tmp_path / "out"), expected)


def test_label_of_two_adapters_out_of_three_is_their_mean(tmp_path):
    folders = [with_head(tmp_path / f"t{i}", labels, i) for i, labels in enumerate((["x"], ["x"], ["y"]))]
    merge_adapters(folders, tmp_path / "out", method="average")
    parts = [rows(folder) for folder in folders]
    assert_same(rows(tmp_path / "out"), {"x": (parts[0]["x"] + parts[1]["x"]) / 2, "y": parts[2]["y"]})


@pytest.mark.parametrize("labels", [{HEAD: ["x", "y"]}, {HEAD: None}], ids=["by label", "whole"])
def test_weights_that_do_not_sum_to_1_are_refused_for_absolute_values(tmp_path, labels):
    folders = [write_folder(tmp_path / f"t{i}", seed=i, saved=head(2, i), labels=labels) for i in range(2)]
    with pytest.raises(InputError, match=r"classifier.*absolute value, so its weights must sum to 1; found 1.2"):
        merge_adapters(folders, tmp_path / "out", method="average", weights=[0.6, 0.6])
    assert not (tmp_path / "out").exists()


def test_equal_heads_pass_whatever_the_weights(tmp_path):
    folders = [write_folder(tmp_path / f"t{i}", seed=i, saved=head(2, 9), labels={HEAD: ["x", "y"]}) for i in range(2)]
    merge_adapters(folders, tmp_path / "out", method="average", weights=[0.6, 0.6])
    found = saved_tensors(tmp_path / "out")
    assert all(torch.equal(found[name], value) for name, value in head(2, 9).items())


def test_heads_of_different_shapes_need_labels(tmp_path):
    old = write_folder(tmp_path / "merged", seed=1, saved=head(3, 1))
    new = write_folder(tmp_path / "task", seed=2, saved=head(2, 2))
    with pytest.raises(InputError, match=r"classifier\.\w+ has different shapes .* labels.json that says which rows"):
        merge_adapters(new, tmp_path / "out", into=old, coefficient=0.3)


@pytest.mark.parametrize("without", ["merged", "task"])
def test_labels_on_one_side_only_are_refused_by_name(tmp_path, without):
    folders = {
        name: write_folder(
            tmp_path / name, seed=i, saved=head(2, i), labels=None if name == without else {HEAD: ["x", "y"]}
        )
        for i, name in enumerate(("merged", "task"))
    }
    with pytest.raises(InputError, match=rf"(?s)(?=.*{without})(?=.*labels\.json)"):
        merge_adapters(folders["task"], tmp_path / "out", into=folders["merged"], coefficient=0.3)


def test_heads_with_and_without_bias_are_refused(tmp_path):
    old = with_head(tmp_path / "merged", ["a", "b"], 1)
    new = with_head(tmp_path / "task", ["c", "d"], 2, bias=False)
    with pytest.raises(InputError, match="bias"):
        merge_adapters(new, tmp_path / "out", into=old, coefficient=0.3)


def test_heads_of_different_widths_are_refused(tmp_path):
    old = write_folder(tmp_path / "merged", seed=1, saved=head(2, 1), labels={HEAD: ["a", "b"]})
    new = write_folder(tmp_path / "task", seed=2, saved=head(2, 2, width=8), labels={HEAD: ["c", "d"]})
    with pytest.raises(InputError, match="classifier.weight has different"):
        merge_adapters(new, tmp_path / "out", into=old, coefficient=0.3)


def head_rows(path, order):
    """[weight | bias] with its rows in a given order of labels."""
    return torch.stack([rows(path)[label] for label in order])


@pytest.fixture
def shared(tmp_path):
    """One head over all tasks: (folders, Δ of modules and head, running values, curvature and H of both)."""

    def build(kind, labels=("a", "b", "c"), old_labels=("a", "b", "c")):
        folders = [
            with_head(tmp_path / "merged", list(old_labels), 1),
            with_head(tmp_path / "task", list(labels), 2),
        ]
        merged = dense(folders[0]) | {HEAD: head_rows(folders[0], labels)}
        delta = dense(folders[1]) | {HEAD: head_rows(folders[1], labels) - merged[HEAD]}
        return folders, delta, merged, *curvature_sums(kind, [merged, delta], [{}, merged])

    return build


@pytest.mark.parametrize("freedom", ["global", "module"])
def test_shared_head_in_the_curvature_moves_by_the_coefficient(shared, tmp_path, freedom):
    folders, delta, merged, sums, H = shared("fisher")
    report = merge_adapters(folders[1], tmp_path / "out", into=folders[0], curvature=sums, freedom=freedom)
    parts = {n: [float((d * times("fisher", h[n], d)).sum()) for h in H] for n, d in delta.items()}
    past, current = (sum(part[i] for part in parts.values()) for i in (0, 1))
    whole = current / (past + current)
    alpha = {name: whole if freedom == "global" else part[1] / sum(part) for name, part in parts.items()}
    assert report.coefficient.used == pytest.approx(whole, rel=1e-5)
    found = dense(tmp_path / "out") | {HEAD: head_rows(tmp_path / "out", "abc")}
    assert_same(found, {name: merged[name] + alpha[name] * d for name, d in delta.items()}, 1e-5)


@pytest.mark.parametrize("kind", ["fisher", "gram"])
def test_shared_head_takes_its_free_optimum(shared, tmp_path, kind):
    folders, delta, merged, sums, H = shared(kind)
    report = merge_adapters(folders[1], tmp_path / "out", into=folders[0], curvature=sums, freedom="free", max_rank=16)
    pull = times(kind, H[0][HEAD], merged[HEAD]) + times(kind, H[1][HEAD], merged[HEAD] + delta[HEAD])
    S = H[0][HEAD] + H[1][HEAD]
    expected = pull / S if kind == "fisher" else torch.linalg.solve(S, pull.T).T
    assert distance(head_rows(tmp_path / "out", "abc"), expected) <= 1e-5
    assert report.heads == {W: "free optimum", B: "free optimum"}


@pytest.mark.parametrize("freedom", ["global", "free"])
def test_shared_head_with_its_labels_in_another_order(shared, tmp_path, freedom):
    folders, delta, merged, sums, H = shared("fisher", labels=("c", "a", "b"))
    try:
        merge_adapters(folders[1], tmp_path / "out", into=folders[0], curvature=sums, freedom=freedom, max_rank=16)
    except InputError as error:
        assert "label" in str(error)  # noqa: PT017 - refusing is as good as sorting the rows
        return
    if freedom == "free":
        pull = H[0][HEAD] * merged[HEAD] + H[1][HEAD] * (merged[HEAD] + delta[HEAD])
        expected = pull / (H[0][HEAD] + H[1][HEAD])
    else:
        parts = [sum(float((d * h[n] * d).sum()) for n, d in delta.items()) for h in H]
        expected = merged[HEAD] + parts[1] / sum(parts) * delta[HEAD]
    assert distance(head_rows(tmp_path / "out", "cab"), expected) <= 1e-5


@pytest.mark.parametrize("old", ["other rows", "no head"])
def test_curvature_of_a_head_that_the_running_merge_does_not_share(shared, tmp_path, old):
    folders, _, _, sums, _ = shared("fisher")
    running = tmp_path / "other"
    if old == "no head":
        write_folder(running, SHAPES, seed=1)
    else:
        with_head(running, ["a", "b"], 1)
    with pytest.raises(InputError, match=HEAD):
        merge_adapters(folders[1], tmp_path / "out", into=running, curvature=sums)
