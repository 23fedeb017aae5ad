"""The charts of runs side by side: what is drawn of report.json and step.json."""

import math
from collections.abc import Callable
from statistics import fmean

from pm_hf.charts import Chart, Series
from pm_hf.report import BITS, CHOICE, INSIDE
from pm_hf.saved_runs import SavedRun

DOTS = 600  # loss points drawn of a run
NAMES = {CHOICE: "accuracy", INSIDE: "accuracy inside the task's own classes", BITS: "bits per byte"}
FACTORS: tuple[tuple[str, int, Callable[[float], bool]], ...] = (  # (name, shape and colour, belongs)
    ("1", 0, lambda factor: factor == 1),
    ("above 1", 2, lambda factor: factor > 1),
    ("below 1", 3, lambda factor: factor < 1),
)
COSTS = (
    ("time-of-each-task", "seconds", "Time of each task", "seconds"),
    ("peak-memory-of-the-process", "process_peak_memory_mb", "Peak memory of the process up to each task", "MiB"),
    ("truncation-error-of-each-merge", "merge_error", "Truncation error of each merge", "relative error"),
)


def charts(runs: list[SavedRun]) -> list[Chart]:
    """Every chart that the runs have the numbers for; a run has one colour and one shape in all of them."""
    name = metric_name(runs[0].metric)
    mean, lost = f"mean {name}", f"{name} lost"
    means = [_means(run, place) for place, run in enumerate(runs)]
    forgotten = _of_runs(runs, [run.forgetting for run in runs], line=False)
    about = "A positive number is what was lost since the task's best score."
    found = [
        Chart("score-after-each-task", "Mean score on the tasks seen", "tasks learned", mean, means),
        Chart("forgetting", "Forgetting of each task", "task", lost, forgotten, about),
        _coefficient_chart(runs),
        *(_loss_chart(run, place) for place, run in enumerate(runs, start=1)),
    ]
    for file, key, title, unit in COSTS:
        values = [[step.get(key) for step in run.steps] for run in runs]
        found.append(Chart(file, title, "task", unit, _of_runs(runs, values)))
    return [chart for chart in found if chart.points]


def _of_runs(runs: list[SavedRun], values: list[list[float | None]], *, line: bool = True) -> list[Series]:
    """One series a run, for the runs that have a value."""
    return [
        Series(run.label, _count(len(y)), y, line=line, colour=place, shape=place)
        for place, (run, y) in enumerate(zip(runs, values, strict=True))
        if any(value is not None for value in y)
    ]


def _means(run: SavedRun, place: int) -> Series:
    """The mean after each task; of a joint training, which has one, a level to compare with."""
    last = run.means[-1]
    name = run.label if last is None else f"{run.label} ({last:.3f})"
    if run.joint:
        count = len(run.tasks)
        return Series(name, _count(count), run.means[-1:] * count, colour=place, dash=1, dots=False)
    return Series(name, _count(len(run.means)), run.means, colour=place, shape=place)


def _coefficient_chart(runs: list[SavedRun]) -> Chart:
    used = [[None if c is None or run.joint else c["used"] for c in run.coefficients] for run in runs]
    series = _of_runs(runs, used)
    if series:
        longest = max(len(one.x) for one in series)
        inverse = [1 / t for t in _count(longest)]
        series.append(Series("1/t", _count(longest), inverse, colour=7, shape=5, dash=1))
    return Chart("coefficients", "Coefficient of each task, and 1/t", "task", "coefficient", series)


def _loss_chart(run: SavedRun, place: int) -> Chart:
    points, ends = _loss_points(run)
    series = []
    for name, shape, belongs in FACTORS:
        chosen = [point for point in points if belongs(point[2])]
        distinct = {round(point[2], 6) for point in chosen}
        shown = f"factor {distinct.pop():g}" if len(distinct) == 1 else f"factor {name}"
        if chosen:
            x, y = [p[0] for p in chosen], [p[1] for p in chosen]
            series.append(Series(shown, x, y, line=False, colour=shape, shape=shape))
    if points:
        series.append(_smooth(points))
    title = f"Training loss of {run.label}"
    about = "Each point is one step, its shape the factor its perturbation drew; upright lines are ends of tasks."
    return Chart(f"loss-{place}", title, "optimizer step", "training loss", series, about, ends)


def _loss_points(run: SavedRun) -> tuple[list[list[float]], dict[float, str]]:
    """([step of the stream, loss, factor, the task's first step], {last step of a task: its name}), thinned out."""
    points, ends, begun = [], {}, 0
    for name, step in zip(run.learned, run.steps, strict=True):
        logged = [(at, loss, factor) for at, loss, factor in step.get("log", []) if loss is not None]
        points += [[begun + at, loss, factor, begun] for at, loss, factor in logged]
        begun += step.get("optimizer_steps", 0)
        ends[float(begun)] = f"end of {name}"
    return points[:: math.ceil(len(points) / DOTS) or 1], dict(list(ends.items())[:-1])


def _smooth(points: list[list[float]]) -> Series:
    """Mean of the neighbours within the same task, a gap between two tasks."""
    reach = max(1, len(points) // 60)
    x: list[float] = []
    y: list[float | None] = []
    for i, (at, _, _, task) in enumerate(points):
        if i and points[i - 1][3] != task:
            x.append(at)
            y.append(None)
        x.append(at)
        y.append(fmean(p[1] for p in points[max(0, i - reach) : i + reach + 1] if p[3] == task))
    return Series(f"mean of {2 * reach + 1} points", x, y, colour=7, dots=False)


def _count(count: int) -> list[float]:
    return [float(i + 1) for i in range(count)]


def metric_name(metric: str) -> str:
    """How a metric is called on the page."""
    return NAMES.get(metric, metric.replace("_", " "))
