"""What inspect says of adapter folders, against dense float64 matrices."""

import json
from statistics import median

import helpers.random_adapters as drawn
import numpy as np
import pytest
import torch
from helpers.adapter_folders import BASE, HEAD, SHAPES, WEIGHTS, dense, head, tree, write_folder
from safetensors.torch import load_file, save_file
from scipy.linalg import subspace_angles

from pm_hf import InputError, merge_adapters
from pm_hf.adapters import inspection
from pm_hf.adapters.inspection import describe, inspect_adapters, relate, tables
from pm_hf.merging.lowrank import LowRank

Q, V = SHAPES


def degrees(left, right):
    """Principal angles between the column spaces of two matrices."""
    return np.rad2deg(subspace_angles(left.numpy(), right.numpy()))


def expected_relation(left, right):
    """The numbers of one module from its dense float64 matrices."""
    one, other = (torch.cat([matrix.flatten() for matrix in side]) for side in (left, right))
    outputs = np.concatenate([degrees(a, b) for a, b in zip(left, right, strict=True)])
    inputs = np.concatenate([degrees(a.T, b.T) for a, b in zip(left, right, strict=True)])
    return {
        "cosine": float(one @ other / (one.norm() * other.norm())),
        "output_angle": outputs.min(),
        "output_angle_mean": outputs.mean(),
        "input_angle": inputs.min(),
        "input_angle_mean": inputs.mean(),
        "sign_conflict": float((one * other < 0).double().mean()),
    }


def change(folder, **factors):
    """Replace factors of a folder: change(folder, q_B=tensor)."""
    state = load_file(folder / WEIGHTS)
    for key, value in factors.items():
        module, factor = key.split("_")
        state[f"base_model.model.{next(name for name in SHAPES if name.endswith(module))}.lora_{factor}.weight"] = value
    save_file(state, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"alpha_pattern": {"layers.0.q": 9}}])
def test_modules_are_described_as_their_dense_update(tmp_path, config):
    folder = write_folder(tmp_path / "a", rank={Q: 4, V: 2}, seed=1, config=config)
    before, found = tree(tmp_path), describe(folder)
    assert tree(tmp_path) == before
    assert set(found["modules"]) == set(SHAPES)
    assert found["warnings"] == []
    for name, matrix in dense(folder).items():
        module = found["modules"][name]
        rank = int(torch.linalg.matrix_rank(matrix))
        assert module["shape"] == f"{matrix.shape[0]}x{matrix.shape[1]}"
        assert module["rank"] == module["numerical_rank"] == rank
        assert module["norm"] == pytest.approx(float(torch.linalg.norm(matrix)), rel=1e-6)
        assert module["spectral_norm"] == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)), rel=1e-6)
        A, B = (load_file(folder / WEIGHTS)[f"base_model.model.{name}.lora_{f}.weight"].double() for f in "AB")
        assert torch.allclose(module["scaling"] * B @ A, matrix, rtol=1e-6)


def test_numerical_rank_counts_independent_directions_only(tmp_path):
    folder = write_folder(tmp_path / "a", rank=3, seed=1)
    A = load_file(folder / WEIGHTS)["base_model.model.layers.0.q.lora_A.weight"]
    A[2] = A[0] + 2 * A[1]
    modules = describe(change(folder, q_A=A, v_B=torch.zeros(10, 3)))["modules"]
    assert [modules[name]["rank"] for name in SHAPES] == [3, 3]
    assert [modules[name]["numerical_rank"] for name in SHAPES] == [2, 0]
    assert (modules[V]["norm"], modules[V]["spectral_norm"]) == (0, 0)


def test_base_labels_and_number_of_tasks(tmp_path):
    folders = [
        write_folder(tmp_path / x, seed=i, saved=head(1, i), labels={HEAD: [x]}) for i, x in enumerate(("a", "b"))
    ]
    merge_adapters(folders, tmp_path / "out", method="average")
    one, both = describe(folders[0]), describe(tmp_path / "out")
    assert (one["base_model"], one["tasks"], one["labels"]) == (BASE, 1, {HEAD: ["a"]})
    assert (both["tasks"], both["labels"], both["path"]) == (2, {HEAD: ["a", "b"]}, str(tmp_path / "out"))


