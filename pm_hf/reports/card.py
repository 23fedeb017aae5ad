"""The model card of a released run, and the lines that load its adapter without pm_hf."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import yaml

from pm_hf.adapters.layout import TOKENIZER_FILES
from pm_hf.config.kinds import STREAM_KINDS
from pm_hf.reports.markdown import code_block, code_span, escaped, table_lines
from pm_hf.reports.release import ReleasedRun, on_hub, redact
from pm_hf.reports.run_charts import charts, metric_name
from pm_hf.runs.records import CLASS_INCREMENTAL, TASK_INCREMENTAL, Report
from pm_hf.text import format_metric, format_number

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


def prediction_lines(
    base: str,
    folder: str | Path,
    kind: str = "text-classification",
    *,
    own_tokenizer: bool = False,
    max_length: int = 128,
    prompt: str | None = None,
    **how: str | bool | None,
) -> str:
    """The lines after `loading_lines` that end in a prediction.

    own_tokenizer: whether the adapter has a tokenizer beside it. max_length: tokens that a text was cut to in training.
    prompt: what a language model was asked with; None where that is not known. how: further settings of the tokenizer
    or processor (revision, trust_remote_code), left out where they are None or False.
    """
    more = "".join(f", {key}={json.dumps(value)}".replace("true", "True") for key, value in how.items() if value)
    rows, source = STREAM_KINDS[kind].rows, f'"{folder}"' if own_tokenizer else f'"{base}"{more}'
    if rows == "pictures":
        return (
            f"processor = AutoImageProcessor.from_pretrained({source})\n"
            'inputs = processor(Image.open("picture.png").convert("RGB"), return_tensors="pt")\n'
            "print(labels[int(model(**inputs).logits.argmax())])"
        )
    if rows == "texts":
        return (
            f"tokenizer = AutoTokenizer.from_pretrained({source})\n"
            f'inputs = tokenizer("a text", truncation=True, max_length={max_length}, return_tensors="pt")\n'
            "print(labels[int(model(**inputs).logits.argmax())])"
        )
    asked = json.dumps(prompt if prompt is not None else "a prompt, written as in training", ensure_ascii=False)
    answer = "answer[0]" if kind == "seq2seq-lm" else 'answer[0, inputs["input_ids"].shape[1] :]'
    return (
        f'inputs = tokenizer({asked}, return_tensors="pt")\n'
        "answer = model.generate(**inputs, max_new_tokens=64, do_sample=False)\n"
        f"print(tokenizer.decode({answer}, skip_special_tokens=True))"
    )


def prediction_imports(kind: str = "text-classification", *, on_hub: bool = False) -> str:
    """The imports of both, the loading and the prediction."""
    lines = loading_imports(kind, on_hub=on_hub)
    rows = STREAM_KINDS[kind].rows
    if rows == "prompts":
        return lines
    names = sorted((STREAM_KINDS[kind].auto_model, "AutoImageProcessor" if rows == "pictures" else "AutoTokenizer"))
    lines = f"{lines.rpartition('from transformers')[0]}from transformers import {', '.join(names)}"
    return (
        lines.replace("from transformers", "from PIL import Image\nfrom transformers") if rows == "pictures" else lines
    )


MANY = 12  # tasks from which on the table has no column for every step
METRICS = {
    CLASS_INCREMENTAL: ("accuracy", "among all classes seen"),
    TASK_INCREMENTAL: ("accuracy", "inside the task's own classes"),
}
# average: (what it is, the type of such a number on the Hub; {} is that of the scores)
AVERAGES = {
    "ACC": ("mean over all tasks at the end", "{}"),
    "AAA": ("mean over the steps of the mean over the tasks seen", "average_incremental_{}"),
    "BWT": ("backward transfer, mean change of a task's score since it was learned", "backward_transfer"),
    "forgetting": ("mean fall from a task's best score", "forgetting"),
}
COSTLY = ("loss-", "time-", "peak-", "truncation-")  # charts of what a run took
MATRIX = "Each number is the score on a task (row) after a task was learned (column); a stronger colour is better."
MOST_LABELS = 40  # that the card lists


def model_card(run: ReleasedRun, repo: str, *, license: str | None = None, language: str | None = None) -> str:
    """README.md of `repo`, owner/name: front matter and Markdown, without local paths and tokens.

    license, language: identifiers of the Hub (apache-2.0, en); what is None is not made up.
    """
    from huggingface_hub import ModelCardData

    stream = run.config.stream
    sources = [place.dataset for place in (stream, *(stream.tasks or [])) if place.dataset]
    data = ModelCardData(
        base_model=run.base,
        base_model_relation="adapter",
        license=license,
        language=language,
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
        _intended_use(run, license),
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
    for key, (about, kind_of_number) in AVERAGES.items():
        value = report.metrics.get(key)
        more = {"dataset_config": "all", "dataset_split": "test", "metric_name": f"{key}: {about}"}
        if value is not None:
            more |= {"dataset_name": f"all {len(tasks)} tasks", "metric_type": kind_of_number.format(metric)}
            evaluations.append(EvalResult(metric_value=value, **given, **more))
    return evaluations


def _intro(run: ReleasedRun, repo: str) -> str:
    report, count = run.report, len(run.report.tasks)
    gguf = run.config.model.gguf_file
    packed = (
        f" It was trained on {code_span(gguf)}, whose weights differ a little from this base model's." if gguf else ""
    )
    if (bits := run.config.model.quantization) is not None:
        packed = (
            f" It was trained and scored on this base model quantized to {bits} by bitsandbytes; the code below loads "
            "it on the model as it is published."
        )
    learned = "together" if run.config.strategy.joint else "one after the other"
    return (
        f"# {repo.rpartition('/')[2]}\n\n"
        f"A LoRA adapter for [`{run.base}`](https://huggingface.co/{run.base}): {count} tasks, learned {learned} and "
        f"kept in one adapter by the method {code_span(report.method)} of pm_hf. It needs transformers and peft, not "
        f"pm_hf.{packed}"
    )


def _loading(run: ReleasedRun, repo: str) -> str:
    stream, model = run.config.stream, run.config.model
    how = {"dtype": model.dtype, "revision": run.revision}
    trusted = model.trust_remote_code
    lines = loading_lines(run.base, repo, run.head, stream.kind, on_hub=True, trust_remote_code=trusted, **how)
    predicted = prediction_lines(
        run.base,
        repo,
        stream.kind,
        own_tokenizer=(run.paths.merged / TOKENIZER_FILES[0]).is_file(),
        max_length=stream.max_length,
        prompt=_prompt(run),
        revision=run.revision,
        trust_remote_code=trusted,
    )
    notes = "".join(f"\n\n{escaped(note)}" for note in run.merge_notes())
    code = f"{prediction_imports(stream.kind, on_hub=True)}\n\n{lines}\n\n{predicted}"
    return "## Load it and ask it\n\n" + code_block("python", code) + notes


def _prompt(run: ReleasedRun) -> str | None:
    """A prompt as the run's template makes it, with its columns' names for their values."""
    template = run.config.stream.prompt_template
    first = {"task": run.report.tasks[0]}
    return None if template is None else re.sub(r"\{(\w+)\}", lambda column: first.get(column[1], column[1]), template)


def _intended_use(run: ReleasedRun, license: str | None) -> str:
    """What it is for, and what its numbers do not say."""
    stream, report = run.config.stream, run.report
    labels = run.labels
    if labels:
        listed = ", ".join(map(code_span, dict.fromkeys(labels[:MOST_LABELS])))
        more = f" and {len(labels) - MOST_LABELS} more, in labels.json" if len(labels) > MOST_LABELS else ""
        what = {"texts": "a text", "pictures": "a picture"}[run.config.kind.rows]
        use = f"It gives {what} one of {len(set(labels))} classes: {listed}{more}. What is none of them gets one too."
    else:
        use = f"It completes prompts as the {len(report.tasks)} tasks' training rows do."
    cut = "" if run.config.kind.rows == "pictures" else f" What is longer than {stream.max_length} tokens was cut."
    own = f"The adapter's licence is {escaped(license)}." if license else "The adapter's licence is not stated."
    return (
        f"## Intended use and limits\n\n{use}{cut} The scores below are on the stream's own test rows; other sources, "
        "other times and groups of people were not measured, and what the base model does wrong it may do too.\n\n"
        f"{own} The base model's licence applies to its use besides."
    )


def _results(run: ReleasedRun) -> str:
    report = run.report
    name = "accuracy among all classes seen" if report.metric == CLASS_INCREMENTAL else format_metric(report.metric)
    lines = [f"## Results\n\nOn test rows: {name}.\n", *_matrix(report), ""]
    metrics = report.metrics
    lines.append("| mean over tasks | |\n| --- | ---: |")
    lines += [f"| {key}: {about} | {format_number(metrics.get(key))} |" for key, (about, _) in AVERAGES.items()]
    if inside := metrics.get(TASK_INCREMENTAL):
        lines.append(f"| ACC inside each task's own classes | {format_number(inside['ACC'])} |")
    alphas = [[str(place), c.used, c.one_over_t] for place, c in enumerate(report.alphas, 1) if c is not None]
    if alphas and report.freedom != "free":
        lines += ["", *table_lines(["merge of task", "coefficient", "1/t"], alphas)]
    notes = redact(report.notes, run.local_paths)
    return "\n".join([*lines, *[f"\n- {escaped(note)}" for note in notes]])


def _matrix(report: Report) -> list[str]:
    """Score on each task after each task, or of many tasks only the first and the last score."""
    scores, tasks = report.scores, report.titles
    steps = len(scores)
    if steps == 1 or len(tasks) <= MANY:
        header = ["task", *(f"after {step}" for step in range(1, steps + 1))] if steps > 1 else ["task", "at the end"]
        return table_lines(header, ([name, *(row[i] for row in scores)] for i, name in enumerate(tasks)))
    header = ["task", "after learning it", "at the end"]
    return table_lines(header, ([name, scores[i][i], scores[-1][i]] for i, name in enumerate(tasks)))


def _plots(run: ReleasedRun) -> str:
    once = {path.stem: path.name for path in reversed(run.plots)}  # of a picture in two formats the .png
    captions = {chart.name: f"{chart.title}. {chart.about}" for chart in charts([run.report])}
    first = next(iter(captions), "")
    order = [first, "matrix-1", *(name for name in captions if name != first)]
    captions["matrix-1"] = f"{metric_name(run.report.metric).capitalize()} on every task. {MATRIX}"
    known = [stem for stem in order if stem in once]
    others = [stem for stem in sorted(once) if stem not in known]
    shown = [_picture(once[stem], captions[stem]) for stem in known if not stem.startswith(COSTLY)]
    shown += [_picture(once[stem], f"{stem.replace('_', ' ')}, a picture in the run's folder.") for stem in others]
    costs = [_picture(once[stem], captions[stem]) for stem in known if stem.startswith(COSTLY)]
    if costs:
        pictures = "\n\n".join(costs)
        shown.append(f"<details><summary>Training, time and memory</summary>\n\n{pictures}\n\n</details>")
    return "\n\n".join(["## Plots", *shown]) if shown else ""


def _picture(name: str, caption: str) -> str:
    sentence = escaped(caption)
    return f"![{sentence}](plots/{quote(name)})\n\n*{sentence}*"


def _making(run: ReleasedRun) -> str:
    report = run.report
    versions = ", ".join(escaped(f"{name} {number}") for name, number in report.versions.items())
    settings = yaml.safe_dump(run.settings(), sort_keys=False, allow_unicode=True).strip()
    return (
        f"## How it was made\n\n"
        f"Method {code_span(report.method)}, seed {report.seed}, {escaped(report.scenario.replace('_', '-'))}, "
        f"{report.seconds or 0:.0f} s. Versions: {versions}.\n\n"
        f"{_synthetic_rows(run)}"
        f"<details><summary>All settings</summary>\n\n{code_block('yaml', settings)}\n\n</details>"
    )


def _synthetic_rows(run: ReleasedRun) -> str:
    """What was kept of the earlier tasks in place of their rows."""
    records = [record for record in run.report.records if record is not None and record.replay]
    if not records:
        return ""
    kept, longest = (max(record.replay[key] for record in records) for key in ("pool_rows", "longest_common_run"))
    of_all = max(record.replay.get("longest_written_run") or 0 for record in records)
    in_all = f" ({of_all} before the copies were dropped)" if of_all > longest else ""
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
        f"row is {longest} tokens{in_all}. Texts that say in other words what a training row says pass this check. "
        f"{left}\n\n"
    )


def _task_adapters(run: ReleasedRun, repo: str) -> str:
    rows = table_lines(["subfolder"], ([code_span(f"tasks/{path.name}")] for path in run.tasks))
    return "\n".join(
        [
            "## The tasks' own adapters\n",
            "Each is what one task's training added to what was merged before it. Alone it is no model for its task; "
            f'`PeftModel.from_pretrained(base, "{repo}", subfolder=…)` loads it for study or another merge.\n',
            *rows,
        ]
    )
