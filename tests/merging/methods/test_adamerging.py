"""AdaMerging and AdaRank against sums of dense task vectors."""

import pytest
import torch
from helpers.small_matrices import close, dense, matrix, term

from pm_hf.errors import InputError
from pm_hf.merging.lowrank import LowRank, compact_svd
from pm_hf.merging.methods.adamerging import adamerging, adamerging_trimmed, adarank
from pm_hf.merging.methods.base import Matrix


def test_adamerging_trims_then_sums_with_what_was_learned(given):
    from peft.utils.merge_utils import magnitude_prune

    learned = [0.3, -0.1, 0.5, 0.2][: len(given.terms)]
    expected = magnitude_prune(dense(given), torch.tensor(learned, dtype=torch.float64), 0.3)
    close(adamerging_trimmed(given, {given.name: {"coefficients": learned}, "other": {}}, density=0.3), expected)


def test_adamerging_refuses_a_matrix_for_which_nothing_was_learned(given):
    with pytest.raises(InputError, match="no coefficients were learned for layer"):
        adamerging_trimmed(given, {"other": [1.0]}, density=0.3)


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
