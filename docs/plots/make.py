"""The plots of coefficient.md: python docs/plots/make.py. Tasks with random updates and diagonal curvatures."""

from pathlib import Path

import torch

from pm_hf.merging.coefficient import Coefficient, optimal_coefficient
from pm_hf.merging.curvature import CurvatureSpec, accumulate
from pm_hf.merging.lowrank import LowRank, add
from pm_hf.reports.charts import Chart, Series, svg

FOLDER = Path(__file__).parent
OUT, IN, RANK, NAME = 12, 16, 3, "q"
GRID = [k / 50 for k in range(51)]
RATIOS = [2.0**k for k in range(-6, 7)]  # curvature of the new task over that of the past


def main() -> None:
    """Write the plots."""
    for chart in (line_chart(), ratio_chart()):
        (FOLDER / f"{chart.name}.svg").write_text(svg(chart, chart.name, alone=True) + "\n", encoding="utf-8")


def updates() -> list[LowRank]:
    """Updates of three tasks, (OUT, IN) with rank RANK."""
    draw = torch.Generator().manual_seed(4)
    shapes = ((OUT, RANK), (RANK, IN))
    return [LowRank(*(torch.randn(*s, generator=draw, dtype=torch.float64) for s in shapes)) for _ in range(3)]


def curvatures(scales: list[float]) -> list[torch.Tensor]:
    """A positive diagonal curvature (OUT, IN) for each task."""
    draw = torch.Generator().manual_seed(5)
    return [scale * torch.randn(OUT, IN, generator=draw, dtype=torch.float64).square() for scale in scales]


def fold(scales: list[float]) -> tuple[Coefficient, LowRank, LowRank, list[LowRank], list[torch.Tensor]]:
    """Tasks folded one after another, each from the merge before it: (the last coefficient, its Δ, the merge before it,
    the optima of all tasks, their curvatures)."""
    H, optima = curvatures(scales), []
    merged = LowRank(torch.zeros(OUT, 0, dtype=torch.float64), torch.zeros(0, IN, dtype=torch.float64))
    before, sums, alpha = merged, None, None
    deltas = updates()[: len(scales)]
    for delta, measured in zip(deltas, H, strict=True):
        before = merged
        optima.append(add(before, delta))
        sums = accumulate({NAME: measured}, {NAME: optima[-1]}, {NAME: delta}, CurvatureSpec(), 1, previous=sums)
        alpha = optimal_coefficient({NAME: delta}, {NAME: before}, sums)
        merged = add(before, delta.scale(alpha.used))
    assert alpha is not None
    return alpha, deltas[-1], before, optima, H


def change(at: float, delta: LowRank, before: LowRank, optimum: LowRank, H: torch.Tensor) -> float:
    """½(θ − θ*)ᵀH(θ − θ*) at θ = θ̂ + αΔ, minus the same at α = 0."""
    away = before.dense() - optimum.dense()
    here = away + at * delta.dense()
    return float((H * (here.square() - away.square())).sum() / 2)


def line_chart() -> Chart:
    """The objective along the third task's merge line, and its two parts."""
    alpha, delta, before, optima, H = fold([1.0, 1.0, 1.0])
    each = [[change(at, delta, before, optimum, h) for at in GRID] for optimum, h in zip(optima, H, strict=True)]
    past, new = [sum(pair) for pair in zip(*each[:-1], strict=True)], each[-1]
    total = [a + b for a, b in zip(past, new, strict=True)]
    series = [
        Series("earlier tasks", GRID, past, dots=False, dash=1),
        Series("the new task", GRID, new, dots=False, dash=3),
        Series("all tasks", GRID, total, dots=False),
        Series(f"α = {alpha.used:.3f}", [alpha.used], [total_at(alpha, delta, before, optima, H)], line=False),
    ]
    marks = {alpha.used: f"α = {alpha.used:.3f}", alpha.one_over_t: f"1/t = {alpha.one_over_t:.3f}"}
    about = "Three tasks; the sum of their losses, to second order, has its minimum at the coefficient."
    return Chart("line", "Change of the objective along the merge line", "α", "change from α = 0", series, about, marks)


def total_at(
    alpha: Coefficient, delta: LowRank, before: LowRank, optima: list[LowRank], H: list[torch.Tensor]
) -> float:
    """The objective of all tasks at the coefficient."""
    return sum(change(alpha.used, delta, before, one, h) for one, h in zip(optima, H, strict=True))


def ratio_chart() -> Chart:
    """The second task's coefficient against the ratio of the curvatures."""
    import math

    powers = [math.log2(ratio) for ratio in RATIOS]
    coefficients = [fold([1.0, ratio])[0] for ratio in RATIOS]
    series = [
        Series("α", powers, [alpha.used for alpha in coefficients]),
        Series("1/t", powers, [alpha.one_over_t for alpha in coefficients], dots=False, dash=1, colour=7),
    ]
    about = "With little curvature of the past the coefficient tends to 1, with little of the new task to 0."
    x = "log₂ of the new task's curvature over that of the first task"
    return Chart("ratio", "Coefficient of the second of two tasks", x, "coefficient", series, about, limits=(0, 1.02))


if __name__ == "__main__":
    main()
