"""Tasks and the stream of them: rows, labels, and their batches."""

import hashlib
import json
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from torch import Tensor
from transformers import DataCollatorWithPadding

from pm_hf.config import RunConfig, Source, StreamSettings
from pm_hf.errors import InputError, raise_all
from pm_hf.files import read_json

LOADERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Rows:
    """Texts and the label name of each."""

    texts: list[str]
    labels: list[str]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Task:
    """One task: its own classes in row order of its head, and its rows."""

    name: str
    labels: tuple[str, ...]
    train: Rows
    test: Rows

    def fingerprint(self) -> str:
        """Digest of labels and rows; a finished task must keep it."""
        digest = hashlib.sha256(json.dumps([self.name, self.labels]).encode())
        for rows in (self.train, self.test):
            digest.update(json.dumps([rows.texts, rows.labels]).encode())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class TaskStream:
    """The tasks in order. In a domain-incremental stream every task has the labels of the whole stream."""

    scenario: str
    tasks: tuple[Task, ...]
    notes: tuple[str, ...] = ()  # what was left out of the data


def load_stream(config: RunConfig) -> TaskStream:
    """Read and check all data before any training; one InputError with everything that is wrong."""
    stream, folder = config.stream, config.data_dir
    if stream.tasks is not None:
        parts = _listed(stream, folder)
    else:
        data = tuple(_read(stream, folder, test=test, extra=stream.domain_column) for test in (False, True))
        parts = _by_class(stream, folder, *data) if stream.class_groups is not None else _by_domain(*data)
        left = sorted(set(data[0][0].labels) - {label for _, train, _ in parts for label in train.labels})
        if left:
            note = f"{len(left)} labels are in no class group, their rows are not used: {', '.join(left[:5])}"
            return replace(make_stream(config, parts), notes=(note,))
    return make_stream(config, parts)


def make_stream(config: RunConfig, parts: Sequence[tuple[str, Rows, Rows]]) -> TaskStream:
    """A checked stream of (name, training rows, test rows)."""
    stream, scenario = config.stream, config.stream.scenario or "class_incremental"
    if stream.tasks is not None and not stream.shared_labels and scenario == "class_incremental":
        parts = [(name, _qualified(name, train), _qualified(name, test)) for name, train, test in parts]
    problems = _problems(scenario, parts)
    raise_all(problems, "stream")
    everything = tuple(sorted({label for _, train, _ in parts for label in train.labels}))
    tasks = []
    for name, train, test in parts:
        labels = everything if scenario == "domain_incremental" else tuple(sorted(set(train.labels)))
        tasks.append(Task(name, labels, _thinned(train, stream.train_per_class, config.seed, name), test))
    return TaskStream(scenario, tuple(tasks))


def encode(tokenizer: Any, rows: Rows, labels: Sequence[str], max_length: int) -> list[dict[str, Any]]:
    """Tokenised rows with `labels` as indices into `labels`."""
    index = {label: i for i, label in enumerate(labels)}
    tokens = tokenizer(rows.texts, truncation=True, max_length=max_length)
    keys = list(tokens.keys())
    return [{**{key: tokens[key][i] for key in keys}, "labels": index[label]} for i, label in enumerate(rows.labels)]


def batches(tokenizer: Any, encoded: Sequence[dict], size: int) -> Iterator[Mapping[str, Tensor]]:
    """Padded batches in order."""
    collate = DataCollatorWithPadding(tokenizer)
    for start in range(0, len(encoded), size):
        yield collate(list(encoded[start : start + size]))


def sample(encoded: Sequence[dict], count: int | None, seed: int) -> list[dict]:
    """`count` rows drawn without repetition, or all of them, in a seeded order."""
    order = random.Random(f"sample/{seed}").sample(range(len(encoded)), len(encoded))
    return [encoded[i] for i in (order if count is None else order[:count])]


