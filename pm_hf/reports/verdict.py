"""What several runs say together: seeds of one method as one, differences with their error, and the answer in words."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from pm_hf.config.presets import PRESETS
from pm_hf.runs.records import CLASS_INCREMENTAL, Report
from pm_hf.runs.right_rows import paired_difference, same_rows
from pm_hf.text import format_metric, format_number

NOT_COMPARED = ("seed", "output_dir", "data_dir")  # settings that make no other method
SURE = 2.0  # standard errors above which a difference is called more than the error


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seeds alone."""

    label: str
    runs: Sequence[Report]

    @property
    def title(self) -> str:
        """The label, with the number of seeds where there are several."""
        return self.label if len(self.runs) == 1 else f"{self.label} ({len(self.runs)} seeds)"

    @property
    def joint(self) -> bool:
        """Whether all tasks were trained at once, which the methods are measured against."""
        return self.runs[0].joint

    @property
    def control(self) -> bool:
        """Whether nothing but the head was computed."""
        first = self.runs[0]
        preset = PRESETS.get(first.method)
        return first.config.get("trains", None if preset is None else preset["trains"]) is False

    def values(self, key: str) -> list[float]:
        """A metric of the runs that have it: ACC, AAA, BWT or forgetting."""
        values = (run.metrics.get(key) for run in self.runs)
        return [value for value in values if value is not None]

    def mean(self, key: str) -> float | None:
        """Its mean over the seeds."""
        values = self.values(key)
        return fmean(values) if values else None

    def shown(self, key: str, digits: int = 3) -> str:
        """The mean, and of several seeds the standard deviation."""
        values = self.values(key)
        spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
        return format_number(self.mean(key), digits) + spread

    @property
    def error(self) -> float | None:
        """Standard error of ACC: over the seeds, or with one seed that of the test rows, √(Σ p(1−p)/n)/tasks; None
        where neither is known."""
        values = self.values("ACC")
        if len(values) > 1:
            return stdev(values) / math.sqrt(len(values))
        run = self.runs[0]
        last, rows = run.scores[-1], run.test_rows
        if run.metric != CLASS_INCREMENTAL or len(rows) < len(last) or None in last or 0 in rows[: len(last)]:
            return None
        return math.sqrt(sum(p * (1 - p) / n for p, n in zip(last, rows, strict=False) if p is not None)) / len(last)


def group_runs(runs: Sequence[Report]) -> list[Group]:
    """The runs in their order, seeds of the same settings as one group."""
    keyed: dict[str, list[Report]] = {}
    for run in runs:
        settings = {key: value for key, value in run.config.items() if key not in NOT_COMPARED}
        keyed.setdefault(json.dumps([run.method, settings], sort_keys=True, default=str), []).append(run)
    parts = [
        part
        for alike in keyed.values()
        for part in ([alike] if len({run.seed for run in alike}) == len(alike) else [[run] for run in alike])
    ]
    methods = [part[0].method for part in parts]
    groups = []
    for number, part in enumerate(parts, start=1):
        method = part[0].method
        if len(part) == 1:
            label = part[0].label if methods.count(method) > 1 or not part[0].label else method
        else:
            label = f"{method} ({number})" if methods.count(method) > 1 else method
        groups.append(Group(label, part))
    return groups


def difference(left: Group, right: Group) -> tuple[float, float | None]:
    """(ACC of left − ACC of right, its standard error): of the differences where both have the same seeds, of one seed
    where both scored the same test rows; else of two independent means; None where one has no error."""
    delta, paired = (left.mean("ACC") or 0.0) - (right.mean("ACC") or 0.0), paired_by(left, right)
    if paired == "seeds":
        first, second = (_of_seeds(group) for group in (left, right))
        return delta, stdev([first[seed] - second[seed] for seed in first]) / math.sqrt(len(first))
    if paired == "rows":
        return delta, paired_difference(left.runs[0].right, right.runs[0].right)[1]
    errors = left.error, right.error
    return delta, None if None in errors else math.hypot(*(error for error in errors if error is not None))


def paired_by(left: Group, right: Group) -> Literal["seeds", "rows"] | None:
    """What the error of a difference is paired by: several seeds that both have, of one seed the test rows that both
    scored; None where the two are independent."""
    if len(left.runs) > 1 and _of_seeds(left).keys() == _of_seeds(right).keys():
        return "seeds"
    alone = len(left.runs) == len(right.runs) == 1
    return "rows" if alone and same_rows(left.runs[0].right, right.runs[0].right) else None


def _of_seeds(group: Group) -> dict[int, float]:
    return {run.seed: run.metrics["ACC"] for run in group.runs}


def ranked(groups: Sequence[Group]) -> list[Group]:
    """The groups that compete, best first: all but joint training."""
    lower = groups[0].runs[0].lower_is_better
    compete = [group for group in groups if not group.joint and group.values("ACC")]
    return sorted(compete, key=lambda group: (group.mean("ACC") or 0.0) * (1 if lower else -1))


def verdict(groups: Sequence[Group]) -> list[str]:
    """Which method, how good, is it more than the error, what was forgotten: one sentence each."""
    order = ranked(groups)
    if not order:
        return []
    first, *others = order
    name, second = format_metric(first.runs[0].metric), next(iter(others), None)
    source = f"{len(first.runs)} seeds" if len(first.runs) > 1 else "one seed"
    if first.error is not None:
        source += f", standard error {first.error:.3f}" + " by its test rows" * (len(first.runs) == 1)
    known = f"{name} {first.shown('ACC')} at the end, the mean of {_count(len(first.runs[0].tasks), 'task')}"
    sentences = [f"{first.label} {'has' if second is None else 'leads with'} {known} ({source})."]
    sentences += [] if second is None else [f"{_compared(first, second)}."]
    sentences += [f"{_compared(first, group)}." for group in others[1:] if group.control]
    sentences += [f"{_compared(first, group)}." for group in groups if group.joint]
    if first.control and second is not None:
        sentences.append("As it trains nothing, the training of the others has not earned its time.")
    return [*sentences, *_forgotten(first, name)]


def _compared(left: Group, right: Group) -> str:
    delta, error = difference(left, right)
    kind = "the control " if right.control else "joint training, " if right.joint and right.label != "joint" else ""
    named = f"{left.label} is {abs(delta):.3f} {'below' if delta < 0 else 'above'} {kind}{right.label}"
    told = f"{named} ({right.shown('ACC')})"
    if error is None:
        return f"{told}; whether that is more than the error takes several seeds"
    if abs(delta) <= SURE * error:
        return f"{told}: no more than twice the standard error ({error:.3f}), so no difference is shown"
    better = (delta < 0) == left.runs[0].lower_is_better
    return f"{told}, {'better' if better else 'worse'} by more than twice the standard error ({error:.3f})"


def _forgotten(group: Group, name: str) -> list[str]:
    mean = group.mean("forgetting")
    if mean is None:
        return []
    if mean <= 0:
        return [f"{group.label} forgot nothing on average ({mean:.3f})."]
    lost: dict[str, list[float]] = {}
    for run in group.runs:
        for task, value in zip(run.titles, run.forgetting, strict=True):
            lost.setdefault(task, []).extend([] if value is None else [value])
    means = {task: fmean(values) for task, values in lost.items() if values}
    worst = max(means, key=lambda task: means[task])
    most = f", most on {worst} ({means[worst]:.3f})" if len(means) > 1 else ""
    return [f"Until the end {group.label} lost {mean:.3f} of a task's best {name} on average{most}."]


def _count(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
