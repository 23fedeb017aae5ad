"""Charts as SVG that adapt to light and dark, and the same charts and matrices as PNG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape as html_escape
from pathlib import Path

import numpy as np

from pm_hf.text import printable

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 340, 64, 16, 16, 52  # pixels


# of the series c0 … c7, on a light and on a dark ground
LIGHT = ("#0b5cad", "#b3450b", "#1c7a3e", "#8a2ba0", "#8a6100", "#c2185b", "#00727a", "#4a4f57")
DARK = ("#6db3f8", "#ff9d5c", "#66d08c", "#d998ec", "#e6bb4a", "#ff86b3", "#4fd0d8", "#b9c0c8")
SOFT = "#5b6470"  # of what is not a series


def _variables(colours: Sequence[str]) -> str:
    return ";".join(f"--c{i}:{colour}" for i, colour in enumerate(colours))


STYLE = (
    f".chart{{--ink:#1a1d21;--soft:{SOFT};--rule:#d5dae0;{_variables(LIGHT)};"
    "font:13px system-ui,sans-serif;max-width:100%;height:auto}\n"
    f"@media (prefers-color-scheme:dark){{.chart{{--ink:#e8eaed;--soft:#a8b0ba;--rule:#3a4149;{_variables(DARK)}}}}}\n"
    ".chart text{fill:var(--ink)}.chart .tick{fill:var(--soft)}.chart .rule{stroke:var(--rule);stroke-width:1}\n"
    ".chart .mark{stroke:var(--soft);stroke-width:1;stroke-dasharray:2 3}\n"
    ".chart path{fill:none;stroke-width:2}.chart .dot{stroke-width:1.5}\n"
    + "".join(f".chart .c{i}{{stroke:var(--c{i});--own:var(--c{i})}}" for i in range(len(LIGHT)))
    + ".chart .full{fill:var(--own)}.chart .open{fill:none}"
)
SHAPES = "circle", "square", "up", "down", "diamond", "cross"
DASHES = "", "6 3", "2 2", "8 3 2 3"


@dataclass(frozen=True)
class Series:
    """Points (x, y) under one name; a y of None is a gap. line, dots: how they are drawn; colour and shape are numbers,
    by default the series' place in the chart."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    line: bool = True
    colour: int | None = None
    shape: int | None = None
    dash: int = 0
    dots: bool = True


