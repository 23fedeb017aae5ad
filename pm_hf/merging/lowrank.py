"""Matrices kept as a product of two thin factors, and their exact and truncated sums."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DENSE_SVD_LIMIT = 1024  # above this the smaller side of a dense matrix is factored by a randomised SVD


OVERSAMPLING, POWER_ITERATIONS = 8, 4


@dataclass(frozen=True)
class LowRank:
    """The matrix B @ A of shape (out, in), with B (out, R) and A (R, in) of one floating dtype.

    R may be 0: the zero matrix, as of an adapter that lacks a module. The factors are borrowed and never changed in
    place.
    """

    B: Tensor
    A: Tensor

    def __post_init__(self) -> None:
        if self.B.ndim != 2 or self.A.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            raise ValueError(f"factors do not fit: B {tuple(self.B.shape)}, A {tuple(self.A.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the product."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        """Inner size R of the factors: an upper bound of the numerical rank."""
        return self.A.shape[0]

    def dense(self) -> Tensor:
        """The product, (out, in)."""
        return self.B @ self.A

    def scale(self, factor: float) -> "LowRank":
        """factor · BA, the factor folded into B."""
        return LowRank(self.B * factor, self.A)

    def to(self, dtype: torch.dtype) -> "LowRank":
        """The same factors in another dtype."""
        return LowRank(self.B.to(dtype), self.A.to(dtype))

    def norm(self) -> float:
        """Frobenius norm, in float64, without forming the product: ‖BA‖² = <BᵀB, AAᵀ>."""
        B, A = self.B.double(), self.A.double()
        return float(((B.T @ B) * (A @ A.T)).sum().clamp_min(0).sqrt())

    def compress(self, max_rank: int | None = None, energy: float | None = None) -> tuple["LowRank", float]:
        """Best approximation in Frobenius norm (Eckart–Young) with at most `max_rank` singular values,
        or the fewest that keep the share `energy` in (0, 1] of the squared norm.

        QR of both factors and an SVD of the R×R core, in float64; never the dense product. Returns the
        truncated matrix (at least rank 1, in the dtype of the input) and the relative error
        ‖BA − truncated‖/‖BA‖.
        """
        if self.rank == 0:
            return _zero(self), 0.0
        Qb, (core,), Qa = common_bases([self])
        U, s, Vh = torch.linalg.svd(core, full_matrices=False)
        keep = _kept(s, max_rank, energy)
        truncated = balanced(Qb @ U[:, :keep], s[:keep], Vh[:keep] @ Qa.T).to(self.B.dtype)
        if self.B.dtype in (torch.float16, torch.bfloat16):  # rounding is no longer small beside the truncation
            total, gap = self.norm(), add(self.to(torch.float64), truncated.to(torch.float64).scale(-1.0)).norm()
            return truncated, gap / total if total else 0.0
        return truncated, _relative_tail(s, keep)


def row_slices(shape: Sequence[int], entries: int) -> Iterator[slice]:
    """The rows of a matrix from top to bottom, about `entries` of its values at a time."""
    step = max(1, entries // shape[1])
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def add(*terms: LowRank) -> LowRank:
    """The exact sum: factors side by side, rank R₁ + R₂ + …"""
    return LowRank(torch.cat([t.B for t in terms], dim=1), torch.cat([t.A for t in terms], dim=0))


def weighted_sum(terms: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Σ wᵢ BᵢAᵢ exactly; terms with weight or rank 0 are left out (nothing left: one zero term of rank 1)."""
    kept = [term.scale(weight) for term, weight in zip(terms, weights, strict=True) if weight != 0 and term.rank]
    return add(*kept) if kept else _zero(terms[0])


def common_bases(terms: Sequence[LowRank]) -> tuple[Tensor, list[Tensor], Tensor]:
    """(U, cores, V) with terms[i] = U @ cores[i] @ Vᵀ: all terms in one small space, by QR of the stacked factors.

    U (out, p) and V (in, q) have orthonormal columns, cores are (p, q), p and q at most the sum of the ranks R (of
    which both are min(out, R) and min(in, R)); all float64. Norms, inner products and singular values of sums of the
    terms are those of the cores.
    """
    Q, R = torch.linalg.qr(torch.cat([term.B for term in terms], dim=1).double())
    P, L = torch.linalg.qr(torch.cat([term.A for term in terms], dim=0).double().T)
    ranks = [term.rank for term in terms]
    cores = [right @ left.T for right, left in zip(R.split(ranks, dim=1), L.split(ranks, dim=1), strict=True)]
    return Q, cores, P


