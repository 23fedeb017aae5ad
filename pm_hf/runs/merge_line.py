"""Losses and scores of a finished run along every task's merge line θ̂_{t−1} + αΔ_t, beside what the closed form of α
predicts there: whether the coefficient that the run chose is the best one on the line."""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from pm_hf.adapters.folder import open_adapter
from pm_hf.adapters.merge import merge_adapters
from pm_hf.config.loading import FREE_KEYS, load_config
from pm_hf.config.schema import RunConfig
from pm_hf.data.stream import STEP_FILE, load_stream
from pm_hf.environment import release_memory, versions
from pm_hf.errors import InputError, raise_all
from pm_hf.files import write_json
from pm_hf.merging.methods import get_method
from pm_hf.runs.folder import CONFIG_FILE
from pm_hf.runs.learner import Run
from pm_hf.runs.records import CLASS_INCREMENTAL, LOWER_IS_BETTER, MERGE_LINE_FILE, TASK_INCREMENTAL, read_runs
from pm_hf.runs.start import start_task

COEFFICIENT_GRID = tuple(tenth / 10 for tenth in range(11))


COMPARED = ("chosen", "one_over_t", "best_loss")  # coefficients whose regret is reported


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
    saved, folder = read_runs([run])[0], Path(run).expanduser()
    if not folder.is_dir():
        raise InputError(f"{folder} is a file: expected the output_dir of a run")
    config = load_config(folder / CONFIG_FILE, overrides, {"output_dir": str(folder)})
    raise_all(_line_problems(config), f"{folder} has no merge line θ + αΔ")
    work = Run(config, load_stream(config))
    known = {task["key"]: task for task in saved.line.get("tasks", [])}
    tasks: list[dict] = []
    skipped: list[dict] = []
    found: dict[str, Any] = {}
    for index in _folded(work):
        step = work.folder.step(index)
        reason = _skip_reason(step)
        key = "" if reason else _key(work, index, step)
        if key not in known and (reason := reason or _missing_rows_reason(work, index)):
            skipped.append({"task": step["task"], "reason": reason})
        else:
            tasks.append(known[key] if key in known else _task(work, index, step, saved.metric) | {"key": key})
        found = _result(config, saved.metric, tasks, skipped)
        write_json(folder / MERGE_LINE_FILE, found)
    return found


def merge_line_table(found: Mapping[str, Any]) -> str:
    """What `merge_line` found as text: a table of points for each task."""
    parts = [line for task in found["tasks"] for line in _task_lines(found, task)]
    if found["mean_regret"]:
        parts.append(f"mean over {len(found['tasks'])} task(s): {_regret_text(found, found['mean_regret'])}")
    if found["predicted_unit"]:
        parts.append(f"predicted: change from α = 0 of the sum over tasks, {found['predicted_unit']}")
    parts += [f"task {task['task']} left out: {task['reason']}" for task in found["skipped"]]
    return "\n".join(parts)


# which tasks have a line
def _line_problems(config: RunConfig) -> list[str]:
    """Settings with which no task of a run is merged as θ̂ + αΔ with one α."""
    strategy, method, freedom = config.strategy, config.merge.method or "pm", config.merge.freedom
    checks = [
        (strategy.joint, "strategy.joint trains all tasks at once"),
        (strategy.individual, "strategy.individual merges nothing"),
        (not config.trains, "trains: false leaves the backbone as it is"),
        (config.head.strict, "head.strict freezes the backbone after the first task"),
        (get_method(method).kernel is not None, f"the result of merge.method {method} is no step along Δ"),
        (freedom == "free", "merge.freedom free solves for the whole matrix"),
        (freedom == "module", "merge.freedom module has a coefficient for each module"),
    ]
    return [problem for applies, problem in checks if applies]


def _folded(work: Run) -> list[int]:
    """Finished tasks that were folded into a merge before them; InputError where there is none, or for other data."""
    folder, tasks = work.folder, work.stream.tasks
    done = 0
    while done < len(tasks) and (folder.task(done) / STEP_FILE).is_file():
        done += 1
    other = [task.name for i, task in enumerate(tasks[:done]) if folder.data_problem(i)]
    raise_all(
        [f"labels or rows of {', '.join(other)} are not those that it was trained on; use data_dir=FOLDER"]
        * bool(other),
        str(folder.path),
    )
    found = [index for index in range(done) if folder.state(index).merged is not None]
    if not found:
        raise InputError(f"{folder.path}: no task was folded into another, {done} finished; a merge line needs two")
    return found


