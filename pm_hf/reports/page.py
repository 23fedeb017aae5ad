"""report.html: runs side by side on one page that needs nothing but itself, and the same charts as files."""

import importlib.util
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pm_hf.files import write_text
from pm_hf.merging.coefficient import Coefficient
from pm_hf.reports.charts import STYLE, Chart, escape, svg
from pm_hf.reports.release import redact
from pm_hf.reports.run_charts import COSTS, charts, line_chart_names, metric_name
from pm_hf.runs.paths import RunPaths
from pm_hf.runs.records import COMPARED_COEFFICIENTS, LOWER_IS_BETTER, MergeLine, Report, ScoreRows, read_runs
from pm_hf.text import NO_VALUE, format_number

LONGEST = 300  # characters shown of a setting
PAGE_STYLE = """
:root{color-scheme:light dark;--back:#fff;--text:#1a1d21;--faint:#5b6470;--line:#d5dae0;--band:#f4f6f8;--best:#7db4ee;
--link:#0b5cad}
@media (prefers-color-scheme:dark){:root{--back:#15181c;--text:#e8eaed;--faint:#a8b0ba;--line:#3a4149;--band:#1e2328;
--best:#2469ac;--link:#6db3f8}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:75rem;padding:1.5rem;background:var(--back);color:var(--text);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.7rem;margin:0 0 .25rem}h2{margin:2.5rem 0 .5rem;padding-top:.75rem;border-top:1px solid var(--line);
font-size:1.3rem}h3{margin:1.5rem 0 .5rem;font-size:1.05rem}
a{color:var(--link)}:focus-visible{outline:3px solid var(--link);outline-offset:2px}
nav ul{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;padding:0;list-style:none}
.skip{position:absolute;left:-99rem}.skip:focus{left:1rem;top:1rem;background:var(--back);padding:.5rem}
.wide{overflow-x:auto;margin:.75rem 0}
table{min-width:20rem;border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--faint);padding-bottom:.35rem;white-space:normal}
th,td{padding:.3rem .6rem;border:1px solid var(--line);text-align:right;white-space:nowrap}
th{background:var(--band);font-weight:600}tbody th{text-align:left;position:sticky;left:0;max-width:22rem;
overflow-wrap:anywhere;white-space:normal;min-width:7rem}tbody th.long{min-width:min(20rem,45vw)}
.heat{background:color-mix(in oklab,var(--best) calc(var(--v)*100%),var(--back))}
thead th:first-child{text-align:left}
.runs{display:flex;flex-wrap:wrap;gap:0 2.5rem}.runs>div{min-width:0;max-width:100%}
.text td,.text thead th{text-align:left;white-space:normal;overflow-wrap:anywhere;vertical-align:top}
.scale{display:inline-block;width:8rem;height:.8rem;margin:0 .5rem;vertical-align:middle;border:1px solid var(--line);
background:linear-gradient(to right in oklab,var(--back),var(--best))}
figure{margin:1rem 0}summary{cursor:pointer;padding:.25rem 0}.faint{color:var(--faint)}
"""


def write_report(runs: Sequence[str | Path], output: str | Path | None = None) -> tuple[Path, list[str]]:
    """Write report.html and plots/ of runs (folders, or report.json files): (the page, what is to be said of it).

    output: a folder; by default that of the only run, else `report` in the working folder. The charts are written as
    SVG, and with matplotlib (the extra `plots`) as PNG too, then the matrices as both. Raises InputError for what is no
    run and for runs without a common metric.
    """
    reports = read_runs(runs)
    only = reports[0].folder if len(reports) == 1 and reports[0].folder.is_dir() else Path("report")
    paths = RunPaths(output if output is not None else only)
    paths.plots.mkdir(parents=True, exist_ok=True)
    drawn = charts(reports)
    for chart in drawn:
        write_text(paths.plots / f"{chart.name}.svg", svg(chart, chart.name, alone=True) + "\n")
    written = _draw(reports, drawn, paths.plots)
    write_text(paths.page, page(reports, drawn))
    return paths.page, [] if written else ["no PNG: matplotlib is not installed (the extra plots)"]


