"""report.html: runs side by side on one page that needs nothing but itself, and the same charts as files.

This says what stands on the page; `templates/page.html` says how it looks.
"""

import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from pm_hf.files import write_text
from pm_hf.merging.coefficient import Coefficient
from pm_hf.reports.canvas import STYLE, escape
from pm_hf.reports.charts import Chart, svg, write_chart, write_matrix
from pm_hf.reports.release import redact
from pm_hf.reports.run_charts import COSTS, charts, line_chart_names, metric_name
from pm_hf.reports.verdict import Group, difference, group_runs, ranked, verdict
from pm_hf.runs.paths import RunPaths
from pm_hf.runs.records import COMPARED_COEFFICIENTS, LOWER_IS_BETTER, MergeLine, Report, ScoreRows, read_runs
from pm_hf.text import NO_VALUE, format_number

OPEN = ("Summary", "Score matrices")  # sections that are not folded
MOST_NOTES = 5  # that are shown unfolded
LONGEST = 300  # characters shown of a setting
MOST_CONFUSED = 10  # pairs of classes shown of a run


@dataclass(frozen=True)
class Cell:
    """One cell. share: how good the value is, from 0 to 1, as a colour behind it. absent: a score that there is not."""

    text: str
    share: float | None = None
    best: bool = False
    absent: bool = False


@dataclass(frozen=True)
class Table:
    """A table; a row's first entry is its head."""

    what: ClassVar = "table"
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    kind: str = ""


@dataclass(frozen=True)
class Figure:
    """A chart with its sentence."""

    what: ClassVar = "figure"
    title: str
    drawing: Markup
    sentence: str


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    what: ClassVar = "text"
    text: str
    kind: str = ""


@dataclass(frozen=True)
class Scale:
    """What the colours of the scores mean."""

    what: ClassVar = "scale"
    worst: str
    best: str
    absent: str = NO_VALUE


@dataclass(frozen=True)
class Listed:
    """A list of sentences."""

    what: ClassVar = "list"
    lines: Sequence[str]


@dataclass(frozen=True)
class Folded:
    """Parts that are shown when asked for."""

    what: ClassVar = "folded"
    title: str
    parts: Sequence["Part"]


@dataclass(frozen=True)
class Titled:
    """Parts below a heading of their own."""

    what: ClassVar = "titled"
    title: str
    parts: Sequence["Part"]


@dataclass(frozen=True)
class Beside:
    """Parts side by side where there is room; kind: runs or charts."""

    what: ClassVar = "beside"
    kind: str
    parts: Sequence["Part"]


