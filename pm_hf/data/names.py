"""Names of labels and tasks: what is seen of them, which look alike, which no folder can have."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from decimal import Decimal

from pm_hf.errors import InputError

_NUMBER = re.compile(r"[+-]?[0-9]{1,20}(\.[0-9]{1,20})?", re.ASCII)
LONGEST_NAME = 240  # bytes of a task's name; a folder task-NN-NAME has at most 255


def check_named(names: Sequence[str], what: str) -> None:
    """InputError for a name of which nothing is seen."""
    empty = [name for name in set(names) if not visible(name)]
    if empty:
        row = min(names.index(name) for name in empty)
        raise InputError(f"{what} is empty in row {row}" + (f" ({ascii(names[row])})" if names[row] else ""))


def visible(text: str) -> bool:
    """Whether anything of a text is seen: not blanks, control and zero-width characters alone."""
    return any(map(_is_seen, text))


def look_alikes(names: Iterable[str]) -> list[list[str]]:
    """Names that differ only in blanks, case, characters that are not seen or Unicode form, or in how a number is
    written, in groups."""
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
        key = "".join(filter(_is_seen, folded))
        groups.setdefault(str(Decimal(key).normalize()) if _NUMBER.fullmatch(key) else key, []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def look_alikes_in_words(names: Iterable[str]) -> str:
    """The first groups of `look_alikes` as text, "" for none; escaped, so that they can be told apart."""
    return _in_words(look_alikes(names))


def meant(strange: Sequence[str], known: Iterable[str]) -> str:
    """What strange names may have been meant for; "" where that is not seen."""
    groups = look_alikes([*strange, *sorted(known)]) if strange else []
    pairs = _in_words([group for group in groups if set(group) & set(strange)])
    return f" (they differ only in blanks, case or form: {pairs})" if pairs else ""


def _in_words(groups: Sequence[Sequence[str]]) -> str:
    more = f" (and {len(groups) - 5} more)" if len(groups) > 5 else ""
    return "; ".join(" and ".join(map(ascii, group)) for group in groups[:5]) + more


def name_problems(name: str) -> list[str]:
    """What keeps a task's name from being a part of a folder's, which `pm_hf.runs.paths` makes of it."""
    held = sum(len(character.encode(errors="replace")) if character.isalnum() else 1 for character in name)
    problems = [f"a task's name holds nothing to read: {ascii(name)}"] * (not visible(name))
    problems += [f"a task's name of {held} bytes, {name[:40]!r}…, is longer than {LONGEST_NAME}"] * (
        held > LONGEST_NAME
    )
    odd = next((character for character in name if character == "\0" or "\ud800" <= character <= "\udfff"), None)
    return problems + ([f"task {ascii(name)}: no name has the character {odd!a}"] if odd else [])


def _is_seen(character: str) -> bool:
    return not character.isspace() and unicodedata.category(character) not in ("Cc", "Cf")
