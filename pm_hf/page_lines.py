"""The page's section of coefficient.json: losses and scores along the merge line of every task."""

from collections.abc import Mapping, Sequence
from html import escape

from pm_hf.page_tables import NONE, cell, table
from pm_hf.run_charts import line_chart_names, metric_name
from pm_hf.saved_runs import SavedRun

COMPARED = {"chosen": "chosen", "one_over_t": "1/t", "best_loss": "best loss"}


def merge_lines(runs: Sequence[SavedRun], drawn: Mapping[str, str]) -> str:
    """The section's body for the runs that have a coefficient.json; drawn: {name of a chart: its figure}."""
    return "".join(_of_run(run, place, len(runs), drawn) for place, run in enumerate(runs, 1) if run.line.get("tasks"))


def _of_run(run: SavedRun, place: int, runs: int, drawn: Mapping[str, str]) -> str:
    tasks = run.line["tasks"]
    details = "".join(
        _points(run, task, [drawn[name] for name in line_chart_names(task, place, runs)]) for task in tasks
    )
    return f"<h3>{escape(run.label)}</h3>\n{_regrets(run)}{details}{_notes(run)}"


def _regrets(run: SavedRun) -> str:
    unit, name = run.line["regret_unit"], metric_name(run.metric)
    header = ["task", "chosen", "1/t", "best for loss", f"best for {name}"]
    header += [f"{what}: {which}" for which in COMPARED.values() for what in (unit, "nats")]
    rows = [_row(f"{task['t']} {task['task']}", task, task["regret"]) for task in run.line["tasks"]]
    caption = (
        f"{run.label}: coefficient chosen, 1/t and the best ones on the merge line, on test rows of all tasks seen; "
        f"what is lost to the best: {name} in {unit}, mean loss of a task in nats"
    )
    return table(caption, header, [*rows, _row("mean", {}, run.line["mean_regret"])])


def _row(title: str, task: Mapping, regret: Mapping) -> list[str]:
    alphas = [cell(task.get(key)) for key in ("chosen", "one_over_t", "best_loss", "best_score")]
    lost = [
        text for key in COMPARED for text in (cell(regret[key]["score"], digits=2), cell(regret[key]["loss"], digits=4))
    ]
    return [title, *alphas, *lost]


def _points(run: SavedRun, task: Mapping, figures: Sequence[str]) -> str:
    """One task's charts, and its points for each task seen."""
    names = [f"{place} {name}" for place, name in enumerate(task["seen"], start=1)]
    header = ["α", "predicted", "loss, sum", *(f"loss, {name}" for name in names)]
    header += [f"{metric_name(run.metric)}, {name}" for name in names]
    rows = []
    for point in task["points"]:
        predicted = point["predicted"]
        numbers = [cell(NONE if predicted is None else f"{predicted:.3g}")]
        numbers += [cell(loss, digits=4) for loss in (point["loss_sum"], *point["losses"])]
        rows.append([f"{point['coefficient']:.3f}", *numbers, *(cell(score) for score in point["scores"])])
    unit = run.line["predicted_unit"]
    about = f"; predicted: what the closed form minimises, change from α = 0, in {unit}" if unit else ""
    caption = f"{run.label}: along the merge line of task {task['t']}, {task['task']}{about}"
    title = f"Task {task['t']}, {escape(task['task'])}"
    return f"<details><summary>{title}</summary>{''.join(figures)}{table(caption, header, rows)}</details>\n"


def _notes(run: SavedRun) -> str:
    notes = [*run.line["notes"], *(f"{task['task']}: {note}" for task in run.line["tasks"] for note in task["notes"])]
    notes += [f"{task['task']} left out: {task['reason']}" for task in run.line["skipped"]]
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f"<ul>{listed}</ul>\n" if listed else ""
