"""Low-rank kernels against dense float64 references."""

import math

import pytest
import torch
from helpers.small_matrices import close, grams, matrix, term

from pm_hf.errors import InputError
from pm_hf.merging.lowrank import LowRank, compact_svd
from pm_hf.merging.methods.adamerging import adamerging, adarank
from pm_hf.merging.methods.base import Matrix
from pm_hf.merging.methods.curvature_weighted import lot
from pm_hf.merging.methods.lore import lore
from pm_hf.merging.methods.opcm import OpcmScale, opcm, opcm_scale
from pm_hf.merging.methods.slao import slao

SEEDS = [0, 1, 2]


def dense(m: Matrix) -> list[torch.Tensor]:
    return [t.dense() for t in m.terms]


def projected(P: torch.Tensor, tau: torch.Tensor, rank: int) -> torch.Tensor:
    """OPCM's projection with the full bases of a dense SVD; beyond `rank` they are arbitrary and left alone."""
    U, s, Vh = torch.linalg.svd(P, full_matrices=True)
    C = U.T @ tau @ Vh.T
    half = next((k for k in range(rank) if s[: k + 1].sum() > 0.5 * s.sum()), 0)
    for i in range(rank):
        for j in range(rank):
            if i == j or (i < half and j < half):
                C[i, j] = 0
    return U @ C @ Vh


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [(6, 6), (6, 9), (9, 6)])
@pytest.mark.parametrize("ranks", [(6, 2), (6, 6), (2, 3), (0, 2), (3, 0)])
def test_opcm_projects_like_a_dense_svd(shape, ranks, seed):
    m = matrix(ranks, shape=shape, seed=seed)
    P, tau = dense(m)
    found = opcm(m, OpcmScale(1.7, 1.3, {}))
    assert found.rank <= max(1, sum(ranks))
    close(found, (1.7 * P + projected(P, tau, ranks[0])) / 1.3)


def test_the_projection_drops_what_the_leading_directions_share():
    P = LowRank(torch.eye(4).double(), torch.diag(torch.tensor([2.0, 1.9, 1.8, 0.1])).double())
    m = Matrix("m", (P, LowRank(torch.eye(4).double(), torch.ones(4, 4).double())), (1.0, 1.0))
    found = opcm(m, OpcmScale(0.0, 1.0, {})).dense()
    expected = 1 - torch.eye(4).double()  # 2/5.8 < half < 3.9/5.8: the leading block is one by one
    close(found.abs(), expected)


def test_rounding_does_not_add_directions_to_the_running_merge():
    once = term(2, dtype=torch.float32)
    noisy = LowRank(torch.cat([once.B, once.B / 3], 1), torch.cat([once.A, once.A / 7]))  # rank 4 stored, 2 in truth
    tau = term(3, seed=9, dtype=torch.float32)
    state = OpcmScale(1.0, 1.0, {})
    merged = once.scale(1 + 1 / 21)
    close(opcm(Matrix("m", (noisy, tau), ()), state), opcm(Matrix("m", (merged, tau), ()), state).dense(), 1e-4)


@pytest.mark.parametrize("seed", SEEDS)
def test_opcm_keeps_the_mean_norm_of_the_whole_model_over_four_tasks(seed):
    shapes = [(6, 9), (7, 7), (9, 5)]
    tasks = [[term(r, s, 10 * seed + 3 * t + i) for i, (s, r) in enumerate(zip(shapes, (2, t % 2, 3), strict=True))]
             for t in range(4)]  # fmt: skip
    running, past, scale, norms = tasks[0], None, 1.0, [norm(t.dense() for t in tasks[0])]
    expected = [t.dense() for t in tasks[0]]
    for task in tasks[1:]:
        pairs = [Matrix(f"m{i}", pair, (1.0, 1.0)) for i, pair in enumerate(zip(running, task, strict=True))]
        state = opcm_scale(lambda pairs=pairs: iter(pairs), past)
        running, past = [opcm(m, state) for m in pairs], state.to_save
        norms.append(norm(t.dense() for t in task))
        ranks = [int(torch.linalg.matrix_rank(P)) for P in expected]
        sums = [scale * P + projected(P, t.dense(), r) for P, t, r in zip(expected, task, ranks, strict=True)]
        scale = norm(sums) / (sum(norms) / len(norms))
        expected = [total / scale for total in sums]
        for found, dense_result in zip(running, expected, strict=True):
            close(found, dense_result, 1e-8)
        assert norm(m.dense() for m in running) == pytest.approx(sum(norms) / len(norms), rel=1e-10)
        assert past == pytest.approx({"scale": scale, "mean_norm": sum(norms) / len(norms), "tasks": len(norms)})


def norm(parts) -> float:
    return math.sqrt(sum(float(part.square().sum()) for part in parts))


