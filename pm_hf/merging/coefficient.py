"""Closed-form optimum of Σᵢ (θ − θ*ᵢ)ᵀ Hᵢ (θ − θ*ᵢ) along the task vector, per module, or over all weights."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from pm_hf.errors import InputError
from pm_hf.merging.curvature import PROBES, Curvature, delta_probe, row_chunks, shape_of
from pm_hf.merging.lowrank import LowRank, add, from_dense

Freedom = Literal["global", "module", "free"]
Source = Literal["closed_form", "given", "average", "line_search"]


FIT_TOLERANCE = 0.02  # change of ‖Δ‖ or uᵀΔv, over ‖Δ‖, that half-precision storage may cause; more: another adapter


RESIDUAL_TOLERANCE = 1e-4  # share of the Gram step's change of outputs that may lie outside the columns of the task's B


RESIDUAL_PROBES = 16  # random combinations of the outputs that estimate this share


PAST_WITHOUT_WEIGHT = 0.95  # from this α on


TASK_WITHOUT_WEIGHT = 0.1  # share of 1/t up to which a task hardly counts


class ZeroCurvatureError(InputError):
    """The curvature is zero along the task vector, so it decides no coefficient."""


@dataclass(frozen=True)
class Coefficient:
    """The coefficient α of θ̂_t = θ̂_{t−1} + αΔ and where it comes from (arXiv 2505.22389, closed form of α).

    raw: numerator / (past + current), float64, unbounded; used: raw clamped to [0, 1].
    past, current: Δᵀ(ΣH of earlier tasks)Δ and ΔᵀH_tΔ, the two parts of the denominator.
    one_over_t: what plain averaging would use. modules: the same for each module when `freedom="module"`.
    note: for humans. source: what decided α: the closed form, a number that was given, averaging, or a line search.
    """

    raw: float
    used: float
    numerator: float
    past: float
    current: float
    one_over_t: float
    modules: dict[str, "Coefficient"] | None = None
    note: str | None = None
    source: Source = "closed_form"

    def for_module(self, name: str) -> float:
        """The factor that this module's Δ gets."""
        return self.used if self.modules is None else self.modules[name].used


def optimal_coefficient(
    delta: Mapping[str, LowRank],
    merged: Mapping[str, LowRank] | None,
    curvature: Curvature,
    *,
    freedom: Literal["global", "module"] = "global",
) -> Coefficient:
    """α_t = Δᵀ(M_t − S_t θ̂_{t−1}) / Δᵀ S_t Δ, with the sums that include task t.

    delta: {module: Δ_t}; merged: {module: θ̂_{t−1} − θ0}, missing modules count as zero, None before the first task.
    Both as (out, in) products, one module read at a time; the sums run in float64, from the factors and a chunk of
    rows of S and M, so memory does not grow with the model, nor with a module, where the sums lie on disk.
    freedom: "global" gives one α for the model (the published method), "module" one for each module.
    Raises InputError when the curvature does not fit the adapters, or when it is zero or not finite where Δ moves.
    """
    check_fits(delta, curvature)
    terms = {name: _terms(name, d, (merged or {}).get(name), curvature) for name, d in delta.items()}
    if freedom == "global":
        return _coefficient(terms, curvature.tasks)
    if freedom != "module":
        raise InputError(f"freedom must be 'global' or 'module' for a coefficient, found {freedom!r}")
    modules = {name: _coefficient({name: term}, curvature.tasks) for name, term in terms.items()}
    whole = _coefficient(terms, curvature.tasks)
    return replace(whole, modules=modules)


def free_solution(
    name: str, delta: LowRank, merged: LowRank | None, curvature: Curvature, max_rank: int | None
) -> tuple[LowRank, float]:
    """Θ = M S⁺ (or M/S for the diagonal): the objective's optimum over the whole matrix of one module, (out, in).

    For the Gram the step from the merged model is B_t · (A_tG_t)(ΣG)⁺ as long as that model is the exact optimum of
    the earlier tasks: rank r more, no dense solution (LOT merging, arXiv 2505.23859, in its sequential form), reduced
    without loss where that is more than min(out, in). Where the past was truncated, and for the diagonal (online
    Fisher merging), the dense optimum (float32) is factored to `max_rank`, by default the sum of the ranks that go
    in. Returns the matrix and its relative Frobenius error. Raises InputError when the curvature is zero or not finite.
    Memory: S and its factor in float64 for the Gram; the optimum itself where it is dense; never M or S∘X whole.
    """
    past = LowRank(delta.B[:, :0], delta.A[:0]) if merged is None else merged
    delta, past = delta.to(torch.float64), past.to(torch.float64)
    if curvature.settings.kind == "factored":
        raise InputError("the factored curvature has no free solution; use freedom global or module, or kind fisher")
    solve = _weighted_mean if curvature.settings.kind == "fisher" else _gram_optimum
    optimum = solve(name, delta, past, curvature)
    full = min(*delta.shape)
    if isinstance(optimum, LowRank):
        limit = min(max_rank or full, full)
        return (optimum, 0.0) if optimum.rank <= limit else optimum.compress(limit)
    rank = max_rank or max(1, delta.rank + past.rank)
    return from_dense(optimum, rank if rank < full else None)


