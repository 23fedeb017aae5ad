"""Tasks and the stream of them: rows, labels, and their batches."""

import glob
import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from pm_hf.config.schema import RunConfig, Source, StreamSettings, TaskSettings
from pm_hf.data.chat import answer_of
from pm_hf.data.columns import spelled
from pm_hf.data.names import look_alikes, look_alikes_in_words, meant, name_problems, visible
from pm_hf.data.rows import Encoder, Examples, Rows
from pm_hf.data.sources import path_of, read_rows
from pm_hf.errors import InputError, raise_all
from pm_hf.files import read_json

# of each class's training rows, held out for `merge.coefficient: search` and `head.gate` without an eval_share
HELD_OUT_SHARE = 0.1
MOST_ANSWERS = 200  # a language task with more different completions has free answers, none to choose among


@dataclass(frozen=True)
class Task:
    """One task: the classes of its head in row order, its rows, and its own classes where the head has others too.

    Of a language model the labels are the answers to choose among, none where the completions are free text.
    train is empty where a finished task's training rows are left out; its labels are then those of its step.json.
    replayed: rows of earlier tasks that are trained on with its own. eval: training rows held out for evaluations
    during the training, for the search of the coefficient and for the gate.
    """

    name: str
    labels: tuple[str, ...]
    train: Rows
    test: Rows
    own: tuple[str, ...] = ()
    replayed: Rows = field(default_factory=lambda: Rows([], []))
    eval: Rows = field(default_factory=lambda: Rows([], []))

    def fingerprint(self) -> str:
        """Digest of labels and rows; a finished task must keep it."""
        return self._digests[0]

    def test_fingerprint(self) -> str:
        """Digest of labels and test rows; a finished task whose training rows are left out must keep it."""
        return self._digests[1]

    def test_digest(self) -> str:
        """Digest of the test rows alone: two runs of it scored the same rows."""
        return self._digests[2]

    @cached_property
    def _digests(self) -> tuple[str, str, str]:  # pictures are read for it, once
        named = json.dumps([self.name, self.labels]).encode()
        contents = [rows.content() if len(rows) else b"" for rows in (self.train, self.test, self.replayed, self.eval)]
        whole, tested = (hashlib.sha256(b"".join(parts)) for parts in ((named, *contents), (named, contents[1])))
        return whole.hexdigest()[:16], tested.hexdigest()[:16], hashlib.sha256(contents[1]).hexdigest()[:16]


@dataclass(frozen=True)
class TaskStream:
    """The tasks in order. In a domain-incremental stream every task has the labels of the whole stream.

    scored: what one joint task is scored on; empty: every task is scored on those learned so far.
    """

    scenario: str
    tasks: tuple[Task, ...]
    notes: tuple[str, ...] = ()  # what was left out of the data
    scored: tuple[Task, ...] = ()
    held_out: tuple[Task, ...] = ()  # scored after every task, never trained on

    @property
    def all(self) -> tuple[Task, ...]:
        """Everything that is trained on or scored."""
        return (*self.tasks, *self.scored, *self.held_out)

    def seen(self, index: int) -> tuple[Task, ...]:
        """The tasks that are scored after task `index`."""
        return self.scored or self.tasks[: index + 1]


def load_stream(config: RunConfig, finished_labels: Mapping[str, Sequence[str]] | None = None) -> TaskStream:
    """Read and check all data before any training; one InputError with everything that is wrong.

    A task of `stream.tasks` with a test file and no training rows is read as one that is finished in output_dir, which
    is not checked here. finished_labels: {name of a finished task: labels of its head}, of which such tasks have
    theirs; without, they have those of their test rows.
    """
    return replace(_load_tasks(config, finished_labels or {}), held_out=_held_out_texts(config))


