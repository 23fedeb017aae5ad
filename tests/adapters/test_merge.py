"""merge_adapters against dense float64 products: exact folds, truncation, coefficients from a curvature."""

import json
import subprocess
import sys

import pytest
import torch
from helpers.adapter_folders import (
    CONFIG,
    SHAPES,
    WEIGHTS,
    assert_same,
    curvature_sums,
    dense,
    distance,
    times,
    tree,
    write_folder,
)
from safetensors.torch import load_file

from pm_hf import InputError, merge_adapters


@pytest.fixture
def pair(tmp_path):
    """A running merge and a task adapter with other factors, rank and alpha."""
    merged = write_folder(tmp_path / "merged", rank=3, alpha=6, seed=1)
    return merged, write_folder(tmp_path / "task", rank=2, alpha=3, seed=2)


def fold(pair, alpha):
    merged, task = dense(pair[0]), dense(pair[1])
    zero = {name: torch.zeros_like(matrix) for name, matrix in (merged | task).items()}
    return {name: merged.get(name, zero[name]) + alpha * task.get(name, zero[name]) for name in zero}


@pytest.mark.parametrize("alpha", [0.3, 1.0, 0.0, -0.5, 1.5])
def test_fold_is_old_plus_alpha_times_delta(pair, tmp_path, alpha):
    report = merge_adapters(pair[1], tmp_path / "out", into=pair[0], coefficient=alpha)
    assert_same(dense(tmp_path / "out"), fold(pair, alpha))
    assert report.coefficient.used == alpha
    assert report.error == 0
    assert report.cast_error == 0


def test_fold_puts_the_factors_side_by_side(pair, tmp_path):
    report = merge_adapters(pair[1], tmp_path / "out", into=pair[0], coefficient=0.3)
    stored, first = load_file(tmp_path / "out" / WEIGHTS), load_file(pair[0] / WEIGHTS)
    for name in SHAPES:
        key = f"base_model.model.{name}.lora_A.weight"
        assert stored[key].shape[0] == report.modules[name]["rank_out"] == 5
        assert torch.equal(stored[key][:3], first[key])
        assert report.modules[name]["ranks_in"] == [3, 2]


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"alpha_pattern": {"layers.0.q": 9}}])
@pytest.mark.parametrize("rank", [2, {"layers.0.q": 4, "layers.1.v": 1}], ids=["rank", "rank_pattern"])
def test_scaling_rules_of_peft_are_followed(pair, tmp_path, config, rank):
    task = write_folder(tmp_path / "other", rank=rank, seed=5, config=config)
    merge_adapters(task, tmp_path / "out", into=pair[0], coefficient=0.4)
    assert_same(dense(tmp_path / "out"), fold((pair[0], task), 0.4))
    written = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert written["use_rslora"] is False


def test_module_that_one_side_lacks_counts_as_zero(tmp_path):
    left = write_folder(tmp_path / "a", {"x": (6, 5), "both": (6, 5)}, seed=1)
    right = write_folder(tmp_path / "b", {"both": (6, 5), "y": (4, 5)}, seed=2)
    merge_adapters(right, tmp_path / "out", into=left, coefficient=0.25)
    found = dense(tmp_path / "out")
    assert set(found) == {"x", "both", "y"}
    assert_same(found, fold((left, right), 0.25))


