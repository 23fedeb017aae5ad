"""What inspect says of adapter folders, against dense float64 matrices."""

import pytest
import torch
from adapter_folders import BASE, HEAD, SHAPES, WEIGHTS, dense, head, tree, write_folder
from safetensors.torch import load_file, save_file

from pm_hf import InputError, merge_adapters
from pm_hf.inspection import describe, relate


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"alpha_pattern": {"layers.0.q": 9}}])
def test_modules_are_described_as_their_dense_update(tmp_path, config):
    folder = write_folder(tmp_path / "a", rank={"layers.0.q": 4, "layers.1.v": 2}, seed=1, config=config)
    before, found = tree(tmp_path), describe(folder)
    assert tree(tmp_path) == before
    assert set(found["modules"]) == set(SHAPES)
    for name, matrix in dense(folder).items():
        module = found["modules"][name]
        rank = int(torch.linalg.matrix_rank(matrix))
        assert module["shape"] == f"{matrix.shape[0]}x{matrix.shape[1]}"
        assert module["rank"] == module["numerical_rank"] == rank
        assert module["norm"] == pytest.approx(float(torch.linalg.norm(matrix)), rel=1e-6)
        A, B = (load_file(folder / WEIGHTS)[f"base_model.model.{name}.lora_{f}.weight"].double() for f in "AB")
        assert torch.allclose(module["scaling"] * B @ A, matrix, rtol=1e-6)


def test_numerical_rank_counts_independent_directions_only(tmp_path):
    folder = write_folder(tmp_path / "a", rank=3, seed=1)
    state = load_file(folder / WEIGHTS)
    q, v = (f"base_model.model.{name}.lora_" for name in SHAPES)
    state[q + "A.weight"][2] = state[q + "A.weight"][0] + 2 * state[q + "A.weight"][1]
    state[v + "B.weight"].zero_()
    save_file(state, folder / WEIGHTS)
    modules = describe(folder)["modules"]
    assert [modules[name]["rank"] for name in SHAPES] == [3, 3]
    assert [modules[name]["numerical_rank"] for name in SHAPES] == [2, 0]
    assert modules["layers.1.v"]["norm"] == 0


def test_base_labels_and_number_of_tasks(tmp_path):
    folders = [
        write_folder(tmp_path / x, seed=i, saved=head(1, i), labels={HEAD: [x]}) for i, x in enumerate(("a", "b"))
    ]
    merge_adapters(folders, tmp_path / "out", method="average")
    one, both = describe(folders[0]), describe(tmp_path / "out")
    assert (one["base_model"], one["tasks"], one["labels"]) == (BASE, 1, {HEAD: ["a"]})
    assert (both["tasks"], both["labels"], both["path"]) == (2, {HEAD: ["a", "b"]}, str(tmp_path / "out"))


def test_cosine_of_two_updates(tmp_path):
    left = write_folder(tmp_path / "a", SHAPES | {"only.a": (3, 3)}, rank=3, seed=1)
    right = write_folder(tmp_path / "b", SHAPES | {"only.b": (3, 3)}, rank=2, seed=2, alpha=9)
    first, second, found = dense(left), dense(right), relate(left, right)
    assert set(found) == set(SHAPES)
    for name in SHAPES:
        cosine = torch.cosine_similarity(first[name].flatten(), second[name].flatten(), dim=0)
        assert found[name]["cosine"] == pytest.approx(float(cosine), abs=1e-6)
    assert relate(left, left)["layers.0.q"]["cosine"] == pytest.approx(1, abs=1e-6)


def test_cosine_with_an_untrained_adapter_is_0(tmp_path):
    left, right = write_folder(tmp_path / "a", seed=1), write_folder(tmp_path / "b", seed=2)
    zero = {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in load_file(right / WEIGHTS).items()}
    save_file(zero, right / WEIGHTS)
    assert relate(left, right) == {name: {"cosine": 0.0} for name in SHAPES}


def test_adapters_that_cannot_be_related(tmp_path):
    left = write_folder(tmp_path / "a", {"x": (3, 4)})
    other, wide = write_folder(tmp_path / "b", {"y": (3, 4)}), write_folder(tmp_path / "c", {"x": (3, 5)})
    with pytest.raises(InputError, match="a and .*b have no module in common"):
        relate(left, other)
    with pytest.raises(InputError, match="x has different shapes"):
        relate(left, wide)


def test_folder_that_is_no_adapter(tmp_path):
    with pytest.raises(InputError, match="none is not a folder"):
        describe(tmp_path / "none")
    folder = write_folder(tmp_path / "a", drop=["layers.0.q.lora_B.weight"])
    with pytest.raises(InputError, match="layers.0.q has lora_A only"):
        describe(folder)