def _load_tasks(config: RunConfig, finished_labels: Mapping[str, Sequence[str]]) -> TaskStream:
    stream, folder = config.stream, config.data_dir
    if (tasks := task_list(config)) is not None:
        parts = _in_order(_tasks_of_list(config, tasks), stream.order)
    else:
        data = _load_train_and_test(config, stream, extra=stream.domain_column or stream.task_column)
        parts = _tasks_by_class(stream, folder, *data) if stream.class_groups is not None else _tasks_by_domain(*data)
        parts = _in_order(parts, stream.order)
        left = sorted(set(data[0][0].labels) - {label for _, train, _ in parts for label in train.labels})
        if left:
            note = f"{len(left)} labels are in no class group, their rows are not used: {', '.join(left[:5])}"
            made = make_stream(config, parts, finished_labels)
            return replace(made, notes=(note, *made.notes))
    return make_stream(config, parts, finished_labels)


def _in_order(parts: Sequence[tuple[str, Rows, Rows]], order: Sequence[str] | None) -> list[tuple[str, Rows, Rows]]:
    """The tasks as `stream.order` has them; InputError unless it names each of them once."""
    if order is None:
        return list(parts)
    by_name = {part[0]: part for part in parts}
    if sorted(order) != sorted(by_name):
        odd = [name for name in order if name not in by_name or order.count(name) > 1] or sorted(
            set(by_name) - set(order)
        )
        raise InputError(
            f"stream.order: expected each of {', '.join(by_name)} once, found {', '.join(order)}; see {odd[0]}"
        )
    return [by_name[name] for name in order]


def make_stream(
    config: RunConfig, parts: Sequence[tuple[str, Rows, Rows]], finished_labels: Mapping[str, Sequence[str]]
) -> TaskStream:
    """A checked stream of (name, training rows, test rows); finished_labels as in `load_stream`."""
    stream, scenario = config.stream, config.stream.scenario or "class_incremental"
    language = not config.kind.has_head
    if stream.tasks is not None and not stream.shared_labels and scenario == "class_incremental" and not language:
        parts = [(name, _qualify_labels(name, train), _qualify_labels(name, test)) for name, train, test in parts]
    left = _labels_without_rows(config, parts, finished_labels)
    raise_all(_stream_problems(scenario, parts, language, left) + _strategy_problems(config, left), "stream")
    own = [left[name] if name in left else _task_labels(language, train, test) for name, train, test in parts]
    everything = tuple(sorted({label for labels in own for label in labels}))
    tasks, share = [], stream.eval_share or (HELD_OUT_SHARE if config.holds_out_rows else None)
    for (name, train, test), labels in zip(parts, own, strict=True):
        train = _limit_per_class(train, stream.train_per_class, config.seed, name)
        train = _limit_rows(train, stream.train_rows, f"{config.seed}/{name}/train", labels)
        test = _limit_rows(test, stream.test_rows, f"{config.seed}/{name}/test")
        train, evaluated = _hold_out(train, share, bool(labels), f"eval/{config.seed}/{name}")
        shared = everything if scenario == "domain_incremental" and (labels or not language) else labels
        tasks.append(Task(name, shared, train, test, shared, eval=evaluated))
    few = [task.name for task in tasks if share and not len(task.eval) and task.name not in left]
    asking = "eval_share" if stream.eval_share else "merge.coefficient: search" if config.searches else "head.gate"
    raise_all([f"task {name!r}: too few training rows for {asking} to hold one out" for name in few], "stream")
    if config.strategy.replay_per_class:
        tasks = _with_replay(tasks, config.strategy.replay_per_class, config.seed)
    notes = _look_alike_notes("labels", [*everything, *sorted(_almost_answers(parts))] if language else everything)
    notes += _look_alike_notes("tasks", [task.name for task in tasks]) + (() if language else _empty_notes(tasks))
    notes += _equal_name_notes(stream, tasks, language)
    if config.strategy.joint:
        return TaskStream(scenario, (_join_tasks(tasks, everything),), notes, scored=tuple(tasks))
    return TaskStream(scenario, tuple(tasks), notes)


