"""The best coefficient on a merge line θ̂_{t−1} + αΔ_t, from what is measured at some of its points."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

Point = dict[str, Any]  # at least `coefficient`, α
COEFFICIENT_GRID = tuple(tenth / 10 for tenth in range(11))


def scan(coefficients: Iterable[float], measure: Callable[[float], Point]) -> list[Point]:
    """What `measure` says of each different α, in ascending order."""
    return [measure(alpha) for alpha in sorted(set(coefficients))]


def best_coefficient(points: Iterable[Point], value: Callable[[Point], float], chosen: float) -> float:
    """The α of the point with the largest value, of several equal ones the nearest to `chosen`."""
    best = max(points, key=lambda point: (value(point), -abs(point["coefficient"] - chosen)))
    return float(best["coefficient"])


def search_points(losses: Mapping[float, tuple[Tensor, Tensor]], earlier: int) -> list[Point]:
    """The objective J(α) = L_new(α) + earlier·L_old(α), a sum over tasks, at each α in ascending order.

    losses: {α: (losses of held-out rows of the new task (n,), losses of rows of the earlier tasks (m,))}, the same rows
    at every α. earlier: number of earlier tasks. `new`, `old`: the means of the two; `objective`: J; `error`: standard
    error of J(α) less its minimum, from the paired differences of the rows.
    """
    points = [
        {"coefficient": alpha, "new": float(new.mean()), "old": float(old.mean())}
        for alpha, (new, old) in sorted(losses.items())
    ]
    for point in points:
        point["objective"] = point["new"] + earlier * point["old"]
    lowest = losses[min(points, key=lambda point: point["objective"])["coefficient"]]
    for point in points:
        new, old = (mean_variance(a - b) for a, b in zip(losses[point["coefficient"]], lowest, strict=True))
        point["error"] = (new + earlier**2 * old) ** 0.5
    return points


def smallest_within_error(points: Iterable[Point]) -> float:
    """The smallest α whose objective is at most one standard error above the minimum (see `search_points`)."""
    points = list(points)
    lowest = min(point["objective"] for point in points)
    return float(min(p["coefficient"] for p in points if p["objective"] - lowest <= p["error"]))


def mean_variance(values: Tensor) -> float:
    """Variance of the mean of independent values, (n,); 0 for a single one."""
    return float(values.double().var()) / len(values) if len(values) > 1 else 0.0


def predicted_change(numerator: float, past: float, current: float, alpha: float) -> float:
    """½(past + current)α² − numerator·α: the change from α = 0 of the objective that the closed form of the coefficient
    minimises (arXiv 2505.22389)."""
    return (past + current) * alpha**2 / 2 - numerator * alpha
