"""Shapes of a picture, and the two writers that draw them alike: SVG that adapts to light and dark, and PNG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape as html_escape
from pathlib import Path
from typing import Any

from pm_hf.text import printable

# of the series c0 … c7, on a light and on a dark ground
LIGHT = ("#0b5cad", "#b3450b", "#1c7a3e", "#8a2ba0", "#8a6100", "#c2185b", "#00727a", "#4a4f57")
DARK = ("#6db3f8", "#ff9d5c", "#66d08c", "#d998ec", "#e6bb4a", "#ff86b3", "#4fd0d8", "#b9c0c8")
INK, SOFT, RULE, BACK, BEST = "#1a1d21", "#5b6470", "#d5dae0", "#ffffff", "#7db4ee"
DARK_INK, DARK_SOFT, DARK_RULE, DARK_BACK, DARK_BEST = "#e8eaed", "#a8b0ba", "#3a4149", "#15181c", "#2469ac"
FAINTEST = 0.12  # of a heat map's colour: the lowest score is not white, as what was not measured is
FONT = 14  # pixels
SHAPES = "circle", "square", "up", "down", "diamond", "cross"
DASHES = "", "6 3", "2 2", "8 3 2 3"
PNG_DOTS, PNG_DASHES = 192, ("-", "--", ":", "-.")


def _variables(colours: Sequence[str]) -> str:
    return ";".join(f"--c{i}:{colour}" for i, colour in enumerate(colours))


STYLE = (
    f".chart{{--ink:{INK};--soft:{SOFT};--rule:{RULE};--ground:{BACK};--strong:{BEST};{_variables(LIGHT)};"
    f"font:{FONT}px system-ui,sans-serif;max-width:100%;height:auto}}\n"
    f"@media (prefers-color-scheme:dark){{.chart{{--ink:{DARK_INK};--soft:{DARK_SOFT};--rule:{DARK_RULE};"
    f"--ground:{DARK_BACK};--strong:{DARK_BEST};{_variables(DARK)}}}}}\n"
    ".chart text{fill:var(--ink)}.chart .tick{fill:var(--soft)}.chart .rule{stroke:var(--rule);stroke-width:1}\n"
    ".chart .mark{stroke:var(--soft);stroke-width:1;stroke-dasharray:2 3}\n"
    ".chart path{fill:none;stroke-width:2}.chart .dot{stroke-width:1.5}\n"
    + "".join(f".chart .c{i}{{stroke:var(--c{i});--own:var(--c{i})}}" for i in range(len(LIGHT)))
    + ".chart .full{fill:var(--own)}\n"
    ".chart .heat{fill:color-mix(in oklab,var(--strong) calc(var(--v)*100%),var(--ground))}"
)


@dataclass(frozen=True)
class Line:
    """A straight line; kind: rule, or mark (dashed), which has a name to be shown."""

    start: tuple[float, float]
    end: tuple[float, float]
    kind: str = "rule"
    hint: str = ""


@dataclass(frozen=True)
class Curve:
    """Lines through points, several where there are gaps; colour, dash: numbers in the palettes."""

    parts: Sequence[Sequence[tuple[float, float]]]
    colour: int
    dash: int = 0


@dataclass(frozen=True)
class Point:
    """A marker; shape: a number in SHAPES. hint: text that is shown when it is pointed at."""

    x: float
    y: float
    shape: int
    colour: int
    hint: str = ""
    size: float = 4


@dataclass(frozen=True)
class Bar:
    """A filled rectangle in the colour of a series, or, with `share` from 0 to 1, of a heat map."""

    x: float
    y: float
    width: float
    height: float
    colour: int = 0
    share: float | None = None
    hint: str = ""


@dataclass(frozen=True)
class Label:
    """A line of text; anchor: start, middle or end. faint: of an axis' numbers. turned: written upwards."""

    x: float
    y: float
    text: str
    anchor: str = "start"
    faint: bool = False
    turned: bool = False


Shape = Line | Curve | Point | Bar | Label


@dataclass(frozen=True)
class Picture:
    """Shapes on a ground of width × height pixels, and `above` more above it; title and about say what is seen."""

    width: int
    height: int
    title: str
    about: str
    shapes: Sequence[Shape]
    above: int = 0


def escape(text: str) -> str:
    """Text in HTML and XML, which know no control characters."""
    return html_escape(printable(text))


def write_picture(picture: Picture, path: Path) -> str | None:
    """The text of an .svg; a .png is written, at twice its pixels (needs matplotlib)."""
    if path.suffix == ".svg":
        return picture_svg(picture, path.stem, alone=True) + "\n"
    _write_png(picture, path)
    return None


def picture_svg(picture: Picture, identifier: str, *, alone: bool = False) -> str:
    """The picture as an <svg> with a title and a description; `alone`: as a file of its own, with the style in it."""
    head, height = 'xmlns="http://www.w3.org/2000/svg" ' if alone else "", picture.height + picture.above
    about = f"{picture.title}. {picture.about}".strip()
    parts = [
        f'<svg {head}class="chart" role="img" viewBox="0 {-picture.above} {picture.width} {height}" '
        f'width="{picture.width}" height="{height}" aria-labelledby="{identifier}-t {identifier}-d">',
        f'<title id="{identifier}-t">{escape(picture.title)}</title><desc id="{identifier}-d">{escape(about)}</desc>',
        f"<style>{STYLE}</style>" if alone else "",
        *map(_element, picture.shapes),
    ]
    return "\n".join([part for part in parts if part] + ["</svg>"])


