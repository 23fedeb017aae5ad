"""The run's settings: defaults < method < YAML < command line, checked as a whole before anything runs."""

import types
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from pm_hf.errors import InputError, raise_all


@dataclass
class ModelSettings:
    """The backbone."""

    base: str = ""  # Hub id, folder, or package:NAME/FOLDER for a model inside an installed Python package
    revision: str | None = None  # Hub revision


@dataclass
class Source:
    """Where rows come from and which columns matter; a task's entry overrides the stream's."""

    train: str | None = None  # file of training rows (csv, json, jsonl, parquet; .gz too), relative to data_dir
    test: str | None = None  # file of test rows
    dataset: str | None = None  # instead of files: Hub id or folder for datasets.load_dataset
    dataset_config: str | None = None  # configuration name of the Hub data set
    dataset_revision: str | None = None  # Hub revision
    train_split: str | None = None  # split of the data set, default "train"
    test_split: str | None = None  # split of the data set, default "test"
    text_column: str | None = None  # default "text"
    label_column: str | None = None  # default "label"


@dataclass
class TaskSettings(Source):
    """One task of a list."""

    name: str = ""  # unique within the stream


@dataclass
class StreamSettings(Source):
    """The tasks: a list of them, or one data set split by class groups or by a column."""

    kind: Literal["text-classification"] = "text-classification"
    scenario: Literal["class_incremental", "domain_incremental"] = "class_incremental"
    tasks: list[TaskSettings] | None = None
    class_groups: int | str | dict | None = None  # number of groups, {task: [label, …]}, or a JSON file of that
    domain_column: str | None = None  # one task for each value of this column, in order of appearance
    shared_labels: bool = False  # whether equal label names of different tasks mean the same class
    max_length: int = 128  # tokens
    train_per_class: int | None = None  # training rows kept of each class and task, drawn with the seed


@dataclass
class LoraSettings:
    """The task adapter."""

    r: int = 8  # rank
    alpha: int = 8  # scaling is alpha / r
    dropout: float = 0.0  # probability
    target_modules: list[str] | str | None = None  # names or a regular expression; default: PEFT's for the model


@dataclass
class PerturbationSettings:
    """Perturbation of the training step."""

    scale: float | None = None  # ε, 0 ≤ ε < 1
    probabilities: list[float] = field(default_factory=lambda: [1 / 3, 1 / 3, 1 / 3])  # of 1, 1 + ε, 1 − ε


@dataclass
class CurvatureSettings:
    """Curvature of a finished task."""

    kind: Literal["fisher", "gram"] | None = None
    labels: Literal["empirical", "mc"] = "empirical"  # labels of the Fisher: the data's, or drawn from the model
    samples: int | None = 512  # examples used at most; null: all
    shrinkage: float = 0.1  # ρ of the Gram: (1−ρ)G + ρ·diag(G)


@dataclass
class MergeSettings:
    """The fold of a task into the running merge."""

    method: Literal["pm", "average", "sequential"] | None = None
    freedom: Literal["global", "module", "free"] | None = None  # one coefficient, one a module, the whole matrix
    coefficient: float | None = None  # a coefficient of one's own instead of the computed one
    max_rank: int | None = 64  # rank kept; null: exact, the rank grows with every task
    on_zero_curvature: Literal["error", "average"] = "error"


@dataclass
class HeadSettings:
    """The classification head."""

    kind: Literal["linear", "lda"] | None = None  # trained rows, or the analytic head
    drift: Literal["ridge", "none"] = "ridge"  # lda: how old class means follow the backbone
    ridge: float = 1.0  # lda: λ = ridge · tr(FᵀF)/d of the drift regression
    strict: bool = False  # lda: freeze backbone and covariance after task 1, old rows stay bit-identical


