"""The closed-form coefficient against the sum over all past tasks, each with its own optimum and curvature."""

import math
from dataclasses import replace

import pytest
import torch

from pm_hf.errors import InputError
from pm_hf.merging import curvature as kernel
from pm_hf.merging.coefficient import check_fits, fixed_coefficient, optimal_coefficient
from pm_hf.merging.curvature import Curvature, CurvatureSpec, accumulate
from pm_hf.merging.lowrank import LowRank, add

SHAPES = {"q": (6, 5), "v": (3, 5), "up": (4, 7)}
OWNER = {"v": "q"}
FISHER, GRAM = CurvatureSpec("fisher"), CurvatureSpec("gram", shrinkage=0.1)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """One or two rows at a time."""
    monkeypatch.setattr(kernel, "CHUNK", 10)


both = pytest.mark.parametrize("settings", [FISHER, GRAM], ids=["fisher", "gram"])


def task(seed: int, kind: str, scale: float = 1.0) -> tuple[dict, dict]:
    """(measured, delta) of one task; `scale` multiplies the curvature."""
    g = torch.Generator().manual_seed(seed)
    delta = {
        name: LowRank(torch.randn(out, 2, generator=g), torch.randn(2, width, generator=g))
        for name, (out, width) in SHAPES.items()
    }
    if kind == "fisher":
        return {name: scale * torch.rand(shape, generator=g) ** 4 for name, shape in SHAPES.items()}, delta
    inputs = {name: torch.randn(9, SHAPES[name][1], generator=g) for name in ("q", "up")}
    return {name: scale * (x.T @ x) / 9 for name, x in inputs.items()}, delta


def fold(
    settings: CurvatureSpec, previous: Curvature | None, merged: dict | None, measured: dict, delta: dict
) -> Curvature:
    optimum = {name: d if merged is None else add(merged[name], d) for name, d in delta.items()}
    owner = OWNER if settings.kind == "gram" else None
    return accumulate(measured, optimum, delta, settings, 8, owner=owner, previous=previous)


class Stream:
    """Tasks trained from the merged model and folded with α; keeps every θ*_i and H_i beside the running sums."""

    def __init__(self, settings: CurvatureSpec) -> None:
        self.settings, self.merged, self.curvature, self.past = settings, None, None, []

    def step(self, measured: dict, delta: dict, freedom: str = "global"):
        """Fold one task; returns the coefficient found and the one from the explicit sums (of each module too)."""
        self.curvature = fold(self.settings, self.curvature, self.merged, measured, delta)
        found = optimal_coefficient(delta, self.merged, self.curvature, freedom=freedom)
        expected = self._explicit(measured, delta)
        moved = {name: d.scale(found.for_module(name)) for name, d in delta.items()}
        self.merged = moved if self.merged is None else {n: add(self.merged[n], d) for n, d in moved.items()}
        return found, expected

    def _explicit(self, measured: dict, delta: dict) -> dict[str, tuple[float, float]]:
        """{module: (−Σᵢ(θ̂−θ*ᵢ)ᵀHᵢΔ, ΣᵢΔᵀHᵢΔ)}: the formula of the paper, curvatures as full matrices."""
        now = {}
        for name, d in delta.items():
            out, width = SHAPES[name]
            if self.settings.kind == "fisher":
                H = torch.diag(measured[name].double().flatten())
            else:
                G, rho = measured[OWNER.get(name, name)].double(), self.settings.shrinkage
                H = torch.kron(torch.eye(out).double(), (1 - rho) * G + rho * torch.diag(G.diagonal()))
            start = torch.zeros(out * width).double() if self.merged is None else vector(self.merged[name])
            now[name] = (H, start, start + vector(d))
        self.past.append(now)
        totals = {}
        for name, d in delta.items():
            start, step = now[name][1], vector(d)
            terms = [(H, optimum) for H, _, optimum in (entry[name] for entry in self.past)]
            numerator = -sum(float((start - optimum) @ H @ step) for H, optimum in terms)
            totals[name] = (numerator, sum(float(step @ H @ step) for H, _ in terms))
        return totals


def vector(matrix: LowRank) -> torch.Tensor:
    return (matrix.B.double() @ matrix.A.double()).flatten()


