"""The one error that bad input gets."""


class InputError(ValueError):
    """Input that cannot be used: the message says what, what was expected, what was found, and the way out.

    It is raised before any work starts. The command line prints it as one line and exits with code 2.
    """


def raise_all(problems: list[str], subject: str) -> None:
    """Raise one InputError that lists every problem found; return if there is none."""
    if len(problems) == 1:
        raise InputError(f"{subject}: {problems[0]}")
    if problems:
        raise InputError(f"{subject}: {len(problems)} problems: " + "; ".join(problems))
