"""OPCM against a dense SVD."""

import math

import pytest
import torch
from helpers.small_matrices import close, dense, matrix, term

from pm_hf.errors import InputError
from pm_hf.merging.lowrank import LowRank
from pm_hf.merging.methods.base import Matrix
from pm_hf.merging.methods.opcm import OpcmScale, opcm, opcm_scale

SEEDS = [0, 1, 2]


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