def _equal_name_notes(stream: StreamSettings, tasks: Sequence[Task], language: bool) -> tuple[str, ...]:
    """A note where a class of a listed task may be one of an earlier task, and is not."""
    if stream.tasks is None or stream.shared_labels or language or stream.scenario != "class_incremental":
        return ()
    counts = Counter(label.removeprefix(f"{task.name}/") for task in tasks for label in task.labels)
    again = sorted(label for label, count in counts.items() if count > 1)
    return (
        f"{len(again)} classes of different tasks have one name and are kept apart ({', '.join(again[:5])}); where a "
        "class comes back set stream.shared_labels: true",
    ) * bool(again)


def _look_alike_notes(what: str, names: Iterable[str]) -> tuple[str, ...]:
    """One note that names those which a reader takes for the same."""
    pairs = look_alikes_in_words(names)
    return (f"{what} that differ only in blanks, case or form are kept apart: {pairs}",) if pairs else ()


def _almost_answers(parts: Sequence[tuple[str, Rows, Rows]]) -> set[str]:
    """Completions of tasks that would have answers to choose among if those of the test rows were written alike."""
    written = set[str]()
    for _, train, test in parts:
        answers, strange = set(train.labels), set(test.labels) - set(train.labels)
        if strange and len(answers) <= MOST_ANSWERS:
            alike = {name for group in look_alikes([*answers, *strange]) if answers & set(group) for name in group}
            written |= alike if strange <= alike else set()
    return written


def _empty_notes(tasks: Sequence[Task]) -> tuple[str, ...]:
    """How many texts of which task say nothing."""
    notes = []
    for task in tasks:
        for side, rows in (("training", task.train), ("test", task.test)):
            empty = sum(not visible(text) for text in rows.inputs) if isinstance(rows.inputs, list) else 0
            notes += [f"task {task.name}: {empty} of {len(rows)} {side} texts are empty"] * (empty > 0)
    return tuple(notes)


def batches(encoder: Encoder, examples: Examples, size: int) -> Iterator[Mapping[str, Tensor]]:
    """Padded batches in order."""
    for start in range(0, len(examples), size):
        yield encoder.collate([examples[i] for i in range(start, min(start + size, len(examples)))])


def sample(rows: Rows, count: int | None, seed: int) -> Rows:
    """`count` rows drawn without repetition, or all of them, in a seeded order."""
    order = random.Random(f"sample/{seed}").sample(range(len(rows)), len(rows))
    return rows.take(order if count is None else order[:count])


def sample_classes(rows: Rows, count: int, seed: int) -> Rows:
    """About `count` rows drawn without repetition, as many of each class as it has and another has, at least one of
    each, in a seeded order."""
    order, taken = random.Random(f"sample/{seed}").sample(range(len(rows)), len(rows)), Counter[str]()
    turn = {}
    for index in order:
        turn[index] = taken[rows.labels[index]]
        taken[rows.labels[index]] += 1
    return rows.take(sorted(order, key=lambda index: turn[index])[: max(count, len(taken))])


def _task_labels(language: bool, train: Rows, test: Rows) -> tuple[str, ...]:
    return closed_answers(train, test) if language else tuple(sorted(set(train.labels)))


def closed_answers(train: Rows, test: Rows) -> tuple[str, ...]:
    """The completions to choose among; none where they are free text."""
    answers = set(train.labels)
    free = len(answers) < 2 or len(answers) > MOST_ANSWERS or not set(test.labels) <= answers
    free = free or any("content" in answer_of(prompt) for rows in (train, test) for prompt in rows.inputs)
    return () if free or any(rows.inputs[0] == "" for rows in (train, test)) else tuple(sorted(answers))


def _with_replay(tasks: Sequence[Task], per_class: int, seed: int) -> list[Task]:
    """Each task with `per_class` training rows of every earlier class (answer), and a head that has them all."""
    replaying: list[Task] = []
    stored, labels = Rows([], []), tuple[str, ...]()
    for task in tasks:
        labels = tuple(dict.fromkeys([*labels, *task.labels]))
        replaying.append(replace(task, labels=labels, replayed=stored))
        free = not task.labels  # free text: so many rows of the task
        kept = _limit_rows(task.train, per_class, f"{seed}/{task.name}/replay") if free else None
        stored = stored.with_rows(kept or _limit_per_class(task.train, per_class, seed, task.name))
    return replaying


