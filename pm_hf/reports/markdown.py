"""Markdown of texts that come from files: tables, code spans, code blocks."""

import re
from collections.abc import Iterable, Sequence

from pm_hf.text import format_number, printable, printable_lines


def table_lines(header: Sequence[str], rows: Iterable[Sequence]) -> list[str]:
    """A Markdown table; numbers with three decimals, None as a dash."""
    lines = [" | ".join(map(escaped, header)), " | ".join(["---", *["---:"] * (len(header) - 1)])]
    lines += [" | ".join(escaped(x) if isinstance(x, str) else format_number(x) for x in row) for row in rows]
    return [f"| {line} |" for line in lines]


class Markup(str):
    """Markdown of ours: not escaped."""


def escaped(text: str) -> str:
    """Text that neither ends a table's cell nor starts markup."""
    if isinstance(text, Markup):
        return text
    return re.sub(r"([\\`|<>\[\]*_&~$!#])", r"\\\1", printable(" ".join(text.split())))


def code_span(text: str) -> Markup:
    """A code span of any text, inside a table too."""
    shown = printable(" ".join(str(text).split())).replace("|", "\\|")
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence, room = "`" * (longest + 1), " " if longest else ""
    return Markup(f"{fence}{room}{shown}{room}{fence}")


def code_block(kind: str, text: str) -> str:
    """A code block of any text: no line of it ends the block."""
    shown = printable_lines(text)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    return f"{fence}{kind}\n{shown}\n{fence}"
