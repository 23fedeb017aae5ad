"""DOGE against dense autograd, and the streamed selection against a sort of the whole model."""

import pytest
import torch
from helpers.small_matrices import close, matrix, term

from pm_hf.merging.lowrank import LowRank
from pm_hf.merging.methods import base as elementwise
from pm_hf.merging.methods.base import Matrix
from pm_hf.merging.methods.doge import Largest, doge, largest_entries

OPTIONS = {"scale": 0.07, "learning_rate": 1e-2, "steps": 30, "keep": 0.3}


def reference(m: Matrix, thresholds, scale, learning_rate, steps, subspace) -> torch.Tensor:
    """The loss as it is written, by autograd, on dense task vectors."""
    tau = [t.dense() for t in m.terms]
    factors = [w * scale / float(t.norm()) if t.any() else 0.0 for w, t in zip(m.weights, tau, strict=True)]
    leading = []
    for t in tau:
        rank = min(int(torch.linalg.matrix_rank(t)), min(m.shape) // len(tau))
        leading.append(torch.linalg.svd(t).U[:, :rank])
    stacked = torch.cat(leading, 1)
    Q = torch.linalg.svd(stacked).U[:, : min(subspace, int(torch.linalg.matrix_rank(stacked)))]
    D = torch.zeros(m.shape, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([D], lr=learning_rate)
    for _ in range(steps):
        adam.zero_grad()
        merged = sum(f * (t + D) for f, t in zip(factors, tau, strict=True))
        sum(((t * (merged - t)).sum(1) ** 2).sum() for t in tau).backward()
        D.grad -= Q @ Q.T @ D.grad
        adam.step()
    kept = [(t.float().abs() >= c) * (t + D.detach()) for t, c in zip(tau, thresholds, strict=True)]
    return sum(f * t for f, t in zip(factors, kept, strict=True))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("ranks", [[2, 3], [12, 14, 12], [4, 0, 3]])
@pytest.mark.parametrize("shape", [(12, 15), (15, 12)])
def test_doge_is_the_dense_optimisation(ranks, shape, seed):
    m = matrix(ranks, [1.0, 0.5, 2.0][: len(ranks)], shape=shape, seed=seed)
    thresholds = tuple(0.1 * (i + 1) for i in range(len(ranks)))
    found = doge(m, Largest(thresholds), **OPTIONS)
    expected = reference(m, thresholds, 0.07, 1e-2, 30, subspace=2)
    untrained = doge(m, Largest(thresholds), **(OPTIONS | {"steps": 0}))
    assert (found - untrained).norm() > 0.1 * untrained.norm(), "the correction has to matter"
    close(found, expected, 1e-9)


def test_rounding_adds_no_directions_to_the_shared_subspace():
    first, other = term(2, (24, 30), dtype=torch.float32), term(2, (24, 30), 1, torch.float32)
    mix = torch.tensor([[0.3, -0.7], [0.9, 0.2]])
    m = Matrix("m", (first, LowRank(first.B @ mix, other.A)), (1.0, 1.0))  # one column space, two roundings of it
    exact = Matrix("m", tuple(LowRank(t.B.double(), t.A.double()) for t in m.terms), m.weights)
    expected = reference(exact, (0.0, 0.0), 0.07, 1e-2, 30, subspace=2)  # of the four dimensions that it may have
    close(doge(m, Largest((0.0, 0.0)), **OPTIONS).double(), expected, 1e-3 * float(expected.abs().max()))


def test_without_a_step_it_is_a_masked_sum_with_layer_wise_factors():
    m = matrix([2, 3], [1.0, 2.0])
    found = doge(m, Largest((0.5, 0.0)), **(OPTIONS | {"steps": 0}))
    first, second = (t.dense() for t in m.terms)
    expected = 0.07 * first * (first.abs() >= 0.5) / first.norm() + 0.14 * second / second.norm()
    close(found, expected)


@pytest.mark.parametrize("steps", [0, 3])
def test_zero_task_vectors_give_zero(steps):
    found = doge(matrix([0, 0]), Largest((0.0, 0.0)), **(OPTIONS | {"steps": steps}))
    assert torch.equal(found, torch.zeros(6, 9, dtype=torch.float64))


def model(dtype) -> list[Matrix]:
    shapes = [(6, 9), (11, 4), (7, 7)]
    ranks = [(2, 3), (4, 0), (1, 2)]
    return [
        Matrix(
            f"m{i}", tuple(term(r, s, 7 * i + k, dtype).scale(10.0 ** (i - 1)) for k, r in enumerate(pair)), (1.0, 1.0)
        )
        for i, (s, pair) in enumerate(zip(shapes, ranks, strict=True))
    ]


def sorted_magnitudes(matrices, adapter: int) -> torch.Tensor:
    return torch.cat([m.terms[adapter].dense().float().abs().flatten() for m in matrices]).sort(descending=True).values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("keep", [1e-9, 0.01, 0.3, 0.7, 1.0])
def test_the_threshold_is_the_exact_order_statistic_of_the_whole_model(dtype, keep):
    matrices = model(dtype)
    found = largest_entries(lambda: iter(matrices), None, **(OPTIONS | {"keep": keep}))
    for i, threshold in enumerate(found.thresholds):
        magnitudes = sorted_magnitudes(matrices, i)
        assert threshold == float(magnitudes[max(1, int(keep * len(magnitudes))) - 1])


def test_the_selection_reads_every_matrix_twice_and_keeps_none(monkeypatch):
    matrices, alive = model(torch.float32), []

    def stream():
        for m in matrices:
            alive.append(m.name)
            yield m

    monkeypatch.setattr(elementwise, "ROW_BLOCK", 16)
    found = largest_entries(stream, None, **OPTIONS)
    assert alive == 2 * [m.name for m in matrices]
    assert found.thresholds[0] == pytest.approx(float(sorted_magnitudes(matrices, 0)[int(0.3 * 147) - 1]), rel=1e-6)