def _join_tasks(tasks: Sequence[Task], labels: tuple[str, ...]) -> Task:
    train, test, evaluated = tasks[0].train, tasks[0].test, tasks[0].eval
    for task in tasks[1:]:
        train, test = train.with_rows(task.train), test.with_rows(task.test)
        evaluated = evaluated.with_rows(task.eval)
    return Task("joint", labels, train, test, labels, eval=evaluated)


def _load_train_and_test(config: RunConfig, source: Source, *, task: str = "", extra: str | None = None) -> list[tuple]:
    """(rows, values of the extra column) of training and of test rows."""
    kind, folder, share = config.stream.kind, config.data_dir, config.stream.test_share
    splits = (False, True) if share is None else (False,)
    data = [read_rows(kind, source, folder, test=test, task=task, extra=extra) for test in splits]
    if share is None:
        return data
    rows, values = data[0]
    classes = config.kind.has_head or bool(closed_answers(rows, rows))
    by_task = values if config.stream.task_column is not None else [""] * len(rows)
    sides = _split_indices(rows, share, classes, f"test/{config.seed}", by_task)
    if not sides[1] and not config.kind.has_head:  # every answer stands once: they are free text
        sides = _split_indices(rows, share, False, f"test/{config.seed}", by_task)
    return [(rows.take(side), [values[i] for i in side] if values else []) for side in sides]


def _hold_out(rows: Rows, share: float | None, classes: bool, key: str) -> tuple[Rows, Rows]:
    """(what stays, the share that is held out)."""
    if share is None:
        return rows, Rows([], [])
    stay, held = _split_indices(rows, share, classes, key)
    return rows.take(stay), rows.take(held)


def _split_indices(
    rows: Rows, share: float, classes: bool, key: str, groups: Sequence[str] | None = None
) -> tuple[list[int], list[int]]:
    """Indices of (the rows that stay, the held out `share`): of each class's rows, or of all rows of free text, in each
    of the groups that rows are of."""
    labels = rows.labels if classes else [""] * len(rows)
    if groups is not None and any(groups):
        labels = [f"{group}/{label}" for group, label in zip(groups, labels, strict=True)]
    held = set(_held_out_indices(labels, share, key))
    return [i for i in range(len(rows)) if i not in held], sorted(held)


def _held_out_indices(labels: Sequence[str], share: float, key: str) -> Iterator[int]:
    """Indices of `share` of each class's rows, at least one where a class has two."""
    for label in sorted(set(labels)):
        own = [i for i, value in enumerate(labels) if value == label]
        count = min(max(1, round(share * len(own))), len(own) - 1)
        yield from random.Random(f"{key}/{label}").sample(own, count)


def task_list(config: RunConfig) -> list[TaskSettings] | None:
    """The tasks that are listed, or one for each file or configuration; None where one data set is split."""
    stream = config.stream
    if stream.task_configs is not None:
        return [TaskSettings(name=name, dataset_config=name) for name in stream.task_configs]
    if stream.task_files is None:
        return stream.tasks
    pattern = path_of(stream.task_files, config.data_dir)
    files = sorted(Path(name) for name in glob.glob(str(pattern)) if Path(name).is_file())
    if not files:
        raise InputError(f"stream.task_files: no file is named {pattern}; set data_dir=FOLDER if they lie elsewhere")
    folder = Path(config.data_dir or ".").expanduser()
    names = [file.name.removesuffix(".gz") for file in files]
    return [
        TaskSettings(name=Path(name).stem, train=os.path.relpath(file, folder))
        for name, file in zip(names, files, strict=True)
    ]


