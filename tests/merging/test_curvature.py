"""Running sums of curvature against sums over every past task, kept in full, in float64."""

import math
from dataclasses import replace

import pytest
import torch
from helpers.small_sums import FISHER, GRAM, OWNER, SHAPES, stream, task

from pm_hf.errors import InputError
from pm_hf.merging import curvature as kernel
from pm_hf.merging.curvature import NORMALISATIONS, CurvatureSpec, accumulate, delta_probe, shrink
from pm_hf.merging.lowrank import LowRank

FIXED_PROBE = [165.35646601052875, -145.96145571068897, 77.28770885786221, -29.076310368505382]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """One or two rows at a time."""
    monkeypatch.setattr(kernel, "CHUNK", 10)


def dense_tasks(settings: CurvatureSpec, tasks: int) -> list[dict]:
    """For each task {module: (H, θ*, Δ)} in float64, H as the Gram after shrinkage written out by hand."""
    past, merged = [], dict.fromkeys(SHAPES, 0.0)
    for seed in range(tasks):
        measured, delta = task(seed, settings.kind)
        entry = {}
        for name, d in delta.items():
            H = measured[OWNER.get(name, name) if settings.kind == "gram" else name].double()
            if settings.kind == "gram":
                diagonal = torch.eye(len(H), dtype=torch.float64) * H
                H = (1 - settings.shrinkage) * H + settings.shrinkage * diagonal
            merged[name] = merged[name] + d.B.double() @ d.A.double()
            entry[name] = (H, merged[name], d.B.double() @ d.A.double())
        past.append(entry)
    return past


@pytest.mark.parametrize("settings", [FISHER, GRAM], ids=["fisher", "gram"])
def test_sums_equal_those_over_all_past_tasks(settings):
    found, past = stream(settings, 4)[-1], dense_tasks(settings, 4)
    assert (found.tasks, found.examples) == (4, [10, 11, 12, 13])
    for name in SHAPES:
        S = sum(entry[name][0] for entry in past)
        if settings.kind == "fisher":
            M = sum(H * theta for H, theta, _ in (entry[name] for entry in past))
        else:
            M = sum(theta @ H for H, theta, _ in (entry[name] for entry in past))
        torch.testing.assert_close(found.sum_of(name).double(), S, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.M[name].double(), M, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [FISHER, GRAM], ids=["fisher", "gram"])
def test_current_is_the_quadratic_form_of_the_newest_task_alone(settings):
    found, newest = stream(settings, 3)[-1], dense_tasks(settings, 3)[-1]
    for name, (H, _, d) in newest.items():
        full = torch.diag(H.flatten()) if settings.kind == "fisher" else torch.kron(torch.eye(len(d)).double(), H)
        expected = d.flatten() @ full @ d.flatten()
        assert found.current[name] == pytest.approx(float(expected), rel=1e-6)
        assert found.delta_norm[name] == pytest.approx(float(d.norm()), rel=1e-10)


def wide(seed: int, rank: int) -> dict[str, LowRank]:
    g = torch.Generator().manual_seed(seed)
    return {
        name: LowRank(torch.randn(out, rank, generator=g), torch.randn(rank, width, generator=g))
        for name, (out, width) in SHAPES.items()
    }


@pytest.mark.parametrize("settings", [FISHER, GRAM], ids=["fisher", "gram"])
@pytest.mark.parametrize("ranks", [(2, 1), (1, 9), (2, 0), (0, 2)])
def test_forms_equal_those_with_the_full_curvature_matrix(settings, ranks):
    found, (left, right) = stream(settings, 2)[-1], (wide(i, rank) for i, rank in enumerate(ranks))
    for name, (out, _) in SHAPES.items():
        X, Y = (side[name].B.double() @ side[name].A.double() for side in (left, right))
        found.S[found.owner.get(name, name)][0, 1] += 0.25  # as it is stored, even where it is not symmetric
        S = found.sum_of(name).double()
        fisher = settings.kind == "fisher"
        full = torch.diag(S.flatten()) if fisher else torch.kron(torch.eye(out).double(), S.T.contiguous())
        expected = [float(X.flatten() @ full @ other.flatten()) for other in (Y, X)]
        forms = found.quadratic(name, left[name], [right[name], left[name]])
        assert forms == pytest.approx(expected, rel=1e-10, abs=1e-12)
        moment = float((X * found.M[name].double()).sum())
        assert found.moment(name, left[name]) == pytest.approx(moment, rel=1e-10, abs=1e-12)


