"""The charts of runs side by side: what is drawn of report.json and step.json."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean

from pm_hf.reports.charts import Chart, Series, write_chart
from pm_hf.reports.verdict import Group, group_runs
from pm_hf.runs.records import CLASS_INCREMENTAL, COMPARED_COEFFICIENTS, TASK_INCREMENTAL, Report, TaskRecord
from pm_hf.text import format_metric

DRAWN = 1e-3  # difference of two coefficients that could be seen in a drawing
DOTS = 600  # loss points drawn of a run
FACTORS: tuple[tuple[str, int, Callable[[float], bool]], ...] = (  # (name, shape and colour, belongs)
    ("1", 0, lambda factor: factor == 1),
    ("above 1", 2, lambda factor: factor > 1),
    ("below 1", 3, lambda factor: factor < 1),
)


Cost = Callable[[TaskRecord], float | None]
COSTS: tuple[tuple[str, Cost, str, str, str], ...] = (  # (name, what of a record, title, unit, a sentence)
    (
        "time-of-each-task",
        lambda record: record.seconds,
        "Time of each task",
        "seconds",
        "Training, curvature, merge and scores together.",
    ),
    (
        "peak-memory-of-the-process",
        lambda record: record.process_peak_memory_mb,
        "Peak memory of the process up to each task",
        "MiB",
        "The largest resident memory since the process began, which another run before in the same process raises too.",
    ),
    (
        "truncation-error-of-each-merge",
        lambda record: record.merge_error,
        "Truncation error of each merge",
        "relative error",
        "What merge.max_rank cuts off, in relation to the norm of the merged update.",
    ),
)


def charts(runs: list[Report]) -> list[Chart]:
    """Every chart that the runs have the numbers for; seeds of one method are drawn as their mean, which has one colour
    and one shape in all of them."""
    groups, lost = group_runs(runs), f"{metric_name(runs[0].metric)} lost"
    forgotten = _of_groups(groups, lambda run: run.forgetting)
    about = "What each task lost since its best score; below zero it became better."
    drawn = [
        means_chart(groups),
        Chart("forgetting", "Forgetting of each task", "task", lost, forgotten, about, bars=True),
        _coefficient_chart(groups),
        *(_loss_chart(run, place) for place, run in enumerate(runs, start=1)),
    ]
    for file, cost, title, unit, about in COSTS:
        drawn.append(Chart(file, title, "task", unit, _of_groups(groups, partial(_costs, cost)), about))
    drawn += [chart for place, run in enumerate(runs, start=1) for chart in search_charts(run, place, len(runs))]
    drawn += [chart for place, run in enumerate(runs, start=1) for chart in line_charts(run, place, len(runs))]
    return [chart for chart in drawn if chart.points]


def means_chart(groups: Sequence[Group]) -> Chart:
    """Mean score on the tasks seen after each task, one line a group."""
    means = [_means(group, place) for place, group in enumerate(groups)]
    title, name = "Mean score on the tasks seen", metric_name(groups[0].runs[0].metric)
    about = "After each task, the mean over the tasks learned until then; it may fall as tasks are added."
    return Chart("score-after-each-task", title, "tasks learned", f"mean {name}", means, about)


def plot_means(runs: list[Report], path: Path) -> None:
    """That chart as a file, each run for itself and called by its method; accuracies from 0 to 1. A PNG needs the extra
    `plots`."""
    limits = (0.0, 1.02) if runs[0].metric == CLASS_INCREMENTAL else None
    write_chart(replace(means_chart([Group(run.method, [run]) for run in runs]), limits=limits), path)


def _of_groups(groups: Sequence[Group], values: Callable[[Report], Sequence[float | None]]) -> list[Series]:
    """One series a group, the mean of its runs, for the groups that have a value."""
    means = [_mean_of_each([values(run) for run in group.runs]) for group in groups]
    return [
        Series(group.label, _count(len(y)), y, colour=place, shape=place)
        for place, (group, y) in enumerate(zip(groups, means, strict=True))
        if any(value is not None for value in y)
    ]


def _mean_of_each(rows: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Of values that stand below each other, the mean of those that there are."""
    columns = ([value for value in column if value is not None] for column in zip(*rows, strict=False))
    return [fmean(column) if column else None for column in columns]