def _tasks_of_list(config: RunConfig, tasks: Sequence[TaskSettings]) -> list[tuple[str, Rows, Rows]]:
    parts, problems = [], []
    for number, task in enumerate(tasks):
        if not visible(task.name):
            problems.append(f"tasks[{number}] has no name" + (f", found {ascii(task.name)}" if task.name else ""))
            continue
        source, train = _task_source(config.stream, task), Rows([], [])
        try:
            if _leaves_out_training(source):
                test, _ = read_rows(config.stream.kind, source, config.data_dir, test=True, task=task.name)
            else:
                (train, _), (test, _) = _load_train_and_test(config, source, task=task.name)
            parts.append((task.name, train, test))
        except InputError as error:
            problems.append(f"task {task.name}: {error}")
    raise_all(problems, "stream")
    return parts


def tasks_without_rows(stream: StreamSettings) -> list[str]:
    """Names of the tasks of a list that have no training rows, which only finished ones may leave out."""
    return [task.name for task in stream.tasks or [] if _leaves_out_training(_task_source(stream, task))]


def _leaves_out_training(source: Source) -> bool:
    """Whether a task has a test file and no training rows."""
    return bool(source.test) and not source.train and source.dataset is None


def _labels_without_rows(
    config: RunConfig, parts: Sequence[tuple[str, Rows, Rows]], finished_labels: Mapping[str, Sequence[str]]
) -> dict[str, tuple[str, ...]]:
    """{task without training rows: its labels}: as the run finished it, or else those of its test rows."""
    labels, tests, language = {}, {name: test for name, _, test in parts}, not config.kind.has_head
    for name in tasks_without_rows(config.stream):
        derived = _task_labels(language, tests[name], tests[name]) if len(tests[name]) else ()
        labels[name] = tuple(finished_labels.get(name, derived))
    return labels


def _strategy_problems(config: RunConfig, left: Collection[str]) -> list[str]:
    """Settings that train on rows which are left out."""
    needing = [key for key in ("joint", "replay_per_class") if left and getattr(config.strategy, key)]
    names = ", ".join(map(repr, left))
    return [f"strategy.{key} trains on rows of earlier tasks: name the training files of {names}" for key in needing]


def _task_source(stream: StreamSettings, task: TaskSettings) -> Source:
    """The task's own entries, the stream's where it has none; an empty one ("") undoes the stream's."""
    inherited = {key: getattr(stream, key) for key in Source.__dataclass_fields__}
    if task.train or task.test:
        inherited["dataset"] = None  # the task's own files
    own = {key: getattr(task, key) for key in inherited}
    return Source(**{key: value if own[key] is None else own[key] for key, value in inherited.items()})


def _held_out_texts(config: RunConfig) -> tuple[Task, ...]:
    stream, texts = config.stream, []
    names = [text.name for text in (*(stream.held_out or []), *(stream.tasks or []))]
    problems = [problem for text in stream.held_out or [] for problem in name_problems(text.name)]
    problems += [f"two texts or tasks are named {name!r}" for name in sorted({n for n in names if names.count(n) > 1})]
    raise_all(problems if stream.held_out else [], "stream.held_out")
    for text in stream.held_out or []:
        try:
            rows, _ = read_rows(stream.kind, _task_source(stream, text), config.data_dir, test=True, task=text.name)
        except InputError as error:
            inherits = stream.prompt_template and text.prompt_template is None
            way_out = '; it has the stream\'s prompt_template, a plain text needs its own: ""' if inherits else ""
            raise InputError(f"stream.held_out: {text.name}: {error}{way_out}") from error
        texts.append(
            Task(text.name, (), Rows([], []), _limit_rows(rows, stream.test_rows, f"{config.seed}/{text.name}"))
        )
    return tuple(texts)