def _listed(stream: StreamSettings, folder: str | None) -> list[tuple[str, Rows, Rows]]:
    parts, problems = [], []
    for number, task in enumerate(stream.tasks or []):
        if not task.name:
            problems.append(f"tasks[{number}] has no name")
            continue
        inherited = {key: getattr(stream, key) for key in Source.__dataclass_fields__}
        if task.train or task.test:
            inherited["dataset"] = None  # the task's own files
        source = Source(**{key: getattr(task, key) or value for key, value in inherited.items()})
        try:
            rows = [_read(source, folder, test=test)[0] for test in (False, True)]
            parts.append((task.name, rows[0], rows[1]))
        except InputError as error:
            problems.append(f"task {task.name}: {error}")
    raise_all(problems, "stream")
    return parts


def _by_class(stream: StreamSettings, folder: str | None, train: tuple, test: tuple) -> list[tuple[str, Rows, Rows]]:
    strange = sorted(set(test[0].labels) - set(train[0].labels))
    raise_all([f"labels in test that train lacks: {strange[:5]}"] * bool(strange), "stream")
    groups = _class_groups(stream.class_groups, folder, sorted(set(train[0].labels)))
    return [
        (name, _where(train[0], train[0].labels, set(labels)), _where(test[0], test[0].labels, set(labels)))
        for name, labels in groups.items()
    ]


def _class_groups(groups: int | str | dict | None, folder: str | None, labels: Sequence[str]) -> dict[str, list[str]]:
    if isinstance(groups, int):
        if not 1 <= groups <= len(labels):
            raise InputError(
                f"stream.class_groups: expected 1 to {len(labels)} groups for {len(labels)} classes, found {groups}"
            )
        size, more = divmod(len(labels), groups)
        starts = [i * size + min(i, more) for i in range(groups + 1)]
        return {f"classes-{i:02d}": list(labels[a:b]) for i, (a, b) in enumerate(zip(starts, starts[1:], strict=False))}
    if isinstance(groups, str):
        path = _path(groups, folder)
        if not path.is_file():
            raise InputError(f"stream.class_groups: file {path} does not exist")
        groups = read_json(path)
    if not isinstance(groups, dict) or not all(isinstance(names, list) for names in groups.values()):
        raise InputError("stream.class_groups: expected {task: [label, …]}")
    named = [str(label) for names in groups.values() for label in names]
    unknown = sorted(set(named) - set(labels))
    twice = sorted({label for label in named if named.count(label) > 1})
    raise_all(
        [f"labels without a training row: {unknown[:5]}"] * bool(unknown)
        + [f"labels in two groups: {twice[:5]}"] * bool(twice),
        "stream.class_groups",
    )
    return {str(task): [str(label) for label in names] for task, names in groups.items()}


def _by_domain(train: tuple, test: tuple) -> list[tuple[str, Rows, Rows]]:
    domains = list(dict.fromkeys(train[1]))
    strange = sorted(set(test[1]) - set(domains))
    raise_all([f"domains in test that train lacks: {strange[:5]}"] * bool(strange), "stream")
    return [(name, _where(train[0], train[1], {name}), _where(test[0], test[1], {name})) for name in domains]


def _read(source: Source, folder: str | None, *, test: bool, extra: str | None = None) -> tuple[Rows, list[str]]:
    """(rows, values of the extra column)."""
    data, where = _load(source, folder, test=test)
    text, label = source.text_column or "text", source.label_column or "label"
    columns = [text, label] + ([extra] if extra else [])
    lost = [column for column in columns if column not in data.column_names]
    if lost:
        raise InputError(f"{where}: missing column {', '.join(lost)}; found {', '.join(data.column_names)}")
    texts = list(data[text])
    bad = next((i for i, value in enumerate(texts) if not isinstance(value, str)), None)
    if bad is not None:
        raise InputError(f"{where}: column {text} must hold text, row {bad} holds {texts[bad]!r}")
    return Rows(texts, _names(data, label, where)), _names(data, extra, where) if extra else []


