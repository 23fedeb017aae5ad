"""The run's settings: defaults < method < YAML < command line, checked as a whole before anything runs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from pm_hf.errors import InputError, raise_all
from pm_hf.files import write_text
from pm_hf.perturbation import perturbation_problems
from pm_hf.typed import build, fill, number, pairs, parsed, plain, put


@dataclass
class ModelSettings:
    """The backbone."""

    base: str = ""  # Hub id, folder, or package:NAME/FOLDER for a model inside an installed Python package
    revision: str | None = None  # Hub revision


@dataclass
class Source:
    """Where rows come from and which columns matter; a task's entry overrides the stream's."""

    train: str | None = None  # file of training rows (csv, json, jsonl, .gz too; parquet), relative to data_dir
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
    # new classes in every task, or the same classes in every task; default: by domain_column, else by class
    scenario: Literal["class_incremental", "domain_incremental"] | None = None
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

    method: Literal["pm", "average", "coma", "sequential"] | None = None
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


# exact: every task counts in full here, so that a truncation would look like forgetting
SEQUENTIAL = _method("sequential", 0.0, None, "global", "linear")
SEQUENTIAL["merge"]["max_rank"] = None

# what each method of a stream sets where the YAML is silent; all train from the running merge
METHODS = {
    "sequential": SEQUENTIAL,
    "average": _method("average", 0.0, None, "global", "linear"),
    "coma": _method("coma", 0.0, None, "global", "linear"),
    "merge_only": _method("pm", 0.0, "fisher", "global", "linear"),
    "pm": _method("pm", 0.5, "fisher", "global", "linear"),
    "pm_gram": _method("pm", 0.5, "gram", "free", "linear"),
    "pm_gram_lda": _method("pm", 0.5, "gram", "free", "lda"),
    "best": _method("pm", 0.0, "fisher", "global", "lda"),  # chosen on held-out training rows of CLINC150
    "frozen": _method("sequential", 0.0, None, "global", "lda", trains=False),
}

# TrainingArguments that the learner decides itself
MANAGED = frozenset(
    (
        *("output_dir", "seed", "data_seed", "task_index", "label_names", "remove_unused_columns", "save_only_model"),
        *("perturbation_scale", "perturbation_probabilities", "perturbation_adapter", "resume_from_checkpoint"),
        *("do_train", "do_eval", "do_predict", "push_to_hub", "hub_token", "hub_model_id", "hub_strategy"),
        *("hub_private_repo", "hub_always_push", "hub_revision"),
    )
)


def load_config(
    source: str | Path | Mapping | RunConfig, overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None
) -> RunConfig:
    """Read YAML (or a mapping), apply overrides, fill in the method's settings, check everything.

    overrides: `key=value`, `--key value` and `--flag` as typed on a command line; values: {dotted key: value}.
    Raises one InputError that lists every unknown key, wrong type and impossible value.
    """
    raw, name = _read(source)
    problems: list[str] = []
    changes = {key: parsed(text) for key, text in pairs(overrides, problems)} | plain(values or {})
    _forget_method(raw, changes.get("method"))
    for key, value in changes.items():
        put(raw, key, value, problems)
    method = raw.get("method", RunConfig.method)
    if not isinstance(method, str) or method not in METHODS:
        problems.append(f"method: unknown {method!r}; valid: {', '.join(METHODS)}")
        method = RunConfig.method  # so that the other problems are found too
    fill(raw, METHODS[method])
    config = build(RunConfig, raw, "", problems)
    if config.stream.scenario is None:
        config.stream.scenario = "domain_incremental" if config.stream.domain_column else "class_incremental"
    config.training = {key: number(value) for key, value in config.training.items()}
    raise_all(problems + value_problems(config), name)
    return config


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved settings as YAML."""
    write_text(path, config_text(config))


def config_text(config: RunConfig) -> str:
    """The resolved settings as YAML."""
    return yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)


