"""Closed-form optimum of Σᵢ (θ − θ*ᵢ)ᵀ Hᵢ (θ − θ*ᵢ) along the task vector, per module, or over all weights."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pm_hf.errors import InputError
from pm_hf.merging.curvature import Curvature
from pm_hf.merging.lowrank import LowRank, add, from_dense

Freedom = Literal["global", "module", "free"]
FIT_TOLERANCE = 0.02  # relative change of ‖Δ‖ that half-precision storage may cause; more means another adapter
RESIDUAL_TOLERANCE = 1e-4  # share of the free solution's step that may lie outside the columns of the task's B
PAST_WITHOUT_WEIGHT = 0.95


class ZeroCurvatureError(InputError):
    """The curvature is zero along the task vector, so it decides no coefficient."""


@dataclass(frozen=True)
class Coefficient:
    """The coefficient α of θ̂_t = θ̂_{t−1} + αΔ and where it comes from (arXiv 2505.22389, closed form of α).

    raw: numerator / (past + current), float64, unbounded; used: raw clamped to [0, 1].
    past, current: Δᵀ(ΣH of earlier tasks)Δ and ΔᵀH_tΔ, the two parts of the denominator.
    one_over_t: what plain averaging would use. modules: the same for each module when `freedom="module"`.
    """

    raw: float
    used: float
    numerator: float
    past: float
    current: float
    one_over_t: float
    modules: dict[str, "Coefficient"] | None = None
    note: str | None = None

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
    Both as (out, in) products; the sums run in float64 over one module at a time.
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
    return Coefficient(
        whole.raw, whole.used, whole.numerator, whole.past, whole.current, whole.one_over_t, modules, whole.note
    )


def free_solution(
    name: str, delta: LowRank, merged: LowRank | None, curvature: Curvature, max_rank: int | None
) -> tuple[LowRank, float]:
    """Θ = M S⁺ (or M/S for the diagonal): the objective's optimum over the whole matrix of one module.

    For the Gram the step from the merged model is B_t · (A_tG_t)(ΣG)⁺ as long as that model is the exact optimum of
    the earlier tasks: rank r more, no dense solution (LOT merging, arXiv 2505.23859, in its sequential form). Where
    the past was truncated, and for the diagonal (online Fisher merging), the dense optimum is factored to
    `max_rank`, by default the sum of the ranks that go in. Returns the matrix and the relative error.
    """
    S = curvature.sum_of(name).double()
    if not (S.isfinite().all() and curvature.M[name].isfinite().all() and S.abs().max() > 0):
        raise InputError(f"the curvature is zero or not finite in module {name}; measure it again")
    past = torch.zeros(delta.shape, dtype=torch.float64) if merged is None else merged.to(torch.float64).dense()
    # M − Sθ̂ equals H_tΔ where θ̂ is already the optimum of the past
    pull = curvature.M[name].double() - curvature.apply(name, past)
    if curvature.settings.kind == "gram":
        B = delta.B.double()
        inner = torch.linalg.pinv(B) @ pull  # (r, in): A_t G_t
        if torch.linalg.norm(pull - B @ inner) <= RESIDUAL_TOLERANCE * torch.linalg.norm(pull):
            step = LowRank(B, _solve_right(inner, S))
            exact = step if merged is None else add(merged.to(torch.float64), step)
            return (exact, 0.0) if max_rank is None or exact.rank <= max_rank else exact.compress(max_rank)
        dense = past + _solve_right(pull, S)
    else:
        dense = past + _divide(pull, S, delta, curvature.tasks)
    rank = max_rank or delta.rank + (0 if merged is None else merged.rank)
    return from_dense(dense, min(rank, *dense.shape))


def fixed_coefficient(value: float, tasks: int, note: str | None = None) -> Coefficient:
    """An α that no curvature decided, recorded like a computed one."""
    nan = math.nan
    return Coefficient(value, value, nan, nan, nan, 1 / tasks, note=note)


def check_fits(delta: Mapping[str, LowRank], curvature: Curvature) -> None:
    """InputError unless the curvature has exactly these modules, shapes and (to storage precision) this Δ."""
    names, known = set(delta), set(curvature.M)
    if names != known:
        odd = sorted(names ^ known)
        raise InputError(
            f"the curvature does not fit the adapter: {len(odd)} modules stand in only one of them, first {odd[0]}; "
            "use the file that was saved with this task"
        )
    for name, d in delta.items():
        if tuple(curvature.M[name].shape) != d.shape:
            found = tuple(curvature.M[name].shape)
            raise InputError(
                f"the curvature does not fit the adapter: {name} is {d.shape} in it, {found} in the curvature"
            )
    norms = {name: d.norm() for name, d in delta.items()}
    ours, theirs = math.hypot(*norms.values()), math.hypot(*curvature.delta_norm.values())
    gap = math.hypot(*(norms[name] - curvature.delta_norm[name] for name in norms))  # module by module
    if gap > FIT_TOLERANCE * max(ours, theirs):
        raise InputError(
            f"the curvature was measured with another task adapter (‖Δ‖ {theirs:.6g} there, {ours:.6g} here); "
            "use the file that was saved with this task"
        )


def _terms(name: str, delta: LowRank, merged: LowRank | None, curvature: Curvature) -> tuple[float, float, float]:
    """(numerator, past, current) of one module, summed in float64."""
    d = delta.to(torch.float64).dense()
    pull = curvature.M[name].double()
    if merged is not None:
        pull = pull - curvature.apply(name, merged.to(torch.float64).dense())
    whole = float((d * curvature.apply(name, d)).sum())
    return float((d * pull).sum()), whole - curvature.current[name], curvature.current[name]


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
    note = None
    if tasks >= 3 and raw > PAST_WITHOUT_WEIGHT:
        note = f"α = {raw:.3f} at task {tasks}: the past has almost no weight, this is close to sequential training"
    return Coefficient(raw, used, numerator, past, current, 1 / tasks, note=note)


def _solve_right(matrix: Tensor, S: Tensor) -> Tensor:
    """X with X S = matrix for a symmetric S ≥ 0 that was stored in float32.

    By Cholesky; where S is singular to the precision of its storage, by the pseudo-inverse cut at that precision.
    """
    noise = len(S) * torch.finfo(torch.float32).eps
    factor, failed = torch.linalg.cholesky_ex(S)
    if int(failed) or bool((factor.diagonal().square() <= noise * S.diagonal()).any()):
        return matrix @ torch.linalg.pinv(S, hermitian=True, rtol=noise)
    return torch.cholesky_solve(matrix.T, factor).T


def _divide(pull: Tensor, S: Tensor, delta: LowRank, tasks: int) -> Tensor:
    """pull / S; entries that no task cares about (S = 0) take the running average's step Δ/t."""
    average = delta.to(torch.float64).dense() / tasks
    return torch.where(S > 0, pull / S.clamp_min(torch.finfo(S.dtype).tiny), average)