def test_the_probe_of_a_task_vector_is_a_fixed_projection():
    ramp = LowRank(torch.arange(6.0).reshape(3, 2), torch.arange(8.0).reshape(2, 4))
    found = delta_probe("layers.0.q", ramp)
    assert found == pytest.approx(FIXED_PROBE, rel=1e-12), "files of earlier versions would be refused"
    same = LowRank(torch.cat([ramp.B, -ramp.B], 1), torch.cat([2 * ramp.A, ramp.A]))
    assert delta_probe("layers.0.q", same) == pytest.approx(found, rel=1e-12)
    assert delta_probe("layers.0.q", ramp.scale(-1.0)) == pytest.approx([-value for value in found], rel=1e-12)
    assert math.dist(delta_probe("layers.1.q", ramp), found) > 0.1 * ramp.norm()
    assert delta_probe("q", LowRank(torch.zeros(3, 0), torch.zeros(0, 4))) == [0.0] * 4


def test_probes_are_independent_and_of_the_size_of_the_task_vector():
    delta = wide(3, 2)["up"]
    found = torch.tensor([delta_probe(f"layer {i}", delta) for i in range(1000)]) / delta.norm()
    moments = found.T @ found / len(found)
    torch.testing.assert_close(moments, torch.eye(4), atol=0.15, rtol=0.0)
    assert found.mean(0).abs().max() < 0.1


@pytest.mark.parametrize("settings", [FISHER, GRAM], ids=["fisher", "gram"])
def test_state_size_is_the_same_to_the_byte_after_every_task(settings):
    sizes = {step.nbytes for step in stream(settings, 6)}
    weights = sum(out * width for out, width in SHAPES.values())
    sums = weights if settings.kind == "fisher" else 5 * 5 + 7 * 7
    assert sizes == {4 * (sums + weights)}


def test_modules_with_one_input_share_one_gram():
    found = stream(GRAM, 2)[-1]
    assert set(found.S) == {"q", "up"}
    assert found.sum_of("v") is found.sum_of("q")
    assert set(found.M) == set(SHAPES)


def test_shrinkage_keeps_the_diagonal_and_makes_a_rank_one_gram_invertible():
    x = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = torch.outer(x, x)
    found = shrink(gram, 0.2)
    assert torch.equal(found.diagonal(), (0.8 * gram + 0.2 * gram).diagonal())
    torch.testing.assert_close(found - torch.diag(found.diagonal()), 0.8 * (gram - torch.diag(gram.diagonal())))
    assert int(torch.linalg.matrix_rank(gram)) == 1
    assert int(torch.linalg.matrix_rank(found)) == 6
    assert torch.equal(shrink(gram, 0.0), gram)