def test_storage_parameters_and_settings(tmp_path):
    plain = describe(write_folder(tmp_path / "a", rank=2))
    assert plain["dtype"] == "float32"
    assert plain["parameters"] == {"LoRA": 2 * (12 + 16 + 10 + 16), "saved": 0}
    assert not any(plain["settings"].values())
    half = {"dtype": torch.bfloat16, "saved": head(3, 0), "config": {"use_rslora": True}}
    found = describe(write_folder(tmp_path / "b", rank=2, **half))
    assert found["dtype"] == "bfloat16, float32"
    assert found["parameters"] == {"LoRA": 2 * (12 + 16 + 10 + 16), "saved": 3 * 16 + 3}
    wanted = {"use_rslora": True, "lora_bias": None, "target_parameters": None, "modules_to_save": [HEAD]}
    assert found["settings"] == wanted


def test_an_untrained_adapter_is_told(tmp_path):
    zeros = {"q_B": torch.zeros(12, 2), "v_B": torch.zeros(10, 2)}
    assert describe(change(write_folder(tmp_path / "a"), **zeros))["warnings"] == [
        f"update close to zero, untrained: {Q}, {V}"
    ]
    one = change(write_folder(tmp_path / "b"), v_B=1e-6 * torch.ones(10, 2))
    assert describe(one)["warnings"] == [f"update close to zero, untrained: {V}"]
    assert describe(change(write_folder(tmp_path / "c"), v_B=0.2 * torch.ones(10, 2)))["warnings"] == []


def test_an_update_out_of_proportion_is_told(tmp_path):
    shapes = {f"layers.{i}.q": (6, 8) for i in range(4)} | {"layers.4.v": (60, 80)}
    folder = write_folder(tmp_path / "a", shapes, seed=1)
    assert describe(folder)["warnings"] == [], "a large matrix has a large norm"
    state = load_file(folder / WEIGHTS)
    state["base_model.model.layers.2.q.lora_B.weight"] *= 100
    save_file(state, folder / WEIGHTS)
    rms = {name: float(matrix.square().mean().sqrt()) for name, matrix in dense(folder).items()}
    times = rms.pop("layers.2.q") / median(rms.values())
    assert describe(folder)["warnings"] == [
        f"update far larger than the others' median: layers.2.q ({times:.0f} times)"
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_told_and_the_rest_is_described(tmp_path, value):
    folder = change(write_folder(tmp_path / "a"), v_B=torch.full((10, 2), value))
    other, found = write_folder(tmp_path / "b", seed=1), describe(folder)
    nothing = dict.fromkeys(("numerical_rank", "norm", "spectral_norm"))
    assert found["modules"][V] == {"shape": "10x16", "rank": 2, "scaling": 2.0} | nothing
    assert found["modules"][Q]["norm"] > 0
    assert [f"{V}.lora_B.weight holds NaN or infinite values" in text for text in found["warnings"]] == [True]
    relation = relate(other, folder)
    assert set(relation["modules"]) == {Q}
    assert f"{V} left out: adapter {folder}" in relation["warnings"][0]
    assert json.loads(json.dumps(inspect_adapters([folder, other]), allow_nan=False))


def test_two_updates_relate_as_their_dense_matrices(tmp_path):
    left = write_folder(tmp_path / "a", SHAPES | {"only.a": (3, 3)}, rank=3, seed=1)
    right = write_folder(tmp_path / "b", SHAPES | {"only.b": (3, 3)}, rank=2, seed=2, alpha=9)
    first, second, found = dense(left), dense(right), relate(left, right)
    assert set(found["modules"]) == set(SHAPES)
    for name in SHAPES:
        assert found["modules"][name] == pytest.approx(expected_relation([first[name]], [second[name]]), abs=1e-5)
    one, other = (torch.cat([side[name].flatten() for name in SHAPES]) for side in (first, second))
    whole = {"cosine": float(torch.cosine_similarity(one, other, dim=0))}
    whole["sign_conflict"] = float((one * other < 0).double().mean())
    assert found["summary"] == pytest.approx(whole, abs=1e-6)
    assert (found["only_left"], found["only_right"], found["warnings"]) == (["only.a"], ["only.b"], [])


def test_angles_see_shared_and_separate_directions(tmp_path):
    left, right = write_folder(tmp_path / "a", rank=3, seed=1), write_folder(tmp_path / "b", rank=3, seed=2)
    A, B = (load_file(left / WEIGHTS)[f"base_model.model.{Q}.lora_{f}.weight"] for f in "AB")
    basis = torch.linalg.qr(torch.cat([B, torch.eye(12)[:, :9]], dim=1))[0]
    change(right, q_A=A[[2, 0, 1]] * 5, q_B=basis[:, 3:6].contiguous())  # the same inputs, other outputs
    row = relate(left, right)["modules"][Q]
    assert row["input_angle"] < row["input_angle_mean"] < 1e-5
    assert row["output_angle_mean"] == pytest.approx(90, abs=1e-4)
    same = relate(left, left)["modules"][Q]
    assert same["cosine"] == pytest.approx(1, abs=1e-12)
    assert same["output_angle_mean"] < 1e-5
    assert same["sign_conflict"] == 0
    minus = change(write_folder(tmp_path / "c", rank=3, seed=1), q_B=-B)
    opposite = relate(left, minus)["modules"][Q]
    assert (opposite["cosine"], opposite["sign_conflict"]) == pytest.approx((-1, 1), abs=1e-12)
    assert opposite["output_angle_mean"] < 1e-5


def test_small_angles_are_resolved():
    for angle in (1e-10, 1e-5, 1.0):
        tilted = torch.tensor([[np.cos(angle), 0, 0], [0, 1, 0], [np.sin(angle), 0, 0]], dtype=torch.float64)[:, :2]
        found = inspection._angles(torch.eye(3, dtype=torch.float64)[:, :2], tilted)
        assert found.tolist() == pytest.approx([0, np.rad2deg(angle)], rel=1e-6, abs=1e-12)
    wide = torch.linalg.qr(torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).double())[0]
    assert np.allclose(inspection._angles(wide[:, :2], wide @ torch.eye(5)[:, 1:].double()).numpy(), [0, 90])


