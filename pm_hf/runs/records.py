"""What a run leaves on disk for whoever reads it again: report.json, config.yaml, step.json, coefficient.json."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from pm_hf.environment import versions
from pm_hf.errors import InputError, raise_all
from pm_hf.files import read_json, write_json
from pm_hf.measuring.metrics import summary

REPORT_FILE = "report.json"


CLASS_INCREMENTAL, TASK_INCREMENTAL, BITS_PER_BYTE = "class_incremental", "task_incremental", "bits_per_byte"


LOWER_IS_BETTER = ("loss", "perplexity", BITS_PER_BYTE)


def primary_metric(names: Sequence[str], own: Sequence[Sequence[str]]) -> str:
    """What a stream is judged by: accuracy among all classes (answers) seen; bits per byte where a task has none."""
    return CLASS_INCREMENTAL if CLASS_INCREMENTAL in names and all(own) else BITS_PER_BYTE


@dataclass(frozen=True)
class Report:
    """What a run learned and forgot.

    matrices: {metric: R}, `R[t][i]` the score on task i after task t, None above the diagonal. A joint run has one row.
    metric: the one the stream is judged by. coefficients: one dict a task. merge_errors: relative Frobenius error of
    each merge, of the module where it is largest.
    """

    folder: Path
    method: str
    seed: int
    scenario: str
    tasks: list[str]
    metric: str
    matrices: dict[str, list[list[float | None]]]
    test_rows: list[int]
    coefficients: list[dict | None]
    seconds: float
    freedom: str = "global"  # "free": the whole matrix was solved for, coefficients are for comparison only
    train_from: str = "merged"  # where each task's training started
    merge_errors: list[float] = field(default_factory=list)
    held_out: list[dict] = field(default_factory=list)  # {text: {metric: score}} after each task, never trained on
    notes: list[str] = field(default_factory=list)

    @property
    def scores(self) -> list[list[float | None]]:
        """The matrix of the metric."""
        return self.matrices[self.metric]

    @property
    def task_incremental(self) -> list[list[float | None]] | None:
        """The same inside each task's own classes (answers); None where there are none."""
        return self.matrices.get(TASK_INCREMENTAL)

    @property
    def signed(self) -> list[list[float | None]]:
        """The same with more being better."""
        lower = self.metric in LOWER_IS_BETTER
        return [[-x if lower and x is not None else x for x in row] for row in self.scores]

    @property
    def metrics(self) -> dict[str, Any]:
        """ACC, AAA, BWT, forgetting and ACC_samples of the metric, and the same inside each task's own classes.

        ACC_samples is the last row pooled over test rows. final: the mean over tasks of every metric's last row.
        Forgetting is positive where a task became worse, whichever way the metric runs.
        """
        last = [score or 0.0 for score in self.scores[-1]]
        rows = self.test_rows[: len(last)]
        pooled = sum(a * n for a, n in zip(last, rows, strict=True)) / sum(rows)
        inside = (
            {"task_incremental": self._summary(TASK_INCREMENTAL)}
            if self.metric == CLASS_INCREMENTAL and TASK_INCREMENTAL in self.matrices
            else {}
        )
        return {**self._summary(self.metric), "ACC_samples": pooled, **inside, "final": self._final()}

    def _summary(self, metric: str) -> dict[str, float | None]:
        R = self.matrices[metric]
        if len(R) < len(R[0]):  # one joint training
            known = [score for score in R[-1] if score is not None]
            return {"ACC": fmean(known), "AAA": None, "BWT": None, "forgetting": None}
        return summary(R, lower_is_better=metric in LOWER_IS_BETTER)

    def _final(self) -> dict[str, float]:
        known = {name: [x for x in R[-1] if x is not None] for name, R in self.matrices.items()}
        return {name: fmean(found) for name, found in known.items() if found}

    def to_dict(self) -> dict[str, Any]:
        """The content of report.json."""
        fields = {key: value for key, value in vars(self).items() if key not in ("folder", "matrices")}
        more = {"scores": self.scores, "task_incremental": self.task_incremental, "matrices": self.matrices}
        return {**fields, **more, "metrics": self.metrics, "versions": versions()}

    def save(self) -> None:
        """Write report.json into the run's folder."""
        write_json(self.folder / REPORT_FILE, self.to_dict())

    def table(self) -> str:
        """The matrix of the metric, the metrics and the coefficients as text."""
        width = max(12, *(len(name) for name in self.tasks))
        count = len(self.scores)
        header = " " * (width + 2) + " ".join(f"{i:>6d}" for i in range(count))
        name = "accuracy" if self.metric == CLASS_INCREMENTAL else self.metric.replace("_", " ")
        lines = [f"{self.method}, seed {self.seed}: {name} on each task (row) after each task (column)", header]
        for i, task in enumerate(self.tasks):
            lines.append(f"{task:<{width}}  " + " ".join(f"{_number(self.scores[t][i]):>6}" for t in range(count)))
        metrics = self.metrics
        lines.append("  ".join(f"{key} {_number(metrics[key])}" for key in ("ACC", "AAA", "BWT", "forgetting")))
        if inside := metrics.get("task_incremental"):
            lines.append(f"inside each task's own classes: ACC {_number(inside['ACC'])}  AAA {_number(inside['AAA'])}")
        others = {
            key: value
            for key, value in metrics["final"].items()
            if key not in (CLASS_INCREMENTAL, TASK_INCREMENTAL, self.metric)
        }
        if others:
            lines.append("at the end: " + "  ".join(f"{k.replace('_', ' ')} {v:.3f}" for k, v in others.items()))
        for text in self.held_out[0] if self.held_out else ():
            values = [step[text][BITS_PER_BYTE] for step in self.held_out]
            lines.append(f"held out, {text}: bits per byte " + " ".join(_number(value) for value in values))
        known = [c for c in self.coefficients if c]
        if known:
            name = "coefficient, not used (the whole matrix is free)" if self.freedom == "free" else "coefficient used"
            lines.append(f"{name}: " + " ".join(f"{c['used']:.3f}" for c in known))
            lines.append("1/t: " + " ".join(f"{c['one_over_t']:.3f}" for c in known))
        if any(self.merge_errors):
            lines.append("relative error of each merge: " + " ".join(f"{error:.1e}" for error in self.merge_errors))
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


