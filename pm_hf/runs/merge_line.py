"""Losses and scores of a finished run along every task's merge line θ̂_{t−1} + αΔ_t, beside what the closed form of α
predicts there: whether the coefficient that the run chose is the best one on the line."""

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from pm_hf.adapters.folder import open_adapter
from pm_hf.adapters.merge import merge_adapters
from pm_hf.config.loading import FREE_KEYS, load_config
from pm_hf.config.schema import RunConfig
from pm_hf.data.stream import load_stream
from pm_hf.distributed import log_line
from pm_hf.environment import release_memory
from pm_hf.errors import InputError, raise_all
from pm_hf.files import write_json
from pm_hf.measuring.line_search import COEFFICIENT_GRID, best_coefficient, predicted_change, scan
from pm_hf.merging.coefficient import Coefficient
from pm_hf.runs.folder import finished_labels
from pm_hf.runs.learner import Run
from pm_hf.runs.paths import RunPaths, TaskPaths
from pm_hf.runs.records import (
    CLASS_INCREMENTAL,
    COMPARED_COEFFICIENTS,
    LOWER_IS_BETTER,
    TASK_INCREMENTAL,
    MergeLine,
    Report,
    TaskRecord,
)
from pm_hf.runs.start import TaskStart, start_task
from pm_hf.text import NO_VALUE, format_metric, format_number, printable, text_table

# {setting that older lines do not know: what they were made with}
NEWER_SETTINGS = {
    ("curvature", "at"): "optimum",
    ("strategy", "drift_weight"): 0.0,
    ("head", "gate"): False,
    ("head", "solver"): "lda",
}
SAME_SCORE = 1e-4  # difference of two scores of one adapter that is not worth a note