@pytest.mark.parametrize("ranks", [(0, 0), (2, 0)])
def test_opcm_refuses_a_scale_that_is_zero_or_undefined(ranks):
    m = matrix(ranks)
    if any(ranks):
        m = Matrix(m.name, (m.terms[0].scale(0.0), m.terms[1]), m.weights)
    with pytest.raises(InputError, match="opcm cannot scale the merge"):
        opcm_scale(lambda: iter([m]), None)


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


@pytest.mark.parametrize("ranks", [[2, 3, 1], [4, 0, 5], [6, 6, 6]])
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5]])
@pytest.mark.parametrize("seed", SEEDS)
def test_lore_alternates_like_dense_matrices(ranks, weights, seed):
    m = matrix(ranks, weights, seed=seed)
    found = lore(m, None, threshold=0.8, rounds=5, scale=1.5)
    w = [x / sum(m.weights) for x in m.weights]
    theta, delta = dense(m), [torch.zeros(m.shape, dtype=torch.float64)] * 3
    for _ in range(5):
        common = sum(x * (t - d) for x, t, d in zip(w, theta, delta, strict=True))
        delta = [soft_threshold(t - common, 0.8) for t in theta]
    close(found, common + 1.5 * sum(x * d for x, d in zip(w, delta, strict=True)))


def soft_threshold(dense_matrix: torch.Tensor, mu: float) -> torch.Tensor:
    U, s, Vh = torch.linalg.svd(dense_matrix, full_matrices=False)
    return U @ torch.diag(torch.relu(s - mu)) @ Vh


def test_lore_without_a_threshold_is_the_mean():
    m = matrix([2, 3])
    close(lore(m, None, threshold=0.0, rounds=3, scale=1.0), (dense(m)[0] + dense(m)[1]) / 2)


def test_lore_refuses_weights_that_make_no_mean():
    with pytest.raises(InputError, match="a mean needs weights"):
        lore(matrix([1, 1], [1.0, -1.0]), None, threshold=0.0, rounds=1, scale=1.0)


def test_slao_merges_the_factors():
    m = matrix([3, 3])
    running, task = m.terms
    found = slao(m, {"tasks": 4})
    assert torch.equal(found.A, task.A)
    close(found.B, running.B + (task.B - running.B) / 2)
    close(slao(m, {"tasks": 1}), task.dense())


def test_slao_treats_a_missing_module_as_zero():
    running, task, nothing = term(2), term(3, seed=1), term(0)
    close(slao(Matrix("m", (running, nothing), (1.0, 1.0)), {"tasks": 4}), running.dense() / 2)
    close(slao(Matrix("m", (nothing, task), (1.0, 1.0)), {"tasks": 4}), task.dense() / 2)


def test_slao_refuses_unequal_ranks():
    with pytest.raises(InputError, match="layer has 2 in the running merge, 3 in the task"):
        slao(matrix([2, 3]), {"tasks": 2})


@pytest.mark.parametrize("ranks", [[2, 3, 1], [4, 0, 2]])
def test_adamerging_sums_with_what_was_learned(ranks):
    m = matrix(ranks)
    found = adamerging(m, {"layer": {"coefficients": [0.3, -0.2, 0.1]}})
    close(found, sum(w * t for w, t in zip([0.3, -0.2, 0.1], dense(m), strict=True)))
    with pytest.raises(InputError, match="no coefficients were learned for layer"):
        adamerging(m, {})


def test_adarank_keeps_the_unmasked_singular_values():
    m = matrix([2, 3, 0])
    state = {"coefficients": [0.5, -1.0, 2.0], "masks": [[0, 1], [1, 0, 1], []]}
    expected = torch.zeros(m.shape, dtype=torch.float64)
    for t, w, mask in zip(dense(m), state["coefficients"], state["masks"], strict=True):
        U, s, Vh = torch.linalg.svd(t, full_matrices=False)
        for k, keep in enumerate(mask):
            expected += w * keep * s[k] * torch.outer(U[:, k], Vh[k])
    found = adarank(m, {"layer": state})
    assert found.rank == 3
    close(found, expected)


def test_adarank_of_all_values_is_the_sum_and_of_none_is_zero():
    m = matrix([2, 3])
    full = {"coefficients": [0.3, 0.3], "masks": [[1, 1], [1, 1, 1]]}
    close(adarank(m, {"layer": full}), 0.3 * (dense(m)[0] + dense(m)[1]))
    none = {"coefficients": [0.3, 0.3], "masks": [[0, 0], [0, 0, 0]]}
    assert adarank(m, {"layer": none}).norm() == 0


def test_adarank_refuses_a_mask_of_another_length():
    repeated = term(2)
    twice = LowRank(torch.cat([repeated.B, repeated.B], 1), torch.cat([repeated.A, repeated.A]))
    assert len(compact_svd(twice)[1]) == 2, "rank 4 as stored, 2 in truth"
    with pytest.raises(InputError, match="layer: expected a mask of 2 singular values, found 4"):
        adarank(Matrix("layer", (twice,), (1.0,)), {"layer": {"coefficients": [1.0], "masks": [[1] * 4]}})
