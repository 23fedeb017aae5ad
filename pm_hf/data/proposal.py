"""A first YAML for somebody's data: what the files or the data set hold, as settings that run."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Image, get_dataset_config_names, get_dataset_split_names, load_dataset
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import AutoConfig

from pm_hf.config.kinds import STREAM_KINDS
from pm_hf.config.reference import as_yaml
from pm_hf.data.columns import text_of
from pm_hf.data.images import PICTURE_SUFFIXES
from pm_hf.data.sources import path_of
from pm_hf.data.tables import Table, TextTable, kind_of, read_table
from pm_hf.errors import InputError
from pm_hf.models.loading import resolve_base

SCHEMA_FILE = "pm_hf.schema.json"
TEST_SHARE = 0.2
BASES = {
    "text-classification": "sentence-transformers/all-MiniLM-L6-v2",
    "image-classification": "google/vit-base-patch16-224-in21k",
    "causal-lm": "HuggingFaceTB/SmolLM2-135M-Instruct",
}
# names of columns by what they usually hold, the likeliest first
TEXTS = (
    "text",
    "utterance",
    "sentence",
    "question",
    "query",
    "review",
    "comment",
    "message",
    "body",
    "content",
    "title",
)
LABELS = ("label", "labels", "intent", "class", "category", "topic", "target", "sentiment", "tag", "y")
TASKS = (
    "task",
    "month",
    "week",
    "quarter",
    "year",
    "period",
    "batch",
    "customer",
    "client",
    "tenant",
    "domain",
    "source",
)
PICTURES = ("image", "picture", "photo", "img")
TEST_WORDS, TRAIN_WORDS = ("test", "validation", "valid", "val", "dev", "eval"), ("train", "training")
MOST_TASKS, LEAST_ROWS = 50, 4  # values that a column of tasks has at most; rows that each of them has at least


@dataclass
class Proposal:
    """What a YAML is to say. stream: its group, in order; comments: {setting: why}; longest: characters of nearly every
    text, None for pictures."""

    kind: str
    stream: dict[str, Any]
    comments: dict[str, str] = field(default_factory=dict)
    longest: int | None = None


def propose_config(data: Sequence[str], base: str | None = None, output_dir: str = "runs/first") -> str:
    """A commented YAML for files of rows, folders of pictures, or one data set (folder or Hub id).

    Raises InputError for what cannot be read, or where no column says what is to be learned.
    """
    if not data:
        raise InputError("no data given; name files, folders, or a data set of the Hub")
    paths = [path_of(name, None) for name in data]
    if all(path.is_file() for path in paths):
        proposal = _of_files(list(dict.fromkeys(paths)))
    elif all(path.is_dir() for path in paths):
        proposal = _of_folders(list(dict.fromkeys(paths)))
    elif len(data) == 1 and not paths[0].exists() and not kind_of(data[0]):
        proposal = _of_data_set(data[0])
    else:
        lost = [name for name, path in zip(data, paths, strict=True) if not path.exists()]
        raise InputError(f"{lost[0]} does not exist" if lost else "files and folders together; name files, or folders")
    return _as_text(proposal, base or BASES[proposal.kind], output_dir)


# ---- what the data are


def _of_files(files: Sequence[Path]) -> Proposal:
    odd = [file for file in files if kind_of(file.name) is None and file.suffix != ".npz"]
    if odd:
        raise InputError(f"{odd[0]}: expected files ending in .csv, .json, .jsonl (.gz too), .parquet or .npz")
    if any(file.suffix == ".npz" for file in files):
        if len(files) > 1:
            raise InputError("one .npz file holds training and test pictures; name one")
        stream = {"train": str(files[0]), "test": str(files[0]), "class_groups": 2}
        return Proposal("image-classification", stream, {"class_groups": GROUPS})
    tables = {file: read_table(file, str(kind_of(file.name))) for file in files}
    pairs = _pairs(files)
    first = tables[next(iter(pairs.values()))[0]]
    proposal = _of_table(first, str(files[0]))
    label = proposal.stream.get("label_column", "label")
    if len(pairs) == 1:
        ((name, (train, test)),) = pairs.items()
        proposal.stream = {"train": str(train), **_tested(test), **proposal.stream}
        return _split_one(proposal, first, label, name)
    proposal.stream.pop("task_column", None)
    listed = [
        {"name": name, "train": str(train), **_tested(test, share=False)} for name, (train, test) in pairs.items()
    ]
    proposal.stream |= {} if all("test" in task for task in listed) else _tested(None)
    has_head = STREAM_KINDS[proposal.kind].has_head
    classes = [_values(tables[train], label) for train, _ in pairs.values()] if has_head else []
    return _listed(proposal, listed, classes)


def _pairs(files: Sequence[Path]) -> dict[str, tuple[Path, Path | None]]:
    """{task: (training file, test file)}: files whose names differ by train and test belong together."""
    parts = {file: _side(file) for file in files}
    trains = {file: name for file, (name, side) in parts.items() if side != "test"}
    tests = {name: file for file, (name, side) in parts.items() if side == "test"}
    if not trains:
        raise InputError(f"{files[0]}: only files of test rows; name the training rows too")
    return {name or file.parent.name or "all": (file, tests.get(name)) for file, name in trains.items()}


def _side(file: Path) -> tuple[str, str]:
    """(name without the word that says which rows, `train`, `test` or nothing)."""
    stem = Path(file.name.removesuffix(".gz")).stem
    words = stem.replace("-", "_").replace(".", "_").split("_")
    for side, names in (("test", TEST_WORDS), ("train", TRAIN_WORDS)):
        if any(word.lower() in names for word in words):
            return "_".join(word for word in words if word.lower() not in names), side
    return stem, ""


def _tested(test: Path | None, share: bool = True) -> dict[str, Any]:
    return {"test": str(test)} if test is not None else {"test_share": TEST_SHARE} if share else {}


def _of_table(table: Table, where: str) -> Proposal:
    """Kind and columns of a table."""
    columns = table.column_names
    if len(columns) == 1 and (sign := next((sign for sign in ";\t|" if sign in columns[0]), None)):
        raise InputError(f"{where}: its cells are separated by {sign!r}, not by commas; save it with commas")
    if "messages" in columns or {"prompt", "completion"} <= set(columns):
        return Proposal("causal-lm", {}, longest=_longest(table, columns))
    pictures = [name for name in columns if isinstance(_feature(table, name), Image)]
    texts = [name for name in columns if _is_text(table, name)]
    label = _label_column(table, [name for name in columns if name not in pictures])
    text = _first(TEXTS, [name for name in texts if name != label]) or max(
        (name for name in texts if name != label), key=lambda name: _mean_length(table, name), default=None
    )
    if pictures and label is not None:
        return Proposal("image-classification", _named(image=_first(PICTURES, pictures) or pictures[0], label=label))
    if text is None:
        raise InputError(f"{where}: no column of texts or pictures among {', '.join(columns)}")
    if label is None:
        return Proposal("causal-lm", _named(text=text), longest=_longest(table, [text]))
    proposal = Proposal("text-classification", _named(text=text, label=label), longest=_longest(table, [text]))
    if (task := _task_column(table, {text, label})) is not None:
        proposal.stream["task_column"] = task
    return proposal


def _named(**columns: str) -> dict[str, Any]:
    """Settings of the columns that are not called as the settings expect them."""
    return {f"{kind}_column": name for kind, name in columns.items() if name != kind}


def _split_one(proposal: Proposal, table: Table, label: str, name: str) -> Proposal:
    """The tasks of one data set: by a column, by classes, or a single one."""
    if "task_column" in proposal.stream:
        proposal.comments["task_column"] = "one task for each value, in order of appearance; classes may come back"
    elif STREAM_KINDS[proposal.kind].has_head:
        classes = _values(table, label)
        if len(classes) < 2:
            raise InputError(f"column {label} has one class only; a classifier needs two")
        proposal.stream["class_groups"] = max(1, min(3, len(classes) // 2))
        proposal.comments["class_groups"] = GROUPS
    else:
        train = {key: proposal.stream.pop(key) for key in ("train", "test") if key in proposal.stream}
        proposal.stream["tasks"] = [{"name": name, **train}]
        proposal.comments["tasks"] = "one task; add the next ones below it"
    return proposal


def _listed(proposal: Proposal, tasks: list[dict[str, Any]], classes: Sequence[set[str]]) -> Proposal:
    """The tasks of a list, with what their classes are to each other."""
    if STREAM_KINDS[proposal.kind].has_head:
        counts = Counter(name for names in classes for name in names)
        if all(count == len(tasks) for count in counts.values()):
            proposal.stream["scenario"] = "domain_incremental"
            proposal.comments["scenario"] = "every task has the same classes"
        elif max(counts.values()) > 1:
            proposal.stream["shared_labels"] = True
            proposal.comments["shared_labels"] = "classes come back: a name is one class in all tasks"
    proposal.stream["tasks"] = tasks
    proposal.comments["tasks"] = "in this order; another one: stream.order"
    return proposal


def _of_folders(folders: Sequence[Path]) -> Proposal:
    if not any(_pictures_by_class(folder) or any(map(_pictures_by_class, _inside(folder))) for folder in folders):
        if len(folders) == 1 and (tables := [file for file in _inside(folders[0], files=True) if kind_of(file.name)]):
            own = any(file.name == "README.md" for file in _inside(folders[0], files=True))
            return _of_data_set(str(folders[0])) if own else _of_files(tables)
        return _of_data_set(str(folders[0]))
    if len(folders) == 1 and not _pictures_by_class(folders[0]):
        sides = {_side(folder)[1]: folder for folder in _inside(folders[0]) if _pictures_by_class(folder)}
        if "train" in sides:
            stream = {"train": str(sides["train"]), **_tested(sides.get("test")), "class_groups": 2}
            return Proposal("image-classification", stream, {"class_groups": GROUPS})
        folders = [folder for folder in _inside(folders[0]) if _pictures_by_class(folder)]
    classes = [{inner.name for inner in _inside(folder)} for folder in folders]
    if len(folders) == 1:
        stream = {"train": str(folders[0]), **_tested(None), "class_groups": max(1, min(3, len(classes[0]) // 2))}
        return Proposal("image-classification", stream, {"class_groups": GROUPS})
    tasks = [{"name": folder.name, "train": str(folder)} for folder in folders]
    return _listed(Proposal("image-classification", _tested(None)), tasks, classes)


def _inside(folder: Path, files: bool = False) -> list[Path]:
    return sorted(path for path in folder.iterdir() if (path.is_file() if files else path.is_dir()))


def _pictures_by_class(folder: Path) -> bool:
    """Whether a folder holds a folder of pictures for each class."""
    inner = _inside(folder)
    return bool(inner) and all(
        any(file.suffix.lower() in PICTURE_SUFFIXES for file in _inside(of_class, True)) for of_class in inner
    )


def _of_data_set(name: str) -> Proposal:
    """A data set of the Hub, or a folder that is one."""
    try:
        configs = get_dataset_config_names(name)
        splits = get_dataset_split_names(name, configs[0])
        rows = load_dataset(name, configs[0], split="train" if "train" in splits else splits[0])
    except Exception as error:  # the library's errors have no class in common
        words = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"{name} is no file or folder, and no data set that can be loaded: {words}") from error
    proposal = _of_table(rows, name)
    label = proposal.stream.get("label_column", "label")
    test = next((split for word in TEST_WORDS for split in splits if split == word), None)
    source = {"dataset": name} | ({"train_split": splits[0]} if "train" not in splits else {})
    source |= {"test_share": TEST_SHARE} if test is None else {} if test == "test" else {"test_split": test}
    if len(configs) == 1:
        proposal.stream = source | proposal.stream
        return _split_one(proposal, rows, label, Path(name).name)
    proposal.stream.pop("task_column", None)
    proposal.stream = source | proposal.stream | {"task_configs": configs[:MOST_TASKS]}
    proposal.comments["task_configs"] = "one task for each configuration of the data set"
    return proposal


# ---- what columns hold


def _feature(table: Table, column: str) -> Any:
    return None if isinstance(table, TextTable) else table.features[column]


def _cells(table: Table, column: str) -> list[Any]:
    if isinstance(table, TextTable):
        return table.columns[column]
    feature = _feature(table, column)
    values = list(table[column])
    return (
        [feature.names[value] for value in values if value is not None] if isinstance(feature, ClassLabel) else values
    )


def _values(table: Table, column: str) -> set[str]:
    return {text_of(value) or "" for value in _cells(table, column)}


def _is_text(table: Table, column: str) -> bool:
    if isinstance(_feature(table, column), Image):
        return False
    cells = [cell for cell in _cells(table, column)[:1000] if cell is not None]
    return bool(cells) and all(type(cell) is str for cell in cells)


def _mean_length(table: Table, column: str) -> float:
    cells = _cells(table, column)
    return sum(len(text_of(cell) or "") for cell in cells) / max(1, len(cells))


def _longest(table: Table, columns: Sequence[str]) -> int:
    """Characters that 95 of 100 rows do not exceed, all columns together."""
    lengths = sorted(
        sum(len(str(cell)) for cell in row) for row in zip(*(_cells(table, c) for c in columns), strict=True)
    )
    return lengths[min(len(lengths) - 1, math.ceil(0.95 * len(lengths)))]


def _first(names: Sequence[str], columns: Sequence[str]) -> str | None:
    """The column that is called as the likeliest name."""
    lower = {column.lower(): column for column in reversed(columns)}
    return next((lower[name] for name in names if name in lower), None)


def _label_column(table: Table, columns: Sequence[str]) -> str | None:
    """The column of classes: a ClassLabel, one that is called so, else the text of fewest values that repeat."""
    typed = [name for name in columns if isinstance(_feature(table, name), ClassLabel)]
    if named := _first(LABELS, typed) or _first(LABELS, columns) or (typed[0] if typed else None):
        return named
    counts = {
        name: len(_values(table, name)) for name in columns if _is_text(table, name) and name.lower() not in TASKS
    }
    counts = {name: count for name, count in counts.items() if 2 <= count <= len(table) // 4}
    return min(counts, key=lambda name: counts[name]) if counts and len(columns) > 1 else None


def _task_column(table: Table, others: set[str]) -> str | None:
    """A column that is called like one of tasks, with some rows for each of its values."""
    name = _first(TASKS, [column for column in table.column_names if column not in others])
    if name is None:
        return None
    counts = Counter(text_of(cell) or "" for cell in _cells(table, name))
    return name if 2 <= len(counts) <= MOST_TASKS and min(counts.values()) >= LEAST_ROWS else None


# ---- the text


GROUPS = "so many tasks of new classes each; or {name: [class, …], …}"


def _as_text(proposal: Proposal, base: str, output_dir: str) -> str:
    kind = STREAM_KINDS[proposal.kind]
    targets, of_model = _target_modules(base)
    stream = {"kind": proposal.kind, **proposal.stream}
    if proposal.longest is not None:
        stream["max_length"] = min(1024, max(16, 16 * math.ceil(proposal.longest / 3 / 16)))
        proposal.comments["max_length"] = f"tokens; 95 of 100 rows have at most {proposal.longest} characters"
    lines = [
        f"# yaml-language-server: $schema={SCHEMA_FILE}",
        "# Made by pm-hf init. pm-hf help SETTING explains a line, pm-hf train --config FILE --dry-run what it does.",
        f"output_dir: {as_yaml(output_dir)}",
        f"method: {kind.method}  # pm-hf methods --stream",
        "model:",
        f"  base: {as_yaml(base)}  # any {kind.auto_model} of the Hub, or a folder",
        "stream:",
        *_lines(stream, proposal.comments),
        "lora:",
        "  r: 8  # rank",
        f"  target_modules: {as_yaml(targets)}  # {of_model}",
        "training:  # any field of TrainingArguments",
        *_lines(dict(kind.training), {}),
    ]
    return "\n".join(lines) + "\n"


def _lines(settings: dict[str, Any], comments: dict[str, str]) -> list[str]:
    lines = []
    for key, value in settings.items():
        why = f"  # {comments[key]}" if key in comments else ""
        rows = isinstance(value, list) and all(isinstance(item, dict) for item in value)
        lines.append(f"  {key}:{'' if rows else ' ' + as_yaml(value)}{why}")
        lines += [f"    - {as_yaml(item)}" for item in value] if rows else []
    return lines


def _target_modules(base: str) -> tuple[list[str] | str | None, str]:
    """(the layers to adapt, whose choice that is)."""
    try:
        model = AutoConfig.from_pretrained(resolve_base(base)).model_type
    except (OSError, ValueError):  # not on this machine, or with code of its own
        return None, "null: PEFT's choice for the model, or all-linear; the model could not be looked at here"
    known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model)
    return (list(known), f"PEFT's choice for {model}") if known else ("all-linear", f"PEFT has no choice for {model}")