Part = Table | Figure | Text | Scale | Listed | Folded | Titled | Beside


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it; folded: shown when asked for."""

    title: str
    parts: Sequence[Part]
    folded: bool = False

    @property
    def id(self) -> str:
        """Its anchor."""
        return "-".join("".join(c if c.isalnum() else " " for c in self.title.lower()).split())


def write_report(runs: Sequence[str | Path], output: str | Path | None = None) -> tuple[Path, list[str]]:
    """Write report.html and plots/ of runs (folders, or report.json files): (the page, what is to be said of it).

    output: a folder; by default that of the only run, else `report` in the working folder. Charts and matrices are
    written as SVG, and with matplotlib (the extra `plots`) as PNG too; a chart that a sentence can replace is not.
    Raises InputError for what is no run and for runs without a common metric.
    """
    reports = read_runs(runs)
    only = reports[0].folder if len(reports) == 1 and reports[0].folder.is_dir() else Path("report")
    paths = RunPaths(output if output is not None else only)
    paths.plots.mkdir(parents=True, exist_ok=True)
    drawn = charts(reports)
    kinds = ("svg",) if importlib.util.find_spec("matplotlib") is None else ("svg", "png")
    for kind in kinds:
        for chart in (chart for chart in drawn if not chart.sentence):
            write_chart(chart, paths.plots / f"{chart.name}.{kind}")
        for place, run in enumerate(reports, start=1):
            title, path = f"{run.label}: {metric_name(run.metric)}", paths.plots / f"matrix-{place}.{kind}"
            write_matrix(run.scores, run.tasks, path, title, lower=run.lower_is_better)
    write_text(paths.page, page(reports, drawn))
    return paths.page, [] if "png" in kinds else ["no PNG: matplotlib is not installed (the extra plots)"]


def page(runs: list[Report], drawn_charts: Sequence[Chart]) -> str:
    """The whole page, of the charts of the runs; nothing in it refers to another file or host."""
    drawn = {chart.name: _figure(chart) for chart in drawn_charts}

    def shown(names: Iterable[str]) -> list[Part]:
        """The charts of these names that there are, side by side."""
        parts = [drawn[name] for name in names if name in drawn]
        return [Beside("charts", parts)] if parts else []

    groups = group_runs(runs)
    sections: dict[str, Sequence[Part]] = {
        "Summary": [*_summary(groups), *shown(["score-after-each-task", "forgetting", "coefficients"])],
        "Score matrices": [_scale(runs), *_best_first(groups, lambda run: _matrices(run, runs))],
        "Each task at the end": _at_the_end(runs),
        "Confused classes": _confusions(groups),
        "Coefficients": _coefficients(runs),
        "Search of the coefficient": shown(name for name in drawn if name.startswith("search-")),
        "Loss along the merge line": merge_lines(runs, drawn),
        "Written rows": [part for run in runs for part in _written_rows(run)],
        "Training": [
            (Titled if len(runs) == 1 else Folded)(run.label, [*_training(run), *shown([f"loss-{place}"])])
            for place, run in enumerate(runs, 1)
            if any(run.records)
        ],
        "Time, memory and truncation": shown(name for name, *_ in COSTS),
        "Texts held out": _held_out(runs),
        "Notes": _notes(runs),
        "Settings": _settings(runs),
        "Versions": _versions(runs),
    }
    few_notes = sum(len(run.notes) for run in runs) <= MOST_NOTES
    return (
        _environment()
        .get_template("page.html")
        .render(
            sections=[
                Section(title, parts, folded=title not in OPEN and not (title == "Notes" and few_notes))
                for title, parts in sections.items()
                if parts
            ],
            names=", ".join(group.title for group in groups),
            metric=metric_name(runs[0].metric),
            way="lower" if runs[0].lower_is_better else "higher",
            style=Markup(_environment().get_template("page.css").render() + STYLE),  # text of ours
        )
    )


@cache
def _environment() -> Environment:
    """The templates; all text is escaped, and made printable before."""
    loader = PackageLoader("pm_hf.reports", "templates")
    return Environment(loader=loader, autoescape=True, trim_blocks=True, finalize=_safe)


def _safe(value: Any) -> Any:
    return Markup(escape(value)) if isinstance(value, str) and not isinstance(value, Markup) else value


def _figure(chart: Chart) -> Part:
    """The chart, or a sentence where one says the same."""
    if chart.sentence:
        return Text(f"{chart.title}: {chart.sentence}.")
    return Figure(chart.title, Markup(svg(chart, f"chart-{chart.name}")), chart.about)  # svg escapes what it is given


# sections
def _share(value: float | None, low: float, high: float, lower: bool) -> float | None:
    """Where a value stands between the worst (0) and the best (1)."""
    if value is None:
        return None
    share = (value - low) / (high - low) if high > low else 1.0
    return 1 - share if lower and high > low else share


def _ends(matrices: Iterable[ScoreRows]) -> tuple[float, float]:
    scores = [score for R in matrices for row in R for score in row if score is not None]
    return min(scores), max(scores)


def _summary(groups: list[Group]) -> list[Part]:
    """The answer in words, and one table."""
    sentences = [Text(sentence, "verdict") for sentence in verdict(groups)]
    return [*sentences[:2], answer_table(groups), *sentences[2:]]


AVERAGES = ("ACC", "AAA", "BWT", "forgetting")


def answer_table(groups: Sequence[Group]) -> Table:
    """One row a method: the averages of its matrix, the differences to joint training and to the control, its cost."""
    inside = any("task_incremental" in run.metrics for group in groups for run in group.runs)
    joint = next((group for group in groups if group.joint), None)
    control = next((group for group in groups if group.control), None)
    compete, first = ranked(groups), groups[0].runs[0]
    others = {"− joint": joint, f"− {'control' if control is None else control.label}": control}
    compared = {name: other for name, other in others.items() if other is not None and len(groups) > 1}
    header = ["run", *AVERAGES, *compared, *["ACC inside own classes"] * inside, "seconds", "peak MiB"]
    best = {key: _best(key, compete, lower=first.lower_is_better) for key in ("ACC", "AAA", "BWT")}
    best["forgetting"] = _best("forgetting", compete, lower=True)
    rows = []
    for group in groups:
        cells = [Cell(group.shown(key), best=group is best[key] and len(compete) > 1) for key in AVERAGES]
        cells += [Cell(NO_VALUE if other is group else _signed(group, other)) for other in compared.values()]
        own = [(run.metrics.get("task_incremental") or {}).get("ACC") for run in group.runs]
        cells += [cell(_mean(own))] * inside
        measured = [record.process_peak_memory_mb for run in group.runs for record in run.records if record is not None]
        peaks = [peak for peak in measured if peak is not None]
        cells += [cell(_mean([run.seconds for run in group.runs]), digits=1), cell(max(peaks, default=None), digits=0)]
        rows.append([group.title, *cells])
    name = metric_name(first.metric)
    caption = (
        f"Mean {name} over tasks at the end (ACC) and over the whole stream (AAA), mean change since a task was "
        "learned (BWT), mean loss since a task's best score (forgetting: positive is worse)"
    )
    caption += ". ± is the standard deviation of the seeds" if any(len(group.runs) > 1 for group in groups) else ""
    caption += ". Underlined: best of those that learn one task after another" if len(compete) > 1 else ""
    return Table(caption, header, rows, "answer")


def _best(key: str, groups: Sequence[Group], *, lower: bool) -> Group | None:
    known = [(mean, group) for group in groups if (mean := group.mean(key)) is not None]
    return (min if lower else max)(known, key=lambda pair: pair[0])[1] if known else None


def _signed(group: Group, other: Group) -> str:
    return f"{difference(group, other)[0]:+.3f}" if group.values("ACC") and other.values("ACC") else NO_VALUE


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _scale(runs: list[Report]) -> Scale:
    low, high = _ends(run.scores for run in runs)
    worst, best = (high, low) if runs[0].lower_is_better else (low, high)
    return Scale(f"{worst:.3f}", f"{best:.3f}")


def _best_first(groups: Sequence[Group], made: Callable[[Report], Part]) -> list[Part]:
    """What is made of the best method's first run; below it, folded, of the other methods' and of the further seeds."""
    first = (ranked(groups) or groups)[0]
    others = {
        "Other methods": [group.runs[0] for group in groups if group is not first],
        "Further seeds": [run for group in groups for run in group.runs[1:]],
    }
    folded = [Folded(title, [Beside("runs", [made(run) for run in runs])]) for title, runs in others.items() if runs]
    return [made(first.runs[0]), *folded]


def _matrices(run: Report, runs: list[Report]) -> Titled:
    others = [name for name in run.matrices if name != run.metric]
    parts: list[Part] = [_matrix(run, run.metric, _ends(other.scores for other in runs))]
    more = [_matrix(run, name, _ends([run.matrices[name]])) for name in others if any(run.matrices[name][-1])]
    parts += [Folded(f"Other metrics of {run.label}", more)] if more else []
    return Titled(run.label, parts)


def _matrix(run: Report, metric: str, ends: tuple[float, float]) -> Table:
    R, lower = run.matrices[metric], metric in LOWER_IS_BETTER
    rows = [[f"{i + 1} {task}", *(score_cell(row[i], ends, lower) for row in R)] for i, task in enumerate(run.titles)]
    after = "all were learned at once" if run.joint else "each task was learned (column)"
    caption = f"{run.label}: {metric_name(metric)} on each task (row) after {after}"
    return Table(caption, ["task", *(["all"] if run.joint else [str(t + 1) for t in range(len(R))])], rows)


def _at_the_end(runs: list[Report]) -> list[Part]:
    tasks = list(dict.fromkeys(task for run in runs for task in run.titles))
    last = [dict(zip(run.titles, run.scores[-1], strict=True)) for run in runs]
    lost = [dict(zip(run.titles, run.forgetting, strict=True)) for run in runs]
    scale, lower = _ends([[list(scores.values())] for scores in last]), runs[0].lower_is_better
    header, name = ["task", *(run.label for run in runs)], metric_name(runs[0].metric)
    ends = [[task, *(score_cell(scores.get(task), scale, lower) for scores in last)] for task in tasks]
    tables: list[Part] = [Table(f"{name.capitalize()} on each task at the end", header, ends)]
    if any(value is not None for of_run in lost for value in of_run.values()):
        falls = [[task, *(cell(of_run.get(task)) for of_run in lost)] for task in tasks]
        caption = f"Forgetting of each task: {name} lost since its best score, positive is worse"
        tables.append(Table(caption, header, falls))
    return [Beside("runs", tables)]


def _confusions(groups: Sequence[Group]) -> list[Part]:
    """Which classes were taken for which at the end, of the first seed of each method."""
    tables: list[Part] = []
    for run in (group.runs[0] for group in groups):
        pairs = next((record.confusions for record in reversed(run.records) if record is not None), [])
        rows = [
            [label, cell(said), cell(count, digits=0), cell(of_class, digits=0)]
            for label, said, count, of_class in pairs[:MOST_CONFUSED]
        ]
        caption = f"{run.label}: classes that were confused most at the end, by test rows"
        tables += [Table(caption, ["class", "taken for", "rows", "of"], rows)] if rows else []
    return [Beside("runs", tables)] if tables else []


def _coefficients(runs: list[Report]) -> list[Part]:
    if not any(c for run in runs for c in run.alphas):
        return []
    free = [run.label for run in runs if run.freedom == "free"]
    unused = f"; not used by {', '.join(free)}, whose whole matrix is free" if free else ""
    longest = max(runs, key=lambda run: len(run.alphas))
    rows = []
    for t in range(len(longest.alphas)):
        alphas = [run.alphas[t] if t < len(run.alphas) else None for run in runs]
        rows.append([f"{t + 1} {longest.learned[t]}", cell(1 / (t + 1)), *(cell(_used(alpha)) for alpha in alphas)])
    header = ["task", "1/t", *(run.label for run in runs)]
    return [Table(f"Coefficient with which each task was merged, and 1/t{unused}", header, rows)]


def _used(alpha: Coefficient | None) -> str:
    if alpha is None:
        return NO_VALUE
    raw, used = alpha.raw, alpha.used
    return f"{used:.3f}" if f"{raw:.3f}" == f"{used:.3f}" else f"{used:.3f} (raw {raw:.3f})"


def _training(run: Report) -> list[Part]:
    header = ["task", "loss", "steps", "factors", "truncation", "seconds", "ms a step", "peak MiB", "curvature MiB"]
    rows = []
    for place, (task, record) in enumerate(zip(run.learned, run.records, strict=True), start=1):
        training = None if record is None else record.training
        factors = {} if training is None else training.factors
        error = None if record is None else record.merge_error
        cells = [
            cell(None if training is None else training.training_loss, digits=4),
            cell(None if training is None else training.optimizer_steps, digits=0),
            cell(", ".join(f"{count} × {factor}" for factor, count in factors.items()) or NO_VALUE),
            cell(NO_VALUE if error is None else f"{error:.2g}"),
            cell(None if record is None else record.seconds, digits=1),
            cell(_times(None if training is None else training.step_seconds, 1000), digits=1),
            cell(None if record is None else record.process_peak_memory_mb, digits=0),
            cell(_times(None if record is None else record.curvature_bytes, 2**-20), digits=2),
        ]
        rows.append([f"{place} {task}", *cells])
    caption = (
        f"{run.label}: each task's mean training loss, factors drawn by the perturbation, relative error of the merge"
    )
    return [Table(caption, header, rows)]


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


WRITTEN = {
    "written": "written",
    "kept": "kept",
    "copies": "copies",
    "doubles": "doubles",
    "empty": "empty",
    "longest_common_run": "longest run, kept",
    "longest_written_run": "longest run, all",
    "agreement": "answered as asked",
    "pool_rows": "in the pool",
}  # {key of step.json's replay: column}


def _written_rows(run: Report) -> list[Part]:
    """Counts of the synthetic rows of each task, and a few of them."""
    records = [record for record in run.records if record is not None and record.replay]
    header = ["task", *WRITTEN.values(), "writer, s", "writing, s", "labels, s"]
    rows, samples = [], []
    for record in records:
        replay, seconds = record.replay, record.replay["seconds"]
        numbers = [cell(replay.get(key), digits=2 if key == "agreement" else 0) for key in WRITTEN]
        times = [cell(seconds[key], digits=1) for key in ("writer", "write", "label")]
        rows.append([record.task, *numbers, *times])
        for sample in replay["samples"]:
            text = sample["prompt"] if isinstance(sample["prompt"], str) else sample["prompt"][-1]["content"]
            samples.append([record.task, *(cell(part[:LONGEST]) for part in (sample["asked"], text, sample["says"]))])
    if not records:
        return []
    caption = (
        f"{run.label}: synthetic rows that a throw-away adapter wrote to be rehearsed. Copies (8 tokens in a row as in "
        "a training row, or 80 % of the tokens), doubles and empty ones are dropped; the longest runs in common with a "
        "training row are in tokens; answered as asked is the share that the merge gives the answer it was written for"
    )
    shown = Table(
        f"{run.label}: some of those kept", ["task", "written for", "prompt", "the merge says"], samples, "text"
    )
    return [Table(caption, header, rows), *([shown] if samples else [])]


def _held_out(runs: list[Report]) -> list[Part]:
    tables: list[Part] = []
    for run in (run for run in runs if run.held_out):
        names = [(text, metric) for text, scores in run.held_out[0].items() for metric in scores]
        rows = []
        for text, metric in names:
            values = [step.get(text, {}).get(metric) for step in (run.untouched, *run.held_out)]
            rows.append([f"{text}: {metric_name(metric)}", *(cell(value) for value in values)])
        header = ["text", "the base", *(str(t + 1) for t in range(len(run.held_out)))]
        title = f"{run.label}: texts that are never trained on, before and after each task"
        tables.append(Table(title, header, rows))
    return tables


def _notes(runs: list[Report]) -> list[Part]:
    listed = [f"{run.label}: {note}" for run in runs for note in run.notes]
    return [Listed(listed)] if listed else []


def _settings(runs: list[Report]) -> list[Part]:
    flat = [_flat(redact(run.config, None)) for run in runs]
    keys = list(dict.fromkeys(key for settings in flat for key in settings))
    if not keys:
        return []
    header = ["setting", *(run.label for run in runs)]
    rows = {key: [key, *(cell(settings.get(key, NO_VALUE)) for settings in flat)] for key in keys}
    differing = [row for key, row in rows.items() if len({settings.get(key) for settings in flat}) > 1]
    every = Folded("All settings", [Table("All settings", header, list(rows.values()), "text")])
    return [*([Table("Settings that differ", header, differing, "text")] if differing else []), every]


def _flat(value: Any, name: str = "") -> dict[str, str]:
    """{dotted key: value as text}, long values cut."""
    if isinstance(value, Mapping) and value and (not name or name.count(".") < 1):
        return {k: v for key, item in value.items() for k, v in _flat(item, f"{name}.{key}" if name else key).items()}
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return {name: text if len(text) <= LONGEST else text[:LONGEST] + " …"} if name else {}


def _versions(runs: list[Report]) -> list[Part]:
    made_with = []
    for run in runs:
        last = run.records[-1].conditions if run.records and run.records[-1] is not None else {}
        places = {key: str(last[key]) for key in ("device", "threads", "processes") if key in last}
        made_with.append(places | run.versions)
    keys = list(dict.fromkeys(key for of_run in made_with for key in of_run))
    rows = [[key, *(cell(of_run.get(key, NO_VALUE)) for of_run in made_with)] for key in keys]
    header = ["what", *(run.label for run in runs)]
    return [Table("What the runs were made with", header, rows, "text")] if keys else []


def merge_lines(runs: Sequence[Report], drawn: Mapping[str, Part]) -> list[Part]:
    """The section's parts for the runs that have a coefficient.json; drawn: {name of a chart: it}."""
    return [
        _lines_of_run(run, run.line, place, len(runs), drawn)
        for place, run in enumerate(runs, 1)
        if run.line is not None and run.line.tasks
    ]