def fixed_coefficient(value: float, tasks: int, note: str | None = None, *, source: Source = "given") -> Coefficient:
    """An α that no curvature decided, recorded like a computed one."""
    nan = math.nan
    return Coefficient(value, value, nan, nan, nan, 1 / tasks, note=note, source=source)


def check_fits(delta: Mapping[str, LowRank], curvature: Curvature) -> None:
    """InputError unless the curvature has exactly these modules, shapes and (to storage precision) this Δ.

    The gaps of ‖Δ‖ and of the fixed projections uᵀΔv, joined over the modules, may be 2 % of the whole ‖Δ‖. A file
    of before the projections existed is compared by norms alone.
    """
    names, known = set(delta), curvature.modules
    if names != known:
        odd = sorted(names ^ known)
        raise InputError(
            f"the curvature does not fit the adapter: {len(odd)} modules stand in only one of them, first {odd[0]}; "
            "use the file that was saved with this task"
        )
    norms, gaps, turns = [], [], []
    for name, d in delta.items():
        if not curvature.fits(name, d.shape):
            measured = shape_of(curvature.M or curvature.S, name)
            raise InputError(
                f"the curvature does not fit the adapter: {name} is {d.shape} in it, {measured} in the curvature"
            )
        norms.append(d.norm())
        gaps.append(norms[-1] - curvature.delta_norm[name])
        if curvature.probe:
            turns.append(math.dist(delta_probe(name, d), curvature.probe[name]) / PROBES**0.5)
    ours, theirs = math.hypot(*norms), math.hypot(*curvature.delta_norm.values())
    gap, turn = (math.hypot(*shares) / (max(ours, theirs) or 1.0) for shares in (gaps, turns))  # module by module
    if max(gap, turn) > FIT_TOLERANCE:
        raise InputError(
            f"the curvature was measured with another task adapter (‖Δ‖ {theirs:.6g} there, {ours:.6g} here; fixed "
            f"projections differ by {turn:.2g}‖Δ‖); use the file that was saved with this task"
        )


def _terms(name: str, delta: LowRank, merged: LowRank | None, curvature: Curvature) -> tuple[float, float, float]:
    """(numerator ⟨Δ, M − Sθ̂⟩, past, current) of one module, in float64.

    The factored curvature has M ≈ S_{t−1}θ̂_{t−1} + H_tθ*_t, so its numerator is ΔᵀH_tΔ; all was computed when it was
    measured, with the task vector that `check_fits` compares.
    """
    if curvature.settings.kind == "factored":
        return curvature.current[name], curvature.past[name], curvature.current[name]
    whole, *drawn = curvature.quadratic(name, delta, [delta] if merged is None else [delta, merged])
    return curvature.moment(name, delta) - sum(drawn), whole - curvature.current[name], curvature.current[name]


def _coefficient(terms: Mapping[str, tuple[float, float, float]], tasks: int) -> Coefficient:
    columns: Iterable[tuple[float, ...]] = zip(*terms.values(), strict=True)
    numerator, past, current = (sum(column) for column in columns)
    denominator = past + current
    if not (math.isfinite(numerator) and math.isfinite(denominator) and denominator > 0):
        broken = [n for n, (up, p, c) in terms.items() if not (math.isfinite(up + p + c) and p + c > 0)]
        error = ZeroCurvatureError if math.isfinite(numerator) and denominator == 0 else InputError
        raise error(
            f"the curvature is zero or not finite along the task vector (denominator {denominator:.3g}) "
            f"in {len(broken)} modules, first {broken[:3]}: "
            "the adapter is untrained or the task is fitted so well that its Fisher vanished; "
            "use labels='mc', kind='gram', on_zero_curvature: average, or a coefficient of your own"
        )
    raw = numerator / denominator
    used = min(max(raw, 0.0), 1.0)
    return Coefficient(raw, used, numerator, past, current, 1 / tasks, note=_note(raw, tasks))


