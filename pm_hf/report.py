"""A run's report: report.json, the table, the plot."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pm_hf.files import write_json
from pm_hf.metrics import summary
from pm_hf.versions import versions

REPORT = "report.json"


@dataclass(frozen=True)
class Report:
    """What a run learned and forgot.

    scores: class-incremental accuracy matrix R[t][i], None above the diagonal; task_incremental the same inside each
    task's own classes. ACC_samples is the last row's accuracy pooled over test rows. coefficients: one dict a task.
    """

    folder: Path
    method: str
    seed: int
    scenario: str
    tasks: list[str]
    scores: list[list[float | None]]
    task_incremental: list[list[float | None]]
    test_rows: list[int]
    coefficients: list[dict | None]
    seconds: float
    freedom: str = "global"  # "free": the whole matrix was solved for, coefficients are for comparison only
    notes: list[str] = field(default_factory=list)

    @property
    def metrics(self) -> dict[str, Any]:
        """ACC, AAA, BWT, forgetting and ACC_samples (class-incremental), and task_incremental ones beside them."""
        last = [score or 0.0 for score in self.scores[-1][: len(self.scores)]]
        rows = self.test_rows[: len(last)]
        pooled = sum(a * n for a, n in zip(last, rows, strict=True)) / sum(rows)
        return {
            **summary(self.scores),
            "ACC_samples": pooled,
            "task_incremental": summary(self.task_incremental),
        }

    def to_dict(self) -> dict[str, Any]:
        """The content of report.json."""
        fields = {key: value for key, value in vars(self).items() if key != "folder"}
        return {**fields, "metrics": self.metrics, "versions": versions()}

    def save(self) -> None:
        """Write report.json into the run's folder."""
        write_json(self.folder / REPORT, self.to_dict())

    def table(self) -> str:
        """The accuracy matrix, the metrics and the coefficients as text."""
        width = max(12, *(len(name) for name in self.tasks))
        header = " " * (width + 2) + " ".join(f"{i:>6d}" for i in range(len(self.scores)))
        lines = [f"{self.method}, seed {self.seed}: accuracy on each task (row) after each task (column)", header]
        for i, name in enumerate(self.tasks[: len(self.scores)]):
            cells = [self.scores[t][i] for t in range(len(self.scores))]
            lines.append(f"{name:<{width}}  " + " ".join(f"{_number(cell):>6}" for cell in cells))
        metrics = self.metrics
        lines.append("  ".join(f"{key} {_number(metrics[key])}" for key in ("ACC", "AAA", "BWT", "forgetting")))
        inside = metrics["task_incremental"]
        lines.append(f"inside each task's own classes: ACC {_number(inside['ACC'])}  AAA {_number(inside['AAA'])}")
        known = [c for c in self.coefficients if c]
        if known:
            name = "coefficient, not used (the whole matrix is free)" if self.freedom == "free" else "coefficient used"
            lines.append(f"{name}: " + " ".join(f"{c['used']:.3f}" for c in known))
            lines.append("1/t: " + " ".join(f"{c['one_over_t']:.3f}" for c in known))
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def loading_lines(base: str, folder: Path, head: str) -> str:
    """The lines that load a merged adapter with transformers and peft only."""
    return (
        f'labels = json.load(open("{folder}/labels.json"))["{head}"]\n'
        f'base = AutoModelForSequenceClassification.from_pretrained("{base}", num_labels=len(labels), '
        "id2label=dict(enumerate(labels)), ignore_mismatched_sizes=True)\n"
        f'model = PeftModel.from_pretrained(base, "{folder}")'
    )


def plot(reports: list[Report], path: Path) -> None:
    """Mean accuracy on the tasks seen after each task, one line a run, as PNG. Needs the extra `plots`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    for report, marker in zip(reports, "osD^vP*X<>" * len(reports), strict=False):
        means = [sum(x or 0 for x in row[: t + 1]) / (t + 1) for t, row in enumerate(report.scores)]
        steps = range(1, len(means) + 1)
        axes.plot(steps, means, marker=marker, label=f"{report.method} ({means[-1]:.3f})")
    axes.set(xlabel="tasks learned", ylabel="mean accuracy on the tasks seen", ylim=(0, 1.02))
    axes.set_xticks(list(range(1, max(len(report.scores) for report in reports) + 1)))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="method (final accuracy)", frameon=False)
    figure.savefig(path)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
