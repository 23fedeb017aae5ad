"""Charts and heat maps as pictures: where everything stands. `canvas` draws them as SVG and PNG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from pm_hf.files import write_text
from pm_hf.reports.canvas import (
    LIGHT,
    SHAPES,
    Bar,
    Curve,
    Label,
    Line,
    Picture,
    Point,
    Shape,
    picture_svg,
    text_width,
    write_picture,
)
from pm_hf.text import format_number

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM, LEGEND = 480, 280, 64, 12, 14, 52, 22  # pixels
SHORT_NAME = 22  # characters of names of which two stand side by side in a legend
CELL = (52, 26)  # pixels of a heat map's cell with a number in it
LONGEST_NAME, MOST_NUMBERED = 24, 20  # characters of a task's name, tasks whose scores are written into the cells


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

    marks: {x: name} of upright lines. limits: of the y axis, by default those of the points. bars: from 0, side by
    side, instead of points. instead: a sentence that says all of it, where there is one.
    """

    name: str
    title: str
    x: str
    y: str
    series: list[Series]
    about: str = ""
    marks: dict[float, str] = field(default_factory=dict)
    limits: tuple[float, float] | None = None
    bars: bool = False
    instead: str = ""

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
        low, high = (min(low, 0.0), max(high, 0.0)) if self.bars else (low, high)
        room = 0.0 if self.limits else 0.05 * (high - low) or 0.05 * abs(high) or 0.5
        side = 0.5 if self.bars else 0.03 * (max(xs) - min(xs)) or 0.5
        bottom = max(0.0, low - room) if low >= 0 else low - room
        return (min(xs) - side, max(xs) + side), (bottom, high + room)

    @cached_property
    def sentence(self) -> str:
        """What stands in place of the drawing: `instead`, or the one value that all points have; "" for a drawing."""
        values = {y for _, y in self.points}
        constant = len(values) == 1 and len(self.points) > 1 and not self.marks
        return self.instead or (f"{values.pop():.3g} throughout" if constant else "")


def svg(chart: Chart, identifier: str, *, alone: bool = False) -> str:
    """The chart as an <svg> with a title and a description; `alone`: as a file of its own, with the style in it."""
    return picture_svg(chart_picture(chart, titled=alone), identifier, alone=alone)


def write_chart(chart: Chart, path: Path) -> None:
    """The chart as .svg or .png, by the file's name."""
    _write(chart_picture(chart, titled=True), path)


def write_matrix(
    scores: Sequence[Sequence[float | None]], tasks: Sequence[str], path: Path, title: str, *, lower: bool
) -> None:
    """A heat map as .svg or .png: tasks down, what was learned across; a stronger colour is a better score."""
    _write(matrix_picture(scores, tasks, title, lower=lower), path)


def _write(picture: Picture, path: Path) -> None:
    text = write_picture(picture, path)
    if text is not None:
        write_text(path, text)


def chart_picture(chart: Chart, *, titled: bool = False) -> Picture:
    """Axes, marks, series and legend; titled: with the title above."""
    shapes: list[Shape] = [*_axes(chart), *_marks(chart)]
    for place, series in enumerate(chart.series):
        shapes += _bars(chart, series, place) if chart.bars else _drawn(chart, series, place)
    columns = 2 if max(len(series.name) for series in chart.series) <= SHORT_NAME else 1
    height = HEIGHT + LEGEND * math.ceil(len(chart.series) / columns)
    shapes += _legend(chart, columns)
    shapes += [Label(12, -4, chart.title)] * titled
    return Picture(WIDTH, height, chart.title, chart.about, shapes, LEGEND * titled)


