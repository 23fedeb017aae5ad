"""Runs as they are on disk, for whoever shows them: report.json, config.yaml and every task's step.json."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from pm_hf.errors import InputError, raise_all
from pm_hf.files import read_json
from pm_hf.report import CHOICE, INSIDE, LOWER_IS_BETTER, REPORT

Matrix = list[list[float | None]]
LINE = "coefficient.json"  # what `pm_hf.merge_line` found
SECRET = re.compile(r"(^|_)(token|password|secret|key)$")
NEEDED = ("method", "seed", "tasks", "scores", "metrics", "coefficients")


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
    matrices: dict[str, Matrix]
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
    def scores(self) -> Matrix:
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
            found.append(_read(path.expanduser()))
        except InputError as error:
            problems.append(str(error))
    raise_all(problems, "runs")
    metrics = list(dict.fromkeys(run.metric for run in found))
    if len(metrics) > 1:
        raise InputError(
            f"the runs are judged by {' and '.join(metrics)}: they have no common scale; one report for each"
        )
    return _labelled(found)


def _read(path: Path) -> SavedRun:
    file = path / REPORT if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{path} holds no {REPORT}: expected the output_dir of a run with a finished task")
    values = read_json(file)
    missing = [key for key in NEEDED if not isinstance(values, Mapping) or key not in values]
    if missing:
        raise InputError(f"{file} is no report of a run: it lacks {', '.join(missing)}")
    inside = {} if values.get("task_incremental") is None else {INSIDE: values["task_incremental"]}
    metric = values.get("metric", CHOICE)
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
        steps=_steps(path, width) if path.is_dir() else [{} for _ in range(width)],
        seconds=values.get("seconds"),
        freedom=values.get("freedom", "global"),
        held_out=values.get("held_out") or [],
        notes=values.get("notes") or [],
        versions=values.get("versions") or {},
        config=hidden(_config(path) if path.is_dir() else values.get("config") or {}),
        line=_line(path / LINE),
    )


def _steps(folder: Path, count: int) -> list[dict]:
    files = sorted(folder.glob("task-*/step.json"), key=lambda file: int(file.parent.name.split("-")[1]))[:count]
    found = [read_json(file) for file in files]
    return [*found, *({} for _ in range(count - len(found)))]


def _line(path: Path) -> dict:
    found = read_json(path) if path.is_file() else {}
    if found and not (isinstance(found, dict) and "tasks" in found):
        raise InputError(f"{path} was not written by pm-hf inspect --coefficient; move it away")
    return found


def _config(folder: Path) -> dict:
    path = folder / "config.yaml"
    found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def hidden(value: Any) -> Any:
    """The settings without what a name like `hub_token` holds."""
    if isinstance(value, Mapping):
        return {
            key: "(hidden)" if SECRET.search(str(key)) and isinstance(item, str) else hidden(item)
            for key, item in value.items()
        }
    return [hidden(item) for item in value] if isinstance(value, list) else value


def _labelled(runs: list[SavedRun]) -> list[SavedRun]:
    """The runs called by their method, by the seed too where methods repeat, and by a number where those do."""
    methods = [run.method for run in runs]
    repeated = len(set(methods)) < len(methods)
    names = [f"{run.method}, seed {run.seed}" if repeated else run.method for run in runs]
    labels = [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names, start=1)]
    return [replace(run, label=label) for run, label in zip(runs, labels, strict=True)]
