"""Elementwise kernels against PEFT's dense functions and against loops over single entries."""

import math

import pytest
import torch
from helpers.small_matrices import close, fishers, matrix

from pm_hf.errors import InputError
from pm_hf.merging.lowrank import LowRank
from pm_hf.merging.methods import base as elementwise
from pm_hf.merging.methods.adamerging import adamerging_trimmed
from pm_hf.merging.methods.base import Matrix
from pm_hf.merging.methods.curvature_weighted import cofima
from pm_hf.merging.methods.magmax import magmax
from pm_hf.merging.methods.ties import dare, dare_mask, dare_ties, ties

SEEDS = [0, 1, 2]
RANKS = [[2, 3, 1], [4, 0, 2, 3]]  # unequal; an adapter that lacks the module


def dense(m: Matrix) -> list[torch.Tensor]:
    return [t.dense() for t in m.terms]


def weights_of(m: Matrix) -> torch.Tensor:
    return torch.tensor(m.weights, dtype=torch.float64)


@pytest.fixture(params=RANKS)
def given(request) -> Matrix:
    return matrix(request.param, [0.7, 1.3, -0.4, 0.2][: len(request.param)])


@pytest.fixture
def same_masks(monkeypatch, given):
    """PEFT draws our masks, one adapter after the other."""

    def use(density: float, seed: int) -> None:
        masks = (dare_mask(given.name, i, given.shape, density=density, seed=seed) for i in range(len(given.terms)))
        monkeypatch.setattr(torch, "bernoulli", lambda like: next(masks).to(like.dtype))

    return use


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("majority", ["total", "frequency"])
def test_ties_agrees_with_peft(given, density, majority):
    from peft.utils.merge_utils import ties as reference

    expected = reference(dense(given), weights_of(given), density, majority)
    close(ties(given, None, density=density, majority=majority), expected)


def test_ties_by_hand():
    rows = [[4.0, -3.0, 2.0, -1.0, 0.5], [-5.0, 3.5, 0.1, -2.0, 0.2], [6.0, 2.5, -0.3, 0.4, -0.1]]
    m = Matrix("m", tuple(LowRank(torch.ones(1, 1), torch.tensor([row])) for row in rows), (1.0, 1.0, 0.5))
    found = ties(m, None, density=0.6, majority="total")  # three of five stay
    # kept: 4 -3 2 | -5 3.5 -2 | 6 2.5 .4; signs of the sums + + + - (where -2 + .4 < 0), + of nothing
    close(found, torch.tensor([[(4 + 3) / 2, (3.5 + 1.25) / 2, 2.0, -2.0, 0.0]]), 1e-6)
    by_number = ties(m, None, density=0.6, majority="frequency")
    close(by_number[0, :2], torch.tensor([(4 + 3) / 2, (3.5 + 1.25) / 2]), 1e-6)
    assert by_number[0, 3] == pytest.approx(0.2), "one of each sign counts as +"