@both
def test_coefficient_equals_the_sum_over_every_past_task(settings):
    stream, found = Stream(settings), []
    for t in range(1, 7):
        coefficient, expected = stream.step(*task(t, settings.kind))
        numerator, denominator = (sum(column) for column in zip(*expected.values(), strict=True))
        assert coefficient.raw == pytest.approx(numerator / denominator, abs=2e-6)
        assert coefficient.numerator == pytest.approx(numerator, rel=1e-5, abs=1e-5)
        assert coefficient.past + coefficient.current == pytest.approx(denominator, rel=1e-6)
        assert coefficient.one_over_t == 1 / t
        found.append(coefficient.raw)
    assert found[0] == pytest.approx(1, abs=1e-6)
    assert max(abs(alpha - 1 / t) for t, alpha in enumerate(found, 1)) > 0.02, "the test must differ from averaging"


@both
def test_coefficient_of_each_module_equals_its_own_sum(settings):
    stream = Stream(settings)
    for t in range(1, 5):
        coefficient, expected = stream.step(*task(t, settings.kind), freedom="module")
        assert set(coefficient.modules) == set(SHAPES)
        for name, (numerator, denominator) in expected.items():
            assert coefficient.modules[name].raw == pytest.approx(numerator / denominator, abs=2e-6)
            assert coefficient.for_module(name) == coefficient.modules[name].used
        numerator, denominator = (sum(column) for column in zip(*expected.values(), strict=True))
        assert coefficient.raw == pytest.approx(numerator / denominator, abs=2e-6)


@both
def test_coefficient_minimises_the_objective_it_is_derived_from(settings):
    stream = Stream(settings)
    for t in range(1, 4):
        start = stream.merged
        coefficient, _ = stream.step(*task(t, settings.kind))
    _, delta = task(3, settings.kind)

    def objective(alpha: float) -> float:
        return sum(
            float((gap := vector(start[name]) + alpha * vector(delta[name]) - optimum) @ H @ gap)
            for entry in stream.past
            for name, (H, _, optimum) in entry.items()
        )

    best = objective(coefficient.raw)
    assert all(best < objective(coefficient.raw + step) for step in (-0.1, -0.01, 0.01, 0.1))


@both
@pytest.mark.parametrize("seed", range(5))
def test_the_first_coefficient_is_one(settings, seed):
    coefficient, _ = Stream(settings).step(*task(seed, settings.kind, scale=10.0 ** (2 * seed - 6)))
    assert coefficient.raw == pytest.approx(1, abs=1e-6)
    assert coefficient.past == pytest.approx(0, abs=1e-5 * coefficient.current)


@both
def test_equal_curvatures_give_the_running_average(settings):
    stream = Stream(settings)
    measured, _ = task(0, settings.kind)
    for t in range(1, 7):
        coefficient, _ = stream.step(measured, task(t, settings.kind)[1])
        assert coefficient.raw == pytest.approx(1 / t, abs=2e-6)
    optima = [{name: optimum for name, (_, _, optimum) in entry.items()} for entry in stream.past]
    for name, merged in stream.merged.items():
        mean = sum(entry[name] for entry in optima) / len(optima)
        torch.testing.assert_close(vector(merged), mean, rtol=1e-4, atol=1e-4)


@both
def test_a_past_that_vanished_gives_a_second_coefficient_of_one(settings):
    stream = Stream(settings)
    stream.step(*task(1, settings.kind, scale=1e-6))
    coefficient, _ = stream.step(*task(2, settings.kind))
    assert coefficient.raw == pytest.approx(1, abs=1e-4)
    assert 0 < coefficient.past < 1e-4 * coefficient.current
    assert coefficient.note is None, "at the second task this is not yet worth a note"


def test_a_past_without_weight_is_noted_from_the_third_task():
    stream = Stream(FISHER)
    notes = [stream.step(*task(t, "fisher", scale=1e-5 if t < 3 else 1.0))[0].note for t in range(1, 4)]
    assert notes[:2] == [None, None]
    assert "the past has almost no weight" in notes[2]
    ordinary = Stream(FISHER)
    assert [ordinary.step(*task(t, "fisher"))[0].note for t in range(1, 4)] == [None] * 3


def one_weight(*tasks: tuple[float, float, float]) -> tuple[dict, dict | None, Curvature]:
    """A model of a single weight from (start, optimum, curvature) of each task; the merged model is the last start."""
    curvature = None
    for start, optimum, H in tasks:
        delta = {"w": scalar(optimum - start)}
        curvature = accumulate({"w": torch.tensor([[H]])}, {"w": scalar(optimum)}, delta, FISHER, 1, previous=curvature)
    return delta, {"w": scalar(start)}, curvature