def _skip_reason(step: Mapping) -> str | None:
    """Why a task has no merge line."""
    if step["coefficient"] is None:
        return "it has no coefficient"
    if step["train_from"] != "merged":
        return f"it was trained from {step['train_from']}, so its Δ does not start at the merge before it"
    return None


def _missing_rows_reason(work: Run, index: int) -> str | None:
    """Why a task's line cannot be computed anew."""
    if work.config.analytic_head and not len(work.stream.tasks[index].train):
        return "its training rows are left out, from which the analytic head of every point is computed"
    return None


def _key(work: Run, index: int, step: Mapping) -> str:
    """Digest of all that a task's line depends on."""
    settings = work.config.to_dict()
    for *parents, last in (key.split(".") for key in FREE_KEYS):  # the rows have a fingerprint
        place = settings[parents[0]] if parents else settings
        place[last] = None
    adapters = [work.folder.task(index) / "adapter", work.folder.state(index).merged]
    parts: list = [
        [open_adapter(path).digest() for path in adapters if path],
        [work.folder.step(seen)["fingerprint"] for seen in range(index + 1)],  # compared with the rows in _folded
        [step["coefficient"], _coefficients(step), settings],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


# one line
def _coefficients(step: Mapping) -> list[float]:
    return sorted({*COEFFICIENT_GRID, step["coefficient"]["used"], step["coefficient"]["one_over_t"]})


def _task(work: Run, index: int, step: Mapping, metric: str) -> dict[str, Any]:
    """One task's line, scored."""
    began, alpha, alphas = time.perf_counter(), step["coefficient"], _coefficients(step)
    points = [_point(work, index, step, value, metric) for value in alphas]
    sign = -1 if metric in LOWER_IS_BETTER else 1
    best = {
        "best_loss": _best(points, lambda point: -point["loss_mean"], alpha["used"]),
        "best_score": _best(points, lambda point: sign * point["score"], alpha["used"]),
    }
    chosen = {name: alpha[key] for name, key in (("chosen", "used"), ("raw", "raw"), ("one_over_t", "one_over_t"))}
    print(
        f"task {step['task']}: {len(points)} points, {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True
    )
    return {
        "task": step["task"],
        "t": index + 1,
        "seen": [task.name for task in work.stream.seen(index)],
        **chosen,
        **best,
        "regret": _regrets(points, chosen | best, metric),
        "points": points,
        "notes": _notes(step, points, metric),
    }


def _point(work: Run, index: int, step: Mapping, alpha: float, metric: str) -> dict[str, Any]:
    """The merge with one coefficient, loaded as users load it."""
    start, seen, head = start_task(work.config, work.folder.state(index), index), work.stream.seen(index), step["head"]
    with TemporaryDirectory(prefix="pm-hf-") as folder:
        merged = Path(folder) / "merged"
        merge_adapters(
            work.folder.task(index) / "adapter",
            merged,
            into=None if start.running is None else start.running.path,
            coefficient=alpha,
            max_rank=work.config.merge.max_rank,
        )
        work.head.after_merge(Path(folder), work.stream.tasks[index], start, head, trained=True)
        found = work.scorer.score(merged, head, seen, loss=True, generate=False)
    release_memory()
    losses, scores = ([one[name] for one in found] for name in ("loss", metric))
    return {
        "coefficient": alpha,
        "predicted": _predicted(step["coefficient"], alpha),
        "loss_sum": sum(losses),
        "loss_mean": fmean(losses),
        "score": fmean(scores),
        "losses": losses,
        "scores": scores,
        TASK_INCREMENTAL: [one.get(TASK_INCREMENTAL) for one in found],
    }


def _predicted(coefficient: Mapping, alpha: float) -> float | None:
    """½(past + current)α² − numerator·α; None where no curvature decided the coefficient."""
    terms = [coefficient[key] for key in ("numerator", "past", "current")]
    if None in terms:
        return None
    numerator, past, current = terms
    return (past + current) * alpha**2 / 2 - numerator * alpha


def _best(points: Iterable[Mapping], value: Callable[[Mapping], float], chosen: float) -> float:
    """The α of the largest value, of several equal ones the nearest to the chosen one."""
    return max(points, key=lambda point: (value(point), -abs(point["coefficient"] - chosen)))["coefficient"]


def _regrets(points: Sequence[Mapping], alphas: Mapping[str, float], metric: str) -> dict[str, dict[str, float]]:
    """{coefficient: what it loses to the best of the line in score, and in mean loss}."""
    at = {point["coefficient"]: point for point in points}
    best_loss, best_score = at[alphas["best_loss"]]["loss_mean"], at[alphas["best_score"]]["score"]
    return {
        name: {
            "score": _scale(metric) * abs(best_score - at[alphas[name]]["score"]),
            "loss": at[alphas[name]]["loss_mean"] - best_loss,
        }
        for name in COMPARED
    }


def _scale(metric: str) -> int:
    return 100 if metric == CLASS_INCREMENTAL else 1


def _notes(step: Mapping, points: Sequence[Mapping], metric: str) -> list[str]:
    """What is to be said of a line, and where the chosen point is not what the run has measured."""
    alpha = step["coefficient"]
    found = [alpha["note"]] if alpha["note"] not in (None, "given") else []
    here = next(point["scores"] for point in points if point["coefficient"] == alpha["used"])
    apart = max(abs(a - b) for a, b in zip(here, step["scores"][metric], strict=True))
    if apart > SAME_SCORE:
        found.append(
            f"scores at the chosen coefficient differ by up to {apart:.2g} from those in step.json: other versions, "
            "another device or other settings"
        )
    return found


# all lines
def _result(config: RunConfig, metric: str, tasks: Sequence[Mapping], skipped: Sequence[Mapping]) -> dict[str, Any]:
    """The content of coefficient.json."""
    mean = {
        name: {kind: fmean(task["regret"][name][kind] for task in tasks) for kind in ("score", "loss")}
        for name in COMPARED
        if tasks
    }
    lda = config.head.kind == "lda"
    return {
        "metric": metric,
        "regret_unit": "points" if metric == CLASS_INCREMENTAL else metric.replace("_", " "),
        "predicted_unit": _unit(config) if any(task["points"][0]["predicted"] is not None for task in tasks) else None,
        "notes": ["the losses are those of the analytic head, predicted is of the heads that were trained"] * lda,
        "mean_regret": mean,
        "tasks": list(tasks),
        "skipped": list(skipped),
        "versions": versions(),
    }


def _unit(config: RunConfig) -> str:
    """What the objective is counted in, a sum over tasks in any case."""
    if config.curvature.kind == "gram":
        return "half the squared change of the layers' outputs, mean over examples"
    if config.curvature.normalisation == "trace":
        return "nats of each task over its mean Fisher entry"
    summed = not config.kind.has_head and config.curvature.loss_reduction == "sum"
    return "nats of an example, summed over its target tokens" if summed else "nats"


# text
def _task_lines(found: Mapping, task: Mapping) -> list[str]:
    name = "accuracy" if found["metric"] == CLASS_INCREMENTAL else found["metric"].replace("_", " ")
    cells = [["α", "predicted", "change", "loss", "earlier", "own", name, "earlier", "own", ""]]
    start = next(point for point in task["points"] if point["coefficient"] == 0)
    for point in task["points"]:
        change, losses, scores = point["loss_sum"] - start["loss_sum"], _parts(point["losses"]), _parts(point["scores"])
        numbers = [change, *losses, *scores]
        marks = [text for key, text in _marks(name).items() if task[key] == point["coefficient"]]
        predicted = "–" if point["predicted"] is None else f"{point['predicted']:.3g}"
        cells.append([f"{point['coefficient']:.3f}", predicted, *map(_number, numbers), ", ".join(marks)])
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]) - 1)]
    alphas = f"α chosen {task['chosen']:.3f} (raw {task['raw']:.3f}), 1/t {task['one_over_t']:.3f}"
    lines = [
        "  ".join([*(c.rjust(w) for c, w in zip(line, widths, strict=False)), line[-1]]).rstrip() for line in cells
    ]
    notes = [f"  note: {note}" for note in [*found["notes"], *task["notes"]]]
    return [
        f"task {task['t']} {task['task']}: {alphas}",
        *(f"  {line}" for line in lines),
        f"  {_regret_text(found, task['regret'])}",
        *notes,
    ]


def _marks(name: str) -> dict[str, str]:
    return {"chosen": "chosen", "one_over_t": "1/t", "best_loss": "best loss", "best_score": f"best {name}"}


def _parts(values: Sequence[float]) -> tuple[float, float | None, float]:
    """(mean over all tasks, over the earlier ones, of the last one)."""
    return fmean(values), fmean(values[:-1]) if len(values) > 1 else None, values[-1]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _regret_text(found: Mapping, regret: Mapping) -> str:
    listed = [
        f"{name} {regret[key]['score']:.2f} {found['regret_unit']} and {regret[key]['loss']:.4f} nats"
        for key, name in (("chosen", "chosen"), ("one_over_t", "1/t"), ("best_loss", "best loss"))
    ]
    return "regret: " + ", ".join(listed)
