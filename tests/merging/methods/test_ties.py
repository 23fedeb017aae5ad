"""TIES and DARE against PEFT's dense functions."""

import math

import pytest
import torch
from helpers.small_matrices import close, dense, matrix, weights_of

from pm_hf.merging.lowrank import LowRank
from pm_hf.merging.methods.base import Matrix
from pm_hf.merging.methods.ties import dare, dare_mask, dare_ties, ties

SEEDS = [0, 1, 2]


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