ScoreRows = list[list[float | None]]


MERGE_LINE_FILE = "coefficient.json"  # what `pm_hf.merge_line` found


SECRET_SETTING = re.compile(r"(^|_)(token|password|secret|key)$")


REQUIRED_KEYS = ("method", "seed", "tasks", "scores", "metrics", "coefficients")


@dataclass(frozen=True)
class SavedRun:
    """One run. label: how it is called beside the others, unique among them.

    matrices: {metric: R}, R[t][i] the score on task i after task t, None where there is none; that of `metric` judges.
    metrics: as in report.json. steps: one dict for each learned task, {} where its step.json is not there. line: what
    coefficient.json says, {} where it is not there.
    """

    path: Path
    label: str
    method: str
    seed: int
    tasks: list[str]
    metric: str
    matrices: dict[str, ScoreRows]
    metrics: dict[str, Any]
    coefficients: list[dict | None]
    steps: list[dict]
    seconds: float | None = None
    freedom: str = "global"
    held_out: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    line: dict = field(default_factory=dict)

    @property
    def scores(self) -> ScoreRows:
        """The matrix of the metric."""
        return self.matrices[self.metric]

    @property
    def lower_is_better(self) -> bool:
        """Whether a smaller score is a better one."""
        return self.metric in LOWER_IS_BETTER

    @property
    def joint(self) -> bool:
        """Whether all tasks were learned in one training: the matrix has one row."""
        return len(self.scores) < len(self.tasks)

    @property
    def means(self) -> list[float | None]:
        """Mean of the scores that each row of the matrix has."""
        known = [[score for score in row if score is not None] for row in self.scores]
        return [fmean(row) if row else None for row in known]

    @property
    def forgetting(self) -> list[float | None]:
        """For each task: the best score it had before the end minus its score at the end, signed so that a positive
        number is a loss; None for the last task and where scores are missing."""
        sign = -1 if self.lower_is_better else 1
        found: list[float | None] = []
        for i in range(len(self.tasks)):
            *before, last = [row[i] for row in self.scores]
            known = [sign * score for score in before if score is not None]
            found.append(max(known) - sign * last if known and last is not None else None)
        return found

    @property
    def learned(self) -> list[str]:
        """Names of what was trained, one for each row of the matrix; a joint training is called by its step."""
        if not self.joint:
            return self.tasks
        return [str(step.get("task", "all tasks")) for step in self.steps]