def value_problems(config: RunConfig) -> list[str]:
    """Values that have the right type and still make no sense."""
    stream, problems = config.stream, []
    checks = [
        (bool(config.output_dir), "output_dir: required"),
        (bool(config.model.base), "model.base: required, a Hub id, a folder or package:NAME/FOLDER"),
        (config.curvature.samples is None or config.curvature.samples >= 1, "curvature.samples: must be at least 1"),
        (0 <= config.curvature.shrinkage < 1, "curvature.shrinkage: must be in [0, 1)"),
        (config.merge.max_rank is None or config.merge.max_rank >= 1, "merge.max_rank: must be at least 1"),
        (config.seed >= 0, "seed: must be at least 0"),
        (config.lora.r >= 1, "lora.r: must be at least 1"),
        (config.lora.alpha >= 1, "lora.alpha: must be at least 1"),
        (0 <= config.lora.dropout < 1, "lora.dropout: must be in [0, 1)"),
        (stream.max_length >= 1, "stream.max_length: must be at least 1"),
        (_within(config.merge.coefficient, 0, 1), "merge.coefficient: must be in [0, 1]"),
        (_within(config.max_forgetting, -1, 1), "max_forgetting: must be in [-1, 1]"),
        (stream.train_per_class is None or stream.train_per_class >= 1, "stream.train_per_class: must be at least 1"),
        (config.head.ridge > 0, "head.ridge: must be positive"),
        (not config.head.strict or config.head.kind == "lda", "head.strict: belongs to head.kind: lda"),
        (config.trains or config.head.kind == "lda", "trains: false needs head.kind: lda"),
    ]
    problems += [message for fine, message in checks if not fine]
    scale = config.perturbation.scale
    problems += perturbation_problems(0.0 if scale is None else scale, config.perturbation.probabilities)
    splits = [n for n in ("tasks", "class_groups", "domain_column") if getattr(stream, n) is not None]
    if len(splits) != 1:
        found = ", ".join(splits) or "none"
        problems.append(f"stream: exactly one of tasks, class_groups and domain_column is needed, found {found}")
    if stream.domain_column is not None and stream.scenario == "class_incremental":
        problems.append("stream.scenario: domain_column makes a domain_incremental stream")
    if stream.class_groups is not None and stream.scenario == "domain_incremental":
        problems.append("stream.scenario: class_groups makes a class_incremental stream")
    if config.merge.method == "pm" and config.merge.coefficient is None and config.curvature.kind is None:
        problems.append("curvature.kind: method pm needs fisher or gram, or merge.coefficient")
    if config.merge.freedom in ("module", "free"):
        if config.merge.coefficient is not None:
            problems.append(f"merge.coefficient: freedom {config.merge.freedom} has no single coefficient")
        if config.merge.method not in (None, "pm"):
            problems.append(f"merge.freedom: {config.merge.freedom} belongs to merge.method pm")
    managed = sorted(MANAGED & set(config.training))
    if _uses_evaluation(config.training):
        problems.append(
            "training: eval_strategy and load_best_model_at_end need an eval data set, which a task has not"
        )
    if managed:
        problems.append(f"training: {', '.join(managed)} are decided by pm_hf, which never uploads; remove them")
    return problems


def _forget_method(raw: dict, method: Any) -> None:
    """Another method is asked for: settings that equal the old method's defaults are the new method's to decide."""
    before = raw.get("method", RunConfig.method)
    old = METHODS.get(before) if isinstance(before, str) else None
    if old is None or method is None or method == before:
        return
    for group, defaults in old.items():
        if not isinstance(defaults, dict):
            raw.pop(group, None)
        elif isinstance(raw.get(group), dict):
            raw[group] = {k: v for k, v in raw[group].items() if k not in defaults or v != defaults[k]}


def _uses_evaluation(training: Mapping) -> bool:
    return training.get("eval_strategy", "no") not in ("no", False) or bool(training.get("load_best_model_at_end"))


def _within(value: float | None, low: float, high: float) -> bool:
    return value is None or low <= value <= high


def _read(source: str | Path | Mapping | RunConfig) -> tuple[dict, str]:
    if isinstance(source, RunConfig):
        return source.to_dict(), "config"
    if isinstance(source, Mapping):
        return plain(source), "config"
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