def _lines_of_run(run: Report, line: MergeLine, place: int, runs: int, drawn: Mapping[str, Part]) -> Part:
    details = [
        _line_points(run, line, task, [drawn[name] for name in line_chart_names(task, place, runs)])
        for task in line.tasks
    ]
    return Titled(run.label, [_line_regrets(run, line), *details, *_line_notes(line)])


def _line_regrets(run: Report, line: MergeLine) -> Part:
    unit, name = line.regret_unit, metric_name(run.metric)
    header = ["task", "chosen", "1/t", "best for loss", f"best for {name}"]
    header += [f"{what}: {which}" for which in COMPARED_COEFFICIENTS.values() for what in (unit, "nats")]
    rows = [_line_row(f"{task['t']} {task['task']}", task, task["regret"]) for task in line.tasks]
    caption = (
        f"{run.label}: coefficient chosen, 1/t and the best ones on the merge line, on test rows of all tasks seen; "
        f"what is lost to the best: {name} in {unit}, mean loss of a task in nats"
    )
    return Table(caption, header, [*rows, _line_row("mean", {}, line.mean_regret)])


def _line_row(title: str, task: Mapping, regret: Mapping) -> list[Any]:
    alphas = [cell(task.get(key)) for key in ("chosen", "one_over_t", "best_loss", "best_score")]
    lost = [
        text
        for key in COMPARED_COEFFICIENTS
        for text in (cell(regret[key]["score"], digits=2), cell(regret[key]["loss"], digits=4))
    ]
    return [title, *alphas, *lost]


