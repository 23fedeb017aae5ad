"""The best coefficient on a merge line θ̂_{t−1} + αΔ_t, from what is measured at some of its points."""

from collections.abc import Callable, Iterable
from typing import Any

Point = dict[str, Any]  # at least `coefficient`, α


def scan(coefficients: Iterable[float], measure: Callable[[float], Point]) -> list[Point]:
    """What `measure` says of each different α, in ascending order."""
    return [measure(alpha) for alpha in sorted(set(coefficients))]


def best_coefficient(points: Iterable[Point], value: Callable[[Point], float], chosen: float) -> float:
    """The α of the point with the largest value, of several equal ones the nearest to `chosen`."""
    best = max(points, key=lambda point: (value(point), -abs(point["coefficient"] - chosen)))
    return float(best["coefficient"])


def predicted_change(numerator: float, past: float, current: float, alpha: float) -> float:
    """½(past + current)α² − numerator·α: the change from α = 0 of the objective that the closed form of the coefficient
    minimises (arXiv 2505.22389)."""
    return (past + current) * alpha**2 / 2 - numerator * alpha