@pytest.mark.parametrize("settings", [FISHER, GRAM], ids=["fisher", "gram"])
def test_the_previous_sums_are_left_as_they_were(settings):
    first = stream(settings, 1)[0]
    sums = [*first.S.values(), *first.M.values()]
    before = [tensor.clone() for tensor in sums]
    measured, delta = task(1, settings.kind)
    raw = {name: tensor.clone() for name, tensor in measured.items()}
    owner = OWNER if settings.kind == "gram" else None
    accumulate(measured, delta, delta, settings, 3, owner=owner, previous=first)
    assert all(torch.equal(now, then) for now, then in zip(sums, before, strict=True))
    assert all(torch.equal(measured[name], raw[name]) for name in raw)
    assert (first.tasks, first.examples) == (1, [10])


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "gram"},
        {"kind": "factored"},
        {"labels": "mc"},
        {"loss_reduction": "sum"},
        {"shrinkage": 0.3},
        {"normalisation": NORMALISATIONS["trace"]},
        {"normalisation": "sum over tokens"},
    ],
    ids=str,
)
def test_sums_measured_otherwise_are_never_mixed(change):
    first = stream(FISHER, 1)[0]
    settings = replace(FISHER, **change)
    measured, delta = task(1, settings.kind)
    with pytest.raises(InputError, match="sums are never mixed"):
        accumulate(measured, delta, delta, settings, 3, previous=first)


def test_with_the_trace_normalisation_the_scale_of_a_task_s_fisher_does_not_count():
    settings = replace(FISHER, normalisation=NORMALISATIONS["trace"])
    (first, one), (second, two) = (task(seed, "fisher") for seed in (0, 1))
    sums = None
    for measured, delta, factor in ((first, one, 1.0), (second, two, 1e4)):
        scaled = {name: factor * H for name, H in measured.items()}
        sums = accumulate(scaled, delta, delta, settings, 8, previous=sums)
    mean = [torch.cat([H.flatten() for H in measured.values()]).double().mean() for measured in (first, second)]
    for name in SHAPES:
        expected = first[name].double() / mean[0] + second[name].double() / mean[1]
        torch.testing.assert_close(sums.sum_of(name).double(), expected, rtol=1e-5, atol=1e-6)
        d = two[name].B.double() @ two[name].A.double()
        assert sums.current[name] == pytest.approx(float((second[name].double() / mean[1] * d**2).sum()), rel=1e-5)
    whole = torch.cat([sums.sum_of(name).flatten() for name in SHAPES])
    assert float(whole.double().mean()) == pytest.approx(2, rel=1e-5)  # one for each task


def test_fisher_that_is_zero_stays_zero_under_the_trace_normalisation():
    measured, delta = task(0, "fisher")
    zero = {name: torch.zeros_like(H) for name, H in measured.items()}
    sums = accumulate(zero, delta, delta, replace(FISHER, normalisation=NORMALISATIONS["trace"]), 8)
    assert all(not sums.sum_of(name).any() for name in SHAPES)


def test_sums_with_other_modules_or_shapes_are_refused():
    first = stream(FISHER, 1)[0]
    measured, delta = task(1, "fisher")
    fewer = {name: measured[name] for name in ("q", "v")}
    with pytest.raises(InputError, match=r"does not fit this adapter.*up"):
        accumulate(fewer, {n: delta[n] for n in fewer}, {n: delta[n] for n in fewer}, FISHER, 3, previous=first)
    wide = LowRank(torch.ones(6, 1), torch.ones(1, 8))
    with pytest.raises(InputError, match=r"does not fit this adapter.*q"):
        accumulate(
            measured | {"q": torch.ones(6, 8)}, delta | {"q": wide}, delta | {"q": wide}, FISHER, 3, previous=first
        )


@pytest.mark.parametrize("out", [1, 8])  # it was 4; 1 would broadcast
def test_a_gram_of_a_module_with_another_output_size_is_refused(out):
    first = stream(GRAM, 1)[0]
    measured, delta = task(1, "gram")
    delta["up"] = LowRank(torch.ones(out, 1), torch.ones(1, 7))
    with pytest.raises(InputError, match=r"does not fit this adapter.*up"):
        accumulate(measured, delta, delta, GRAM, 3, owner=OWNER, previous=first)


def test_another_sharing_of_inputs_is_refused_and_named():
    first = stream(GRAM, 1)[0]
    measured, delta = task(1, "gram")
    with pytest.raises(InputError, match=r"does not fit this adapter.*\bv\b"):
        accumulate(measured, delta, delta, GRAM, 3, owner={"v": "up"}, previous=first)