def _draw(runs: list[Report], drawn: list[Chart], folder: Path) -> bool:
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from pm_hf.reports.charts import write_chart, write_matrix

    for chart in drawn:
        write_chart(chart, folder / f"{chart.name}.png")
    for place, run in enumerate(runs, start=1):
        title = f"{run.label}: {metric_name(run.metric)}"
        for kind in ("png", "svg"):
            path = folder / f"matrix-{place}.{kind}"
            write_matrix(run.scores, run.tasks, path, title, lower=run.lower_is_better)
    return True


def page(runs: list[Report], drawn_charts: Sequence[Chart]) -> str:
    """The whole page, of the charts of the runs; nothing in it refers to another file or host."""
    drawn = {chart.name: _figure(chart) for chart in drawn_charts}
    sections = {
        "Summary": _summary(runs) + drawn["score-after-each-task"],
        "Score matrices": _scale(runs) + f'<div class="runs">{"".join(_matrices(run, runs) for run in runs)}</div>\n',
        "Each task at the end": _at_the_end(runs) + drawn.get("forgetting", ""),
        "Coefficients": _coefficients(runs) + drawn.get("coefficients", ""),
        "Search of the coefficient": "".join(figure for name, figure in drawn.items() if name.startswith("search-")),
        "Loss along the merge line": merge_lines(runs, drawn),
        "Written rows": "".join(_written_rows(run) for run in runs),
        "Training": "".join(_training(run, drawn.get(f"loss-{place}", "")) for place, run in enumerate(runs, 1)),
        "Time, memory and truncation": "".join(drawn.get(name, "") for name, *_ in COSTS),
        "Texts held out": _held_out(runs),
        "Notes": _notes(runs),
        "Settings": _settings(runs),
        "Versions": _versions(runs),
    }
    filled = {title: body for title, body in sections.items() if body}
    links = "".join(f'<li><a href="#{_id(title)}">{title}</a></li>' for title in filled)
    bodies = "".join(
        f'<section aria-labelledby="{_id(title)}"><h2 id="{_id(title)}">{title}</h2>\n{body}</section>\n'
        for title, body in filled.items()
    )
    names = escape(", ".join(run.label for run in runs))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:"><link rel="icon" href="data:,">'
        f"<title>Continual learning: {names}</title><style>{PAGE_STYLE}{STYLE}</style></head>\n"
        '<body><a class="skip" href="#summary">To the summary</a>'
        f'<header><h1>Continual learning report</h1><p class="faint">{names}; judged by '
        f"{escape(metric_name(runs[0].metric))}, {'lower' if runs[0].lower_is_better else 'higher'} is better</p>"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>\n<main>\n{bodies}</main></body></html>\n'
    )


def _figure(chart: Chart) -> str:
    return f"<figure><h3>{escape(chart.title)}</h3>{svg(chart, f'chart-{chart.name}')}</figure>\n"