def _load(source: Source, folder: str | None, *, test: bool) -> tuple[Dataset, str]:
    file = source.test if test else source.train
    if source.dataset is not None:
        split = (source.test_split or "test") if test else (source.train_split or "train")
        local = _path(source.dataset, folder)
        name = str(local) if local.is_dir() else source.dataset
        where = f"data set {name}, split {split}"
        try:
            return load_dataset(name, source.dataset_config, split=split, revision=source.dataset_revision), where
        except (OSError, ValueError, RuntimeError, DatasetGenerationError) as error:
            raise InputError(f"{where} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    if file is None:
        raise InputError(f"no {'test' if test else 'train'} file and no dataset given")
    path = _path(file, folder)
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix not in LOADERS or path.name.endswith(".parquet.gz"):
        raise InputError(
            f"{path}: expected a file ending in .csv, .json, .jsonl (.gz too) or .parquet, found {path.name}"
        )
    if not path.is_file():
        raise InputError(f"file {path} does not exist; set data_dir=FOLDER if it lies elsewhere")
    # keep_default_na: a text such as "null" or "NA" is text
    options = {"keep_default_na": False} if LOADERS[suffix] == "csv" else {}
    try:
        # a cache of its own: the shared one tells files apart by time of change only
        with tempfile.TemporaryDirectory() as cache:
            data = load_dataset(LOADERS[suffix], data_files=str(path), split="train", cache_dir=cache, **options)
            return Dataset.from_dict(data.to_dict(), features=data.features), str(path)
    except (OSError, ValueError, DatasetGenerationError) as error:
        cause = error.__cause__ or error
        raise InputError(f"{path} cannot be read as {LOADERS[suffix]}: {' '.join(str(cause).split())[:300]}") from error


def _names(data: Dataset, column: str, where: str) -> list[str]:
    feature, values = data.features[column], list(data[column])
    empty = next((i for i, value in enumerate(values) if value is None or value == ""), None)
    if empty is not None:
        raise InputError(f"{where}: column {column} is empty in row {empty}")
    if isinstance(feature, ClassLabel):
        hidden = next((i for i, value in enumerate(values) if not 0 <= value < feature.num_classes), None)
        if hidden is not None:
            raise InputError(
                f"{where}: column {column} holds no class in row {hidden} ({values[hidden]}); hidden labels?"
            )
        return [feature.int2str(value) for value in values]
    return [str(value) for value in values]


def _problems(scenario: str, parts: Sequence[tuple[str, Rows, Rows]]) -> list[str]:
    problems, names = [], [name for name, _, _ in parts]
    if not names:
        problems.append("no tasks")
    problems += [f"two tasks are named {name!r}" for name in sorted({n for n in names if names.count(n) > 1})]
    known = {label for _, train, _ in parts for label in train.labels}
    for name, train, test in parts:
        for kind, rows in (("training", train), ("test", test)):
            if not len(rows):
                problems.append(f"task {name!r} is empty: no {kind} rows")
        allowed = known if scenario == "domain_incremental" else set(train.labels)
        strange = sorted(set(test.labels) - allowed)
        if strange and len(train):
            problems.append(f"task {name!r}: labels in test that train lacks: {strange[:5]}")
    return problems


def _qualified(task: str, rows: Rows) -> Rows:
    return Rows(rows.texts, [f"{task}/{label}" for label in rows.labels])


def _where(rows: Rows, values: Sequence[str], allowed: set[str]) -> Rows:
    kept = [i for i, value in enumerate(values) if value in allowed]
    return Rows([rows.texts[i] for i in kept], [rows.labels[i] for i in kept])


def _thinned(rows: Rows, per_class: int | None, seed: int, task: str) -> Rows:
    """At most `per_class` rows of each class, drawn with the seed, in the original order."""
    if per_class is None:
        return rows
    kept = []
    for label in sorted(set(rows.labels)):
        own = [i for i, value in enumerate(rows.labels) if value == label]
        kept += random.Random(f"{seed}/{task}/{label}").sample(own, min(per_class, len(own)))
    kept.sort()
    return Rows([rows.texts[i] for i in kept], [rows.labels[i] for i in kept])


def _path(name: str, folder: str | None) -> Path:
    return Path(folder or ".").expanduser() / Path(name).expanduser()