def _costs(cost: Cost, run: Report) -> list[float | None]:
    return [None if record is None else cost(record) for record in run.records]


def _means(group: Group, place: int) -> Series:
    """The mean after each task; of a joint training, which has one, a level to compare with."""
    means = _mean_of_each([run.means for run in group.runs])
    last = means[-1]
    name = group.label if last is None else f"{group.label} ({last:.3f})"
    if group.joint:
        count = len(group.runs[0].tasks)
        return Series(name, _count(count), means[-1:] * count, colour=place, dash=1, dots=False)
    return Series(name, _count(len(means)), means, colour=place, shape=place)


def _coefficient_chart(groups: Sequence[Group]) -> Chart:
    series = _of_groups(
        groups, lambda run: [None if alpha is None or run.joint else alpha.used for alpha in run.alphas]
    )
    instead = ""
    if series:
        longest = max(len(of_group.x) for of_group in series)
        inverse = [1 / t for t in _count(longest)]
        alike = all(y is None or abs(y - 1 / t) < DRAWN for of in series for t, y in zip(of.x, of.y, strict=True))
        instead = "1/t for every task, so each merge is the mean of its tasks" if alike else ""
        series.append(Series("1/t", _count(longest), inverse, colour=7, shape=5, dash=1))
    about = "With what weight each task was folded in; 1/t would make the merge the mean of the tasks."
    title = "Coefficient of each task, and 1/t"
    return Chart("coefficients", title, "task", "coefficient", series, about, instead=instead)


def _loss_chart(run: Report, place: int) -> Chart:
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


def search_charts(run: Report, place: int, runs: int) -> list[Chart]:
    """What the coefficient of each task was searched with: losses of held-out new rows and of the earlier tasks', the
    pool or draws of their classes."""
    drawn = []
    for t, record in enumerate(run.records, start=1):
        if record is None or not record.search or record.coefficient is None:
            continue
        x, chosen = [point["coefficient"] for point in record.search], record.coefficient.used
        sums = dict(zip(x, [point["objective"] for point in record.search], strict=True))
        series = [Series("objective", x, list(sums.values()), colour=0, shape=0)]
        rows, unit = ("written", "token") if record.replay else ("drawn", "row")
        series.append(Series(f"{rows} rows, a task", x, [p["old"] for p in record.search], colour=1, shape=1))
        series.append(Series("new rows held out", x, [p["new"] for p in record.search], colour=2, shape=2))
        series.append(Series(f"chosen {chosen:.1f}", [chosen], [sums[chosen]], line=False, colour=3, shape=3))
        where = f"task {t}, {record.task}" + (f", {run.label}" if runs > 1 else "")
        about = (
            "The objective is the loss of the new rows plus that of the written rows once for each earlier task. "
            "Chosen is the smallest coefficient within one standard error of its minimum."
        )
        name = f"search-{t}" if runs == 1 else f"search-{place}-{t}"
        title, unit = f"Search of the coefficient of {where}", f"cross-entropy, nats a {unit}"
        drawn.append(Chart(name, title, "coefficient α", unit, series, about, _marks(series)))
    return drawn


def line_charts(run: Report, place: int, runs: int) -> list[Chart]:
    """Of each task in coefficient.json: change of the loss and score along its merge line."""
    tasks = [] if run.line is None else run.line.tasks
    return [chart for task in tasks for chart in _line_charts(run, task, place, runs)]


def line_chart_names(task: Mapping, place: int, runs: int) -> tuple[str, str]:
    """Names of the charts of one task's line; place: of its run among the `runs` of the page."""
    name = f"coefficient-{task['t']}" if runs == 1 else f"coefficient-{place}-{task['t']}"
    return name, f"{name}-score"