def compact_svd(matrix: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """(U, s, Vᵀ) of the product inside its numerical rank n: (out, n), (n,) descending, (n, in), float64.

    By QR and an SVD of R×R. Singular values below the rounding of the factors' dtype are not counted.
    """
    Q, (core,), P = common_bases([matrix])
    U, s, Vh = torch.linalg.svd(core, full_matrices=False)
    rank = numerical_rank(s, matrix.B.dtype)
    return Q @ U[:, :rank], s[:rank], Vh[:rank] @ P.T


def balanced(U: Tensor, s: Tensor, Vh: Tensor) -> LowRank:
    """U diag(s) Vh, (out, k), (k,), (k, in), with √s in both factors, so that half precision loses least."""
    root = s.sqrt()
    return LowRank(U * root, root[:, None] * Vh)


def numerical_rank(s: Tensor, dtype: torch.dtype) -> int:
    """Number of singular values (descending) above the rounding of factors that were stored in `dtype`."""
    return int((s > len(s) * torch.finfo(dtype).eps * s[:1]).sum())


def from_dense(matrix: Tensor, max_rank: int | None) -> tuple[LowRank, float]:
    """Truncated SVD of a dense (out, in) matrix and its relative Frobenius error; None keeps all, without an SVD.

    Exact up to a smaller side of 1024; above that the seeded randomised range finder of Halko, Martinsson
    and Tropp (arXiv 0909.4061, algorithm 4.4) with oversampling and power iterations. With None one factor is the
    identity of the smaller side: error 0.
    """
    if max_rank is None:
        identity = torch.eye(min(matrix.shape), dtype=matrix.dtype)
        wide = matrix.shape[0] <= matrix.shape[1]
        return LowRank(identity, matrix) if wide else LowRank(matrix, identity), 0.0
    if min(matrix.shape) <= DENSE_SVD_LIMIT:
        U, s, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        keep = _kept(s, max_rank, None)
        return balanced(U[:, :keep], s[:keep], Vh[:keep]).to(matrix.dtype), _relative_tail(s, keep)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(matrix.shape[1], max_rank + OVERSAMPLING, generator=generator, dtype=matrix.dtype)
    Q, _ = torch.linalg.qr(matrix @ probe)
    for _ in range(POWER_ITERATIONS):
        Q, _ = torch.linalg.qr(matrix.T @ Q)
        Q, _ = torch.linalg.qr(matrix @ Q)
    truncated, _ = LowRank(Q, Q.T @ matrix).compress(max_rank)
    total = float(torch.linalg.norm(matrix))
    return truncated, float(torch.linalg.norm(matrix - truncated.dense())) / total if total else 0.0


def _kept(s: Tensor, max_rank: int | None, energy: float | None) -> int:
    """Number of singular values to keep; values that are zero in float64 are never kept."""
    numerical = int((s > s[0] * len(s) * torch.finfo(s.dtype).eps).sum())
    keep = numerical if max_rank is None else min(numerical, max_rank)
    if energy is not None and energy < 1:
        share = s.square().cumsum(0) / s.square().sum().clamp_min(torch.finfo(s.dtype).tiny)
        keep = min(keep, int((share < energy - 1e-12).sum()) + 1)
    return max(keep, 1)


def _zero(like: LowRank) -> LowRank:
    """The zero matrix as factors of rank 1: the least that an adapter file can hold."""
    return LowRank(like.B.new_zeros(like.shape[0], 1), like.A.new_zeros(1, like.shape[1]))


def _relative_tail(s: Tensor, keep: int) -> float:
    total = float(s.square().sum())
    return (float(s[keep:].square().sum()) / total) ** 0.5 if total else 0.0
