"""Generated input for the four readers: settings, rows, adapter folders, files of a run.

One module a reader. Each has `CASES`, a strategy of hypothesis whose values are plain Python (their repr is enough to
repeat one), and `judge(case, folder)`, which lets the reader read a case in an empty folder and returns RIGHT or
REFUSED. SilentError is a result that a slow, obvious reference does not have, or valid input that is refused; any
other exception is a traceback that a user would see. The default tests and `make fuzz` use the same two.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck
from hypothesis import settings as budget

from pm_hf.errors import InputError

RIGHT, REFUSED = "right", "refused"


def few(count: int) -> budget:
    """So many cases, the same ones every time, for the default tests."""
    return budget(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )


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


def judged(reader: Any, case: Any) -> str:
    """What a reader's `judge` says of a case, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return reader.judge(case, Path(folder))
