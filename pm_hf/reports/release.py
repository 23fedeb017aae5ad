"""A finished run as it may leave this machine: read, checked, without local paths and without tokens."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pm_hf.adapters.download import TOKEN
from pm_hf.adapters.folder import open_adapter
from pm_hf.adapters.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LABELS_FILE, MERGE_REPORT, TOKENIZER_FILES
from pm_hf.config.loading import load_config
from pm_hf.config.schema import RunConfig
from pm_hf.errors import InputError, raise_all
from pm_hf.files import damaged_file, read_checked, read_json, same_files
from pm_hf.runs.paths import ADAPTER_FOLDER, DEPLOYED_FOLDER, MERGED_FOLDER, TASK_PREFIX, RunPaths, TaskPaths
from pm_hf.runs.records import Report, TaskRecord
from pm_hf.runs.schemas import MergeReportFile

LOCAL_PATH = re.compile(r"""(?<![\w/.:])~?/[^\s/,;:'"]+/[^\s,;:'"]+""")
# files of a task's folder that are published
PUBLISHED = tuple(f"{name}/" for name in (ADAPTER_FOLDER, MERGED_FOLDER, DEPLOYED_FOLDER))
SECRET_KEY = re.compile(r"(^|_)(token|password|secret|key)$")
TOKENIZER_SETTINGS = "tokenizer_config.json"
TOKENIZER_PATHS = ("name_or_path", "tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file")  # local
PLOT_SUFFIXES = (".png", ".svg")
FILE_SETTINGS = ("train", "test")  # settings that name a file or a folder of rows
LOCAL_SETTINGS = ("output_dir", "data_dir", "max_forgetting")  # settings that mean nothing elsewhere


@dataclass(frozen=True)
class ReleasedRun:
    """A finished run. base: id of its base model on the Hub; head: its head in labels.json, None without one."""

    paths: RunPaths
    config: RunConfig
    report: Report
    base: str
    revision: str | None  # of the base model
    head: str | None
    labels: Sequence[str]  # of the head's rows
    tasks: list[TaskPaths]
    plots: list[Path]

    @property
    def local_paths(self) -> list[str]:
        """Local paths that this run knows of."""
        named = (self.config.output_dir, self.config.data_dir, self.config.model.base, self.config.start_from)
        paths = [Path(name).expanduser() for name in named if name and not name.startswith("package:")]
        return [str(path) for path in (self.paths.folder.resolve(), *paths) if path.is_absolute()]

    def clean_report(self) -> Any:
        """The content of report.json for others."""
        return redact(read_json(self.paths.report), self.local_paths)

    def merge_notes(self) -> list[str]:
        """What the last merge says to users of its result."""
        path = self.paths.merged / MERGE_REPORT
        notes = read_json(path).get("notes") if path.is_file() else None
        return [note for note in notes if isinstance(note, str)] if isinstance(notes, list) else []

    def adapter_files(self, folder: Path) -> dict[str, Any]:
        """{name: path of the file, or JSON content to be written instead} of an adapter folder."""
        whole = (ADAPTER_WEIGHTS, LABELS_FILE, *TOKENIZER_FILES)
        files: dict[str, Any] = {name: folder / name for name in whole if (folder / name).is_file()}
        if TOKENIZER_SETTINGS in files:
            settings = read_json(folder / TOKENIZER_SETTINGS)
            files[TOKENIZER_SETTINGS] = {key: settings[key] for key in settings if key not in TOKENIZER_PATHS}
        config = read_json(folder / ADAPTER_CONFIG)
        named = {"base_model_name_or_path": self.base, "revision": self.revision}
        files[ADAPTER_CONFIG] = redact(config, self.local_paths) | named
        if (folder / MERGE_REPORT).is_file():
            merge = read_checked(folder / MERGE_REPORT, MergeReportFile, "merge again, or remove the file")
            files[MERGE_REPORT] = redact(
                merge
                | {"inputs": [_place(path) for path in merge["inputs"]]}
                | ({"tokenizer": _place(merge["tokenizer"])} if merge.get("tokenizer") else {}),
                self.local_paths,
            )
        return files

    def settings(self) -> dict[str, Any]:
        """The run's settings for others: those that are not null, file names without their folders."""
        settings = self.config.to_dict()
        for key in LOCAL_SETTINGS:
            del settings[key]
        settings["model"] |= {"base": self.base, "revision": self.revision}
        stream = settings["stream"]
        for place in (stream, *(stream["tasks"] or []), *(stream["held_out"] or [])):
            place |= {key: Path(place[key]).name for key in FILE_SETTINGS if place[key]}
            if place["dataset"] and not on_hub(place["dataset"]):
                place["dataset"] = Path(place["dataset"]).name
        if isinstance(stream["class_groups"], str):
            stream["class_groups"] = Path(stream["class_groups"]).name
        settings["start_from"] = Path(settings["start_from"]).name if settings["start_from"] else None
        return redact(_without_nulls(settings), self.local_paths)


