"""What a run leaves on disk: step.json of every task, report.json, coefficient.json; each written and read here.

Keys that a file lacks, because an older version wrote it, have defaults; keys that are not known are left alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from pm_hf.config.yaml_text import read_yaml
from pm_hf.environment import versions
from pm_hf.errors import InputError, raise_all
from pm_hf.files import FileMark, as_record, expand, read_checked, read_json, write_json
from pm_hf.measuring.metrics import is_joint, summary, task_forgetting
from pm_hf.merging.coefficient import Coefficient
from pm_hf.runs.paths import MERGE_LINE_FILE, REPORT_FILE, RunPaths
from pm_hf.runs.right_rows import RightRows
from pm_hf.runs.schemas import MergeLineFile, ReportFile, StepFile
from pm_hf.text import format_metric, format_number, printable
from pm_hf.training.record import TrainingRecord

CLASS_INCREMENTAL, TASK_INCREMENTAL, BITS_PER_BYTE = "class_incremental", "task_incremental", "bits_per_byte"
LOWER_IS_BETTER = ("loss", "perplexity", BITS_PER_BYTE)
CONDITIONS = ("threads", "processes", "device", "versions")  # of step.json: what a task was learned under
WAY_OUT = "it was changed by hand, or damaged: bring it back from a copy"
ScoreRows = list[list[float | None]]


def primary_metric(names: Sequence[str], own: Sequence[Sequence[str]]) -> str:
    """What a stream is judged by: accuracy among all classes (answers) seen; bits per byte where a task has none."""
    return CLASS_INCREMENTAL if CLASS_INCREMENTAL in names and all(own) else BITS_PER_BYTE


@dataclass(frozen=True)
class TaskRecord:
    """step.json: what became of one task.

    labels: of its head, in row order. fingerprint, test_fingerprint: digests of its rows. coefficient: None where
    several coefficients, or none, decided the merge. merge_error: largest relative Frobenius error of a module.
    curvature_bytes: size of the sums. training: None where only the head was computed. scores: {metric: one score
    for each task seen}. held_out: {text: {metric: score}}; untouched: the same of the base, in the first task's
    record. confusions: (class, another that test rows of it were taken for, how many, test rows of the class), most
    first. right: {task: which of its test rows are right among all classes, or answers, seen}. replay: counts and
    seconds of the written rows, see `pm_hf.runs.rehearsal`; search: the points of the coefficient's search, see
    `search_points`; gate: the scale at which the merge is `deployed`, and the points of all `scales`, see
    `pm_hf.measuring.gate.judge`; these six are left out where there is none. conditions: threads, processes,
    device, versions. files: {name in the task's folder: size and SHA-256} of what it left; inputs: what it depends
    on besides, see `pm_hf.runs.inputs`; {} where an older version wrote it.
    """

    task: str
    labels: list[str] = field(default_factory=list)
    fingerprint: str = ""
    test_fingerprint: str | None = None
    head: str | None = None
    train_from: str = "merged"
    freedom: str = "global"
    coefficient: Coefficient | None = None
    merge_error: float | None = None
    curvature_bytes: int | None = None
    test_rows: int | None = None
    training: TrainingRecord | None = None
    scores: dict[str, list[float | None]] = field(default_factory=dict)
    held_out: dict[str, dict[str, float]] = field(default_factory=dict)
    confusions: list[tuple[str, str, int, int]] = field(default_factory=list)
    right: dict[str, RightRows] = field(default_factory=dict)
    untouched: dict[str, dict[str, float]] = field(default_factory=dict)
    replay: dict[str, Any] = field(default_factory=dict)
    search: list[dict[str, float]] = field(default_factory=list)
    gate: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    process_peak_memory_mb: float | None = None
    conditions: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    files: dict[str, FileMark] = field(default_factory=dict)
    inputs: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def optimizer_steps(self) -> int:
        """Steps of its training."""
        return 0 if self.training is None else self.training.optimizer_steps

    def to_dict(self) -> dict[str, Any]:
        """The content of step.json: what the training and the conditions say stands beside the rest."""
        content: dict[str, Any] = {}
        for part in fields(self):
            value = getattr(self, part.name)
            if part.name == "training":
                content |= {} if value is None else value.to_dict()
            elif part.name in ("untouched", "confusions", "right", "replay", "search", "gate") and not value:
                continue
            elif part.name == "right":
                content[part.name] = {task: asdict(rows) for task, rows in value.items()}
            elif part.name == "conditions":
                content |= value
            else:
                content[part.name] = asdict(value) if part.name == "coefficient" and value is not None else value
        return content

    def save(self, path: Path) -> None:
        """Write step.json."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: Path) -> "TaskRecord":
        """Read step.json; InputError when it is missing, broken or holds something else."""
        content = read_checked(path, StepFile, WAY_OUT)
        names = {part.name for part in fields(cls)} - {"coefficient", "training", "conditions", "right"}
        return cls(
            **{name: content[name] for name in names & content.keys()},
            coefficient=read_coefficient(content.get("coefficient")),
            right=read_right(content),
            training=TrainingRecord.read(content),
            conditions={key: content[key] for key in CONDITIONS if key in content},
        )


def read_right(content: Mapping[str, Any]) -> dict[str, RightRows]:
    """`right` of a step.json or a report.json."""
    return {task: RightRows(**rows) for task, rows in content.get("right", {}).items()}


def read_coefficient(content: Mapping[str, Any] | None) -> Coefficient | None:
    """A coefficient as step.json and report.json hold it; null is NaN. Before `source` existed the note told it."""
    if content is None:
        return None
    values = {key: value for key, value in content.items() if key in {part.name for part in fields(Coefficient)}}
    if "source" not in values:
        by_rule = "given" if values.get("note") == "given" else "average"
        values["source"] = by_rule if values.get("numerator") is None else "closed_form"
    modules = values.pop("modules", None)
    parts = None if modules is None else {name: read_coefficient(module) for name, module in modules.items()}
    numbers = {key: values.pop(key, None) for key in ("raw", "used", "numerator", "past", "current", "one_over_t")}
    filled = {key: float("nan") if number is None else number for key, number in numbers.items()}
    return Coefficient(**filled, **values, modules=parts)  # type: ignore[arg-type]


# keys of the coefficients whose regret a merge line has, and what they are called
COMPARED_COEFFICIENTS = {"chosen": "chosen", "one_over_t": "1/t", "best_loss": "best loss"}


@dataclass(frozen=True)
class MergeLine:
    """coefficient.json: what `pm_hf.merge_line` measured; see there for the keys of its tasks."""

    metric: str
    regret_unit: str
    predicted_unit: str | None
    notes: list[str]
    mean_regret: dict[str, dict[str, float]]
    tasks: list[dict[str, Any]]
    skipped: list[dict[str, str]]
    versions: dict[str, str] = field(default_factory=versions)

    @classmethod
    def load(cls, path: Path) -> "MergeLine | None":
        """The file's content, None where there is none; InputError for a file of another kind."""
        if not path.exists() or (content := read_json(path)) == {}:
            return None
        as_record(content, MergeLineFile, str(path), "move it away, pm-hf inspect --coefficient writes a new one")
        return cls(**{part.name: content[part.name] for part in fields(cls) if part.name in content})


@dataclass(frozen=True)
class Report:
    """report.json: what a run learned and forgot.

    matrices: {metric: R}, `R[t][i]` the score on task i after task t, None above the diagonal. A joint run has one row.
    metric: the one the stream is judged by. alphas: the coefficient of each task. merge_errors: relative Frobenius
    error of each merge, of the module where it is largest. classes: {task: its labels} of tasks that are named by a
    number alone. right: {task: which of its test rows are right at the end}.
    Of a run that was read from its folder also: records, one of each learned task, None where its step.json is not
    there; config, its settings; line, coefficient.json; label, how it is called beside other runs.
    """

    folder: Path
    method: str
    seed: int
    scenario: str
    tasks: list[str]
    metric: str
    matrices: dict[str, ScoreRows]
    test_rows: list[int]
    alphas: list[Coefficient | None]
    seconds: float | None
    freedom: str = "global"  # "free": the whole matrix was solved for, coefficients are for comparison only
    train_from: str = "merged"  # where each task's training started
    merge_errors: list[float] = field(default_factory=list)
    held_out: list[dict] = field(default_factory=list)  # {text: {metric: score}} after each task, never trained on
    untouched: dict[str, dict] = field(default_factory=dict)  # the same of the base, before any task
    notes: list[str] = field(default_factory=list)
    classes: dict[str, list[str]] = field(default_factory=dict)
    right: dict[str, RightRows] = field(default_factory=dict)
    saved_metrics: dict[str, Any] = field(default_factory=dict)  # of a report.json that was read
    versions: dict[str, str] = field(default_factory=versions)
    label: str = ""
    records: list[TaskRecord | None] = field(default_factory=list)
    config: dict = field(default_factory=dict)
    line: MergeLine | None = None

    @property
    def metrics(self) -> dict[str, Any]:
        """See `compute_metrics`; of a run that was read, those of the file."""
        return self.saved_metrics or compute_metrics(self.matrices, self.metric, self.test_rows)

    @property
    def scores(self) -> ScoreRows:
        """The matrix of the metric."""
        return self.matrices[self.metric]

    @property
    def coefficients(self) -> list[dict[str, Any] | None]:
        """One dict a task, as in report.json: `used`, `raw`, `one_over_t`, …"""
        return [None if alpha is None else asdict(alpha) for alpha in self.alphas]

    @property
    def task_incremental(self) -> ScoreRows | None:
        """The same inside each task's own classes (answers); None where there are none."""
        return self.matrices.get(TASK_INCREMENTAL)

    @property
    def lower_is_better(self) -> bool:
        """Whether a smaller score is a better one."""
        return self.metric in LOWER_IS_BETTER

    @property
    def joint(self) -> bool:
        """Whether all tasks were learned in one training: the matrix has one row."""
        return is_joint(self.scores)

    @property
    def means(self) -> list[float | None]:
        """Mean of the scores that each row of the matrix has."""
        rows = [[score for score in row if score is not None] for row in self.scores]
        return [fmean(row) if row else None for row in rows]

    @property
    def forgetting(self) -> list[float | None]:
        """For each task: what it lost since its best score, positive where it became worse whichever way the metric
        runs; None for the last task and where scores are missing."""
        sign = -1 if self.lower_is_better else 1
        return task_forgetting([[None if score is None else sign * score for score in row] for row in self.scores])

    @property
    def titles(self) -> list[str]:
        """Names of the tasks as a reader understands them: with the classes behind a number."""
        return [f"{task} ({_listed(self.classes[task])})" if task in self.classes else task for task in self.tasks]

    @property
    def learned(self) -> list[str]:
        """Titles of what was trained, one for each row of the matrix; a joint training is called by its record."""
        if not self.joint:
            return self.titles
        return ["all tasks" if record is None else record.task for record in self.records]

    def to_dict(self) -> dict[str, Any]:
        """The content of report.json."""
        content = {name: getattr(self, name) for name in ("method", "seed", "scenario", "tasks", "metric", "test_rows")}
        content |= {name: getattr(self, name) for name in ("coefficients", "seconds", "freedom", "train_from")}
        content |= {name: getattr(self, name) for name in ("merge_errors", "held_out", "notes")}
        content |= {name: getattr(self, name) for name in ("scores", "task_incremental", "matrices")}
        content |= {"classes": self.classes} if self.classes else {}
        content |= {"right": {task: asdict(of) for task, of in self.right.items()}} if self.right else {}
        content |= {"untouched": self.untouched} if self.untouched else {}
        return content | {"metrics": self.metrics, "versions": self.versions}

    def save(self) -> None:
        """Write report.json into the run's folder."""
        write_json(RunPaths(self.folder).report, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> "Report":
        """The run in a folder, or what a report.json alone says of one; InputError for what is no run."""
        path = expand(path, "run")
        whole, paths = path.is_dir(), RunPaths(path)
        file = paths.report if whole else path
        if not file.is_file():
            raise InputError(f"{path} holds no {REPORT_FILE}: expected the output_dir of a run with a finished task")
        content = read_checked(file, ReportFile, WAY_OUT)
        metric, inside = content.get("metric") or CLASS_INCREMENTAL, content.get("task_incremental")
        scores: dict[str, ScoreRows] = {metric: content["scores"]}
        rows = len(content["scores"])
        records: list[TaskRecord | None] = _read_records(paths, rows) if whole else [None] * rows
        config = _read_settings(paths.config) if whole else content.get("config") or {}
        return cls(
            folder=path,
            method=content["method"],
            seed=content["seed"],
            scenario=content.get("scenario", CLASS_INCREMENTAL),
            tasks=list(content["tasks"]),
            metric=metric,
            matrices=content.get("matrices") or scores | ({} if inside is None else {TASK_INCREMENTAL: inside}),
            test_rows=content.get("test_rows") or [],
            alphas=[read_coefficient(alpha) for alpha in content["coefficients"]],
            seconds=content.get("seconds"),
            freedom=content.get("freedom", "global"),
            train_from=content.get("train_from", "merged"),
            merge_errors=content.get("merge_errors") or [],
            held_out=content.get("held_out") or [],
            untouched=content.get("untouched") or {},
            notes=content.get("notes") or [],
            classes=content.get("classes") or _numbered_classes(config, records),
            right=read_right(content),
            saved_metrics=content["metrics"],
            versions=content.get("versions") or {},
            records=records,
            config=config,
            line=MergeLine.load(path / MERGE_LINE_FILE) if whole else None,
        )

    def table(self) -> str:
        """The matrix of the metric, the metrics and the coefficients as text."""
        width = max(12, *(len(title) for title in self.titles))
        count = len(self.scores)
        header = " " * (width + 2) + " ".join(f"{i:>6d}" for i in range(count))
        name = format_metric(self.metric)
        lines = [f"{self.method}, seed {self.seed}: {name} on each task (row) after each task (column)", header]
        for i, task in enumerate(self.titles):
            cells = " ".join(f"{format_number(self.scores[t][i]):>6}" for t in range(count))
            lines.append(f"{task:<{width}}  {cells}")
        metrics = self.metrics
        lines.append("  ".join(f"{key} {format_number(metrics[key])}" for key in ("ACC", "AAA", "BWT", "forgetting")))
        if inside := metrics.get(TASK_INCREMENTAL):
            numbers = "  ".join(f"{key} {format_number(inside[key])}" for key in ("ACC", "AAA"))
            lines.append(f"inside each task's own classes: {numbers}")
        shown = (CLASS_INCREMENTAL, TASK_INCREMENTAL, self.metric)
        others = {key: value for key, value in metrics["final"].items() if key not in shown}
        if others:
            lines.append("at the end: " + "  ".join(f"{format_metric(k)} {v:.3f}" for k, v in others.items()))
        for text in self.held_out[0] if self.held_out else ():
            values = [step[text][BITS_PER_BYTE] for step in self.held_out]
            line = f"held out, {text}: bits per byte " + " ".join(format_number(value) for value in values)
            if (base := self.untouched.get(text, {}).get(BITS_PER_BYTE)) is not None:
                line += f"; the base {format_number(base)}, {100 * (values[-1] / base - 1):+.1f} %"
            lines.append(line)
        alphas = [alpha for alpha in self.alphas if alpha is not None]
        if alphas:
            name = "coefficient, not used (the whole matrix is free)" if self.freedom == "free" else "coefficient used"
            lines.append(f"{name}: " + " ".join(f"{alpha.used:.3f}" for alpha in alphas))
            lines.append("1/t: " + " ".join(f"{alpha.one_over_t:.3f}" for alpha in alphas))
        if any(self.merge_errors):
            lines.append("relative error of each merge: " + " ".join(f"{error:.1e}" for error in self.merge_errors))
        return "\n".join(map(printable, [*lines, *(f"note: {note}" for note in self.notes)]))


def compute_metrics(matrices: Mapping[str, ScoreRows], metric: str, test_rows: Sequence[int]) -> dict[str, Any]:
    """ACC, AAA, BWT, forgetting and ACC_samples of the metric, and the same inside each task's own classes.

    ACC_samples is the last row pooled over test rows. final: the mean over tasks of every metric's last row.
    Forgetting is positive where a task became worse, whichever way the metric runs.
    """
    last = [score or 0.0 for score in matrices[metric][-1]]
    rows = test_rows[: len(last)]
    pooled = sum(score * count for score, count in zip(last, rows, strict=True)) / sum(rows)
    has_inside = metric == CLASS_INCREMENTAL and TASK_INCREMENTAL in matrices
    inside = {TASK_INCREMENTAL: _summary(matrices, TASK_INCREMENTAL)} if has_inside else {}
    ends = {name: [score for score in R[-1] if score is not None] for name, R in matrices.items()}
    final = {name: fmean(scores) for name, scores in ends.items() if scores}
    return {**_summary(matrices, metric), "ACC_samples": pooled, **inside, "final": final}


def _summary(matrices: Mapping[str, ScoreRows], metric: str) -> dict[str, float | None]:
    return summary(matrices[metric], lower_is_better=metric in LOWER_IS_BETTER)


def _listed(labels: Sequence[str]) -> str:
    """A few labels, or the first ones of many and their number."""
    return ", ".join(labels) if len(labels) <= 3 else f"{labels[0]}, {labels[1]}, …, {len(labels)} classes"


def read_runs(paths: Sequence[str | Path]) -> list[Report]:
    """The runs of folders of `learn`, or of report.json files, each with a label of its own; a folder of several seeds
    stands for its runs.

    Raises one InputError that lists what is wrong, runs that are judged by different metrics included.
    """
    runs: list[Report] = []
    problems: list[str] = []
    for path in chain.from_iterable(map(_seeds_or_itself, paths)):
        try:
            runs.append(Report.load(path))
        except InputError as error:
            problems.append(str(error))
    raise_all(problems, "runs")
    metrics = list(dict.fromkeys(run.metric for run in runs))
    if len(metrics) > 1:
        raise InputError(
            f"the runs are judged by {' and '.join(metrics)}: they have no common scale; one report for each"
        )
    return _labelled(runs)


def _seeds_or_itself(path: str | Path) -> list[str | Path]:
    """The finished runs of a folder that `pm-hf train --seeds` wrote, by seed; of any other path itself."""
    folder = RunPaths(path)
    return (
        [path] if folder.config.exists() else [*(run.folder for run in folder.seeds() if run.report.exists())] or [path]
    )


def _read_records(paths: RunPaths, count: int) -> list[TaskRecord | None]:
    """The record of each learned task, in its own place; None where its step.json is not there."""
    records = {number: TaskRecord.load(task.step) for number, task in paths.numbered_tasks() if task.finished}
    return [records.get(number) for number in range(count)]


def _numbered_classes(config: Mapping[str, Any], records: Sequence[TaskRecord | None]) -> dict[str, list[str]]:
    """`classes` of a run whose report.json was written before it had them; a head may have the labels of earlier tasks
    too, whose rows are replayed."""
    stream, classes, seen = config.get("stream"), dict[str, list[str]](), set[str]()
    if not isinstance(stream, Mapping) or not isinstance(stream.get("class_groups"), int):
        return classes
    for record in records:
        if record is not None:
            classes[record.task] = [label for label in record.labels if label not in seen]
            seen |= set(record.labels)
    return classes


def _read_settings(path: Path) -> dict:
    """The settings as config.yaml has them, of whichever version; InputError where it is no YAML."""
    settings = read_yaml(path) if path.is_file() else {}
    return settings if isinstance(settings, dict) else {}


def _labelled(runs: list[Report]) -> list[Report]:
    """The runs called by their method, by the seed too where methods repeat, and by a number where those do."""
    methods = [run.method for run in runs]
    repeated = len(set(methods)) < len(methods)
    names = [f"{run.method}, seed {run.seed}" if repeated else run.method for run in runs]
    labels = [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names, start=1)]
    return [replace(run, label=label) for run, label in zip(runs, labels, strict=True)]