# sections
def _id(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def _share(value: float | None, low: float, high: float, lower: bool) -> float | None:
    """Where a value stands between the worst (0) and the best (1)."""
    if value is None:
        return None
    share = (value - low) / (high - low) if high > low else 1.0
    return 1 - share if lower and high > low else share


def _ends(matrices: Iterable[ScoreRows]) -> tuple[float, float]:
    scores = [score for R in matrices for row in R for score in row if score is not None]
    return min(scores), max(scores)


def _summary(runs: list[Report]) -> str:
    inside = any("task_incremental" in run.metrics for run in runs)
    header = ["run", "ACC", "AAA", "BWT", "forgetting", *["ACC inside own classes"] * inside, "seconds", "peak MiB"]
    rows = []
    for run in runs:
        own = run.metrics.get("task_incremental") or {}
        measured = [None if record is None else record.process_peak_memory_mb for record in run.records]
        peaks = [peak for peak in measured if peak is not None]
        cells = [cell(run.metrics.get(key)) for key in ("ACC", "AAA", "BWT", "forgetting")]
        cells += [cell(own.get("ACC"))] * inside
        rows.append([run.label, *cells, cell(run.seconds, digits=1), cell(max(peaks, default=None), digits=0)])
    name = metric_name(runs[0].metric)
    caption = (
        f"Mean {name} over tasks at the end (ACC) and over the whole stream (AAA), mean change since a task was "
        "learned (BWT), mean loss since a task's best score (forgetting: positive is worse)"
    )
    return table(caption, header, rows)


def _scale(runs: list[Report]) -> str:
    low, high = _ends(run.scores for run in runs)
    worst, best = (high, low) if runs[0].lower_is_better else (low, high)
    return (
        f'<p>Colour behind a number, the same in all runs: {worst:.3f} (worst)<span class="scale"></span>{best:.3f} '
        f"(best). {NO_VALUE} is no score.</p>\n"
    )


def _matrices(run: Report, runs: list[Report]) -> str:
    others = [name for name in run.matrices if name != run.metric]
    shown = _matrix(run, run.metric, _ends(other.scores for other in runs))
    more = "".join(_matrix(run, name, _ends([run.matrices[name]])) for name in others if any(run.matrices[name][-1]))
    if more:
        more = f"<details><summary>Other metrics of {escape(run.label)}</summary>{more}</details>\n"
    return f"<div><h3>{escape(run.label)}</h3>\n{shown}{more}</div>\n"


def _matrix(run: Report, metric: str, ends: tuple[float, float]) -> str:
    R, lower = run.matrices[metric], metric in LOWER_IS_BETTER
    rows = []
    for i, task in enumerate(run.titles):
        scores = [row[i] for row in R]
        rows.append([f"{i + 1} {task}", *(cell(score, _share(score, *ends, lower)) for score in scores)])
    after = "all were learned at once" if run.joint else "each task was learned (column)"
    caption = f"{run.label}: {metric_name(metric)} on each task (row) after {after}"
    return table(caption, ["task", *(["all"] if run.joint else [str(t + 1) for t in range(len(R))])], rows)


def _at_the_end(runs: list[Report]) -> str:
    tasks = list(dict.fromkeys(task for run in runs for task in run.titles))
    last = [dict(zip(run.titles, run.scores[-1], strict=True)) for run in runs]
    lost = [dict(zip(run.titles, run.forgetting, strict=True)) for run in runs]
    low, high = _ends([[list(scores.values())] for scores in last])
    header = ["task", *(run.label for run in runs)]
    ends = [
        [task, *(cell(s.get(task), _share(s.get(task), low, high, runs[0].lower_is_better)) for s in last)]
        for task in tasks
    ]
    falls = [[task, *(cell(of_run.get(task)) for of_run in lost)] for task in tasks]
    name = metric_name(runs[0].metric)
    tables = table(f"{name.capitalize()} on each task at the end", header, ends)
    if any(value is not None for of_run in lost for value in of_run.values()):
        tables += table(f"Forgetting of each task: {name} lost since its best score, positive is worse", header, falls)
    return tables


def _coefficients(runs: list[Report]) -> str:
    if not any(c for run in runs for c in run.alphas):
        return ""
    free = [run.label for run in runs if run.freedom == "free"]
    unused = f"; not used by {', '.join(free)}, whose whole matrix is free" if free else ""
    longest = max(runs, key=lambda run: len(run.alphas))
    rows = []
    for t in range(len(longest.alphas)):
        alphas = [run.alphas[t] if t < len(run.alphas) else None for run in runs]
        rows.append([f"{t + 1} {longest.learned[t]}", cell(1 / (t + 1)), *(cell(_used(alpha)) for alpha in alphas)])
    header = ["task", "1/t", *(run.label for run in runs)]
    return table(f"Coefficient with which each task was merged, and 1/t{unused}", header, rows)


def _used(alpha: Coefficient | None) -> str:
    if alpha is None:
        return NO_VALUE
    raw, used = alpha.raw, alpha.used
    return f"{used:.3f}" if f"{raw:.3f}" == f"{used:.3f}" else f"{used:.3f} (raw {raw:.3f})"


def _training(run: Report, loss: str) -> str:
    if not any(run.records):
        return ""
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
    return f"<h3>{escape(run.label)}</h3>{table(caption, header, rows)}{loss}"


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _written_rows(run: Report) -> str:
    """Counts of the synthetic rows of each task, and a few of them."""
    records = [record for record in run.records if record is not None and record.replay]
    counts = ("written", "kept", "copies", "doubles", "empty", "longest_common_run", "agreement", "pool_rows")
    header = ["task", *(key.replace("_", " ") for key in counts), "writer, s", "writing, s", "labels, s"]
    rows, samples = [], []
    for record in records:
        replay, seconds = record.replay, record.replay["seconds"]
        numbers = [cell(replay[key], digits=2 if key == "agreement" else 0) for key in counts]
        times = [cell(seconds[key], digits=1) for key in ("writer", "write", "label")]
        rows.append([record.task, *numbers, *times])
        for sample in replay["samples"]:
            text = sample["prompt"] if isinstance(sample["prompt"], str) else sample["prompt"][-1]["content"]
            samples.append([record.task, *(cell(part[:LONGEST]) for part in (sample["asked"], text, sample["says"]))])
    if not records:
        return ""
    caption = (
        f"{run.label}: rows that a throw-away adapter wrote to be rehearsed; copies of training rows are dropped, the "
        "longest common run is in tokens, agreement the share whose answer is the one it was written for"
    )
    shown = table("Some of them", ["task", "written for", "prompt", "the merge says"], samples, "text")
    return table(caption, header, rows) + (shown if samples else "")


def _held_out(runs: list[Report]) -> str:
    tables = ""
    for run in (run for run in runs if run.held_out):
        names = [(text, metric) for text, scores in run.held_out[0].items() for metric in scores]
        rows = []
        for text, metric in names:
            values = [step.get(text, {}).get(metric) for step in (run.untouched, *run.held_out)]
            rows.append([f"{text}: {metric_name(metric)}", *(cell(value) for value in values)])
        header = ["text", "the base", *(str(t + 1) for t in range(len(run.held_out)))]
        tables += table(f"{run.label}: texts that are never trained on, before and after each task", header, rows)
    return tables


def _notes(runs: list[Report]) -> str:
    listed = [f"<li>{escape(run.label)}: {escape(note)}</li>" for run in runs for note in run.notes]
    return f"<ul>{''.join(listed)}</ul>\n" if listed else ""


def _settings(runs: list[Report]) -> str:
    flat = [_flat(redact(run.config, None)) for run in runs]
    keys = list(dict.fromkeys(key for settings in flat for key in settings))
    if not keys:
        return ""
    header = ["setting", *(run.label for run in runs)]
    rows = {key: [key, *(cell(settings.get(key, NO_VALUE)) for settings in flat)] for key in keys}
    differing = [row for key, row in rows.items() if len({settings.get(key) for settings in flat}) > 1]
    first = table("Settings that differ", header, differing, "text") if differing else ""
    every = table("All settings", header, rows.values(), "text")
    return f"{first}<details><summary>All settings</summary>{every}</details>\n"


def _flat(value: Any, name: str = "") -> dict[str, str]:
    """{dotted key: value as text}, long values cut."""
    if isinstance(value, Mapping) and value and (not name or name.count(".") < 1):
        return {k: v for key, item in value.items() for k, v in _flat(item, f"{name}.{key}" if name else key).items()}
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return {name: text if len(text) <= LONGEST else text[:LONGEST] + " …"} if name else {}


def _versions(runs: list[Report]) -> str:
    made_with = []
    for run in runs:
        last = run.records[-1].conditions if run.records and run.records[-1] is not None else {}
        places = {key: str(last[key]) for key in ("device", "threads", "processes") if key in last}
        made_with.append(places | run.versions)
    keys = list(dict.fromkeys(key for of_run in made_with for key in of_run))
    rows = [[key, *(cell(of_run.get(key, NO_VALUE)) for of_run in made_with)] for key in keys]
    return table("What the runs were made with", ["", *(run.label for run in runs)], rows, "text") if keys else ""


def merge_lines(runs: Sequence[Report], drawn: Mapping[str, str]) -> str:
    """The section's body for the runs that have a coefficient.json; drawn: {name of a chart: its figure}."""
    return "".join(
        _lines_of_run(run, run.line, place, len(runs), drawn)
        for place, run in enumerate(runs, 1)
        if run.line is not None and run.line.tasks
    )


def _lines_of_run(run: Report, line: MergeLine, place: int, runs: int, drawn: Mapping[str, str]) -> str:
    details = "".join(
        _line_points(run, line, task, [drawn[name] for name in line_chart_names(task, place, runs)])
        for task in line.tasks
    )
    return f"<h3>{escape(run.label)}</h3>\n{_line_regrets(run, line)}{details}{_line_notes(line)}"


def _line_regrets(run: Report, line: MergeLine) -> str:
    unit, name = line.regret_unit, metric_name(run.metric)
    header = ["task", "chosen", "1/t", "best for loss", f"best for {name}"]
    header += [f"{what}: {which}" for which in COMPARED_COEFFICIENTS.values() for what in (unit, "nats")]
    rows = [_line_row(f"{task['t']} {task['task']}", task, task["regret"]) for task in line.tasks]
    caption = (
        f"{run.label}: coefficient chosen, 1/t and the best ones on the merge line, on test rows of all tasks seen; "
        f"what is lost to the best: {name} in {unit}, mean loss of a task in nats"
    )
    return table(caption, header, [*rows, _line_row("mean", {}, line.mean_regret)])


def _line_row(title: str, task: Mapping, regret: Mapping) -> list[str]:
    alphas = [cell(task.get(key)) for key in ("chosen", "one_over_t", "best_loss", "best_score")]
    lost = [
        text
        for key in COMPARED_COEFFICIENTS
        for text in (cell(regret[key]["score"], digits=2), cell(regret[key]["loss"], digits=4))
    ]
    return [title, *alphas, *lost]


def _line_points(run: Report, line: MergeLine, task: Mapping, figures: Sequence[str]) -> str:
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
    title = f"Task {task['t']}, {escape(task['task'])}"
    return f"<details><summary>{title}</summary>{''.join(figures)}{table(caption, header, rows)}</details>\n"


def _line_notes(line: MergeLine) -> str:
    notes = [*line.notes, *(f"{task['task']}: {note}" for task in line.tasks for note in task["notes"])]
    notes += [f"{task['task']} left out: {task['reason']}" for task in line.skipped]
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f"<ul>{listed}</ul>\n" if listed else ""


LONG_CELL = 24  # characters of a name that gets a wide column


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table; header cells and a row's first cell are text, the others come from `cell`."""
    heads = "".join(f'<th scope="col">{escape(text)}</th>' for text in header)
    body = "".join(f"<tr>{_row_head(row[0])}{''.join(row[1:])}</tr>\n" for row in rows)
    reach = f' role="region" tabindex="0" aria-label="{escape(caption)}"' if len(header) > 8 else ""
    start = f'<table class="{kind}">' if kind else "<table>"
    return (
        f'<div class="wide"{reach}>{start}<caption>{escape(caption)}</caption><thead><tr>{heads}</tr></thead>'
        f"<tbody>\n{body}</tbody></table></div>\n"
    )


def cell(value: Any, share: float | None = None, digits: int = 3) -> str:
    """One cell; share: how good the value is, from 0 to 1, as a colour behind the number."""
    text = value if isinstance(value, str) else format_number(value, digits)
    colour = "" if share is None else f' class="heat" style="--v:{share:.3f}"'
    return f"<td{colour}>{escape(text)}</td>"


def _row_head(text: str) -> str:
    long = ' class="long"' if len(text) > LONG_CELL else ""
    return f'<th scope="row"{long}>{escape(text)}</th>'
