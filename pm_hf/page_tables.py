"""Tables of the page, with a heading for every column and row."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

NONE = "–"
LONG = 24  # characters of a name that gets a wide column


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table; header cells and a row's first cell are text, the others come from `cell`."""
    heads = "".join(f'<th scope="col">{escape(text)}</th>' for text in header)
    body = "".join(f"<tr>{_row_head(row[0])}{''.join(row[1:])}</tr>\n" for row in rows)
    reach = f' role="region" tabindex="0" aria-label="{escape(caption)}"' if len(header) > 8 else ""
    start = f'<table class="{kind}">' if kind else "<table>"
    return (
        f'<div class="wide"{reach}>{start}<caption>{escape(caption)}</caption><thead><tr>{heads}</tr></thead>'
        f"<tbody>\n{body}</tbody></table></div>\n"
    )


def cell(value: Any, share: float | None = None, digits: int = 3) -> str:
    """One cell; share: how good the value is, from 0 to 1, as a colour behind the number."""
    text = value if isinstance(value, str) else _number(value, digits)
    colour = "" if share is None else f' class="heat" style="--v:{share:.3f}"'
    return f"<td{colour}>{escape(text)}</td>"


def _row_head(text: str) -> str:
    long = ' class="long"' if len(text) > LONG else ""
    return f'<th scope="row"{long}>{escape(text)}</th>'


def _number(value: float | None, digits: int = 3) -> str:
    return NONE if value is None else f"{value:.{digits}f}"