def _tasks_by_class(
    stream: StreamSettings, folder: str | None, train: tuple, test: tuple
) -> list[tuple[str, Rows, Rows]]:
    strange = sorted(set(test[0].labels) - set(train[0].labels))
    hint = meant(strange, set(train[0].labels))
    raise_all([f"labels in test that train lacks: {strange[:5]}{hint}"] * bool(strange), "stream")
    groups = _class_groups(stream.class_groups, folder, sorted(set(train[0].labels)))
    return [
        (name, _rows_with(train[0], train[0].labels, set(labels)), _rows_with(test[0], test[0].labels, set(labels)))
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
        path = path_of(groups, folder)
        if not path.is_file():
            raise InputError(f"stream.class_groups: file {path} does not exist")
        groups = read_json(path)
    if not isinstance(groups, dict) or not all(isinstance(names, list) for names in groups.values()):
        raise InputError("stream.class_groups: expected {task: [label, …]}")
    groups = {str(task): [spelled(label, labels) for label in names] for task, names in groups.items()}
    named = [label for names in groups.values() for label in names]
    unknown = sorted(set(named) - set(labels))
    twice = sorted({label for label in named if named.count(label) > 1})
    raise_all(
        [f"labels without a training row: {unknown[:5]}"] * bool(unknown)
        + [f"labels in two groups: {twice[:5]}"] * bool(twice),
        "stream.class_groups",
    )
    return groups


def _tasks_by_domain(train: tuple, test: tuple) -> list[tuple[str, Rows, Rows]]:
    domains = list(dict.fromkeys(train[1]))
    strange = sorted(set(test[1]) - set(domains))
    hint = meant(strange, domains)
    raise_all([f"domains in test that train lacks: {strange[:5]}{hint}"] * bool(strange), "stream")
    return [(name, _rows_with(train[0], train[1], {name}), _rows_with(test[0], test[1], {name})) for name in domains]


def _stream_problems(
    scenario: str, parts: Sequence[tuple[str, Rows, Rows]], language: bool, left: Mapping[str, Sequence[str]]
) -> list[str]:
    problems, names = [], [name for name, _, _ in parts]
    if not names:
        problems.append("no tasks")
    problems += [f"two tasks are named {name!r}" for name in sorted({n for n in names if names.count(n) > 1})]
    problems += [problem for name in names for problem in name_problems(name)]
    known = {label for name, train, _ in parts for label in left.get(name, train.labels)}
    for name, train, test in parts:
        for kind, rows in (("training", train), ("test", test)):
            if not len(rows) and not (kind == "training" and name in left):
                problems.append(f"task {name!r} is empty: no {kind} rows")
            elif len(rows) and not language and isinstance(rows.inputs, list) and not any(map(visible, rows.inputs)):
                problems.append(f"task {name!r}: every {kind} text is empty")
        allowed = known if scenario == "domain_incremental" else set(train.labels)
        strange = sorted(set(test.labels) - allowed)
        if strange and len(train) and not language:
            problems.append(f"task {name!r}: labels in test that train lacks: {strange[:5]}" + meant(strange, allowed))
    return problems


def _qualify_labels(task: str, rows: Rows) -> Rows:
    return replace(rows, labels=[f"{task}/{label}" for label in rows.labels])


def _rows_with(rows: Rows, values: Sequence[str], allowed: set[str]) -> Rows:
    return rows.take(i for i, value in enumerate(values) if value in allowed)


def _limit_per_class(rows: Rows, per_class: int | None, seed: int, task: str) -> Rows:
    """At most `per_class` rows of each class, drawn with the seed, in the original order."""
    if per_class is None:
        return rows
    kept = []
    for label in sorted(set(rows.labels)):
        own = [i for i, value in enumerate(rows.labels) if value == label]
        kept += random.Random(f"{seed}/{task}/{label}").sample(own, min(per_class, len(own)))
    return rows.take(sorted(kept))


def _limit_rows(rows: Rows, count: int | None, key: str, labels: Sequence[str] = ()) -> Rows:
    """At most `count` rows, drawn with the key, in the original order.

    labels: each keeps a row where `count` allows it; its first one stands in for the last drawn of the commonest class.
    """
    if count is None or count >= len(rows):
        return rows
    kept = random.Random(key).sample(range(len(rows)), count)
    drawn = {rows.labels[i] for i in kept}
    lost = [label for label in labels if label not in drawn and label in rows.labels] if count >= len(labels) else []
    for label in lost:
        commonest = Counter(rows.labels[i] for i in kept).most_common(1)[0][0]
        kept.remove(next(i for i in reversed(kept) if rows.labels[i] == commonest))
        kept.append(rows.labels.index(label))
    return rows.take(sorted(kept))
