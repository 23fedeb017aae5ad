"""Numbers and tables as text, the same wherever they are shown."""

from collections.abc import Sequence

NO_VALUE = "–"


def format_number(value: float | None, digits: int = 3) -> str:
    """A number with so many decimals; a dash where there is none."""
    return NO_VALUE if value is None else f"{value:.{digits}f}"


def format_metric(metric: str) -> str:
    """A metric's name in words: `bits_per_byte` as bits per byte; what a run is judged by is called accuracy."""
    return "accuracy" if metric == "class_incremental" else metric.replace("_", " ")


def text_table(rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,), indent: str = "") -> list[str]:
    """Lines of a table, columns below each other and two spaces apart; those numbered in `left` start at the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        padded = [text.ljust(w) if column in left else text.rjust(w) for column, (text, w) in enumerate(cells)]
        lines.append((indent + "  ".join(padded)).rstrip())
    return lines
