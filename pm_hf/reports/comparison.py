"""Finished runs side by side in a terminal: `pm-hf compare`."""

from collections.abc import Sequence
from typing import Any

from pm_hf.errors import InputError
from pm_hf.reports.verdict import Group, difference, group_runs, verdict
from pm_hf.runs.records import Report
from pm_hf.text import printable, text_table

AVERAGES = ("ACC", "AAA", "BWT", "forgetting")


def compare(runs: Sequence[Report]) -> list[str]:
    """The answer in words, then a line for each method, its seeds as mean ± standard deviation.

    The differences to joint training and to the control have their standard error where it is known, see
    `pm_hf.reports.verdict.difference`. Raises InputError for runs of different streams.
    """
    groups = _groups(runs)
    others = _others(groups)
    rows = [["run", "seeds", *AVERAGES, *(f"minus {name}" for name in others)]]
    for group in groups:
        shown = [group.shown(key) for key in AVERAGES]
        rows.append([group.label, str(len(group.runs)), *shown, *(_minus(group, other) for other in others.values())])
    return [*verdict(groups), "", *map(printable, text_table(rows))]


def compared(runs: Sequence[Report]) -> list[dict[str, Any]]:
    """The same for a machine: of each method its seeds, folders, the mean of each average and the values it is of, and
    {other: {difference, error}}."""
    groups = _groups(runs)
    return [
        {
            "run": group.label,
            "method": group.runs[0].method,
            "seeds": [run.seed for run in group.runs],
            "folders": [str(run.folder) for run in group.runs],
            **{key: {"mean": group.mean(key), "values": group.values(key)} for key in AVERAGES},
            "minus": {
                name: dict(zip(("difference", "error"), difference(group, other), strict=True))
                for name, other in _others(groups).items()
                if other is not group and group.values("ACC") and other.values("ACC")
            },
        }
        for group in groups
    ]


def _groups(runs: Sequence[Report]) -> list[Group]:
    first = runs[0]
    for run in runs[1:]:
        if sorted(run.tasks) != sorted(first.tasks):
            raise InputError(
                f"runs of one stream are compared: {first.folder} has the tasks {', '.join(first.tasks)}, {run.folder} "
                f"has {', '.join(run.tasks)}"
            )
    return group_runs(runs)


def _others(groups: Sequence[Group]) -> dict[str, Group]:
    """Joint training and the control, where they are among several."""
    joint = next((group for group in groups if group.joint), None)
    control = next((group for group in groups if group.control), None)
    named = {"joint": joint, "control": control}
    return {name: group for name, group in named.items() if group is not None and len(groups) > 1}


def _minus(group: Group, other: Group) -> str:
    if group is other or not group.values("ACC") or not other.values("ACC"):
        return ""
    delta, error = difference(group, other)
    return f"{delta:+.3f}" + ("" if error is None else f" ± {error:.3f}")
