"""The answer of the report page without the page: for a terminal, and for programs."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import stdev
from typing import Any

from pm_hf.errors import InputError
from pm_hf.reports.page import AVERAGES, Cell, answer_table
from pm_hf.reports.verdict import SURE, Group, difference, group_runs, paired_by, verdict
from pm_hf.runs.records import Report, read_runs
from pm_hf.text import text_table

BEST = "*"  # behind the best value of a column, which the page underlines


def compare_runs(runs: Sequence[str | Path]) -> list[Group]:
    """Finished runs (folders, folders of several seeds, report.json files), those that differ in the seed alone as one.

    InputError for what is no run, and for runs of different streams: other tasks, classes or numbers of test rows.
    """
    first, *others = reports = read_runs(runs)
    differing = [(run, what) for run in others if (what := _other_stream(first, run)) is not None]
    problems = [f"{first.folder} and {run.folder} {what}" for run, what in differing]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise InputError(f"runs of different streams have no common answer: {problems[0]}{more}; compare those of one")
    return group_runs(reports)


def _other_stream(left: Report, right: Report) -> str | None:
    """In what the streams of two runs differ, None where they are the same; the order of the tasks is the runs' own."""
    ours, theirs = (set(run.tasks) for run in (left, right))
    if ours != theirs:
        mine, others = sorted(ours - theirs), sorted(theirs - ours)
        sides = [
            f"only the {which} has {', '.join(of[:3])}" for which, of in (("first", mine), ("second", others)) if of
        ]
        return f"have different tasks: {'; '.join(sides)}"
    if left.classes and right.classes:
        task = next((task for task in left.classes if left.classes[task] != right.classes.get(task)), None)
        if task is not None:
            return f"have different classes in task {task}"
    rows = [dict(zip(run.tasks, run.test_rows, strict=False)) for run in (left, right)]
    task = next((task for task in rows[0] if task in rows[1] and rows[0][task] != rows[1][task]), None)
    return None if task is None else f"have {rows[0][task]} and {rows[1][task]} test rows in task {task}"


def comparison_text(groups: Sequence[Group]) -> str:
    """The sentences and the table as lines."""
    table = answer_table(groups)
    rows = [[name, *map(_plain, cells)] for name, *cells in table.rows]
    caption = table.caption.replace("Underlined", f"{BEST} marks")
    return "\n".join([*verdict(groups), "", *text_table([list(table.header), *rows]), "", f"{caption}."])


def _plain(cell: Cell) -> str:
    return f"{cell.text} {BEST}" if cell.best else cell.text


def comparison_content(groups: Sequence[Group]) -> dict[str, Any]:
    """The same as JSON holds it: every method's averages by seed, every pair's difference with its standard error."""
    first = groups[0].runs[0]
    known = [group for group in groups if group.values("ACC")]
    return {
        "metric": first.metric,
        "lower_is_better": first.lower_is_better,
        "tasks": first.titles,
        "verdict": verdict(groups),
        "methods": [_method(group) for group in groups],
        "differences": [_difference(left, right) for left, right in combinations(known, 2)],
    }


def _method(group: Group) -> dict[str, Any]:
    seconds = [run.seconds for run in group.runs]
    return {
        "label": group.label,
        "method": group.runs[0].method,
        "joint": group.joint,
        "control": group.control,
        "seeds": [run.seed for run in group.runs],
        "runs": [str(run.folder) for run in group.runs],
        **{key: _spread(group.values(key), group.mean(key)) for key in AVERAGES},
        "seconds": seconds,
    }


def _spread(values: Sequence[float], mean: float | None) -> dict[str, Any]:
    """sd: standard deviation over the seeds, null for one."""
    return {"mean": mean, "sd": stdev(values) if len(values) > 1 else None, "values": list(values)}


def _difference(left: Group, right: Group) -> dict[str, Any]:
    """ACC of left less that of right; more_than_error: by more than two standard errors, null where none is known."""
    delta, error = difference(left, right)
    return {
        "left": left.label,
        "right": right.label,
        "difference": delta,
        "standard_error": error,
        "paired_by": paired_by(left, right),
        "more_than_error": None if error is None else abs(delta) > SURE * error,
    }