def scalar(value: float) -> LowRank:
    return LowRank(torch.tensor([[value]]), torch.ones(1, 1))


def test_a_coefficient_above_one_is_clamped_and_recorded():
    # the past's optimum 4 lies beyond the step from 0 to 1: the minimum of (θ−4)² + (θ−1)² is 2.5
    found = optimal_coefficient(*one_weight((0.0, 4.0, 1.0), (0.0, 1.0, 1.0)))
    assert (found.raw, found.used) == (pytest.approx(2.5), 1.0)
    assert (found.numerator, found.past, found.current) == (pytest.approx(5), pytest.approx(1), pytest.approx(1))


def test_a_coefficient_below_zero_is_clamped_and_recorded():
    # the past's optimum −4 lies behind the step from 0 to 1: the minimum of (θ+4)² + (θ−1)² is −1.5
    found = optimal_coefficient(*one_weight((0.0, -4.0, 1.0), (0.0, 1.0, 1.0)))
    assert (found.raw, found.used) == (pytest.approx(-1.5), 0.0)
    assert found.numerator == pytest.approx(-3)


def test_modules_without_a_past_count_as_zero():
    measured, delta = task(1, "fisher")
    first = fold(FISHER, None, None, measured, delta)
    later, step = task(2, "fisher")
    zeros = {name: LowRank(torch.zeros(out, 1), torch.zeros(1, width)) for name, (out, width) in SHAPES.items()}
    curvature = fold(FISHER, first, zeros, later, step)
    partly = {"q": delta["q"]}
    assert optimal_coefficient(step, partly, curvature) == optimal_coefficient(step, zeros | partly, curvature)


@both
@pytest.mark.parametrize("freedom", ["global", "module"])
def test_zero_curvature_is_an_input_error_that_names_modules(settings, freedom):
    measured, delta = task(1, settings.kind, scale=0.0)
    with pytest.raises(InputError, match=r"zero or not finite along the task vector.*first \['q'"):
        optimal_coefficient(delta, None, fold(settings, None, None, measured, delta), freedom=freedom)


def test_an_untrained_adapter_is_an_input_error():
    measured, delta = task(1, "fisher")
    delta = {name: d.scale(0.0) for name, d in delta.items()}
    with pytest.raises(InputError, match="the adapter is untrained"):
        optimal_coefficient(delta, None, fold(FISHER, None, None, measured, delta))


@both
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_curvature_that_is_not_finite_is_an_input_error_that_names_only_its_module(settings, value):
    measured, delta = task(1, settings.kind)
    measured["up"][1, 1] = value
    curvature = fold(settings, None, None, measured, delta)
    with pytest.raises(InputError, match=r"in 1 modules, first \['up'\]"):
        optimal_coefficient(delta, None, curvature)


def infinite_both_ways() -> tuple[dict, Curvature]:
    """Overflowed curvature of two modules that pull in opposite directions."""
    _, delta = task(1, "fisher")
    infinite = {name: torch.full(shape, math.inf) for name, shape in SHAPES.items()}
    pull = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    for name, sign in (("q", 1.0), ("v", -1.0)):
        pull[name] = sign * math.inf * torch.sign(delta[name].dense())
    norms = {name: d.norm() for name, d in delta.items()}
    return delta, Curvature(FISHER, infinite, pull, dict.fromkeys(SHAPES, math.inf), norms, [1])


def test_infinite_pulls_of_both_signs_are_an_input_error():
    delta, curvature = infinite_both_ways()
    with pytest.raises(InputError, match="not finite"):
        optimal_coefficient(delta, None, curvature)


def test_a_merged_model_that_is_not_finite_is_an_input_error_that_names_its_module():
    stream = Stream(FISHER)
    stream.step(*task(1, "fisher"))
    measured, delta = task(2, "fisher")
    curvature = fold(FISHER, stream.curvature, stream.merged, measured, delta)
    stream.merged["v"].B[0, 0] = math.nan
    with pytest.raises(InputError, match=r"first \['v'\]"):
        optimal_coefficient(delta, stream.merged, curvature)


def test_curvature_of_another_adapter_is_refused():
    measured, delta = task(1, "fisher")
    curvature = fold(FISHER, None, None, measured, delta)
    other = {name: d.scale(1.1) for name, d in delta.items()}
    with pytest.raises(InputError, match=r"measured with another task adapter \(‖Δ‖"):
        optimal_coefficient(other, None, curvature)