def test_regex_targets_become_explicit_names(tmp_path):
    task = write_folder(tmp_path / "a", config={"target_modules": r".*\.(q|v)"})
    merge_adapters(task, tmp_path / "out")
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["target_modules"] == sorted(SHAPES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_merged_in_float32(pair, tmp_path, dtype):
    task = write_folder(tmp_path / "half", dtype=dtype, seed=4)
    report = merge_adapters(task, tmp_path / "out", into=pair[0], coefficient=0.3)
    assert_same(dense(tmp_path / "out"), fold((pair[0], task), 0.3))
    assert {t.dtype for t in load_file(tmp_path / "out" / WEIGHTS).values()} == {torch.float32}
    assert report.cast_error == 0


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_output_dtype_and_its_cast_error_are_true(pair, tmp_path, dtype, torch_dtype):
    report = merge_adapters(pair[1], tmp_path / "out", into=pair[0], coefficient=0.3, dtype=dtype)
    assert {t.dtype for t in load_file(tmp_path / "out" / WEIGHTS).values()} == {torch_dtype}
    found, expected = dense(tmp_path / "out"), fold(pair, 0.3)
    true = max(distance(found[name], expected[name]) for name in expected)
    assert 0 < report.cast_error == pytest.approx(true, rel=1e-2)


def test_cast_error_stands_in_the_report_on_disk(pair, tmp_path):
    report = merge_adapters(pair[1], tmp_path / "out", into=pair[0], coefficient=0.3, dtype="bfloat16")
    stored = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert stored["cast_error"] == report.cast_error > 0


@pytest.mark.parametrize("limit", [{"max_rank": 1}, {"max_rank": 3}, {"energy": 0.9}, {"energy": 0.6, "max_rank": 2}])
def test_truncation_is_the_best_one_and_its_error_true(pair, tmp_path, limit):
    report = merge_adapters(pair[1], tmp_path / "out", into=pair[0], coefficient=0.8, **limit)
    found = dense(tmp_path / "out")
    for name, expected in fold(pair, 0.8).items():
        values = torch.linalg.svdvals(expected).square()
        share = values.cumsum(0) / values.sum()
        keep = min(limit.get("max_rank", 5), int((share < limit.get("energy", 2)).sum()) + 1)
        error = float((values[keep:].sum() / values.sum()).sqrt())
        assert report.modules[name]["rank_out"] == keep
        assert distance(found[name], expected) == pytest.approx(error, abs=1e-6)
        assert report.modules[name]["error"] == pytest.approx(error, abs=1e-6)
    assert 0 < report.error == max(module["error"] for module in report.modules.values())


def test_more_factors_than_dimensions_are_reduced_without_loss(tmp_path):
    shapes = {"m": (5, 7)}
    left, right = (write_folder(tmp_path / str(seed), shapes, rank=4, seed=seed) for seed in (1, 2))
    report = merge_adapters(right, tmp_path / "out", into=left, coefficient=0.5)
    assert report.modules["m"]["rank_out"] == 5
    assert report.error <= 1e-12
    assert_same(dense(tmp_path / "out"), fold((left, right), 0.5))


@pytest.mark.parametrize("method", ["pm", "average", "sequential"])
def test_first_task_alone_is_taken_as_it_is(tmp_path, method):
    task = write_folder(tmp_path / "a", seed=3, config={"use_rslora": True})
    report = merge_adapters([task], tmp_path / "out", method=method)
    assert report.coefficient.used == 1
    assert report.tasks == 1
    assert_same(dense(tmp_path / "out"), dense(task))


@pytest.mark.parametrize("kind", ["fisher", "gram"])
@pytest.mark.parametrize("freedom", ["global", "module", "free"])
def test_optimum_of_the_first_task_is_itself(tmp_path, kind, freedom):
    task = write_folder(tmp_path / "a", seed=3)
    sums, _ = curvature_sums(kind, [dense(task)], [{}])
    report = merge_adapters(task, tmp_path / "out", curvature=sums, freedom=freedom, max_rank=10)
    assert report.coefficient.raw == pytest.approx(1, abs=1e-6)
    assert_same(dense(tmp_path / "out"), dense(task), 1e-5)


@pytest.mark.parametrize("method", ["average", "sequential"])
def test_average_and_sequential_fold(tmp_path, method):
    folders = [write_folder(tmp_path / f"t{i}", seed=i) for i in range(3)]
    running = folders[0]
    for i, task in enumerate(folders[1:]):
        report = merge_adapters(task, tmp_path / f"m{i}", into=running, method=method)
        running = tmp_path / f"m{i}"
    a, b, c = (dense(folder) for folder in folders)
    weights = (1, 1 / 2, 1 / 3) if method == "average" else (1, 1, 1)
    expected = {name: weights[0] * a[name] + weights[1] * b[name] + weights[2] * c[name] for name in a}
    assert report.tasks == 3
    assert report.coefficient.used == pytest.approx(weights[2])
    assert_same(dense(running), expected)


def test_the_base_counts_as_so_many_models_of_the_running_mean(tmp_path):
    one, two = write_folder(tmp_path / "one", seed=1), write_folder(tmp_path / "two", seed=2)
    first = merge_adapters(one, tmp_path / "a", method="average", options={"prior": 2})
    second = merge_adapters(two, tmp_path / "b", into=tmp_path / "a", method="average", options={"prior": 2})
    assert (first.coefficient.used, second.coefficient.used) == (1 / 3, 1 / 4)
    expected = {name: value / 3 + dense(two)[name] / 4 for name, value in dense(one).items()}
    assert_same(dense(tmp_path / "b"), expected)


@pytest.mark.parametrize("weights", [None, [0.5, 0.2, 0.3], [2.0, -1.0, 0.5]])
def test_average_of_several_is_the_weighted_sum(tmp_path, weights):
    folders = [write_folder(tmp_path / f"t{i}", rank=i + 1, seed=i) for i in range(3)]
    report = merge_adapters(folders, tmp_path / "out", method="average", weights=weights)
    values = weights or [1 / 3] * 3
    parts = [dense(folder) for folder in folders]
    expected = {n: sum(w * part[n] for w, part in zip(values, parts, strict=True)) for n in SHAPES}
    assert_same(dense(tmp_path / "out"), expected)
    assert report.weights == pytest.approx(values)
    assert report.coefficient is None


@pytest.fixture
def second(pair):
    """Dense (θ̂₁, Δ₂) of the pair; task 2 was trained from the running merge."""
    return dense(pair[0]), dense(pair[1])


@pytest.mark.parametrize("kind", ["fisher", "gram"])
def test_global_and_module_coefficient_minimise_the_objective(pair, second, tmp_path, kind):
    merged, delta = second
    sums, H = curvature_sums(kind, [merged, delta], [{}, merged])
    parts = {}
    for name, d in delta.items():  # −Σ(θ̂ − θ*ᵢ)ᵀHᵢΔ / ΣΔᵀHᵢΔ; θ*₁ = θ̂, θ*₂ = θ̂ + Δ
        parts[name] = [float((d * times(kind, h[name], d)).sum()) for h in H]
    sums.save(tmp_path / "curvature.safetensors")
    for freedom in ("global", "module"):
        out = tmp_path / freedom
        report = merge_adapters(
            pair[1], out, into=pair[0], curvature=tmp_path / "curvature.safetensors", freedom=freedom
        )
        past, current = (sum(part[i] for part in parts.values()) for i in (0, 1))
        one = dict.fromkeys(parts, current / (past + current))
        each = {name: part[1] / sum(part) for name, part in parts.items()}
        alpha = one if freedom == "global" else each
        assert report.coefficient.used == pytest.approx(current / (past + current), rel=1e-5)
        assert report.coefficient.one_over_t == 0.5
        assert_same(dense(out), {n: merged[n] + alpha[n] * delta[n] for n in delta}, 1e-5)
        assert [report.modules[n]["coefficient"] for n in delta] == pytest.approx([alpha[n] for n in delta], rel=1e-5)
    assert each["layers.0.q"] != pytest.approx(each["layers.1.v"], rel=1e-2)


@pytest.mark.parametrize("kind", ["fisher", "gram"])
def test_free_optimum_is_m_over_s(pair, second, tmp_path, kind):
    merged, delta = second
    sums, H = curvature_sums(kind, [merged, delta], [{}, merged])
    expected = {}
    for name, d in delta.items():
        pull = times(kind, H[0][name], merged[name]) + times(kind, H[1][name], merged[name] + d)
        S = H[0][name] + H[1][name]
        expected[name] = pull / S if kind == "fisher" else torch.linalg.solve(S, pull.T).T
    report = merge_adapters(pair[1], tmp_path / "whole", into=pair[0], curvature=sums, freedom="free", max_rank=16)
    assert_same(dense(tmp_path / "whole"), expected, 1e-5)
    assert report.error <= 1e-9
    report = merge_adapters(pair[1], tmp_path / "out", into=pair[0], curvature=sums, freedom="free")
    for name, found in dense(tmp_path / "out").items():
        assert report.modules[name]["rank_out"] == 5  # both ranks: exact for the Gram, the best for the diagonal
        assert report.modules[name]["error"] == pytest.approx(distance(found, expected[name]), abs=1e-5)
        assert (report.modules[name]["error"] > 1e-3) == (kind == "fisher")


def test_coefficient_outside_0_1_is_clamped_and_recorded(pair, second, tmp_path):
    merged, delta = second
    pulled = {name: matrix + 3 * delta[name] for name, matrix in merged.items()}  # the past lies beyond the task
    sums, _ = curvature_sums("fisher", [pulled, delta], [{}, merged])
    report = merge_adapters(pair[1], tmp_path / "out", into=pair[0], curvature=sums)
    assert report.coefficient.raw > 1.1
    assert report.coefficient.used == 1
    assert_same(dense(tmp_path / "out"), fold(pair, 1.0))


@pytest.mark.parametrize("freedom", ["global", "free"])
@pytest.mark.parametrize("kind", ["fisher", "gram"])
def test_zero_curvature_is_refused_or_averaged_on_request(pair, second, tmp_path, kind, freedom):
    sums, _ = curvature_sums(kind, list(second), [{}, second[0]], scale=0.0)
    arguments = {"into": pair[0], "curvature": sums, "freedom": freedom, "max_rank": 10}
    with pytest.raises(InputError, match="zero or not finite along the task vector .* in 2 modules"):
        merge_adapters(pair[1], tmp_path / "out", **arguments)
    report = merge_adapters(pair[1], tmp_path / "out", **arguments, options={"on_zero_curvature": "average"})
    assert report.coefficient.used == 0.5
    assert "averaged" in report.coefficient.note
    assert_same(dense(tmp_path / "out"), fold(pair, 0.5))


@pytest.mark.parametrize("freedom", ["global", "module", "free"])
def test_curvature_fold_keeps_a_module_that_only_the_past_has(pair, tmp_path, freedom):
    task = write_folder(tmp_path / "small", {"layers.0.q": (12, 16)}, seed=8)
    merged, delta = dense(pair[0]), dense(task)
    past = {"layers.0.q": merged["layers.0.q"]}
    sums, _ = curvature_sums("gram", [past, delta], [{}, past])
    report = merge_adapters(task, tmp_path / "out", into=pair[0], curvature=sums, freedom=freedom)
    found = dense(tmp_path / "out")
    assert distance(found["layers.1.v"], merged["layers.1.v"]) <= 1e-6
    assert 0 < report.coefficient.used < 1


def test_energy_is_not_ignored_by_the_free_optimum(pair, second, tmp_path):
    sums, _ = curvature_sums("gram", list(second), [{}, second[0]])
    try:
        report = merge_adapters(pair[1], tmp_path / "out", into=pair[0], curvature=sums, freedom="free", energy=0.5)
    except InputError as error:
        assert "energy" in str(error)  # noqa: PT017 - refusing is as good as applying
    else:
        assert max(module["rank_out"] for module in report.modules.values()) < 5


def test_unmeasured_past_counts_as_a_task(pair, second, tmp_path):
    merged, delta = second
    once, _ = curvature_sums("fisher", [delta], [merged])
    options = {"unmeasured_past": "ignore"}
    report = merge_adapters(pair[1], tmp_path / "out", into=pair[0], curvature=once, options=options)
    assert report.coefficient.raw == pytest.approx(1, abs=1e-6)
    assert report.tasks == 2
    assert report.coefficient.one_over_t == 0.5
    third = write_folder(tmp_path / "third", seed=5)
    start = dense(tmp_path / "out")
    twice, _ = curvature_sums("fisher", [delta, dense(third)], [merged, start])
    report = merge_adapters(third, tmp_path / "next", into=tmp_path / "out", curvature=twice)  # needs no option
    assert 0 < report.coefficient.used < 1
    assert report.tasks == 3


def test_number_of_tasks_survives_a_merge_of_merges(tmp_path):
    tasks = [write_folder(tmp_path / f"t{i}", seed=i) for i in range(4)]
    for i in (0, 2):
        merge_adapters(tasks[i : i + 2], tmp_path / f"m{i}", method="average")
    report = merge_adapters([tmp_path / "m0", tmp_path / "m2"], tmp_path / "out", method="average")
    assert report.tasks == 4


def test_running_merge_made_smaller_keeps_its_number_of_tasks(tmp_path):
    tasks = [write_folder(tmp_path / f"t{i}", seed=i) for i in range(2)]
    merge_adapters(tasks, tmp_path / "merged", method="average")
    report = merge_adapters(tmp_path / "merged", tmp_path / "small", method="average", max_rank=2)
    assert report.tasks == 2
    assert report.coefficient.used == 1


@pytest.mark.parametrize("same", ["into", "task"])
def test_output_may_be_an_input(pair, tmp_path, same):
    expected = fold(pair, 0.3)
    output = pair[0] if same == "into" else pair[1]
    merge_adapters(pair[1], output, into=pair[0], coefficient=0.3, overwrite=True)
    assert_same(dense(output), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "task"]


def test_inputs_are_not_changed_and_dry_run_writes_nothing(pair, tmp_path):
    before = tree(tmp_path)
    planned = merge_adapters(pair[1], tmp_path / "a" / "out", into=pair[0], coefficient=0.3, dry_run=True)
    assert tree(tmp_path) == before
    done = merge_adapters(pair[1], tmp_path / "a" / "out", into=pair[0], coefficient=0.3)
    assert {key: tree(tmp_path)[key] for key in before} == before
    assert planned.modules == done.modules
    assert planned.coefficient.used == done.coefficient.used


def test_merge_needs_neither_transformers_nor_peft_nor_the_base(pair, tmp_path):
    code = (
        "import sys; from pm_hf import merge_adapters; "
        f"merge_adapters({str(pair[1])!r}, {str(tmp_path / 'out')!r}, into={str(pair[0])!r}, coefficient=0.3); "
        "print(sorted({'transformers', 'peft', 'datasets', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
    assert_same(dense(tmp_path / "out"), fold(pair, 0.3))
