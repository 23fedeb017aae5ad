"""Charts and matrices as PNG, by matplotlib (the extra `plots`)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pm_hf.charts import Chart

MARKERS, LINES = "os^vDX", ("-", "--", ":", "-.")
COLOURS = ("#0b5cad", "#b3450b", "#1c7a3e", "#8a2ba0", "#8a6100", "#c2185b", "#00727a", "#4a4f57")


def write_chart(chart: Chart, path: Path) -> None:
    """The chart as PNG, 150 dots per inch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    for place, series in enumerate(chart.series):
        values = [float("nan") if y is None else y for y in series.y]
        axes.plot(
            series.x,
            values,
            label=series.name,
            color=COLOURS[(place if series.colour is None else series.colour) % len(COLOURS)],
            marker=MARKERS[(place if series.shape is None else series.shape) % len(MARKERS)] if series.dots else "",
            linestyle=LINES[series.dash] if series.line else "none",
            markersize=5 if series.line else 3,
        )
    for x in chart.marks:
        axes.axvline(x, color="#5b6470", linewidth=0.8, linestyle=":")
    across, up = chart.ranges
    axes.set(title=chart.title, xlabel=chart.x, ylabel=chart.y, xlim=across, ylim=up)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


def write_matrix(
    scores: Sequence[Sequence[float | None]], tasks: Sequence[str], path: Path, title: str, *, lower: bool
) -> None:
    """A heat map as PNG: tasks down, what was learned across; a stronger colour is a better score."""
    from matplotlib.figure import Figure

    rows = np.array(scores, dtype=float).T  # None is NaN
    low, high = np.nanmin(rows), np.nanmax(rows)
    numbered = len(tasks) <= 20
    side = 1.5 + 0.5 * min(len(tasks), 20)
    figure = Figure(figsize=(side + 2.5, side + 0.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(rows, cmap="Blues_r" if lower else "Blues", aspect="auto")
    for i, t in np.argwhere(np.isfinite(rows)) if numbered else ():
        share = (rows[i, t] - low) / (high - low or 1)
        colour = "white" if (1 - share if lower else share) > 0.6 else "black"
        axes.text(t, i, f"{rows[i, t]:.2f}", ha="center", va="center", color=colour, fontsize=8)
    axes.set(xlabel="tasks learned", ylabel="task")
    axes.set_title(title, parse_math=False)  # a name may have a $
    short = [name if len(name) <= 24 else name[:23] + "…" for name in tasks]
    axes.set_yticks(range(len(tasks)), short, parse_math=False)
    every = max(1, len(scores) // 20)
    axes.set_xticks(range(0, len(scores), every), [str(t + 1) for t in range(0, len(scores), every)])
    figure.colorbar(image, ax=axes)
    figure.savefig(path)
