"""What stands in each JSON file of a run that is read back, as it stands there: see `pm_hf.files.read_record`.

whole.json and trainer_state.json of a checkpoint are described beside what writes them: `pm_hf.training.checkpoints`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pm_hf.files import FileMark, Number
from pm_hf.merging.coefficient import Freedom, Source
from pm_hf.merging.methods.base import Start

Score = Number | None
Scores = dict[str, list[Score]]  # {metric: one score for each task seen}
Texts = dict[str, dict[str, Score]]  # {held-out text: {metric: score}}


@dataclass
class CoefficientFile:
    """A coefficient; null is NaN. See `pm_hf.merging.coefficient.Coefficient`."""

    used: float
    raw: Score = None
    numerator: Score = None
    past: Score = None
    current: Score = None
    one_over_t: Score = None
    modules: "dict[str, CoefficientFile] | None" = None
    note: str | None = None
    source: Source | None = None


@dataclass
class MessageFile:
    """A message of a chat that was written."""

    role: str
    content: str


@dataclass
class SampleFile:
    """A written row that is shown."""

    asked: str
    prompt: str | list[MessageFile]
    says: str

    def problem(self) -> str | None:
        """A chat has a message."""
        return "replay.samples: a prompt has no message" if self.prompt == [] else None


@dataclass
class ReplaySecondsFile:
    """What a task's writing took; pool: what is rehearsed beside the task."""

    writer: Number
    write: Number
    label: Number
    pool: Number = 0


@dataclass
class ReplayFile:
    """`replay` of a step.json. See `pm_hf.runs.rehearsal.Rehearsal.finish`."""

    written: int
    kept: int
    copies: int
    doubles: int
    empty: int
    agreement: Score
    longest_common_run: int
    rows_asked: int
    pool_rows: int
    samples: list[SampleFile]
    seconds: ReplaySecondsFile
    longest_written_run: int | None = None
    base_rows: int = 0
    answers_without_rows: list[str] = field(default_factory=list)
    writer_bytes: int | None = None


@dataclass
class SearchPointFile:
    """A point of the coefficient's search. See `pm_hf.measuring.line_search.search_points`."""

    coefficient: Number
    new: Number
    old: Number
    objective: Number
    error: Number


@dataclass
class ScaleFile:
    """What the gate measured at a scale. See `pm_hf.measuring.gate.judge`."""

    scale: Number
    gain: Number
    error: Number


@dataclass
class RightFile:
    """Which test rows of a task are right. See `pm_hf.runs.right_rows.RightRows`."""

    rows: str
    count: int
    bits: str

    def problem(self) -> str | None:
        """A bit for each row."""
        if self.count < 0 or not re.fullmatch(f"(?:[0-9a-f]{{2}}){{{-(-self.count // 8)}}}", self.bits):
            return f"bits: expected a hexadecimal bit for each of {self.count} rows"
        return None


@dataclass
class GateFile:
    """`gate` of a step.json."""

    deployed: Number
    scales: list[ScaleFile]


@dataclass
class StepFile:
    """step.json of a finished task. See `pm_hf.runs.records.TaskRecord`."""

    task: str
    labels: list[str] = field(default_factory=list)
    fingerprint: str = ""
    test_fingerprint: str | None = None
    head: str | None = None
    train_from: Start = "merged"
    freedom: Freedom = "global"
    coefficient: CoefficientFile | None = None
    merge_error: Score = None
    curvature_bytes: int | None = None
    test_rows: int | None = None
    scores: Scores = field(default_factory=dict)
    held_out: Texts = field(default_factory=dict)
    confusions: list[tuple[str, str, int, int]] = field(default_factory=list)
    right: dict[str, RightFile] = field(default_factory=dict)
    untouched: Texts = field(default_factory=dict)
    replay: ReplayFile | None = None
    search: list[SearchPointFile] = field(default_factory=list)
    gate: GateFile | None = None
    seconds: Score = None
    process_peak_memory_mb: Score = None
    threads: int | None = None
    processes: int | None = None
    device: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    files: dict[str, FileMark] = field(default_factory=dict)
    inputs: dict[str, dict[str, str]] = field(default_factory=dict)
    training_loss: Score = None
    optimizer_steps: int = 0
    factors: dict[str, int] | None = None
    log: list[list[Score]] | None = None
    step_seconds: Score = None
    cut_rows: int = 0

    def problem(self) -> str | None:
        """What types do not tell."""
        lengths = {metric: len(row) for metric, row in self.scores.items()}
        if lengths and (0 in lengths.values() or len(set(lengths.values())) > 1):
            return f"scores: expected as many of every metric, found {lengths}"
        if any(len(point) != 3 or None in (point[0], point[2]) for point in self.log or ()):
            return "log: expected points of step, loss and factor"
        used = None if self.coefficient is None else self.coefficient.used
        if self.search and used is not None and used not in (point.coefficient for point in self.search):
            return f"search: none of {len(self.search)} points has the coefficient {used:g}"
        if self.gate is not None and self.gate.deployed not in (point.scale for point in self.gate.scales):
            return f"gate: none of {len(self.gate.scales)} scales is the deployed one, {self.gate.deployed:g}"
        parts = [*(self.replay.samples if self.replay else ()), *self.right.values()]
        return next((p for part in parts if (p := part.problem())), None)