def _note(alpha: float, tasks: int) -> str | None:
    """What is to be said of an α that leaves the past, or the task, without weight."""
    if tasks >= 3 and alpha > PAST_WITHOUT_WEIGHT:
        return f"α = {alpha:.3f} at task {tasks}: the past has almost no weight, this is close to sequential training"
    if tasks >= 2 and alpha < TASK_WITHOUT_WEIGHT / tasks:
        return (
            f"α = {alpha:.3f} at task {tasks}, 1/t {1 / tasks:.3f}: the task has almost no weight, as its curvature is "
            "far below that of the past, which is so of a fitted task; merge.method average gives every task the same"
        )
    return None


def _gram_optimum(name: str, delta: LowRank, past: LowRank, curvature: Curvature) -> LowRank | Tensor:
    """θ̂ + pull·S⁺ with pull = M − θ̂S, which is H_tΔ where θ̂ is already the optimum of the earlier tasks.

    Then pull = B(B⁺pull), and the result stays low-rank; otherwise it is dense, float32. What lies outside the columns
    of B is weighed as the objective does, by tr(X S⁺ Xᵀ), on random combinations of the outputs.
    """
    S, rank = curvature.sum_of(name).double(), delta.rank
    draws = torch.randn(RESIDUAL_PROBES, delta.shape[0], generator=torch.Generator().manual_seed(0), dtype=S.dtype)
    left = torch.cat([torch.linalg.pinv(delta.B), draws])
    pull = -(left @ past.B) @ (past.A @ S)
    for rows, M in row_chunks(curvature.M, name):
        pull += left[:, rows] @ M
    _check_useful(name, bool(S.isfinite().all() and pull.isfinite().all()), bool(S.any()))
    divide = _right_division(S)
    outside = pull[rank:] - (draws @ delta.B) @ pull[:rank]
    step, whole, lost = divide(torch.cat([pull, outside])).split([rank, RESIDUAL_PROBES, RESIDUAL_PROBES])
    if (lost * outside).sum() <= RESIDUAL_TOLERANCE**2 * (whole * pull[rank:]).sum():
        return add(past, LowRank(delta.B, step))
    dense, drawn = torch.empty(delta.shape), past.A @ S
    for rows, M in row_chunks(curvature.M, name):
        dense[rows] = past.B[rows] @ past.A + divide(M - past.B[rows] @ drawn)
    return dense


def _weighted_mean(name: str, delta: LowRank, past: LowRank, curvature: Curvature) -> Tensor:
    """M/S, dense, float32; entries that no task cares about (S = 0) take the running average's step Δ/t."""
    dense, finite, some = torch.empty(delta.shape), True, False
    sums = zip(row_chunks(curvature.S, name), row_chunks(curvature.M, name), strict=True)
    for (rows, S), (_, M) in sums:
        average = past.B[rows] @ past.A + (delta.B[rows] @ delta.A) / curvature.tasks
        dense[rows] = torch.where(S > 0, M / S, average).float()
        finite, some = finite and bool(S.isfinite().all() and M.isfinite().all()), some or bool(S.any())
    _check_useful(name, finite, some)
    return dense


def _check_useful(name: str, finite: bool, some: bool) -> None:
    if not (finite and some):
        raise InputError(f"the curvature is zero or not finite in module {name}; measure it again")


def solve_right(matrix: Tensor, S: Tensor) -> Tensor:
    """X with X S = matrix: see `_right_division`."""
    return _right_division(S)(matrix)


def _right_division(S: Tensor) -> Callable[[Tensor], Tensor]:
    """matrix → X with X S = matrix, for a symmetric S ≥ 0 that was stored in float32.

    By Cholesky; where S is singular to the precision of its storage, by the pseudo-inverse cut at that precision.
    """
    noise = len(S) * torch.finfo(torch.float32).eps
    factor, failed = torch.linalg.cholesky_ex(S)
    if int(failed) or bool((factor.diagonal().square() <= noise * S.diagonal()).any()):
        inverse = torch.linalg.pinv(S, hermitian=True, rtol=noise)
        return lambda matrix: matrix @ inverse
    return lambda matrix: torch.cholesky_solve(matrix.T, factor).T