def _line_points(run: Report, line: MergeLine, task: Mapping, figures: Sequence[Part]) -> Part:
    """One task's charts, and its points for each task seen."""
    names = [f"{place} {name}" for place, name in enumerate(task["seen"], start=1)]
    header = ["α", "predicted", "loss, sum", *(f"loss, {name}" for name in names)]
    header += [f"{metric_name(run.metric)}, {name}" for name in names]
    rows = []
    for point in task["points"]:
        predicted = point["predicted"]
        numbers = [cell(NO_VALUE if predicted is None else f"{predicted:.3g}")]
        numbers += [cell(loss, digits=4) for loss in (point["loss_sum"], *point["losses"])]
        rows.append([f"{point['coefficient']:.3f}", *numbers, *(cell(score) for score in point["scores"])])
    unit = line.predicted_unit
    about = f"; predicted: what the closed form minimises, change from α = 0, in {unit}" if unit else ""
    caption = f"{run.label}: along the merge line of task {task['t']}, {task['task']}{about}"
    return Folded(f"Task {task['t']}, {task['task']}", [Beside("charts", figures), Table(caption, header, rows)])


def _line_notes(line: MergeLine) -> list[Part]:
    notes = [*line.notes, *(f"{task['task']}: {note}" for task in line.tasks for note in task["notes"])]
    notes += [f"{task['task']} left out: {task['reason']}" for task in line.skipped]
    return [Listed(notes)] if notes else []


def cell(value: Any, digits: int = 3) -> Cell:
    """One cell: a text as it stands, a number with so many decimals, a dash for none."""
    return Cell(value if isinstance(value, str) else format_number(value, digits))


def score_cell(value: float | None, ends: tuple[float, float], lower: bool) -> Cell:
    """A score with the colour of its place between the two ends."""
    return Cell(format_number(value), _share(value, *ends, lower), absent=value is None)