def _line_charts(run: Report, task: Mapping, place: int, runs: int) -> tuple[Chart, Chart]:
    points, score = task["points"], metric_name(run.metric)
    x = [point["coefficient"] for point in points]
    start = next(point for point in points if point["coefficient"] == 0)["losses"]
    changes = [[loss - before for loss, before in zip(point["losses"], start, strict=True)] for point in points]
    losses = _curves(x, changes, sum)
    losses += _predicted(x, [point["predicted"] for point in points], losses[0].y)
    scores = _curves(x, [point["scores"] for point in points], fmean)
    where = f"along the merge line of task {task['t']}" + (f", {run.label}" if runs > 1 else "")
    about = "Upright lines and single points: the chosen coefficient, 1/t and the best one on the line."
    loss_name, score_name = line_chart_names(task, place, runs)
    losses += _compared(task, "best_loss", dict(zip(x, map(sum, changes), strict=True)))
    scores += _compared(task, "best_score", {point["coefficient"]: point["score"] for point in points})
    change = "change of the summed loss, nats"
    return (
        Chart(loss_name, f"Loss {where}", "coefficient α", change, losses, about, _marks(losses)),
        Chart(score_name, f"{score.capitalize()} {where}", "coefficient α", score, scores, about, _marks(scores)),
    )


def _curves(x: list[float], values: list[list[float]], joined: Callable[[Iterable[float]], float]) -> list[Series]:
    """What `joined` makes of the values (points, tasks): of all tasks, of the earlier ones, of the last one."""
    curves = [Series("all tasks seen", x, [joined(row) for row in values], colour=0, shape=0)]
    if len(values[0]) > 1:
        curves.append(Series("earlier tasks", x, [joined(row[:-1]) for row in values], colour=1, shape=1))
        curves.append(Series("this task", x, [row[-1] for row in values], colour=2, shape=2))
    return curves


def _predicted(x: list[float], values: list[float | None], measured: Sequence[float | None]) -> list[Series]:
    """The prediction, drawn as large as the measured curve where the two are more than three times apart."""
    curves = ([y for y in ys if y is not None] for ys in (measured, values))
    heights = [max(curve) - min(curve) for curve in curves if curve]
    if len(heights) < 2 or not all(heights):
        return []
    ratio = heights[0] / heights[1]
    factor, name = (1.0, "predicted") if 1 / 3 <= ratio <= 3 else (ratio, f"predicted × {float(f'{ratio:.2g}'):g}")
    return [Series(name, x, [None if y is None else factor * y for y in values], colour=7, dash=1, dots=False)]


def _compared(task: Mapping, best: str, values: Mapping[float, float]) -> list[Series]:
    """One point for each of the coefficients that are compared."""
    named = [*((key, COMPARED_COEFFICIENTS[key]) for key in ("chosen", "one_over_t")), (best, "best")]
    return [
        Series(f"{name} {task[key]:.3f}", [task[key]], [values[task[key]]], line=False, colour=look, shape=look)
        for look, (key, name) in enumerate(named, start=3)
    ]


def _marks(series: Sequence[Series]) -> dict[float, str]:
    """Upright lines at the single points."""
    return {point.x[0]: point.name for point in series if len(point.x) == 1}


def _loss_points(run: Report) -> tuple[list[list[float]], dict[float, str]]:
    """([step of the stream, loss, factor, the task's first step], {last step of a task: its name}), thinned out."""
    points, ends, begun = [], {}, 0
    for name, record in zip(run.learned, run.records, strict=True):
        log = record.training.log if record is not None and record.training is not None else []
        points += [[begun + at, loss, factor, begun] for at, loss, factor in log if loss is not None]
        begun += 0 if record is None else record.optimizer_steps
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
    return "accuracy inside the task's own classes" if metric == TASK_INCREMENTAL else format_metric(metric)
