"""A run's report: report.json, the table, the plot."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from pm_hf.files import write_json
from pm_hf.metrics import summary
from pm_hf.versions import versions

REPORT = "report.json"
CHOICE, INSIDE, BITS = "class_incremental", "task_incremental", "bits_per_byte"
LOWER_IS_BETTER = ("loss", "perplexity", BITS)
# kind of stream: class of transformers that loads the model; PEFT has none for pictures
AUTO = {
    "text-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
}


def primary_metric(names: Sequence[str], own: Sequence[Sequence[str]]) -> str:
    """What a stream is judged by: accuracy among all classes (answers) seen; bits per byte where a task has none."""
    return CHOICE if CHOICE in names and all(own) else BITS


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
        return self.matrices.get(INSIDE)

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
            {"task_incremental": self._summary(INSIDE)} if self.metric == CHOICE and INSIDE in self.matrices else {}
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
        write_json(self.folder / REPORT, self.to_dict())

    def table(self) -> str:
        """The matrix of the metric, the metrics and the coefficients as text."""
        width = max(12, *(len(name) for name in self.tasks))
        count = len(self.scores)
        header = " " * (width + 2) + " ".join(f"{i:>6d}" for i in range(count))
        name = "accuracy" if self.metric == CHOICE else self.metric.replace("_", " ")
        lines = [f"{self.method}, seed {self.seed}: {name} on each task (row) after each task (column)", header]
        for i, task in enumerate(self.tasks):
            lines.append(f"{task:<{width}}  " + " ".join(f"{_number(self.scores[t][i]):>6}" for t in range(count)))
        metrics = self.metrics
        lines.append("  ".join(f"{key} {_number(metrics[key])}" for key in ("ACC", "AAA", "BWT", "forgetting")))
        if inside := metrics.get("task_incremental"):
            lines.append(f"inside each task's own classes: ACC {_number(inside['ACC'])}  AAA {_number(inside['AAA'])}")
        others = {key: value for key, value in metrics["final"].items() if key not in (CHOICE, INSIDE, self.metric)}
        if others:
            lines.append("at the end: " + "  ".join(f"{k.replace('_', ' ')} {v:.3f}" for k, v in others.items()))
        for text in self.held_out[0] if self.held_out else ():
            values = [step[text][BITS] for step in self.held_out]
            lines.append(f"held out, {text}: bits per byte " + " ".join(_number(value) for value in values))
        known = [c for c in self.coefficients if c]
        if known:
            name = "coefficient, not used (the whole matrix is free)" if self.freedom == "free" else "coefficient used"
            lines.append(f"{name}: " + " ".join(f"{c['used']:.3f}" for c in known))
            lines.append("1/t: " + " ".join(f"{c['one_over_t']:.3f}" for c in known))
        if any(self.merge_errors):
            lines.append("relative error of each merge: " + " ".join(f"{error:.1e}" for error in self.merge_errors))
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def loading_lines(
    base: str,
    folder: str | Path,
    head: str | None,
    kind: str = "text-classification",
    *,
    on_hub: bool = False,
    **how: str | None,
) -> str:
    """The lines that load a merged adapter with transformers and peft only.

    head: its name in labels.json, None for a language model. on_hub: `folder` is the id of a repository. how: further
    settings of the base model (dtype, revision), left out where they are None.
    """
    more = "".join(f', {key}="{value}"' for key, value in how.items() if value is not None)
    model = f'model = PeftModel.from_pretrained(base, "{folder}")'
    if head is None:
        revision = f', revision="{how["revision"]}"' if how.get("revision") else ""
        tokenizer = f'tokenizer = AutoTokenizer.from_pretrained("{base}"{revision})'
        return f'{tokenizer}\nbase = {AUTO[kind]}.from_pretrained("{base}"{more})\n{model}'
    file = f'hf_hub_download("{folder}", "labels.json")' if on_hub else f'"{folder}/labels.json"'
    return (
        f'labels = json.load(open({file}))["{head}"]\n'
        f'base = {AUTO[kind]}.from_pretrained("{base}", num_labels=len(labels), '
        f"id2label=dict(enumerate(labels)), ignore_mismatched_sizes=True{more})\n"
        f"{model}"
    )


def loading_imports(kind: str = "text-classification", *, on_hub: bool = False) -> str:
    """The imports that the lines need."""
    if "classification" not in kind:
        return f"from peft import PeftModel\nfrom transformers import {AUTO[kind]}, AutoTokenizer"
    download = "from huggingface_hub import hf_hub_download\n" if on_hub else ""
    return f"import json\n\n{download}from peft import PeftModel\nfrom transformers import {AUTO[kind]}"


def plot(reports: list[Report], path: Path) -> None:
    """Mean score on the tasks seen after each task, one line a run, as PNG. Needs the extra `plots`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    for report, marker in zip(reports, "osD^vP*X<>" * len(reports), strict=False):
        means = [sum(x or 0 for x in row[: t + 1]) / (t + 1) for t, row in enumerate(report.scores)]
        steps = range(1, len(means) + 1)
        axes.plot(steps, means, marker=marker, label=f"{report.method} ({means[-1]:.3f})")
    name = "accuracy" if reports[0].metric == CHOICE else reports[0].metric.replace("_", " ")
    axes.set(xlabel="tasks learned", ylabel=f"mean {name} on the tasks seen")
    if reports[0].metric == CHOICE:
        axes.set(ylim=(0, 1.02))
    axes.set_xticks(list(range(1, max(len(report.scores) for report in reports) + 1)))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title=f"method (final {name})", frameon=False)
    figure.savefig(path)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