@dataclass
class RunConfig:
    """Everything that decides a run; saved as config.yaml."""

    output_dir: str = ""
    method: str = "pm"  # a row of METHODS: fills what is left null below
    seed: int = 0
    data_dir: str | None = None  # folder that file names in `stream` are relative to
    model: ModelSettings = field(default_factory=ModelSettings)
    stream: StreamSettings = field(default_factory=StreamSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    training: dict[str, Any] = field(default_factory=dict)  # any field of TrainingArguments, and head_learning_rate
    perturbation: PerturbationSettings = field(default_factory=PerturbationSettings)
    curvature: CurvatureSettings = field(default_factory=CurvatureSettings)
    merge: MergeSettings = field(default_factory=MergeSettings)
    head: HeadSettings = field(default_factory=HeadSettings)
    trains: bool | None = None  # false: the backbone stays as it is and only the head is computed
    max_forgetting: float | None = None  # the run fails when an old task lost more accuracy than this
    start_from: str | None = None  # released adapter folder to begin from

    def to_dict(self) -> dict:
        """Plain nested dict."""
        return asdict(self)


def _method(merge: str, scale: float, kind: str | None, freedom: str, head: str, trains: bool = True) -> dict:
    return {
        "merge": {"method": merge, "freedom": freedom},
        "perturbation": {"scale": scale},
        "curvature": {"kind": kind},
        "head": {"kind": head},
        "trains": trains,
    }


# what each method of a stream sets where the YAML is silent; all train from the running merge
METHODS = {
    "sequential": _method("sequential", 0.0, None, "global", "linear"),
    "average": _method("average", 0.0, None, "global", "linear"),
    "merge_only": _method("pm", 0.0, "fisher", "global", "linear"),
    "pm": _method("pm", 0.5, "fisher", "global", "linear"),
    "pm_gram": _method("pm", 0.5, "gram", "free", "linear"),
    "merge_only_lda": _method("pm", 0.0, "fisher", "global", "lda"),
    "best": _method("pm", 0.5, "gram", "free", "lda"),
    "frozen": _method("sequential", 0.0, None, "global", "lda", trains=False),
}

# TrainingArguments that the learner decides itself
MANAGED = frozenset(
    [
        "output_dir",
        "seed",
        "data_seed",
        "task_index",
        "perturbation_scale",
        "perturbation_probabilities",
        "perturbation_adapter",
        "remove_unused_columns",
        "label_names",
        "resume_from_checkpoint",
        "do_train",
        "do_eval",
        "do_predict",
    ]
)


def load_config(source: str | Path | Mapping | RunConfig, overrides: Sequence[str] = ()) -> RunConfig:
    """Read YAML (or a mapping), apply `key=value` overrides, fill in the method's settings, check everything.

    Raises one InputError that lists every unknown key, wrong type and impossible value.
    """
    raw, name = _read(source)
    problems: list[str] = []
    for override in _normalised(overrides, problems):
        _apply(raw, override, problems)
    method = raw.get("method", RunConfig.method)
    if not isinstance(method, str) or method not in METHODS:
        problems.append(f"method: unknown {method!r}; valid: {', '.join(METHODS)}")
    else:
        _fill(raw, METHODS[method])
    config = _build(RunConfig, raw, "", problems)
    raise_all(problems, name)
    raise_all(value_problems(config), name)
    return config


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved settings as YAML."""
    path.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")


def value_problems(config: RunConfig) -> list[str]:
    """Values that have the right type and still make no sense."""
    stream, problems = config.stream, []
    checks = [
        (bool(config.output_dir), "output_dir: required"),
        (bool(config.model.base), "model.base: required, a Hub id, a folder or package:NAME/FOLDER"),
        (config.curvature.samples is None or config.curvature.samples >= 1, "curvature.samples: must be at least 1"),
        (0 <= config.curvature.shrinkage < 1, "curvature.shrinkage: must be in [0, 1)"),
        (config.merge.max_rank is None or config.merge.max_rank >= 1, "merge.max_rank: must be at least 1"),
        (config.lora.r >= 1, "lora.r: must be at least 1"),
        (stream.train_per_class is None or stream.train_per_class >= 1, "stream.train_per_class: must be at least 1"),
        (config.head.ridge > 0, "head.ridge: must be positive"),
        (not config.head.strict or config.head.kind == "lda", "head.strict: belongs to head.kind: lda"),
        (config.trains or config.head.kind == "lda", "trains: false needs head.kind: lda"),
    ]
    problems += [message for fine, message in checks if not fine]
    splits = [n for n in ("tasks", "class_groups", "domain_column") if getattr(stream, n) is not None]
    if len(splits) != 1:
        found = ", ".join(splits) or "none"
        problems.append(f"stream: exactly one of tasks, class_groups and domain_column is needed, found {found}")
    if config.merge.method == "pm" and config.merge.coefficient is None and config.curvature.kind is None:
        problems.append("curvature.kind: method pm needs fisher or gram, or merge.coefficient")
    if config.merge.freedom == "free" and config.merge.coefficient is not None:
        problems.append("merge.coefficient: freedom free has no coefficient")
    managed = sorted(MANAGED & set(config.training))
    if managed:
        problems.append(f"training: {', '.join(managed)} are set by pm_hf from the run's own settings; remove them")
    return problems


def _read(source: str | Path | Mapping | RunConfig) -> tuple[dict, str]:
    if isinstance(source, RunConfig):
        return source.to_dict(), "config"
    if isinstance(source, Mapping):
        return yaml.safe_load(yaml.safe_dump(dict(source))), "config"
    path = Path(source)
    if not path.is_file():
        raise InputError(f"config {path} does not exist")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise InputError(f"config {path}: expected a mapping of settings, found {type(raw).__name__}")
    return raw, f"config {path}"


def _normalised(arguments: Sequence[str], problems: list[str]) -> list[tuple[str, str]]:
    """`key=value`, `--key=value`, `--key value` and `--flag` as (key, value) pairs."""
    pairs, waiting = [], None
    for argument in arguments:
        if waiting is not None and not argument.startswith("--") and "=" not in argument:
            pairs.append((waiting, argument))
            waiting = None
            continue
        if waiting is not None:
            pairs.append((waiting, "true"))
            waiting = None
        key, equals, value = argument.removeprefix("--").partition("=")
        if equals:
            pairs.append((key, value))
        elif argument.startswith("--"):
            waiting = key
        else:
            problems.append(f"override {argument!r}: expected key=value or --key value")
    return [*pairs, (waiting, "true")] if waiting is not None else pairs


def _apply(raw: dict, override: tuple[str, str], problems: list[str]) -> None:
    key, text = override
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    *parents, last = key.replace("-", "_").split(".")
    place = raw
    for parent in parents:
        inner = place.get(parent)
        if inner is None:
            inner = place[parent] = {}
        if not isinstance(inner, dict):
            problems.append(f"override {key}: {parent} is not a group of settings")
            return
        place = inner
    place[last] = value


def _fill(raw: dict, defaults: Mapping) -> None:
    """Put defaults where `raw` has nothing or null."""
    for key, value in defaults.items():
        if isinstance(value, Mapping):
            if raw.get(key) is None:
                raw[key] = {}
            if isinstance(raw[key], dict):
                _fill(raw[key], value)
        elif raw.get(key) is None:
            raw[key] = value


def _build(kind: type, raw: Any, path: str, problems: list[str]) -> Any:
    """A dataclass from a mapping; problems are collected and the default stands in for a wrong value."""
    if not isinstance(raw, Mapping):
        problems.append(f"{path or 'config'}: expected settings by name, found {raw!r}")
        return kind()
    hints, known = get_type_hints(kind), [f.name for f in fields(kind)]
    valid = ", ".join(known)
    problems += [f"{_join(path, key)}: unknown key; valid: {valid}" for key in raw if key not in known]
    values = {}
    for name in known:
        if name in raw:
            found = len(problems)
            value = _convert(hints[name], raw[name], _join(path, name), problems)
            if len(problems) == found:
                values[name] = value
    return kind(**values)


def _convert(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        fits, converted = _match(option, value, path, problems)
        if fits:
            return converted
    problems.append(f"{path}: expected {_describe(options)}, found {value!r}")
    return value


def _match(option: Any, value: Any, path: str, problems: list[str]) -> tuple[bool, Any]:
    origin = get_origin(option)
    if option is Any:
        return True, value
    if option is type(None):
        return value is None, None
    if origin is Literal:
        return value in get_args(option), value
    if is_dataclass(option) and isinstance(option, type):
        return (True, _build(option, {} if value is None else value, path, problems))
    if origin is list:
        if not isinstance(value, list):
            return False, value
        (inner,) = get_args(option)
        return True, [_convert(inner, item, f"{path}[{i}]", problems) for i, item in enumerate(value)]
    if option is dict or origin is dict:
        return isinstance(value, dict), value
    if option is float:
        return _as_float(value)
    if option in (int, str, bool):
        return isinstance(value, option) and (option is bool or not isinstance(value, bool)), value
    return False, value


def _as_float(value: Any) -> tuple[bool, Any]:
    """YAML reads 1e-3 as text; it is a number."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False, value
    try:
        return True, float(value)
    except ValueError:
        return False, value


def _describe(options: Sequence[Any]) -> str:
    names = []
    for option in options:
        if get_origin(option) is Literal:
            names += [str(choice) for choice in get_args(option)]
        else:
            names.append("null" if option is type(None) else getattr(option, "__name__", str(option)))
    return " or ".join(names)


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)
