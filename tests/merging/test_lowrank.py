"""LowRank against dense float64 matrices."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from pm_hf.merging.lowrank import DENSE_SVD_LIMIT, LowRank, add, common_bases, compact_svd, from_dense, weighted_sum


def random_factors(out=9, inner=4, width=7, seed=0, dtype=torch.float64) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(out, inner, generator=generator, dtype=torch.float64)
    A = torch.randn(inner, width, generator=generator, dtype=torch.float64)
    return LowRank(B, A).to(dtype)


def with_spectrum(values, out=12, width=10, seed=0) -> LowRank:
    """A matrix whose singular values are `values`, as badly scaled factors."""
    generator = torch.Generator().manual_seed(seed)
    U, _ = torch.linalg.qr(torch.randn(out, len(values), generator=generator, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(width, len(values), generator=generator, dtype=torch.float64))
    return LowRank(1e4 * U * torch.tensor(values, dtype=torch.float64), 1e-4 * V.T)


def relative(found, expected) -> float:
    return float(torch.linalg.norm(found.double() - expected.double()) / torch.linalg.norm(expected.double()))


@pytest.mark.parametrize("inner", [1, 4, 8, 20])  # below, between and above both sides of a 9×7 matrix
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_compress_is_the_best_approximation_of_that_rank(inner, rank):
    matrix = random_factors(inner=inner)
    s = torch.linalg.svd(matrix.dense()).S
    found, error = matrix.compress(max_rank=rank)
    assert found.rank == min(rank, inner)
    best = float(s[rank:].norm() / s.norm())  # Eckart–Young
    assert relative(found.dense(), matrix.dense()) == pytest.approx(best, abs=1e-12)
    assert error == pytest.approx(best, abs=1e-12)


def test_compress_equals_the_truncated_dense_svd_entry_by_entry():
    matrix = random_factors()
    U, s, Vh = torch.linalg.svd(matrix.dense(), full_matrices=False)
    found, _ = matrix.compress(max_rank=2)
    torch.testing.assert_close(found.dense(), U[:, :2] * s[:2] @ Vh[:2], rtol=0, atol=1e-12)


def test_compress_reports_the_true_error_of_float32_factors():
    matrix = random_factors(out=40, inner=12, width=30, dtype=torch.float32)
    found, error = matrix.compress(max_rank=5)
    assert found.B.dtype == found.A.dtype == torch.float32
    true = relative(found.to(torch.float64).dense(), matrix.to(torch.float64).dense())
    assert error == pytest.approx(true, rel=1e-5)


def test_compress_of_half_precision_factors_reports_the_rounding_too():
    matrix = random_factors(out=20, width=30, dtype=torch.bfloat16)
    found, error = matrix.compress(max_rank=4)
    true = relative(found.to(torch.float64).dense(), matrix.to(torch.float64).dense())
    assert true > 1e-4, "bfloat16 factors cannot be exact"
    assert error == pytest.approx(true, rel=0.05)


@pytest.mark.parametrize(
    ("energy", "rank"),
    [(0.01, 1), (16 / 21, 1), (16 / 21 + 1e-6, 2), (20 / 21, 2), (0.97, 3), (1.0, 3)],
)
def test_energy_keeps_the_fewest_values_that_reach_the_share(energy, rank):
    found, error = with_spectrum([4.0, 2.0, 1.0]).compress(energy=energy)
    assert found.rank == rank
    assert 1 - error**2 >= energy - 1e-9


def test_full_energy_loses_nothing():
    matrix = with_spectrum([1.0, 1e-3, 1e-7])
    found, _ = matrix.compress(energy=1.0)
    assert found.rank == 3
    assert relative(found.dense(), matrix.dense()) < 1e-12


def test_rank_and_energy_together_take_the_smaller():
    matrix = with_spectrum([4.0, 2.0, 1.0])
    assert matrix.compress(max_rank=2, energy=1.0)[0].rank == 2
    assert matrix.compress(max_rank=3, energy=0.5)[0].rank == 1


def test_compress_without_a_limit_drops_only_what_is_numerically_zero():
    once = random_factors(inner=3)
    repeated = add(once, once.scale(2.0), once.scale(-0.5))  # rank 9 as stored, 3 in truth
    found, error = repeated.compress()
    assert (found.rank, repeated.rank) == (3, 9)
    assert error < 1e-12
    torch.testing.assert_close(found.dense(), 2.5 * once.dense(), rtol=1e-12, atol=1e-12)


def test_compressed_factors_are_balanced():
    found, _ = with_spectrum([4.0, 2.0, 1.0]).compress()
    torch.testing.assert_close(found.B.T @ found.B, found.A @ found.A.T, rtol=1e-9, atol=1e-9)


def test_compress_of_zero_is_zero_of_rank_one_without_error():
    zero = LowRank(torch.zeros(5, 3), torch.ones(3, 4))
    found, error = zero.compress(max_rank=2)
    assert (found.rank, error, found.norm()) == (1, 0.0, 0.0)
    assert found.shape == (5, 4)


def test_norm_equals_that_of_the_dense_matrix():
    matrix = random_factors(inner=12)
    assert matrix.norm() == pytest.approx(float(torch.linalg.norm(matrix.dense())), rel=1e-12)


def test_sums_are_exact_and_leave_their_terms_alone():
    terms = [random_factors(inner=inner, seed=inner) for inner in (1, 2, 3)]
    before = [(term.B.clone(), term.A.clone()) for term in terms]
    total = add(*terms)
    assert total.rank == 6
    torch.testing.assert_close(total.dense(), sum(term.dense() for term in terms), rtol=1e-13, atol=1e-13)
    weighted = weighted_sum(terms, [0.5, 0.0, -2.0])
    assert weighted.rank == 4, "a term without weight costs no rank"
    torch.testing.assert_close(weighted.dense(), 0.5 * terms[0].dense() - 2 * terms[2].dense(), rtol=1e-13, atol=1e-13)
    assert all(torch.equal(t.B, B) and torch.equal(t.A, A) for t, (B, A) in zip(terms, before, strict=True))


def test_a_sum_without_any_weight_is_zero_of_the_right_shape():
    zero = weighted_sum([random_factors(), random_factors(seed=1)], [0.0, 0.0])
    assert (zero.shape, zero.rank, zero.norm()) == ((9, 7), 1, 0.0)


def test_weighted_sum_refuses_another_number_of_weights():
    with pytest.raises(ValueError, match="zip"):
        weighted_sum([random_factors()], [1.0, 2.0])


@pytest.mark.parametrize("shapes", [((4, 3), (2, 5)), ((4,), (4, 5))])
def test_factors_that_do_not_fit_are_refused(shapes):
    with pytest.raises(ValueError, match="factors do not fit"):
        LowRank(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_from_dense_is_the_best_approximation_of_a_small_matrix(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s = torch.linalg.svdvals(matrix)
    found, error = from_dense(matrix, 4)
    best = float(s[4:].norm() / s.norm())
    assert found.rank == 4
    assert relative(found.dense(), matrix) == pytest.approx(best, rel=1e-9)
    assert error == pytest.approx(best, rel=1e-9)


def test_from_dense_of_full_rank_is_exact():
    matrix = torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, error = from_dense(matrix, 6)
    torch.testing.assert_close(found.dense(), matrix, rtol=1e-12, atol=1e-12)
    assert error < 1e-12


class _Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_iter(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("shape", [(4, 400), (400, 4)])
def test_from_dense_needs_no_more_memory_than_the_matrix(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with _Largest() as largest:
        from_dense(matrix, 2)
    assert largest.elements <= 2 * matrix.numel()


@pytest.fixture(scope="module")
def large() -> LowRank:
    """Above the limit of the exact path, singular values 1, 0.7, 0.49, …"""
    return with_spectrum([0.7**k for k in range(24)], DENSE_SVD_LIMIT + 6, DENSE_SVD_LIMIT + 16)


def test_from_dense_of_a_large_matrix_is_close_to_the_best(large):
    found, error = from_dense(large.dense(), 6)
    s = torch.tensor([0.7**k for k in range(24)], dtype=torch.float64)
    best = float(s[6:].norm() / s.norm())
    assert found.rank == 6
    assert best <= error * (1 + 1e-9)
    assert error <= best * 1.001
    assert relative(found.dense(), large.dense()) == pytest.approx(error, rel=1e-9)


def test_from_dense_of_a_large_matrix_repeats_and_leaves_the_global_generator_alone(large):
    dense = large.dense().float()
    state = torch.get_rng_state()
    first, second = from_dense(dense, 3)[0], from_dense(dense, 3)[0]
    assert torch.equal(first.B, second.B)
    assert torch.equal(first.A, second.A)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("side", [8, DENSE_SVD_LIMIT + 1])
def test_from_dense_of_zero_has_no_error(side):
    found, error = from_dense(torch.zeros(side, side), 2)
    assert error == 0.0
    assert found.norm() == 0.0


@pytest.mark.parametrize("side", [8, DENSE_SVD_LIMIT + 1])
def test_from_dense_keeps_the_dtype(side):
    found, _ = from_dense(torch.ones(side, side), 1)
    assert found.B.dtype == found.A.dtype == torch.float32


def nothing(out=9, width=7) -> LowRank:
    return LowRank(torch.zeros(out, 0, dtype=torch.float64), torch.zeros(0, width, dtype=torch.float64))


def test_rank_zero_is_the_zero_matrix():
    zero, matrix = nothing(), random_factors()
    assert (zero.rank, zero.norm(), zero.shape) == (0, 0.0, (9, 7))
    assert torch.equal(zero.dense(), torch.zeros(9, 7, dtype=torch.float64))
    assert torch.equal(add(matrix, zero).dense(), matrix.dense())
    weighted = weighted_sum([zero, matrix], [2.0, 0.5])
    assert weighted.rank == matrix.rank
    for found in (weighted_sum([zero, zero], [1.0, 1.0]), zero.compress(3)[0], zero.compress(energy=0.5)[0]):
        assert (found.rank, found.norm(), found.shape) == (1, 0.0, (9, 7))
    assert zero.compress()[1] == 0.0


@pytest.mark.parametrize("ranks", [(3,), (2, 0, 4), (0, 0), (5, 6), (8, 9)])  # the last two above 9×7's sides
def test_common_bases_hold_every_term(ranks):
    terms = [random_factors(inner=rank, seed=i) if rank else nothing() for i, rank in enumerate(ranks)]
    U, cores, V = common_bases([term.to(torch.float32) for term in terms])
    assert U.shape == (9, min(9, sum(ranks)))
    assert V.shape == (7, min(7, sum(ranks)))
    for basis in (U, V):
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64))
    for term, core in zip(terms, cores, strict=True):
        expected = term.to(torch.float32).to(torch.float64).dense()
        torch.testing.assert_close(U @ core @ V.T, expected, rtol=1e-12, atol=1e-12)


def test_compact_svd_stops_at_the_numerical_rank():
    matrix = with_spectrum([3.0, 1.0, 1e-3])
    repeated = add(matrix, matrix.scale(0.5)).to(torch.float32)
    U, s, Vh = compact_svd(repeated)
    torch.testing.assert_close(s, torch.tensor([4.5, 1.5, 1.5e-3], dtype=torch.float64), rtol=1e-3, atol=0)
    torch.testing.assert_close(U * s @ Vh, repeated.to(torch.float64).dense(), rtol=0, atol=1e-5)
    assert [tuple(part.shape) for part in compact_svd(nothing())] == [(9, 0), (0,), (0, 7)]


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (DENSE_SVD_LIMIT + 1, DENSE_SVD_LIMIT + 2)])
def test_from_dense_without_a_limit_keeps_every_bit(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found, error = from_dense(matrix, None)
    assert (found.rank, error) == (min(shape), 0.0)
    assert torch.equal(found.dense(), matrix)