def matrix_picture(
    scores: Sequence[Sequence[float | None]], tasks: Sequence[str], title: str, *, lower: bool
) -> Picture:
    """A cell for each score, crossed out where there is none; numbers where they have room."""
    known = [score for row in scores for score in row if score is not None]
    low, high = min(known), max(known)
    numbered, (wide, high_cell) = len(tasks) <= MOST_NUMBERED, CELL
    width = wide if numbered else max(6, 960 // len(scores))
    names = [name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…" for name in tasks]
    left, top = max(map(text_width, names)) + 16, 64
    shapes: list[Shape] = [Label(8, 20, title), Label(left, 42, "tasks learned", faint=True)]
    every = 1 if numbered else math.ceil(len(scores) / MOST_NUMBERED)
    shapes += [
        Label(left + width * (t + 0.5), top - 6, str(t + 1), "middle", faint=True) for t in range(0, len(scores), every)
    ]
    for i, name in enumerate(names):
        y = top + high_cell * i
        shapes.append(Label(left - 8, y + 18, name, "end"))
        for t, row in enumerate(scores):
            x, score = left + width * t, row[i]
            if score is None:
                shapes.append(Line((x + 1, y + high_cell - 1), (x + width - 1, y + 1)))
                continue
            share = (score - low) / (high - low) if high > low else 1.0
            hint = f"{tasks[i]} after {t + 1}: {score:.3f}"
            better = 1 - share if lower and high > low else share
            shapes.append(Bar(x + 1, y + 1, width - 2, high_cell - 2, share=better, hint=hint))
            shapes += [Label(x + width / 2, y + 18, format_number(score, 2), "middle")] * numbered
    ends = (high, low) if lower else (low, high)
    bottom = top + high_cell * len(tasks) + 24
    key = f"from {ends[0]:.3f} (worst) to {ends[1]:.3f} (best); a stroke: not measured"
    shapes.append(Label(8, bottom, key, faint=True))
    across = max(left + width * len(scores) + 8, text_width(title) + 16, text_width(key) + 16)
    return Picture(math.ceil(across), bottom + 12, title, key, shapes)


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


def _axes(chart: Chart) -> list[Shape]:
    (left, right), (low, high) = chart.ranges
    shapes: list[Shape] = []
    for y in ticks(low, high, 5):
        _, down = _place(chart, left, y)
        shapes.append(Line((LEFT, down), (WIDTH - RIGHT, down)))
        shapes.append(Label(LEFT - 8, down + 5, f"{y:g}", "end", faint=True))
    for x in ticks(left, right, 7):
        if chart.whole and x != int(x):
            continue
        across, _ = _place(chart, x, low)
        shapes.append(Label(across, HEIGHT - BOTTOM + 19, f"{x:g}", "middle", faint=True))
    shapes.append(Label((LEFT + WIDTH) / 2, HEIGHT - 12, chart.x, "middle"))
    shapes.append(Label(14, (TOP + HEIGHT - BOTTOM) / 2, chart.y, "middle", turned=True))
    return shapes


def _marks(chart: Chart) -> list[Shape]:
    places = ((_place(chart, x, 0)[0], name) for x, name in chart.marks.items())
    return [Line((x, TOP), (x, HEIGHT - BOTTOM), "mark", name) for x, name in places]


def _look(series: Series, place: int) -> tuple[int, int]:
    """Numbers of a series' colour and shape."""
    colour, shape = (place if own is None else own for own in (series.colour, series.shape))
    return colour % len(LIGHT), shape % len(SHAPES)


def _drawn(chart: Chart, series: Series, place: int) -> list[Shape]:
    colour, shape = _look(series, place)
    parts: list[list[tuple[float, float]]] = [[]]
    points: list[Shape] = []
    for x, y in zip(series.x, series.y, strict=True):
        if y is None:
            parts.append([])
            continue
        across, down = _place(chart, x, y)
        parts[-1].append((across, down))
        hint = f"{series.name}: {y:.4g} at {x:g}" if series.line else ""
        points += [Point(across, down, shape, colour, hint)] * series.dots
    curves = [part for part in parts if part]
    line: list[Shape] = [Curve(curves, colour, series.dash)] if series.line and curves else []
    return line + points


def _bars(chart: Chart, series: Series, place: int) -> list[Shape]:
    """Bars from 0; those of one x stand side by side, in the order of the series."""
    (left, right), _ = chart.ranges
    unit = (WIDTH - LEFT - RIGHT) / (right - left)
    width = round(0.8 * unit / len(chart.series), 1)
    shapes: list[Shape] = []
    for x, y in zip(series.x, series.y, strict=True):
        if y is not None:
            across, down = _place(chart, x, y)
            _, zero = _place(chart, x, 0)
            start = round(across - 0.4 * unit + place * width, 1)
            hint = f"{series.name}: {y:.4g} at {x:g}"
            height = round(abs(down - zero), 1)
            shapes.append(Bar(start, min(down, zero), width, height, _look(series, place)[0], hint=hint))
    return shapes


def _legend(chart: Chart, columns: int) -> list[Shape]:
    shapes: list[Shape] = []
    width = (WIDTH - 12) / columns
    for place, series in enumerate(chart.series):
        x, y = 12 + width * (place % columns), HEIGHT + LEGEND * (place // columns) + 6
        colour, shape = _look(series, place)
        if chart.bars:
            shapes.append(Bar(x + 8, y - 6, 12, 12, colour))
        else:
            shapes += [Curve([[(x, y), (x + 28, y)]], colour, series.dash)] * series.line
            shapes += [Point(x + 14, y, shape, colour)] * series.dots
        shapes.append(Label(x + 36, y + 5, series.name))
    return shapes
