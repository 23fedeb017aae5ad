"""The card that `pm-hf merge` puts beside a merged adapter."""

import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from pm_hf.adapters.download import HUB_NAME
from pm_hf.adapters.folder import Adapter, open_adapter
from pm_hf.adapters.layout import CARD_FILE, TOKENIZER_FILES
from pm_hf.adapters.merge import MergeReport
from pm_hf.config.kinds import STREAM_KINDS
from pm_hf.files import write_text
from pm_hf.reports.card import loading_lines, prediction_imports, prediction_lines
from pm_hf.reports.markdown import code_block, code_span, escaped, table_lines

MARK = "<!-- written by pm-hf merge -->"  # a card without it was written by hand, and stays
HUB_MODEL = re.compile(f"{HUB_NAME}/{HUB_NAME}")
UNKNOWN_BASE = "the base model: its Hub id or folder"


def write_merge_card(folder: Path, report: MergeReport) -> bool:
    """Write README.md into the folder of a merge, unless one stands there that was written by hand; whether it did."""
    path = folder / CARD_FILE
    if path.is_file() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return False
    write_text(path, merge_card(folder.resolve().name, open_adapter(folder), report))
    return True


def merge_card(name: str, adapter: Adapter, report: MergeReport) -> str:
    """Front matter and Markdown of a merged adapter called `name`; inputs without the folders that they lie in."""
    base = str(adapter.config.get("base_model_name_or_path"))
    on_hub = bool(HUB_MODEL.fullmatch(base)) and not Path(base).exists()
    head = {"base_model": base, "base_model_relation": "adapter"} if on_hub else {}
    about: dict[str, object] = {**head, "library_name": "peft", "tags": ["lora", "merge", "pm-hf"]}
    of_base = f" for `{base}`" if on_hub else ""
    what = "one adapter" if len(report.inputs) == 1 else f"{len(report.inputs)} adapters"
    parts = [
        f"---\n{yaml.safe_dump(about, sort_keys=False).strip()}\n---\n\n{MARK}",
        f"# {escaped(name)}",
        f"A LoRA adapter{of_base}, merged of {what} by the method {code_span(report.method)} of pm_hf. It needs "
        "transformers and peft, not pm_hf.",
        "## Load it",
        code_block("python", _code(name, base if on_hub else UNKNOWN_BASE, adapter)),
        "## What it was made of",
        "\n".join(table_lines(["adapter", "weight"], zip(map(_short, report.inputs), _weights(report), strict=True))),
        f"Largest relative error of a weight's update: {report.error:.1e} by truncation, {report.cast_error:.1e} by "
        "the storage dtype. What each module lost, the options and the versions: merge_report.json.",
        *(f"- {escaped(note)}" for note in report.notes),
        "How good the merge is at the tasks of these adapters was not measured here.",
    ]
    return "\n\n".join(parts) + "\n"


def _weights(report: MergeReport) -> Sequence[float | None]:
    """The weight of each input; of a fold 1 for the running merge. None where the method has no such numbers."""
    if report.coefficient is not None:
        return [*[1.0] * (len(report.inputs) - 1), report.coefficient.used]
    return report.weights if report.weights is not None else [None] * len(report.inputs)


def _short(source: str) -> str:
    """An input's name: a Hub id as it stands, a folder by its last two names."""
    return source if HUB_MODEL.match(source) and not Path(source).exists() else "/".join(Path(source).parts[-2:])


def _code(name: str, base: str, adapter: Adapter) -> str:
    """Lines that load the adapter, and end in a prediction where PEFT's task type tells what it predicts."""
    task, head = adapter.config.get("task_type"), next(iter(adapter.labels), None)
    kind = next(
        (kind for kind, row in STREAM_KINDS.items() if row.task_type is not None and row.task_type == task), None
    )
    if kind is None or (head is None) == STREAM_KINDS[kind].has_head:
        mapping = adapter.config.get("auto_mapping") or {}
        model = mapping.get("base_model_class") or "AutoModel"
        imports = f"from peft import PeftModel\nfrom transformers import {model}"
        return (
            f'{imports}\n\nbase = {model}.from_pretrained("{base}")\nmodel = PeftModel.from_pretrained(base, "{name}")'
        )
    own = (adapter.path / TOKENIZER_FILES[0]).is_file()
    predicted = prediction_lines(base, name, kind, own_tokenizer=own)
    return f"{prediction_imports(kind)}\n\n{loading_lines(base, name, head, kind)}\n\n{predicted}"
