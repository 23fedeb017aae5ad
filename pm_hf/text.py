"""Numbers, tables and foreign texts as text, the same wherever they are shown."""

import unicodedata
from collections.abc import Sequence

NO_VALUE = "–"


# Unicode categories that no terminal or page should get from a file: control and format characters (escape codes, line
# breaks, bidi controls), halves of pairs, line and paragraph separators, what is not assigned
UNSAFE_CATEGORIES = ("Cc", "Cf", "Cs", "Cn", "Zl", "Zp")


JOINERS = "\u200c\u200d"  # format characters that words and emoji are written with


def printable(text: str) -> str:
    """A text that may come from a file, as one line that is safe to print: what a terminal would obey instead of show,
    and what nobody could see, stands as \\x1b, \\u202e or \\U000e0041."""
    return text if text.isascii() and text.isprintable() else "".join(map(_escaped, text))


def printable_lines(text: str) -> str:
    """The same for a text of several lines."""
    return "\n".join(map(printable, text.split("\n")))


def _escaped(character: str) -> str:
    if character in JOINERS or unicodedata.category(character) not in UNSAFE_CATEGORIES:
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


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
