"""CoFiMA and LOT against dense float64 references."""

import math

import pytest
import torch
from helpers.small_matrices import close, dense, fishers, grams, matrix

from pm_hf.errors import InputError
from pm_hf.merging.methods.base import Matrix
from pm_hf.merging.methods.curvature_weighted import cofima, lot


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


@pytest.mark.parametrize("ranks", [[2, 3, 1], [4, 0, 2]])
@pytest.mark.parametrize("inputs", [20, 4])  # the second leaves each Gram, not the sum, singular
@pytest.mark.parametrize("rho", [0.0, 0.3])
def test_lot_is_the_dense_optimum(ranks, inputs, rho):
    G = grams(3, inputs=inputs)
    m = matrix(ranks, [0.5, 1.0, 2.0], curvature=G)
    found = lot(m, None, scale=1.2, shrinkage=rho)
    shrunk = [w * ((1 - rho) * g + rho * g.diag().diag()) for w, g in zip(m.weights, G, strict=True)]
    pull = sum(t @ g for t, g in zip(dense(m), shrunk, strict=True))
    expected = 1.2 * torch.linalg.lstsq(sum(shrunk), pull.T).solution.T
    assert found.rank == sum(ranks)
    close(found, expected, 1e-8)


def test_lot_of_a_singular_sum_takes_the_solution_of_least_norm():
    G = grams(2, inputs=2)  # rank 4 of 9
    m = matrix([2, 3], curvature=G)
    pull = sum(t @ g for t, g in zip(dense(m), G, strict=True))
    found = lot(m, None, scale=1.0, shrinkage=0.0).dense()
    close(found, pull @ torch.linalg.pinv(sum(G), hermitian=True, rtol=1e-9), 1e-8)
    close(found @ sum(G), pull, 1e-8)


@pytest.mark.parametrize("gram", [torch.zeros(9, 9), torch.full((9, 9), math.nan)])
def test_lot_refuses_grams_that_say_nothing(gram):
    with pytest.raises(InputError, match="layer: the weighted sum of the Grams is zero or not finite"):
        lot(matrix([1, 1], curvature=[gram, gram]), None, scale=1.0, shrinkage=0.0)