def merge_line(run: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Score every folded task of a finished run on a grid of α, and write it into RUN/coefficient.json.

    run: output_dir of a run. overrides: settings as `key=value`, for data or a base model that have moved. The α are
    0, 0.1, …, 1, the chosen one and 1/t; each merge is loaded as users load it, the analytic head is computed anew.

    metric, regret_unit: what the run is judged by, and in what regret is counted (points: hundredths of an accuracy).
    tasks: for each of them `points` with `coefficient`, `losses` and `scores` (one for each task `seen`, on its test
    rows), `loss_sum`, `loss_mean` and `score` over these tasks, and `predicted`: ½(past + current)α² − numerator·α, the
    change from α = 0 of the objective that the closed form minimises, None where no curvature was used. A loss is a
    classifier's mean cross-entropy inside the task's own classes, a language model's mean over its target tokens, both
    in nats. With the mean-reduced Fisher `predicted` is in nats too, summed over tasks: the second-order change of
    `loss_sum` where the Fisher is the Hessian and the rows are those it was measured on. predicted_unit says which unit
    it has with other curvatures; None where nothing is predicted.
    best_loss and best_score are the best α of the grid, of several equal ones the nearest to the chosen; regret is what
    the chosen α, 1/t and best_loss lose to them, in `score` and in `loss_mean`; mean_regret its mean over the tasks.
    skipped: tasks that were not merged along such a line, and why.

    A task whose line was computed before, from the same adapters, rows and settings, is taken from coefficient.json.
    Raises InputError for what is no run, and for runs whose merge is not along a line.
    """
    saved, folder = Report.load(run), Path(run).expanduser()
    if not folder.is_dir():
        raise InputError(f"{folder} is a file: expected the output_dir of a run")
    paths = RunPaths(folder)
    config = load_config(paths.config, overrides, {"output_dir": str(folder)})
    raise_all(_line_problems(config), f"{folder} has no merge line θ + αΔ")
    work = Run(config, load_stream(config, finished_labels(config)))
    computed = {} if saved.line is None else {task["key"]: task for task in saved.line.tasks}
    tasks: list[dict] = []
    skipped: list[dict] = []
    line: dict[str, Any] = {}
    for index in _folded(work):
        record = work.folder.record(index)
        reason = _skip_reason(record)
        key = "" if reason else _key(work, index, record)
        if key not in computed and (reason := reason or _missing_rows_reason(work, index)):
            skipped.append({"task": record.task, "reason": reason})
        elif key in computed:
            tasks.append(computed[key])
        else:
            tasks.append(_task(work, index, record, saved.metric) | {"key": key})
        line = asdict(_merge_line(config, saved.metric, tasks, skipped))
        write_json(paths.merge_line, line)
    return line


# which tasks have a line
def _line_problems(config: RunConfig) -> list[str]:
    """Settings with which no task of a run is merged as θ̂ + αΔ with one α."""
    strategy, method, freedom = config.strategy, config.merging_method, config.merge.freedom
    checks = [
        (strategy.joint, "strategy.joint trains all tasks at once"),
        (strategy.individual, "strategy.individual merges nothing"),
        (not config.trains, "trains: false leaves the backbone as it is"),
        (config.head.strict, "head.strict freezes the backbone after the first task"),
        (method.kernel is not None, f"the result of merge.method {method.name} is no step along Δ"),
        (freedom == "free", "merge.freedom free solves for the whole matrix"),
        (freedom == "module", "merge.freedom module has a coefficient for each module"),
    ]
    return [problem for applies, problem in checks if applies]


def _folded(work: Run) -> list[int]:
    """Finished tasks that were folded into a merge before them; InputError where there is none, or for other data."""
    folder, tasks = work.folder, work.stream.tasks
    done = folder.count_finished()
    other = [task.name for i, task in enumerate(tasks[:done]) if folder.data_problem(i)]
    raise_all(
        [f"labels or rows of {', '.join(other)} are not those that it was trained on; use data_dir=FOLDER"]
        * bool(other),
        str(folder.path),
    )
    folded = [index for index in range(done) if folder.state(index).merged is not None]
    if not folded:
        raise InputError(f"{folder.path}: no task was folded into another, {done} finished; a merge line needs two")
    return folded


def _skip_reason(record: TaskRecord) -> str | None:
    """Why a task has no merge line."""
    if record.coefficient is None:
        return "it has no coefficient"
    if record.train_from != "merged":
        return f"it was trained from {record.train_from}, so its Δ does not start at the merge before it"
    return None


def _missing_rows_reason(work: Run, index: int) -> str | None:
    """Why a task's line cannot be computed anew."""
    if work.config.analytic_head and not len(work.stream.tasks[index].train):
        return "its training rows are left out, from which the analytic head of every point is computed"
    return None


def _key(work: Run, index: int, record: TaskRecord) -> str:
    """Digest of all that a task's line depends on."""
    settings, alpha = work.config.to_dict(), _coefficient(record)
    for *parents, last in (key.split(".") for key in FREE_KEYS):  # the rows have a fingerprint
        place = settings[parents[0]] if parents else settings
        place[last] = None
    del settings["stream"]["order"]  # lines are kept since before it existed
    if not work.config.rehearses:
        del settings["strategy"]["replay"], settings["strategy"]["pool_rows"]  # as for the order
    for (group, name), default in NEWER_SETTINGS.items():
        if settings[group][name] == default:
            del settings[group][name]  # as for the order
    kept = {key: value for key, value in asdict(alpha).items() if key != "source"}  # as for the order
    adapters = [work.folder.task(index).adapter, work.folder.state(index).merged]
    parts: list = [
        [open_adapter(path).digest() for path in adapters if path],
        [work.folder.record(seen).fingerprint for seen in range(index + 1)],  # compared with the rows in _folded
        [{key: None if value != value else value for key, value in kept.items()}, sorted(_grid(alpha)), settings],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


# one line
def _coefficient(record: TaskRecord) -> Coefficient:
    """That of a task which was not skipped."""
    assert record.coefficient is not None
    return record.coefficient


def _grid(alpha: Coefficient) -> set[float]:
    return {*COEFFICIENT_GRID, alpha.used, alpha.one_over_t}


def _task(work: Run, index: int, record: TaskRecord, metric: str) -> dict[str, Any]:
    """One task's line, scored."""
    began, alpha = time.perf_counter(), _coefficient(record)
    start = start_task(work.config, work.folder.state(index), index)
    points = scan(_grid(alpha), lambda value: _point(work, start, record, value, metric))
    sign = -1 if metric in LOWER_IS_BETTER else 1
    best = {
        "best_loss": best_coefficient(points, lambda point: -point["loss_mean"], alpha.used),
        "best_score": best_coefficient(points, lambda point: sign * point["score"], alpha.used),
    }
    chosen = {"chosen": alpha.used, "raw": alpha.raw, "one_over_t": alpha.one_over_t}
    log_line(f"task {record.task}: {len(points)} points, {time.perf_counter() - began:.1f} s")
    return {
        "task": record.task,
        "t": index + 1,
        "seen": [task.name for task in work.stream.seen(index)],
        **chosen,
        **best,
        "regret": _regrets(points, chosen | best, metric),
        "points": points,
        "notes": _notes(record, points, metric),
    }


def _point(work: Run, start: TaskStart, record: TaskRecord, alpha: float, metric: str) -> dict[str, Any]:
    """The merge with one coefficient, loaded as users load it."""
    index, seen = start.index, work.stream.seen(start.index)
    with TemporaryDirectory(prefix="pm-hf-") as folder:
        paths = TaskPaths(Path(folder))
        merge_adapters(
            work.folder.task(index).adapter,
            paths.merged,
            into=None if start.running is None else start.running.path,
            coefficient=alpha,
            max_rank=work.config.merge.max_rank,
        )
        work.head.after_merge(paths, work.stream.tasks[index], start, record.head, trained=True)
        measured = work.scorer.score(paths.merged, record.head, seen, loss=True, generate=False)
    release_memory()
    losses, scores = ([of_task[name] for of_task in measured] for name in ("loss", metric))
    return {
        "coefficient": alpha,
        "predicted": _predicted(_coefficient(record), alpha),
        "loss_sum": sum(losses),
        "loss_mean": fmean(losses),
        "score": fmean(scores),
        "losses": losses,
        "scores": scores,
        TASK_INCREMENTAL: [of_task.get(TASK_INCREMENTAL) for of_task in measured],
    }


def _predicted(chosen: Coefficient, alpha: float) -> float | None:
    """The change that the closed form predicts; None where no curvature decided the coefficient."""
    terms = (chosen.numerator, chosen.past, chosen.current)
    return None if any(map(math.isnan, terms)) else predicted_change(*terms, alpha)


def _regrets(points: Sequence[Mapping], alphas: Mapping[str, float], metric: str) -> dict[str, dict[str, float]]:
    """{coefficient: what it loses to the best of the line in score, and in mean loss}."""
    at = {point["coefficient"]: point for point in points}
    best_loss, best_score = at[alphas["best_loss"]]["loss_mean"], at[alphas["best_score"]]["score"]
    return {
        name: {
            "score": _scale(metric) * abs(best_score - at[alphas[name]]["score"]),
            "loss": at[alphas[name]]["loss_mean"] - best_loss,
        }
        for name in COMPARED_COEFFICIENTS
    }


def _scale(metric: str) -> int:
    return 100 if metric == CLASS_INCREMENTAL else 1


def _notes(record: TaskRecord, points: Sequence[Mapping], metric: str) -> list[str]:
    """What is to be said of a line, and where the chosen point is not what the run has measured."""
    alpha = _coefficient(record)
    notes = [alpha.note] if alpha.note and alpha.source != "given" else []
    chosen = next(point["scores"] for point in points if point["coefficient"] == alpha.used)
    apart = max(abs(a - b) for a, b in zip(chosen, record.scores[metric], strict=True))
    if apart > SAME_SCORE:
        notes.append(
            f"scores at the chosen coefficient differ by up to {apart:.2g} from those in step.json: other versions, "
            "another device or other settings"
        )
    return notes


# all lines
def _merge_line(config: RunConfig, metric: str, tasks: list[dict], skipped: list[dict]) -> MergeLine:
    """The content of coefficient.json."""
    mean = {
        name: {kind: fmean(task["regret"][name][kind] for task in tasks) for kind in ("score", "loss")}
        for name in COMPARED_COEFFICIENTS
        if tasks
    }
    predicts = any(task["points"][0]["predicted"] is not None for task in tasks)
    trained_heads = "the losses are those of the analytic head, predicted is of the heads that were trained"
    return MergeLine(
        metric=metric,
        regret_unit="points" if metric == CLASS_INCREMENTAL else format_metric(metric),
        predicted_unit=_unit(config) if predicts else None,
        notes=[trained_heads] if config.analytic_head else [],
        mean_regret=mean,
        tasks=tasks,
        skipped=skipped,
    )


def _unit(config: RunConfig) -> str:
    """What the objective is counted in, a sum over tasks in any case."""
    if config.curvature.kind == "gram":
        return "half the squared change of the layers' outputs, mean over examples"
    if config.curvature.normalisation == "trace":
        return "nats of each task over its mean Fisher entry"
    summed = not config.kind.has_head and config.curvature.loss_reduction == "sum"
    return "nats of an example, summed over its target tokens" if summed else "nats"


# text
def merge_line_table(line: Mapping[str, Any]) -> str:
    """What `merge_line` measured as text: a table of points for each task."""
    parts = [text for task in line["tasks"] for text in _task_lines(line, task)]
    if line["mean_regret"]:
        parts.append(f"mean over {len(line['tasks'])} task(s): {_regret_text(line, line['mean_regret'])}")
    if line["predicted_unit"]:
        parts.append(f"predicted: change from α = 0 of the sum over tasks, {line['predicted_unit']}")
    parts += [f"task {task['task']} left out: {task['reason']}" for task in line["skipped"]]
    return "\n".join(map(printable, parts))


def _task_lines(line: Mapping, task: Mapping) -> list[str]:
    name = format_metric(line["metric"])
    marks = COMPARED_COEFFICIENTS | {"best_score": f"best {name}"}
    rows = [["α", "predicted", "change", "loss", "earlier", "own", name, "earlier", "own", ""]]
    start = next(point for point in task["points"] if point["coefficient"] == 0)
    for point in task["points"]:
        change = point["loss_sum"] - start["loss_sum"]
        numbers = [change, *_parts(point["losses"]), *_parts(point["scores"])]
        marked = [text for key, text in marks.items() if task[key] == point["coefficient"]]
        predicted = NO_VALUE if point["predicted"] is None else f"{point['predicted']:.3g}"
        cells = [format_number(number, 4) for number in numbers]
        rows.append([f"{point['coefficient']:.3f}", predicted, *cells, ", ".join(marked)])
    alphas = f"α chosen {task['chosen']:.3f} (raw {task['raw']:.3f}), 1/t {task['one_over_t']:.3f}"
    return [
        f"task {task['t']} {task['task']}: {alphas}",
        *text_table(rows, left=(len(rows[0]) - 1,), indent="  "),
        f"  {_regret_text(line, task['regret'])}",
        *(f"  note: {note}" for note in [*line["notes"], *task["notes"]]),
    ]


def _parts(values: Sequence[float]) -> tuple[float, float | None, float]:
    """(mean over all tasks, over the earlier ones, of the last one)."""
    return fmean(values), fmean(values[:-1]) if len(values) > 1 else None, values[-1]


def _regret_text(line: Mapping, regret: Mapping) -> str:
    listed = [
        f"{name} {regret[key]['score']:.2f} {line['regret_unit']} and {regret[key]['loss']:.4f} nats"
        for key, name in COMPARED_COEFFICIENTS.items()
    ]
    return "regret: " + ", ".join(listed)
