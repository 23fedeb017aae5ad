"""The search of a coefficient against the definition, row by row."""

import math
import random
from statistics import fmean, variance

import pytest
import torch

from pm_hf.measuring.line_search import COEFFICIENT_GRID, search_points, smallest_within_error


def drawn(seed, rows=12, noise=1.0):
    """{α: (losses of new rows, losses of old rows)}: new ones fall with α, old ones rise."""
    rng = random.Random(seed)
    lines = [(rng.gauss(2, 1), rng.gauss(1, noise)) for _ in range(2 * rows)]
    new, old = lines[:rows], lines[rows:]
    return {
        alpha: (
            torch.tensor([a + (1 - alpha) ** 2 * b for a, b in new], dtype=torch.float64),
            torch.tensor([a + alpha**2 * b for a, b in old], dtype=torch.float64),
        )
        for alpha in COEFFICIENT_GRID
    }


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("earlier", [1, 4])
def test_points_and_choice_are_those_of_the_definition(seed, earlier):
    losses = drawn(seed)
    J = {a: fmean(new.tolist()) + earlier * fmean(old.tolist()) for a, (new, old) in losses.items()}
    lowest = min(J, key=J.get)
    allowed = []
    for alpha, (new, old) in losses.items():
        gaps = [(new - losses[lowest][0]).tolist(), (old - losses[lowest][1]).tolist()]
        error = math.sqrt(variance(gaps[0]) / len(gaps[0]) + earlier**2 * variance(gaps[1]) / len(gaps[1]))
        if J[alpha] - J[lowest] <= error:
            allowed.append(alpha)
        (point,) = [p for p in search_points(losses, earlier) if p["coefficient"] == alpha]
        assert point["objective"] == pytest.approx(J[alpha])
        assert point["error"] == pytest.approx(error)
        assert point["new"] == pytest.approx(fmean(new.tolist()))
        assert point["old"] == pytest.approx(fmean(old.tolist()))
    assert smallest_within_error(search_points(losses, earlier)) == min(allowed)


def test_without_noise_the_minimum_is_taken():
    losses = {
        alpha: (torch.full((4,), (1 - alpha) ** 2).double(), torch.full((4,), 0.25 * alpha**2).double())
        for alpha in COEFFICIENT_GRID
    }
    assert smallest_within_error(search_points(losses, 1)) == 0.8
    assert [point["coefficient"] for point in search_points(losses, 1)] == list(COEFFICIENT_GRID)


def test_a_single_row_has_no_error():
    losses = {alpha: (torch.tensor([-alpha]), torch.tensor([alpha / 2])) for alpha in (0.0, 1.0)}
    assert [point["error"] for point in search_points(losses, 1)] == [0, 0]
    assert smallest_within_error(search_points(losses, 1)) == 1