def read_finished_run(run: str | os.PathLike, base_model_id: str | None = None) -> ReleasedRun:
    """Read the output folder of a finished run and check all that is to be published.

    base_model_id: the base model's id on the Hub; by default model.base, which then must be one. InputError lists
    what is wrong.
    """
    paths = RunPaths(os.fspath(run))
    for file in (paths.report, paths.config):
        if not file.is_file():
            raise InputError(
                f"run {paths.folder} has no {file.name}; expected the output_dir of a finished pm-hf train"
            )
    report, config, tasks = Report.load(paths.folder), load_config(paths.config), paths.tasks()
    problems = _unfinished(config, report, tasks) or _unreleased(config, paths, tasks)
    base = base_model_id if base_model_id is not None else config.model.base
    if base_model_id is not None and not valid_id(base):
        problems.append(f"--base_model_id {base} is no id on the Hub; expected owner/name")
    elif base_model_id is None and not on_hub(base):
        problems.append(f"model.base {base} is not on the Hub and is never written; give its id: --base_model_id ID")
    elif base_model_id is None and config.model.gguf_file:
        problems.append(
            f"how {config.model.gguf_file} is loaded depends on the version of transformers; give the id of the model "
            "that it was made from: --base_model_id ID"
        )
    raise_all(problems, f"run {paths.folder} cannot be published")
    merged, *_ = [open_adapter(path) for path in (paths.merged, *(task.adapter for task in tasks))]
    plots = [path for path in (*paths.folder.glob("*"), *paths.plots.glob("*")) if path.suffix in PLOT_SUFFIXES]
    return ReleasedRun(
        paths=paths,
        config=config,
        report=report,
        base=base,
        revision=config.model.revision if base == config.model.base else None,
        head=next(iter(merged.labels), None),
        labels=next(iter(merged.labels.values()), ()),
        tasks=tasks,
        plots=sorted(plots, key=lambda path: path.name),
    )


def valid_id(name: str) -> bool:
    """Whether a name may be the id of a repository on the Hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def on_hub(name: str) -> bool:
    """Whether a model or data set is named by its id on the Hub: a local folder of that name wins."""
    return valid_id(name) and not Path(name).exists()


def redact(value: Any, local_paths: Sequence[str] | None = ()) -> Any:
    """JSON content as others may see it: without tokens, and without what a key such as `hub_token` holds.

    local_paths: paths of this machine that are known. Every path is cut to its last name, unless this is None.
    Keys stay as they are.
    """
    if isinstance(value, Mapping):
        return {
            key: "(hidden)" if isinstance(item, str) and SECRET_KEY.search(str(key)) else redact(item, local_paths)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact(item, local_paths) for item in value]
    if not isinstance(value, str):
        return value
    value = TOKEN.sub("…", value)
    if local_paths is None:
        return value
    for path in sorted(local_paths, key=len, reverse=True):
        value = value.replace(path, Path(path).name)
    value = LOCAL_PATH.sub(lambda path: Path(path[0]).name, value)
    return Path(value).name if value.startswith("~/") else value


def _unfinished(config: RunConfig, report: Report, tasks: Sequence[TaskPaths]) -> list[str]:
    begun = [task.name for task in tasks if not task.finished]
    if begun:
        return [f"{begun[0]} is not finished; continue the run with pm-hf train first"]
    stream, expected = config.stream, len(report.alphas)
    if not config.strategy.joint:
        groups = len(stream.class_groups) if isinstance(stream.class_groups, dict) else stream.class_groups
        planned = len(stream.tasks) if stream.tasks else groups
        expected = planned if isinstance(planned, int) else expected
    reported = min(len(tasks), len(report.alphas))
    if len(tasks) != len(report.alphas) or reported != expected:
        count = max(expected, len(tasks))
        return [f"{reported} of {count} tasks are in its report; continue it with pm-hf train first"]
    return []


def _unreleased(config: RunConfig, paths: RunPaths, tasks: Sequence[TaskPaths]) -> list[str]:
    merged = paths.merged
    if not config.merges:
        return ["strategy.individual keeps one adapter for each task and merges none; there is nothing to load"]
    if config.analytic_head and not config.kind.has_head:
        return [
            "method frozen of a language model trains nothing: its adapter is the base, and chooses no answers alone"
        ]
    if not tasks or not merged.is_dir():
        return [f"there is no merged adapter {merged}"]
    for task in tasks:
        marks = {name: mark for name, mark in TaskRecord.load(task.step).files.items() if name.startswith(PUBLISHED)}
        if damage := damaged_file(task.folder, marks):
            return [f"{damage}; bring the file back from a copy"]
    if not same_files(tasks[-1].released, merged):
        return [f"{merged} is not the adapter that its report is about (max_forgetting kept an older one)"]
    return []


def _place(path: str) -> str:
    """`task-00-name/adapter` of an adapter of the run, else the folder's name."""
    parts = Path(path).parts
    return "/".join(parts[-2:]) if len(parts) > 1 and parts[-2].startswith(TASK_PREFIX) else Path(path).name


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        content = {key: _without_nulls(item) for key, item in value.items()}
        return {key: item for key, item in content.items() if item is not None and item != {}}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