def test_ties_keeps_nothing_where_the_share_is_below_one_entry():
    found = ties(matrix([1, 1], shape=(2, 2)), None, density=0.2, majority="total")
    assert torch.equal(found, torch.zeros(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("seed", SEEDS)
def test_dare_agrees_with_peft_under_the_same_masks(given, same_masks, seed):
    from peft.utils.merge_utils import dare_linear

    same_masks(0.4, seed)
    close(dare(given, None, density=0.4, seed=seed), dare_linear(dense(given), weights_of(given), 0.4))


@pytest.mark.parametrize("majority", ["total", "frequency"])
def test_dare_ties_agrees_with_peft_under_the_same_masks(given, same_masks, majority):
    from peft.utils.merge_utils import dare_ties as reference

    same_masks(0.6, 3)
    found = dare_ties(given, None, density=0.6, majority=majority, seed=3)
    close(found, reference(dense(given), weights_of(given), 0.6, majority))


def test_dare_is_the_sum_in_expectation(given):
    draws = torch.stack([dare(given, None, density=0.5, seed=seed) for seed in range(400)])
    expected = sum(w * tau for w, tau in zip(given.weights, dense(given), strict=True))
    error = draws.std(dim=0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - expected).abs() < 5 * error).all()


def test_the_mask_depends_on_seed_name_and_index_and_nothing_else():
    mask = dare_mask("a", 0, (40, 50), density=0.3, seed=0)
    torch.manual_seed(5)
    assert torch.equal(mask, dare_mask("a", 0, (40, 50), density=0.3, seed=0))
    assert 0.25 < mask.double().mean() < 0.35
    others = [("b", 0, 0), ("a", 1, 0), ("a", 0, 1)]
    for name, index, seed in others:
        assert not torch.equal(mask, dare_mask(name, index, (40, 50), density=0.3, seed=seed))


def test_the_mask_is_the_same_in_every_process():
    expected = [[0, 1, 0, 0, 0, 0, 1, 1], [1, 0, 0, 0, 0, 0, 1, 1]]  # written down once: Python's own hash would differ
    assert dare_mask("a.b", 1, (2, 8), density=0.5, seed=7).int().tolist() == expected


def test_magmax_takes_the_entry_of_largest_magnitude_and_scales_it_afterwards(given):
    found, tau = magmax(given, None), dense(given)
    for r in range(given.shape[0]):
        for c in range(given.shape[1]):
            best = max(range(len(tau)), key=lambda i: abs(float(tau[i][r, c])))  # max takes the first of equals
            assert float(found[r, c]) == pytest.approx(given.weights[best] * float(tau[best][r, c]), rel=1e-12)


def test_magmax_takes_the_first_of_equal_magnitudes():
    one, other = torch.tensor([[1.0, -2.0]]), torch.tensor([[-1.0, 2.0]])
    m = Matrix("m", tuple(LowRank(torch.ones(1, 1), row) for row in (one, other)), (1.0, 1.0))
    assert torch.equal(magmax(m, None), one)


@pytest.mark.parametrize("ranks", RANKS)
def test_magmax_of_all_equals_folding_one_by_one(ranks):
    m = matrix(ranks)
    running = m.terms[0].dense()
    for new in m.terms[1:]:
        as_factors = LowRank(torch.eye(len(running), dtype=running.dtype), running)
        running = magmax(Matrix("m", (as_factors, new), (1.0, 1.0)), None)
    close(magmax(m, None), running, 0)


@pytest.mark.parametrize("weights", [[0.6, 0.4, 0.0], [1.0, 2.0, 3.0]])
def test_cofima_is_the_fisher_weighted_mean_of_every_entry(weights):
    curvature = fishers(3)
    for fisher in curvature:
        fisher[0] = 0.0  # no task cares about the first row
    curvature[1][:, 0] = 0.0
    m = matrix([2, 0, 3], weights, curvature=curvature)
    found, theta = cofima(m, None, coefficient=0.4), dense(m)
    for r in range(6):
        for c in range(9):
            share = [w * float(F[r, c]) for w, F in zip(weights, curvature, strict=True)]
            share = share if sum(share) else weights
            mean = sum(s * float(t[r, c]) for s, t in zip(share, theta, strict=True)) / sum(share)
            assert float(found[r, c]) == pytest.approx(mean, rel=1e-9, abs=1e-12)


def test_cofima_minimises_its_objective():
    curvature = fishers(2, seed=4)
    m = matrix([2, 3], [0.3, 0.7], curvature=curvature)
    theta = cofima(m, None, coefficient=0.7)
    gradient = sum(w * F * (theta - t) for w, F, t in zip(m.weights, curvature, dense(m), strict=True))
    assert gradient.abs().max() < 1e-12


def test_tiny_fishers_do_not_underflow():
    m = matrix([2, 3], dtype=torch.float32, curvature=[1e-30 * F.float() for F in fishers(2)])
    plain = Matrix(m.name, m.terms, m.weights, tuple(F.float() for F in fishers(2)))
    close(cofima(m, None, coefficient=0.4), cofima(plain, None, coefficient=0.4), 1e-5)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_cofima_refuses_a_fisher_that_is_none(bad):
    curvature = fishers(2)
    curvature[1][2, 3] = bad
    with pytest.raises(InputError, match="Fisher of adapter 1 is negative or not finite"):
        cofima(matrix([1, 1], curvature=curvature), None, coefficient=0.4)


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.5, -0.5]])
def test_cofima_refuses_weights_that_make_no_mean(weights):
    with pytest.raises(InputError, match="a mean needs weights"):
        cofima(matrix([1, 1], weights, curvature=fishers(2)), None, coefficient=0.4)


def test_adamerging_trims_then_sums_with_what_was_learned(given):
    from peft.utils.merge_utils import magnitude_prune

    learned = [0.3, -0.1, 0.5, 0.2][: len(given.terms)]
    expected = magnitude_prune(dense(given), torch.tensor(learned, dtype=torch.float64), 0.3)
    close(adamerging_trimmed(given, {given.name: {"coefficients": learned}, "other": {}}, density=0.3), expected)


def test_adamerging_refuses_a_matrix_for_which_nothing_was_learned(given):
    with pytest.raises(InputError, match="no coefficients were learned for layer"):
        adamerging_trimmed(given, {"other": [1.0]}, density=0.3)


@pytest.mark.parametrize(
    "merge",
    [
        lambda m: ties(m, None, density=0.3, majority="total"),
        lambda m: dare(m, None, density=0.5, seed=0),
        lambda m: dare_ties(m, None, density=0.5, majority="total", seed=0),
        lambda m: magmax(m, None),
        lambda m: cofima(m, None, coefficient=0.4),
    ],
)
def test_blocks_of_rows_give_the_whole(merge, monkeypatch):
    m = matrix([2, 0, 3], shape=(11, 9), curvature=fishers(3, (11, 9)))
    whole = merge(m)
    monkeypatch.setattr(elementwise, "ROW_BLOCK", 20)  # two rows each, one in the last
    close(merge(m), whole, 1e-13)
