"""The one error that bad input gets."""

from pm_hf.text import printable


class InputError(ValueError):
    """Input that cannot be used: the message says what, what was expected, what was found, and the way out.

    It is raised before any work starts. The command line prints it as one line and exits with code 2. The message may
    quote names and values from files: it is made printable, see pm_hf.text.printable.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)))


def raise_all(problems: list[str], subject: str) -> None:
    """Raise one InputError that lists every problem found; return if there is none."""
    if len(problems) == 1:
        raise InputError(f"{subject}: {problems[0]}")
    if problems:
        raise InputError(f"{subject}: {len(problems)} problems: " + "; ".join(problems))