def read_runs(paths: Sequence[str | Path]) -> list[SavedRun]:
    """The runs of folders of `learn`, or of report.json files.

    Raises one InputError that lists what is wrong, runs that are judged by different metrics included.
    """
    found: list[SavedRun] = []
    problems: list[str] = []
    for path in map(Path, paths):
        try:
            found.append(_read_run(path.expanduser()))
        except InputError as error:
            problems.append(str(error))
    raise_all(problems, "runs")
    metrics = list(dict.fromkeys(run.metric for run in found))
    if len(metrics) > 1:
        raise InputError(
            f"the runs are judged by {' and '.join(metrics)}: they have no common scale; one report for each"
        )
    return _labelled(found)


def _read_run(path: Path) -> SavedRun:
    file = path / REPORT_FILE if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{path} holds no {REPORT_FILE}: expected the output_dir of a run with a finished task")
    values = read_json(file)
    missing = [key for key in REQUIRED_KEYS if not isinstance(values, Mapping) or key not in values]
    if missing:
        raise InputError(f"{file} is no report of a run: it lacks {', '.join(missing)}")
    inside = {} if values.get("task_incremental") is None else {TASK_INCREMENTAL: values["task_incremental"]}
    metric = values.get("metric", CLASS_INCREMENTAL)
    width = len(values["scores"])
    return SavedRun(
        path=path,
        label="",
        method=values["method"],
        seed=values["seed"],
        tasks=list(values["tasks"]),
        metric=metric,
        matrices=values.get("matrices") or {metric: values["scores"], **inside},
        metrics=values["metrics"],
        coefficients=values["coefficients"],
        steps=_read_steps(path, width) if path.is_dir() else [{} for _ in range(width)],
        seconds=values.get("seconds"),
        freedom=values.get("freedom", "global"),
        held_out=values.get("held_out") or [],
        notes=values.get("notes") or [],
        versions=values.get("versions") or {},
        config=redact_secrets(_read_settings(path) if path.is_dir() else values.get("config") or {}),
        line=_read_merge_line(path / MERGE_LINE_FILE),
    )


def _read_steps(folder: Path, count: int) -> list[dict]:
    files = sorted(folder.glob("task-*/step.json"), key=lambda file: int(file.parent.name.split("-")[1]))[:count]
    found = [read_json(file) for file in files]
    return [*found, *({} for _ in range(count - len(found)))]


def _read_merge_line(path: Path) -> dict:
    found = read_json(path) if path.is_file() else {}
    if found and not (isinstance(found, dict) and "tasks" in found):
        raise InputError(f"{path} was not written by pm-hf inspect --coefficient; move it away")
    return found


def _read_settings(folder: Path) -> dict:
    path = folder / "config.yaml"
    found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def redact_secrets(value: Any) -> Any:
    """The settings without what a name like `hub_token` holds."""
    if isinstance(value, Mapping):
        return {
            key: "(hidden)" if SECRET_SETTING.search(str(key)) and isinstance(item, str) else redact_secrets(item)
            for key, item in value.items()
        }
    return [redact_secrets(item) for item in value] if isinstance(value, list) else value


def _labelled(runs: list[SavedRun]) -> list[SavedRun]:
    """The runs called by their method, by the seed too where methods repeat, and by a number where those do."""
    methods = [run.method for run in runs]
    repeated = len(set(methods)) < len(methods)
    names = [f"{run.method}, seed {run.seed}" if repeated else run.method for run in runs]
    labels = [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names, start=1)]
    return [replace(run, label=label) for run, label in zip(runs, labels, strict=True)]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