@dataclass
class RowsFile:
    """rows.json of a task that is being trained. conditions stand beside."""

    fingerprint: str
    notes: list[str] = field(default_factory=list)
    threads: int | None = None
    processes: int | None = None
    device: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, dict[str, str]] = field(default_factory=dict)


@dataclass
class SummaryFile:
    """`metrics` of a report.json."""

    ACC: Score
    AAA: Score = None
    BWT: Score = None
    forgetting: Score = None
    ACC_samples: Score = None
    final: dict[str, Score] = field(default_factory=dict)
    task_incremental: dict[str, Score] | None = None


@dataclass
class ReportFile:
    """report.json. See `pm_hf.runs.records.Report`."""

    method: str
    seed: int
    tasks: list[str]
    scores: list[list[Score]]
    metrics: SummaryFile
    coefficients: list[CoefficientFile | None]
    scenario: str = ""
    metric: str | None = None
    task_incremental: list[list[Score]] | None = None
    matrices: dict[str, list[list[Score]]] | None = None
    test_rows: list[int] | None = None
    seconds: Score = None
    freedom: Freedom = "global"
    train_from: Start = "merged"
    merge_errors: list[Score] | None = None
    held_out: list[Texts] | None = None
    untouched: Texts = field(default_factory=dict)
    notes: list[str] | None = None
    classes: dict[str, list[str]] | None = None
    right: dict[str, RightFile] = field(default_factory=dict)
    versions: dict[str, str] | None = None
    config: dict[str, Any] | None = None

    def problem(self) -> str | None:
        """Matrices have a column for each task and a row for each training; so have the lists beside them."""
        named = {"scores": self.scores, **{f"matrices.{name}": R for name, R in (self.matrices or {}).items()}}
        named |= {"task_incremental": self.task_incremental} if self.task_incremental is not None else {}
        rows, columns = len(self.scores), len(self.tasks)
        if not 0 < rows <= columns:
            return f"scores: expected a row for each of {columns} tasks, or one, found {rows}"
        for name, R in named.items():
            widths = {len(row) for row in R}
            if len(R) != rows or widths != {columns}:
                return f"{name}: expected {rows} rows of {columns} scores, found {len(R)} of {sorted(widths)}"
        if all(score is None for score in self.scores[-1]):
            return "scores: the last row is empty"
        for task, of in self.right.items():
            if wrong_bits := of.problem():
                return f"right.{task}: {wrong_bits}"
        if self.matrices and self.metric is not None and self.metric not in self.matrices:
            return f"metric: expected one of {', '.join(self.matrices)}, found {self.metric}"
        lists: tuple[tuple[str, Sequence | None, int], ...] = (
            ("coefficients", self.coefficients, rows),
            ("merge_errors", self.merge_errors or None, rows),
            ("test_rows", self.test_rows or None, columns),
        )
        wrong = [(name, count, len(values)) for name, values, count in lists if values is not None]
        return next(
            (f"{name}: expected {count}, found {length}" for name, count, length in wrong if count != length), None
        )


@dataclass
class RegretFile:
    """What one coefficient of a merge line loses to the best one."""

    score: float
    loss: float


Regrets = dict[Literal["chosen", "one_over_t", "best_loss"], RegretFile]


@dataclass
class PointFile:
    """One point of a merge line."""

    coefficient: float
    predicted: Score
    loss_sum: float
    score: float
    losses: list[float]
    scores: list[float]
    task_incremental: list[Score] | None = None


@dataclass
class LineFile:
    """The merge line of one task. See `pm_hf.runs.merge_line`."""

    task: str
    t: int
    seen: list[str]
    chosen: float
    raw: Score
    one_over_t: float
    best_loss: float
    best_score: float
    regret: Regrets
    points: list[PointFile]
    notes: list[str]
    key: str = ""

    def problem(self) -> str | None:
        """A score and a loss for each task seen; a point at 0 and at each coefficient that is compared."""
        sizes = {len(values) for point in self.points for values in (point.losses, point.scores)}
        if sizes != {len(self.seen)} or not self.seen:
            return f"points of {self.task}: expected {len(self.seen)} losses and scores in each, found {sorted(sizes)}"
        wanted = {0.0, self.chosen, self.one_over_t, self.best_loss, self.best_score}
        missing = wanted - {point.coefficient for point in self.points}
        if missing:
            return f"points of {self.task}: none has the coefficient {min(missing):g}"
        return None if len(self.regret) == 3 else f"regret of {self.task}: expected three, found {sorted(self.regret)}"


@dataclass
class SkippedFile:
    """A task without a merge line."""

    task: str
    reason: str


@dataclass
class MergeLineFile:
    """coefficient.json. See `pm_hf.runs.merge_line.merge_line`."""

    metric: str
    regret_unit: str
    predicted_unit: str | None
    notes: list[str]
    mean_regret: Regrets
    tasks: list[LineFile]
    skipped: list[SkippedFile]
    versions: dict[str, str] = field(default_factory=dict)

    def problem(self) -> str | None:
        """Those of the lines."""
        if self.tasks and len(self.mean_regret) != 3:
            return f"mean_regret: expected three, found {sorted(self.mean_regret)}"
        return next((problem for line in self.tasks if (problem := line.problem())), None)


@dataclass
class TrackersFile:
    """logs/trackers.json: the run's id at its trackers, and how many tasks each of them has."""

    id: str
    logged: dict[str, int]


@dataclass
class MergeReportFile:
    """What is published of an adapter's merge_report.json."""

    inputs: list[str]
    tasks: int = 1
