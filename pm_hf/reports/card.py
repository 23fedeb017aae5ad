"""The model card of a released run, and the lines that load its adapter without pm_hf."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import yaml

from pm_hf.config.kinds import STREAM_KINDS
from pm_hf.reports.release import ReleasedRun, on_hub, redact
from pm_hf.runs.records import CLASS_INCREMENTAL, TASK_INCREMENTAL, Report
from pm_hf.text import format_metric, format_number, printable, printable_lines

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


def loading_lines(
    base: str,
    folder: str | Path,
    head: str | None,
    kind: str = "text-classification",
    *,
    on_hub: bool = False,
    trust_remote_code: bool = False,
    **how: str | None,
) -> str:
    """The lines that load a merged adapter with transformers and peft only.

    head: its name in labels.json, None for a language model. on_hub: `folder` is the id of a repository.
    trust_remote_code: whether the base model needs code of its own. how: further settings of the base model (dtype,
    revision), left out where they are None.
    """
    trusted = ", trust_remote_code=True" if trust_remote_code else ""
    more = "".join(f', {key}="{value}"' for key, value in how.items() if value is not None) + trusted
    model = f'model = PeftModel.from_pretrained(base, "{folder}")'
    if head is None:
        revision = f', revision="{how["revision"]}"' if how.get("revision") else ""
        tokenizer = f'tokenizer = AutoTokenizer.from_pretrained("{base}"{revision}{trusted})'
        return f'{tokenizer}\nbase = {STREAM_KINDS[kind].auto_model}.from_pretrained("{base}"{more})\n{model}'
    file = f'hf_hub_download("{folder}", "labels.json")' if on_hub else f'"{folder}/labels.json"'
    return (
        f"labels = json.load(open({file}))[{json.dumps(head, ensure_ascii=False)}]\n"
        f'base = {STREAM_KINDS[kind].auto_model}.from_pretrained("{base}", num_labels=len(labels), '
        f"id2label=dict(enumerate(labels)), ignore_mismatched_sizes=True{more})\n"
        f"{model}"
    )


def loading_imports(kind: str = "text-classification", *, on_hub: bool = False) -> str:
    """The imports that the lines need."""
    if not STREAM_KINDS[kind].has_head:
        return f"from peft import PeftModel\nfrom transformers import {STREAM_KINDS[kind].auto_model}, AutoTokenizer"
    download = "from huggingface_hub import hf_hub_download\n" if on_hub else ""
    return (
        f"import json\n\n{download}from peft import PeftModel\nfrom transformers import {STREAM_KINDS[kind].auto_model}"
    )


MANY = 12  # tasks from which on the table has no column for every step
METRICS = {
    CLASS_INCREMENTAL: ("accuracy", "among all classes seen"),
    TASK_INCREMENTAL: ("accuracy", "inside the task's own classes"),
}
AVERAGES = {
    "ACC": "mean over all tasks at the end",
    "AAA": "mean over the steps of the mean over the tasks seen",
    "BWT": "backward transfer",
    "forgetting": "mean fall from a task's best score",
}


def model_card(run: ReleasedRun, repo: str) -> str:
    """README.md of `repo`, owner/name: front matter and Markdown, without local paths and tokens."""
    from huggingface_hub import ModelCardData

    stream = run.config.stream
    sources = [place.dataset for place in (stream, *(stream.tasks or [])) if place.dataset]
    data = ModelCardData(
        base_model=run.base,
        base_model_relation="adapter",
        library_name="peft",
        pipeline_tag=run.config.kind.pipeline,
        tags=["lora", "continual-learning", "merge", "pm-hf"],
        datasets=sorted({name for name in sources if on_hub(name)}) or None,
        model_name=repo.rpartition("/")[2],
        eval_results=results(run),
    )
    parts = (
        _intro(run, repo),
        _loading(run, repo),
        _results(run),
        _plots(run),
        _making(run),
        _task_adapters(run, repo),
    )
    return f"---\n{data.to_yaml().strip()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def results(run: ReleasedRun) -> list["EvalResult"]:
    """What the model-index holds: every metric on every task at the end, and the averages over tasks."""
    from huggingface_hub import EvalResult

    report, kind = run.report, run.config.kind.pipeline
    source = run.config.stream.dataset
    given: dict[str, Any] = {"task_type": kind, "dataset_type": source if source and on_hub(source) else "other"}
    tasks, evaluations = report.tasks, []
    more: dict[str, Any]
    for index, task in enumerate(tasks):
        for name, matrix in report.matrices.items():
            metric, about = METRICS.get(name, (name, None))
            value = matrix[-1][index]
            more = {"dataset_config": task, "dataset_split": "test", "metric_name": about and f"{metric} {about}"}
            if value is not None:
                result = EvalResult(dataset_name=task, metric_type=metric, metric_value=value, **given, **more)
                evaluations.append(result)
    metric = METRICS.get(report.metric, (report.metric, ""))[0]
    for key, about in AVERAGES.items():
        value = report.metrics.get(key)
        more = {"dataset_config": "all", "dataset_split": "test", "metric_name": f"{key}: {about}"}
        if value is not None:
            name = f"all {len(tasks)} tasks"
            evaluations.append(EvalResult(dataset_name=name, metric_type=metric, metric_value=value, **given, **more))
    return evaluations


def _intro(run: ReleasedRun, repo: str) -> str:
    report, count = run.report, len(run.report.tasks)
    gguf = run.config.model.gguf_file
    packed = f" It was trained on {_code(gguf)}, whose weights differ a little from this base model's." if gguf else ""
    learned = "together" if run.config.strategy.joint else "one after the other"
    return (
        f"# {repo.rpartition('/')[2]}\n\n"
        f"A LoRA adapter for [`{run.base}`](https://huggingface.co/{run.base}): {count} tasks, learned {learned} and "
        f"kept in one adapter by the method {_code(report.method)} of pm_hf. It needs transformers and peft, not pm_hf."
        f"{packed}"
    )


def _loading(run: ReleasedRun, repo: str) -> str:
    kind, model = run.config.stream.kind, run.config.model
    how = {"dtype": model.dtype, "revision": run.revision}
    lines = loading_lines(run.base, repo, run.head, kind, on_hub=True, trust_remote_code=model.trust_remote_code, **how)
    notes = "".join(f"\n\n{_cell(note)}" for note in run.merge_notes())
    return "## Load it\n\n" + _fenced("python", f"{loading_imports(kind, on_hub=True)}\n\n{lines}") + notes


def _results(run: ReleasedRun) -> str:
    report = run.report
    name = "accuracy among all classes seen" if report.metric == CLASS_INCREMENTAL else format_metric(report.metric)
    lines = [f"## Results\n\nOn test rows: {name}.\n", *_matrix(report), ""]
    metrics = report.metrics
    lines.append("| mean over tasks | |\n| --- | ---: |")
    lines += [f"| {key}: {about} | {format_number(metrics.get(key))} |" for key, about in AVERAGES.items()]
    if inside := metrics.get(TASK_INCREMENTAL):
        lines.append(f"| ACC inside each task's own classes | {format_number(inside['ACC'])} |")
    alphas = [[str(place), c.used, c.one_over_t] for place, c in enumerate(report.alphas, 1) if c is not None]
    if alphas and report.freedom != "free":
        lines += ["", *_rows(["merge of task", "coefficient", "1/t"], alphas)]
    notes = redact(report.notes, run.local_paths)
    return "\n".join([*lines, *[f"\n- {_cell(note)}" for note in notes]])


def _matrix(report: Report) -> list[str]:
    """Score on each task after each task, or of many tasks only the first and the last score."""
    scores, tasks = report.scores, report.titles
    steps = len(scores)
    if steps == 1 or len(tasks) <= MANY:
        header = ["task", *(f"after {step}" for step in range(1, steps + 1))] if steps > 1 else ["task", "at the end"]
        return _rows(header, ([name, *(row[i] for row in scores)] for i, name in enumerate(tasks)))
    header = ["task", "after learning it", "at the end"]
    return _rows(header, ([name, scores[i][i], scores[-1][i]] for i, name in enumerate(tasks)))


def _plots(run: ReleasedRun) -> str:
    once = {path.stem: path.name for path in reversed(run.plots)}  # of a picture in two formats the .png
    shown = [f"![{_cell(stem.replace('_', ' '))}](plots/{quote(once[stem])})" for stem in sorted(once)]
    return "\n\n".join(["## Plots", *shown]) if shown else ""


def _making(run: ReleasedRun) -> str:
    report = run.report
    versions = ", ".join(_cell(f"{name} {number}") for name, number in report.versions.items())
    settings = yaml.safe_dump(run.settings(), sort_keys=False, allow_unicode=True).strip()
    return (
        f"## How it was made\n\n"
        f"Method {_code(report.method)}, seed {report.seed}, {_cell(report.scenario.replace('_', '-'))}, "
        f"{report.seconds or 0:.0f} s. Versions: {versions}.\n\n"
        f"{_synthetic_rows(run)}"
        f"<details><summary>All settings</summary>\n\n{_fenced('yaml', settings)}\n\n</details>"
    )


def _synthetic_rows(run: ReleasedRun) -> str:
    """What was kept of the earlier tasks in place of their rows."""
    records = [record for record in run.report.records if record is not None and record.replay]
    if not records:
        return ""
    kept, longest = (max(record.replay[key] for record in records) for key in ("pool_rows", "longest_common_run"))
    copies, writer = (
        (sum(record.replay["copies"] for record in records)),
        max(record.replay.get("writer_bytes") or 0 for record in records),
    )
    written = f"at most {kept} at a time, " if not writer else ""
    left = (
        "Of the rows only the few on the report page are published."
        if not writer
        else f"In the run's folder no text of them is kept but of each task its writer, an adapter of at most {writer} "
        "bytes, which writes them again before each task; none is published."
    )
    return (
        f"No training row of an earlier task was kept. The adapter was also trained on synthetic rows, {written}"
        "which an adapter of the base wrote after the task's rows. They were compared with training rows: "
        f"{copies} exact or near copies were dropped, the longest run of tokens that a kept row shares with a training "
        f"row is {longest}. {left}\n\n"
    )


def _task_adapters(run: ReleasedRun, repo: str) -> str:
    rows = _rows(["subfolder"], ([_code(f"tasks/{path.name}")] for path in run.tasks))
    return "\n".join(
        [
            "## The tasks' own adapters\n",
            "Each is what one task's training added to what was merged before it. Alone it is no model for its task; "
            f'`PeftModel.from_pretrained(base, "{repo}", subfolder=…)` loads it for study or another merge.\n',
            *rows,
        ]
    )


def _rows(header: Sequence[str], rows: Iterable[Sequence]) -> list[str]:
    """A Markdown table; numbers with three decimals, None as a dash."""
    lines = [" | ".join(map(_cell, header)), " | ".join(["---", *["---:"] * (len(header) - 1)])]
    lines += [" | ".join(_cell(x) if isinstance(x, str) else format_number(x) for x in row) for row in rows]
    return [f"| {line} |" for line in lines]


class _Markup(str):
    """Markdown of ours: not escaped."""


def _cell(text: str) -> str:
    """Text that neither ends a table's cell nor starts markup."""
    if isinstance(text, _Markup):
        return text
    return re.sub(r"([\\`|<>\[\]*_&~$!#])", r"\\\1", printable(" ".join(text.split())))


def _code(text: str) -> _Markup:
    """A code span of any text, inside a table too."""
    shown = printable(" ".join(str(text).split())).replace("|", "\\|")
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence, room = "`" * (longest + 1), " " if longest else ""
    return _Markup(f"{fence}{room}{shown}{room}{fence}")


def _fenced(kind: str, text: str) -> str:
    """A code block of any text: no line of it ends the block."""
    shown = printable_lines(text)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    return f"{fence}{kind}\n{shown}\n{fence}"