@dataclass(frozen=True)
class Chart:
    """What a chart shows. name: of its file; about: one sentence of what is to be seen, for who does not see it.

    marks: {x: name} of upright lines. limits: of the y axis, by default those of the points.
    """

    name: str
    title: str
    x: str
    y: str
    series: list[Series]
    about: str = ""
    marks: dict[float, str] = field(default_factory=dict)
    limits: tuple[float, float] | None = None

    @cached_property
    def points(self) -> list[tuple[float, float]]:
        """All points of all series."""
        pairs = [pair for series in self.series for pair in zip(series.x, series.y, strict=True)]
        return [(x, y) for x, y in pairs if y is not None]

    @cached_property
    def whole(self) -> bool:
        """Whether the x axis counts something."""
        return all(x == int(x) for x, _ in self.points)

    @cached_property
    def ranges(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Ends of the x and the y axis, each with some room."""
        xs, ys = zip(*self.points, strict=True)
        low, high = self.limits or (min(ys), max(ys))
        room = 0.0 if self.limits else 0.05 * (high - low) or 0.05 * abs(high) or 0.5
        side = 0.03 * (max(xs) - min(xs)) or 0.5
        bottom = max(0.0, low - room) if low >= 0 else low - room
        return (min(xs) - side, max(xs) + side), (bottom, high + room)


def escape(text: str) -> str:
    """Text in HTML and XML, which know no control characters."""
    return html_escape(printable(text))


def svg(chart: Chart, identifier: str, *, alone: bool = False) -> str:
    """The chart as an <svg> with a title and a description; `alone`: as a file of its own, with the style in it."""
    columns = 3 if max(len(series.name) for series in chart.series) <= 30 else 1
    height = HEIGHT + 22 * math.ceil(len(chart.series) / columns)
    head = 'xmlns="http://www.w3.org/2000/svg" ' if alone else ""
    about = f"{chart.title}. {chart.about}".strip()
    parts = [
        f'<svg {head}class="chart" role="img" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
        f' aria-labelledby="{identifier}-t {identifier}-d">',
        f'<title id="{identifier}-t">{escape(chart.title)}</title><desc id="{identifier}-d">{escape(about)}</desc>',
        f"<style>{STYLE}</style>" if alone else "",
    ]
    parts += [*_axes(chart), *_marks(chart)]
    for place, series in enumerate(chart.series):
        parts += _drawn(chart, series, place)
    parts += _legend(chart, columns)
    return "\n".join([part for part in parts if part] + ["</svg>"])


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers between two, about `count` of them: steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * min((1, 2, 5, 10), key=lambda m: abs(math.log(m * power / rough)))
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _place(chart: Chart, x: float, y: float) -> tuple[float, float]:
    (left, right), (low, high) = chart.ranges
    across = LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT)
    down = HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
    return round(across, 1), round(down, 1)


def _axes(chart: Chart) -> list[str]:
    (left, right), (low, high) = chart.ranges
    parts = []
    for y in ticks(low, high):
        _, down = _place(chart, left, y)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down}" y2="{down}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{down + 4}" text-anchor="end">{y:g}</text>')
    for x in ticks(left, right, 10):
        if chart.whole and x != int(x):
            continue
        across, _ = _place(chart, x, low)
        parts.append(f'<text class="tick" x="{across}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{x:g}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 14}" text-anchor="middle">{escape(chart.x)}</text>')
    parts.append(
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{escape(chart.y)}</text>'
    )
    return parts


def _marks(chart: Chart) -> list[str]:
    parts = []
    for x, name in chart.marks.items():
        across, _ = _place(chart, x, 0)
        line = f'<line class="mark" x1="{across}" x2="{across}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">'
        parts.append(f"{line}<title>{escape(name)}</title></line>")
    return parts


def _look(series: Series, place: int) -> tuple[int, int]:
    """Numbers of a series' colour and shape."""
    colour, shape = (place if own is None else own for own in (series.colour, series.shape))
    return colour % len(LIGHT), shape % len(SHAPES)


def _drawn(chart: Chart, series: Series, place: int) -> list[str]:
    colour, shape = _look(series, place)
    markers, path, pen = [], [], "M"
    for x, y in zip(series.x, series.y, strict=True):
        if y is None:
            pen = "M"
            continue
        across, down = _place(chart, x, y)
        path.append(f"{pen}{across} {down}")
        pen = "L"
        hint = f"<title>{escape(series.name)}: {y:.4g} at {x:g}</title>" if series.line else ""
        markers += [marker(across, down, SHAPES[shape], colour, hint)] * series.dots
    dash = f' stroke-dasharray="{DASHES[series.dash]}"' if series.dash else ""
    line = [f'<path class="c{colour}"{dash} d="{" ".join(path)}"/>'] if series.line and path else []
    return line + markers


def marker(x: float, y: float, shape: str, colour: int, inside: str = "", size: float = 4) -> str:
    """One point as an SVG element."""
    kind, s = f'class="dot full c{colour}"', size
    if shape == "circle":
        return f'<circle {kind} cx="{x}" cy="{y}" r="{s - 0.5}">{inside}</circle>'
    corners = {
        "square": [(-s, -s), (s, -s), (s, s), (-s, s)],
        "up": [(0, -s), (s, s), (-s, s)],
        "down": [(0, s), (s, -s), (-s, -s)],
        "diamond": [(0, -s - 1), (s + 1, 0), (0, s + 1), (-s - 1, 0)],
        "cross": [(-s, -s), (s, s), (0, 0), (s, -s), (-s, s), (0, 0)],
    }[shape]
    listed = " ".join(f"{round(x + dx, 1)},{round(y + dy, 1)}" for dx, dy in corners)
    return f'<polygon {kind} points="{listed}">{inside}</polygon>'


def _legend(chart: Chart, columns: int) -> list[str]:
    parts, width = [], (WIDTH - LEFT) / columns
    for place, series in enumerate(chart.series):
        x, y = LEFT + width * (place % columns), HEIGHT + 22 * (place // columns) + 6
        colour, shape = _look(series, place)
        dash = f' stroke-dasharray="{DASHES[series.dash]}"' if series.dash else ""
        line = f'<path class="c{colour}"{dash} d="M{x} {y}L{x + 28} {y}"/>' if series.line else ""
        parts.append(line + marker(x + 14, y, SHAPES[shape], colour) * series.dots)
        parts.append(f'<text x="{x + 36}" y="{y + 4}">{escape(series.name)}</text>')
    return parts


PNG_MARKERS, PNG_LINES = "os^vDX", ("-", "--", ":", "-.")  # of SHAPES and DASHES


def write_chart(chart: Chart, path: Path) -> None:
    """The chart as PNG, 150 dots per inch."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.2, 4.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    for place, series in enumerate(chart.series):
        values = [float("nan") if y is None else y for y in series.y]
        colour, shape = _look(series, place)
        axes.plot(
            series.x,
            values,
            label=printable(series.name),
            color=LIGHT[colour],
            marker=PNG_MARKERS[shape] if series.dots else "",
            linestyle=PNG_LINES[series.dash] if series.line else "none",
            markersize=5 if series.line else 3,
        )
    for x in chart.marks:
        axes.axvline(x, color=SOFT, linewidth=0.8, linestyle=":")
    across, up = chart.ranges
    axes.set(xlim=across, ylim=up)
    for write, text in ((axes.set_title, chart.title), (axes.set_xlabel, chart.x), (axes.set_ylabel, chart.y)):
        write(printable(text), parse_math=False)  # a name may have a $
    if chart.whole:
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    for name in axes.legend(frameon=False).get_texts():
        name.set_parse_math(False)
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
    axes.set_title(printable(title), parse_math=False)  # a name may have a $
    short = [name if len(name) <= 24 else name[:23] + "…" for name in map(printable, tasks)]
    axes.set_yticks(range(len(tasks)), short, parse_math=False)
    every = max(1, len(scores) // 20)
    axes.set_xticks(range(0, len(scores), every), [str(t + 1) for t in range(0, len(scores), every)])
    figure.colorbar(image, ax=axes)
    figure.savefig(path)
