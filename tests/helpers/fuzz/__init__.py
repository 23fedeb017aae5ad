"""Generated input for the four readers: settings, rows, adapter folders, files of a run.

One module a reader. Each has `CASES`, a strategy of hypothesis whose values are plain Python (their repr is enough to
repeat one), and `judge(case, folder)`, which lets the reader read a case in an empty folder and returns RIGHT or
REFUSED. SilentError is a result that a slow, obvious reference does not have, or valid input that is refused; any
other exception is a traceback that a user would see. The default tests and `make fuzz` use the same two.
"""

from collections.abc import Callable
from typing import Any

from pm_hf.errors import InputError

RIGHT, REFUSED = "right", "refused"


class SilentError(AssertionError):
    """A reader gave something else than what the input says, without a word."""


def check(fine: bool, *what: Any) -> None:
    """SilentError with what is wrong."""
    if not fine:
        raise SilentError(" ".join(f"{part}"[:600] for part in what))


def read(call: Callable[[], Any]) -> tuple[Any, str | None]:
    """(what a reader gives, None), or (None, its InputError's one line)."""
    try:
        return call(), None
    except InputError as error:
        said = str(error)
    check(said != "" and len(said.splitlines()) == 1, "not one line:", repr(said))
    check("\x1b" not in said, "a terminal's command:", repr(said))
    return None, said
