"""The factored curvature r cᵀ/mean(r) against the matrices that it stands for, written out in float64."""

import math
from dataclasses import replace

import pytest
import torch
from helpers.small_sums import FACTORED, FISHER, GRAM, OWNER, SHAPES, means, rewrite, stream, task

from pm_hf.errors import InputError
from pm_hf.merging.coefficient import ZeroCurvatureError, check_fits, free_solution, optimal_coefficient
from pm_hf.merging.curvature import Curvature, FileTensors, accumulate, quadratic_forms, shape_of
from pm_hf.merging.lowrank import LowRank, add


@pytest.fixture
def path(tmp_path):
    return tmp_path / "c.safetensors"


def full(vector: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """r cᵀ/mean(r), (out, in), in float64."""
    r, c = vector.double().split(list(shape))
    return torch.outer(r, c) / r.mean()


def dense(matrix: LowRank) -> torch.Tensor:
    return matrix.B.double() @ matrix.A.double()


def form(H: torch.Tensor, delta: LowRank) -> float:
    """ΔᵀHΔ of a diagonal curvature, (out, in)."""
    return float((H * dense(delta) ** 2).sum())


def moves(seed: int) -> dict[str, LowRank]:
    return task(seed, "fisher")[1]


def folded(settings, fishers: list[dict], deltas: list[dict], freedom: str = "global") -> list:
    """Coefficients of a stream of tasks, each trained from the merge of the ones before."""
    curvature, merged, found = None, None, []
    for F, delta in zip(fishers, deltas, strict=True):
        measured = F if settings.kind == "fisher" else means(F)
        optimum = delta if merged is None else {name: add(merged[name], d) for name, d in delta.items()}
        curvature = accumulate(measured, optimum, delta, settings, 4, previous=curvature)
        found.append(optimal_coefficient(delta, merged, curvature, freedom=freedom))
        step = {name: d.scale(found[-1].for_module(name)) for name, d in delta.items()}
        merged = step if merged is None else {name: add(merged[name], d) for name, d in step.items()}
    return found


# ---- forms and sums


@pytest.mark.parametrize("ranks", [(2, 1), (1, 9), (2, 0), (0, 2)])
def test_forms_equal_those_of_the_matrix_written_out(ranks):
    sums = stream(FACTORED, 2)[-1]
    for name, (out, width) in SHAPES.items():
        g = torch.Generator().manual_seed(1)
        left, right = (LowRank(torch.randn(out, k, generator=g), torch.randn(k, width, generator=g)) for k in ranks)
        H = full(sums.S[name], (out, width))
        expected = [float((dense(left) * H * dense(other)).sum()) for other in (right, left)]
        assert sums.quadratic(name, left, [right, left]) == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_the_matrix_keeps_the_means_of_the_fisher_that_it_stands_for():
    F = task(0, "fisher")[0]
    for name, vector in means(F).items():
        H = full(vector, SHAPES[name])
        torch.testing.assert_close(H.mean(1), F[name].double().mean(1))
        torch.testing.assert_close(H.mean(0), F[name].double().mean(0))


def test_a_curvature_of_zeros_has_the_form_zero():
    delta = moves(0)["q"]
    assert quadratic_forms("factored", {"q": torch.zeros(11)}, "q", delta, [delta]) == [0.0]


def test_sums_are_those_of_the_means_and_past_and_current_the_parts_of_the_newest_form():
    steps = stream(FACTORED, 4)
    vectors = [task(seed, "factored")[0] for seed in range(4)]
    for t, sums in enumerate(steps):
        delta = moves(t)
        assert sums.tasks == t + 1
        assert sums.M == {}
        assert sums.modules == set(SHAPES)
        for name, shape in SHAPES.items():
            torch.testing.assert_close(sums.S[name], sum(v[name] for v in vectors[: t + 1]))
            assert sums.current[name] == pytest.approx(form(full(vectors[t][name], shape), delta[name]), rel=1e-6)
            past = sum(v[name].double() for v in vectors[:t]) if t else torch.zeros(sum(shape))
            expected = form(full(past, shape), delta[name]) if t else 0.0
            assert sums.past[name] == pytest.approx(expected, rel=1e-6)


def test_the_state_has_one_number_for_each_row_and_column_after_every_task():
    assert {step.nbytes for step in stream(FACTORED, 6)} == {4 * sum(out + width for out, width in SHAPES.values())}


def test_the_previous_sums_are_left_as_they_were():
    first = stream(FACTORED, 1)[0]
    before = {name: value.clone() for name, value in first.S.items()}
    measured, delta = task(1, "factored")
    accumulate(measured, delta, delta, FACTORED, 3, previous=first)
    assert all(torch.equal(first.S[name], value) for name, value in before.items())
    assert set(first.past.values()) == {0.0}


@pytest.mark.parametrize(
    "settings", [FISHER, GRAM, replace(FACTORED, labels="mc"), replace(FACTORED, loss_reduction="sum")], ids=str
)
def test_sums_of_other_settings_are_never_mixed(settings):
    first = stream(FACTORED, 1)[0]
    measured, delta = task(1, settings.kind)
    owner = OWNER if settings.kind == "gram" else None
    with pytest.raises(InputError, match="sums are never mixed"):
        accumulate(measured, delta, delta, settings, 3, owner=owner, previous=first)
    other, (measured, delta) = stream(settings, 1)[0], task(1, "factored")
    with pytest.raises(InputError, match="sums are never mixed"):
        accumulate(measured, delta, delta, FACTORED, 3, previous=other)


def test_sums_of_another_width_are_refused():
    first, (measured, delta) = stream(FACTORED, 1)[0], task(1, "factored")
    wide = delta | {"q": LowRank(torch.ones(6, 1), torch.ones(1, 8))}
    with pytest.raises(InputError, match=r"does not fit this adapter.*q"):
        accumulate(measured | {"q": torch.ones(14)}, wide, wide, FACTORED, 3, previous=first)


# ---- coefficient


def test_the_coefficient_is_the_tasks_part_of_the_curvature_along_its_move():
    fishers, deltas = [task(seed, "fisher")[0] for seed in range(5)], [moves(10 + seed) for seed in range(5)]
    vectors = [means(F) for F in fishers]
    single, each = folded(FACTORED, fishers, deltas), folded(FACTORED, fishers, deltas, "module")
    for t, (found, apart) in enumerate(zip(single, each, strict=True)):
        parts = {}
        for name, shape in SHAPES.items():
            past = sum(v[name].double() for v in vectors[:t]) if t else None
            parts[name] = (
                0.0 if past is None else form(full(past, shape), deltas[t][name]),
                form(full(vectors[t][name], shape), deltas[t][name]),
            )
        past, current = (sum(column) for column in zip(*parts.values(), strict=True))
        assert found.raw == apart.raw == pytest.approx(current / (past + current), rel=1e-6)
        assert (found.past, found.current, found.numerator) == pytest.approx((past, current, current), rel=1e-6)
        assert found.one_over_t == 1 / (t + 1)
        for name, (before, now) in parts.items():
            assert apart.for_module(name) == pytest.approx(now / (before + now), rel=1e-6)
    assert max(abs(found.raw - found.one_over_t) for found in single) > 0.01, "the test must differ from averaging"


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_the_first_coefficient_is_one(scale):
    F, delta = task(3, "fisher")
    found = folded(FACTORED, [{name: scale * value for name, value in F.items()}], [delta])[0]
    assert found.raw == pytest.approx(1, abs=1e-6)


def test_equal_curvatures_give_the_running_average():
    F = task(0, "fisher")[0]
    found = folded(FACTORED, [F] * 6, [moves(seed) for seed in range(6)])
    assert [c.raw for c in found] == pytest.approx([1 / t for t in range(1, 7)], abs=1e-6)


def rank_one(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        name: torch.outer(torch.rand(m, generator=g), torch.rand(n, generator=g)) for name, (m, n) in SHAPES.items()
    }


def test_it_is_exact_for_two_tasks_whose_fishers_have_rank_one():
    for seed in range(5):
        fishers, deltas = [rank_one(2 * seed), rank_one(2 * seed + 1)], [moves(seed), moves(seed + 50)]
        exact, found = (folded(settings, fishers, deltas) for settings in (FISHER, FACTORED))
        assert found[1].raw == pytest.approx(exact[1].raw, abs=1e-6)
        assert abs(found[1].raw - 0.5) > 1e-3


def test_it_is_exact_for_any_number_of_tasks_whose_fishers_are_multiples_of_one_of_rank_one():
    F = rank_one(1)
    fishers = [{name: factor * value for name, value in F.items()} for factor in (1.0, 0.2, 3.0, 0.7, 1.5)]
    deltas = [moves(seed) for seed in range(5)]
    exact, found = (folded(settings, fishers, deltas) for settings in (FISHER, FACTORED))
    assert [c.raw for c in found] == pytest.approx([c.raw for c in exact], abs=1e-5)


def test_it_is_only_an_approximation_of_other_fishers():
    fishers = [{name: value**8 for name, value in task(seed, "fisher")[0].items()} for seed in (1, 2)]
    deltas = [moves(3), moves(4)]
    exact, found = (folded(settings, fishers, deltas)[1].raw for settings in (FISHER, FACTORED))
    assert 1e-3 < abs(found - exact) < 0.3


@pytest.mark.parametrize("seed", range(5))
def test_the_coefficient_lies_between_zero_and_one(seed):
    g = torch.Generator().manual_seed(seed)
    scales = 10 ** (6 * torch.rand(6, generator=g) - 3)
    fishers = [{name: s * value for name, value in task(i, "fisher")[0].items()} for i, s in enumerate(scales)]
    for found in folded(FACTORED, fishers, [moves(seed + i) for i in range(6)]):
        assert 0 < found.raw == found.used <= 1


def test_the_whole_matrix_has_no_optimum():
    sums, delta = stream(FACTORED, 1)[0], moves(0)["q"]
    with pytest.raises(InputError, match="no free solution; use freedom global or module, or kind fisher"):
        free_solution("q", delta, None, sums, None)


@pytest.mark.parametrize("freedom", ["global", "module"])
def test_zero_curvature_is_an_input_error_that_names_modules(freedom):
    zero = {name: torch.zeros(sum(shape)) for name, shape in SHAPES.items()}
    sums = accumulate(zero, moves(0), moves(0), FACTORED, 3)
    with pytest.raises(ZeroCurvatureError, match=r"zero or not finite along the task vector.*first \['q'"):
        optimal_coefficient(moves(0), None, sums, freedom=freedom)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_curvature_that_is_not_finite_is_an_input_error_that_names_only_its_module(value):
    measured, delta = task(0, "factored")
    measured["up"][1] = value
    sums = accumulate(measured, delta, delta, FACTORED, 3)
    with pytest.raises(InputError, match=r"in 1 modules, first \['up'\]"):
        optimal_coefficient(delta, None, sums)


def test_another_adapter_is_refused():
    sums, delta = stream(FACTORED, 2)[-1], moves(1)
    check_fits(delta, sums)
    for other, message in (
        ({name: d.scale(-1.0) for name, d in delta.items()}, "measured with another task adapter"),
        ({name: delta[name] for name in ("q", "v")}, "1 modules stand in only one of them, first up"),
        (delta | {"q": delta["v"]}, r"q is \(3, 5\) in it, \(11,\) in the curvature"),
    ):
        with pytest.raises(InputError, match=message):
            optimal_coefficient(other, None, sums)


# ---- file


def test_loading_and_the_coefficient_need_the_header_alone(path, monkeypatch):
    saved = stream(FACTORED, 3)[-1]
    saved.save(path)

    def refuse(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(FileTensors, "rows", refuse)
    loaded = Curvature.load(path)
    assert {name: shape_of(loaded.S, name) for name in loaded.S} == {n: (sum(s),) for n, s in SHAPES.items()}
    for freedom in ("global", "module"):
        expected = optimal_coefficient(moves(2), None, saved, freedom=freedom)
        assert optimal_coefficient(moves(2), None, loaded, freedom=freedom) == expected


def test_sums_stored_in_bfloat16_continue_in_float32(path):
    saved, (measured, delta) = stream(FACTORED, 2)[-1], task(2, "factored")
    saved.save(path)
    rewrite(path, lambda t, h: t.update({name: tensor.bfloat16() for name, tensor in t.items()}))
    loaded = Curvature.load(path)
    assert loaded.nbytes == saved.nbytes // 2
    following = accumulate(measured, delta, delta, FACTORED, 3, previous=loaded)
    for name, value in saved.S.items():
        assert torch.equal(following.S[name], value.bfloat16().float() + measured[name])
    assert following.past == pytest.approx(
        accumulate(measured, delta, delta, FACTORED, 3, previous=saved).past, rel=2e-2
    )


BROKEN = {
    "S missing": (lambda t, h: t.pop("S.up"), "S and M do not belong to the same modules"),
    "S of a matrix": (lambda t, h: t.update({"S.q": torch.ones(6, 5)}), r"S of q has shape \(6, 5\)"),
    "an M": (lambda t, h: t.update({"M.q": torch.ones(6, 5)}), "tensor M.q is none of its sums"),
    "past missing": (lambda t, h: h["past"].pop("q"), "past and current name different modules, first q"),
    "no past": (lambda t, h: h.pop("past"), "past and current name different modules, first q"),
    "past of text": (lambda t, h: h["past"].update(q="1"), "past is not {module: number}, none below 0"),
    "current of nothing": (lambda t, h: h["current"].update(q=None), "current is not {module: number}, none below 0"),
    "current missing": (lambda t, h: h["current"].pop("q"), "past and current name different modules, first q"),
    "probe missing": (lambda t, h: h["probe"].pop("v"), "probe and current name different modules, first v"),
    "another kind": (lambda t, h: h["settings"].update(kind="fisher"), "M and current name different modules"),
    "float64": (lambda t, h: t.update({"S.q": t["S.q"].double()}), "tensor S.q is none of its sums, or not in F32"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_a_file_that_contradicts_itself_is_an_input_error(path, change, message):
    stream(FACTORED, 2)[-1].save(path)
    Curvature.load(path)
    rewrite(path, change)
    with pytest.raises(InputError, match=f"is not a sound curvature file: {message}.*; estimate the curvature again"):
        Curvature.load(path)


def test_a_file_with_a_longer_vector_does_not_fit_its_adapter(path):
    stream(FACTORED, 1)[0].save(path)
    rewrite(path, lambda t, h: t.update({"S.q": torch.ones(12)}))
    with pytest.raises(InputError, match=r"q is \(6, 5\) in it, \(12,\) in the curvature"):
        optimal_coefficient(moves(0), None, Curvature.load(path))


def test_a_file_of_before_the_loss_reduction_was_stored_holds_means(path):
    stream(FISHER, 1)[0].save(path)
    rewrite(path, lambda t, h: (h["settings"].pop("loss_reduction"), h.pop("past")))
    assert Curvature.load(path).settings == FISHER