def test_curvature_of_another_adapter_of_the_same_total_norm_is_refused():
    measured, delta = task(1, "fisher")
    delta["v"] = delta["v"].scale(3 * delta["q"].norm() / delta["v"].norm())
    curvature = fold(FISHER, None, None, measured, delta)
    other = delta | {"q": delta["q"].scale(3.0), "v": delta["v"].scale(1 / 3)}
    with pytest.raises(InputError, match="measured with another task adapter"):
        optimal_coefficient(other, None, curvature)


def flipped(delta: LowRank) -> LowRank:
    return delta.scale(-1.0)


def rotated(delta: LowRank) -> LowRank:
    """The same singular values, other directions of the outputs."""
    square = torch.randn(len(delta.B), len(delta.B), generator=torch.Generator().manual_seed(3))
    return LowRank(torch.linalg.qr(square)[0] @ delta.B, delta.A)


def reordered(delta: LowRank) -> LowRank:
    return LowRank(delta.B, delta.A.flip(1))


turns = pytest.mark.parametrize("turn", [flipped, rotated, reordered])


@turns
def test_curvature_of_another_adapter_of_the_same_norms_is_refused(turn):
    measured, delta = task(1, "fisher")
    curvature = fold(FISHER, None, None, measured, delta)
    other = {name: turn(d) for name, d in delta.items()}
    assert {n: d.norm() for n, d in other.items()} == pytest.approx(curvature.delta_norm, rel=1e-5)
    with pytest.raises(InputError, match=r"another task adapter .*fixed projections differ by [\d.]+‖Δ‖"):
        optimal_coefficient(other, None, curvature)
    # one module of another adapter is enough
    with pytest.raises(InputError, match="measured with another task adapter"):
        optimal_coefficient(delta | {"up": other["up"]}, None, curvature)


@turns
def test_a_file_of_before_the_probe_is_guarded_by_norms_alone(turn):
    measured, delta = task(1, "fisher")
    curvature = replace(fold(FISHER, None, None, measured, delta), probe={})
    assert optimal_coefficient(delta, None, curvature).raw == pytest.approx(1)
    check_fits({name: turn(d) for name, d in delta.items()}, curvature)
    with pytest.raises(InputError, match="measured with another task adapter"):
        check_fits({name: turn(d).scale(1.1) for name, d in delta.items()}, curvature)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(20))
def test_storage_in_half_precision_is_no_other_adapter(dtype, seed):
    measured, delta = task(seed, "fisher")
    curvature = fold(FISHER, None, None, measured, delta)
    stored = {name: d.to(dtype).to(torch.float32) for name, d in delta.items()}
    assert optimal_coefficient(stored, None, curvature).raw == pytest.approx(1, abs=0.02)


def test_other_modules_or_shapes_are_refused():
    measured, delta = task(1, "fisher")
    curvature = fold(FISHER, None, None, measured, delta)
    with pytest.raises(InputError, match="1 modules stand in only one of them, first down"):
        optimal_coefficient(delta | {"down": delta["up"]}, None, curvature)
    with pytest.raises(InputError, match="1 modules stand in only one of them, first up"):
        optimal_coefficient({name: delta[name] for name in ("q", "v")}, None, curvature)
    with pytest.raises(InputError, match=r"q is \(3, 5\) in it, \(6, 5\) in the curvature"):
        optimal_coefficient(delta | {"q": delta["v"]}, None, curvature)


def test_an_unknown_freedom_is_refused():
    measured, delta = task(1, "fisher")
    with pytest.raises(InputError, match="must be 'global' or 'module' for a coefficient, found 'layer'"):
        optimal_coefficient(delta, None, fold(FISHER, None, None, measured, delta), freedom="layer")


def test_inputs_are_not_changed():
    stream = Stream(FISHER)
    stream.step(*task(1, "fisher"))
    measured, delta = task(2, "fisher")
    curvature = fold(FISHER, stream.curvature, stream.merged, measured, delta)
    tensors = [*curvature.S.values(), *curvature.M.values(), *(m.B for m in stream.merged.values()), delta["q"].B]
    before = [tensor.clone() for tensor in tensors]
    optimal_coefficient(delta, stream.merged, curvature)
    assert all(torch.equal(now, then) for now, then in zip(tensors, before, strict=True))


def test_a_given_coefficient_is_used_as_it_is():
    found = fixed_coefficient(1.5, 4, "given")
    assert (found.raw, found.used, found.one_over_t, found.note) == (1.5, 1.5, 0.25, "given")
    assert found.for_module("anything") == 1.5
    assert math.isnan(found.numerator), "nothing was computed"