def test_an_untrained_module_has_no_direction(tmp_path):
    left = write_folder(tmp_path / "a", seed=1)
    right = change(write_folder(tmp_path / "b", seed=2), q_B=torch.zeros(12, 2), v_B=torch.zeros(10, 2))
    found = relate(left, right)
    angles = ("output_angle", "output_angle_mean", "input_angle", "input_angle_mean")
    nothing = {"cosine": 0.0, "sign_conflict": 0.0} | dict.fromkeys(angles)
    assert found["modules"] == dict.fromkeys(SHAPES, nothing)
    assert found["summary"] == {"cosine": 0.0, "sign_conflict": 0.0}


def test_signs_are_counted_row_by_row(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    B, A, D, C = (torch.randn(shape, generator=generator) for shape in ((11, 2), (2, 7), (11, 3), (3, 7)))
    B[3] = 0  # zeros conflict with nothing
    tiny = 1e-25  # products of entries underflow in float32, signs do not
    left, right = LowRank(B * tiny, A), LowRank(D * tiny, C)
    expected = int(((B.double() @ A.double()) * (D.double() @ C.double()) < 0).sum())
    for chunk in (1, 20, 10**6):
        monkeypatch.setattr(inspection, "CHUNK", chunk)
        assert inspection._sign_conflicts(left, right) == expected
    assert 0 < expected < 70


KINDS = {
    "fused": drawn.Site("block.fused", "fused", 6, 5, experts=3),
    "grouped": drawn.Site("block.grouped", "grouped", 8, 3, kernel=(2, 2)),
    "conv": drawn.Site("block.conv", "conv", 6, 3, kernel=(3,)),
    "embedding": drawn.Site("block.embedding", "embedding", 6, 9),
    "bias": drawn.Site("block.linear", "linear", 6, 7),
}


def matrices(place, weight):
    """The (out, in) matrices of a weight's update."""
    if place.kind == "fused":
        return list(weight)
    if place.kind == "embedding":
        return [weight.T]
    return list(weight.flatten(1).chunk(2 if place.kind == "grouped" else 1))


@pytest.mark.parametrize("kind", KINDS)
def test_every_storage_is_read_as_its_matrices(tmp_path, kind):
    place = KINDS[kind]
    makes = [drawn.Drawn({place.name: (2, 3)}, False, kind == "bias", torch.float32, seed) for seed in (1, 2)]
    folders = [drawn.write(tmp_path / str(make.seed), [place], make) for make in makes]
    updates = [drawn.dense(folder, [place]) for folder in folders]
    parts = [matrices(place, update[place.name]) for update in updates]
    row = describe(folders[0])["modules"][place.name]
    several = f"{len(parts[0])}x" if len(parts[0]) > 1 else ""
    assert row["shape"] == several + "x".join(map(str, parts[0][0].shape))
    assert row["numerical_rank"] == max(int(torch.linalg.matrix_rank(part)) for part in parts[0])
    assert row["norm"] == pytest.approx(float(updates[0][place.name].norm()), rel=1e-6)
    assert row["spectral_norm"] == pytest.approx(max(float(torch.linalg.matrix_norm(p, 2)) for p in parts[0]), rel=1e-6)
    if kind == "bias":
        assert row["bias_norm"] == pytest.approx(float(updates[0][f"{place.name}.bias"].norm()), rel=1e-6)
    found = relate(*folders)["modules"][place.name]
    assert found == pytest.approx(expected_relation(*parts), abs=1e-5)


def test_an_expert_that_was_never_used_has_no_direction(tmp_path):
    place = KINDS["fused"]
    folders = [
        drawn.write(tmp_path / str(seed), [place], drawn.Drawn({place.name: (2, 3)}, False, False, torch.float32, seed))
        for seed in (1, 2)
    ]
    state = load_file(folders[0] / WEIGHTS)
    state["base_model.model.block.fused.lora_B.weight"][:, ::3] = 0  # the columns of expert 0
    save_file(state, folders[0] / WEIGHTS)
    assert describe(folders[0])["modules"][place.name]["numerical_rank"] == 2
    parts = [matrices(place, drawn.dense(folder, [place])[place.name]) for folder in folders]
    used = expected_relation(parts[0][1:], parts[1][1:])
    found = relate(*folders)["modules"][place.name]
    assert {key: found[key] for key in used if "angle" in key} == pytest.approx(
        {key: value for key, value in used.items() if "angle" in key}, abs=1e-5
    )
    assert found["sign_conflict"] == pytest.approx(used["sign_conflict"] * 2 / 3)


def test_what_does_not_compare_stands_in_the_warnings(tmp_path):
    left = write_folder(tmp_path / "a", {"x": (3, 4), "y": (3, 4)})
    other = write_folder(tmp_path / "b", {"z": (3, 4)}, config={"base_model_name_or_path": "other/base"})
    wide = write_folder(tmp_path / "c", {"x": (3, 5), "y": (3, 4)})
    found = relate(left, other)
    assert found["warnings"] == [
        "different bases, tiny/base and other/base: updates of different models do not compare",
        "no module in common",
    ]
    assert (found["modules"], found["summary"]) == ({}, {})
    found = relate(left, wide)
    assert found["warnings"] == ["x is not the same in both, left out: linear 3x4 and linear 3x5"]
    assert set(found["modules"]) == {"y"}


def test_every_pair_is_related_and_printed(tmp_path):
    shapes = [SHAPES, SHAPES | {"only.b": (3, 3)}, {Q: SHAPES[Q]}]
    names = [str(write_folder(tmp_path / str(i), shape, seed=i)) for i, shape in enumerate(shapes)]
    found = inspect_adapters(names)
    assert found["adapters"] == [describe(name) for name in names]
    pairs = [(0, 1), (0, 2), (1, 2)]
    assert found["relations"] == [relate(names[i], names[j]) for i, j in pairs]
    assert json.loads(json.dumps(found)) == found
    lines = tables(found).splitlines()
    assert f"{names[0]}: base {BASE}, 1 task(s), float32, parameters: 108 LoRA, 0 saved" in lines
    assert lines[1].split() == ["module", *found["adapters"][0]["modules"][Q]]
    assert lines[2].split()[:4] == [Q, "12x16", "2", "2"]
    assert f"{names[0]} and {names[1]}" in lines
    assert f"  only in {names[1]}: only.b" in lines
    assert sum(line.startswith("  all of these: cosine ") for line in lines) == 3
    assert not any("warning" in line for line in lines)


def test_text_shows_settings_labels_and_warnings(tmp_path):
    names = [f"intent {i}" for i in range(10)]
    folder = write_folder(tmp_path / "a", saved=head(10, 0), labels={HEAD: names}, config={"use_rslora": True})
    text = tables(inspect_adapters([change(folder, q_B=torch.full((12, 2), torch.nan), v_B=torch.zeros(10, 2))]))
    assert f"  labels of {HEAD}: {', '.join(names[:8])} and 2 more\n" in text
    assert "  use_rslora: True\n" in text
    assert "  warning: adapter" in text
    assert f"  warning: update close to zero, untrained: {V}" in text
    assert text.splitlines()[-4].split()[-1] == "-"


def test_folder_that_is_no_adapter(tmp_path):
    with pytest.raises(InputError, match="none is not a folder"):
        describe(tmp_path / "none")
    folder = write_folder(tmp_path / "a", drop=["layers.0.q.lora_B.weight"])
    with pytest.raises(InputError, match="layers.0.q has lora_A only"):
        describe(folder)


def test_what_a_terminal_would_obey_is_escaped_in_the_table(tmp_path):
    name = "layers.\x1b[2J\u202eq"
    folder = write_folder(tmp_path / "a", {name: (6, 8)}, labels={"classifier": ["\x1b[31mred"]}, saved=head(1, 1))
    shown = tables(inspect_adapters([folder, folder]))
    assert "layers.\\x1b[2J\\u202eq" in shown
    assert "\\x1b[31mred" in shown
    assert not {"\x1b", "\u202e"} & set(shown)