def _element(shape: Shape) -> str:
    match shape:
        case Line((x1, y1), (x2, y2), kind, hint):
            line = f'<line class="{kind}" x1="{x1}" x2="{x2}" y1="{y1}" y2="{y2}"'
            return f"{line}>{_hint(hint)}</line>" if hint else f"{line}/>"
        case Curve(parts, colour, dash):
            dashes = f' stroke-dasharray="{DASHES[dash]}"' if dash else ""
            path = " ".join("M" + " L".join(f"{x} {y}" for x, y in part) for part in parts)
            return f'<path class="c{colour}"{dashes} d="{path}"/>'
        case Bar(x, y, width, height, colour, None, hint):
            place = f'x="{x}" y="{y}" width="{width}" height="{height}"'
            return f'<rect class="dot full c{colour}" {place}>{_hint(hint)}</rect>'
        case Bar(x, y, width, height, _, share, hint):
            place = f'x="{x}" y="{y}" width="{width}" height="{height}"'
            drawn = FAINTEST + (1 - FAINTEST) * (share or 0)
            return f'<rect class="heat" style="--v:{drawn:.3f}" fill="{_mixed(drawn)}" {place}>{_hint(hint)}</rect>'
        case Label(x, y, text, anchor, faint, turned):
            kind = ' class="tick"' if faint else ""
            turn = f' transform="rotate(-90 {x} {y})"' if turned else ""
            return f'<text{kind} x="{x}" y="{y}" text-anchor="{anchor}"{turn}>{escape(text)}</text>'
        case Point(x, y, shape_number, colour, hint, size):
            kind = f'class="dot full c{colour}"'
            if SHAPES[shape_number] == "circle":
                return f'<circle {kind} cx="{x}" cy="{y}" r="{size - 0.5}">{_hint(hint)}</circle>'
            corners = _corners(SHAPES[shape_number], size)
            listed = " ".join(f"{round(x + dx, 1)},{round(y + dy, 1)}" for dx, dy in corners)
            return f'<polygon {kind} points="{listed}">{_hint(hint)}</polygon>'


def _hint(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""


def _corners(shape: str, s: float) -> list[tuple[float, float]]:
    return {
        "square": [(-s, -s), (s, -s), (s, s), (-s, s)],
        "up": [(0, -s), (s, s), (-s, s)],
        "down": [(0, s), (s, -s), (-s, -s)],
        "diamond": [(0, -s - 1), (s + 1, 0), (0, s + 1), (-s - 1, 0)],
        "cross": [(-s, -s), (s, s), (0, 0), (s, -s), (-s, s), (0, 0)],
    }[shape]


def _mixed(share: float) -> str:
    """A heat map's colour on the light ground."""
    ends = ([int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in (BACK, BEST))
    return "#" + "".join(f"{round(back + share * (best - back)):02x}" for back, best in zip(*ends, strict=True))


def _write_png(picture: Picture, path: Path) -> None:
    """The same shapes at the same places, on the light ground."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle, Polygon, Rectangle

    size = picture.width / 96, (picture.height + picture.above) / 96
    figure = Figure(figsize=size, dpi=PNG_DOTS)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, picture.width), ylim=(picture.height, -picture.above))
    axes.set_axis_off()
    points, sides = 72 / 96, {"start": "left", "middle": "center", "end": "right"}
    look: dict[str, Any]
    for level, shape in enumerate(picture.shapes):
        match shape:
            case Line((x1, y1), (x2, y2), kind, _):
                look = {"color": RULE} if kind == "rule" else {"color": SOFT, "linestyle": ":"}
                axes.plot([x1, x2], [y1, y2], linewidth=points, zorder=level, **look)
            case Curve(parts, colour, dash):
                for part in parts:
                    look = {"color": LIGHT[colour], "linestyle": PNG_DASHES[dash]}
                    axes.plot(*zip(*part, strict=True), linewidth=2 * points, zorder=level, **look)
            case Bar(x, y, width, height, colour, share, _):
                filled = LIGHT[colour] if share is None else _mixed(FAINTEST + (1 - FAINTEST) * share)
                axes.add_patch(Rectangle((x, y), width, height, color=filled, linewidth=0, zorder=level))
            case Label(x, y, text, anchor, faint, turned):
                look = {"color": SOFT if faint else INK, "fontsize": FONT * points * 0.92, "zorder": level}
                look |= {"ha": sides[anchor], "va": "baseline", "rotation": 90 if turned else 0}
                # a name may have a $
                axes.text(x, y, printable(text), parse_math=False, rotation_mode="anchor", **look)
            case Point(x, y, number, colour, _, s):
                if SHAPES[number] == "circle":
                    axes.add_patch(Circle((x, y), s - 0.5, color=LIGHT[colour], zorder=level))
                else:
                    corners = [(x + dx, y + dy) for dx, dy in _corners(SHAPES[number], s)]
                    axes.add_patch(Polygon(corners, color=LIGHT[colour], zorder=level))
    figure.savefig(path)


def text_width(text: str) -> float:
    """About how many pixels a line of text takes."""
    return math.ceil(0.56 * FONT * len(text))
