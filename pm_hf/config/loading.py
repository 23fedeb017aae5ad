"""The run's settings: defaults < method < YAML < command line, checked as a whole before anything runs."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from pm_hf.config.presets import PRESETS, forget_preset, kind_of, preset_defaults
from pm_hf.config.rules import value_problems
from pm_hf.config.schema import RunConfig, StreamSettings
from pm_hf.config.training import training_values
from pm_hf.config.typed import Settings, as_number, brief
from pm_hf.config.yaml_text import parse_value, read_yaml
from pm_hf.errors import InputError, raise_all
from pm_hf.files import write_text

# what may change when a finished run is continued; the data of finished tasks is compared by its fingerprint
FREE_KEYS = (
    *("output_dir", "data_dir", "max_forgetting", "training.report_to", "training.run_name"),
    *(f"stream.{split}" for split in StreamSettings.SPLITS),
    "stream.order",
    "merge.on_zero_curvature",  # finished tasks had a curvature, or are as it was then
)


# what a saved config.yaml without these meant before a kind of stream had defaults: those of TrainingArguments
TRANSFORMERS_TRAINING = {"learning_rate": 5e-5, "num_train_epochs": 3}

RSLORA_ALPHA = 6  # alpha of every rank where the scaling is alpha/√r: about that of 2·r over r at rank 8

NEXT_LINE = "\x85"  # the one character that PyYAML writes as it is and reads as a blank

# keys of `merge` that are options of its method too
KEYS_AND_OPTIONS = ("on_zero_curvature", "coefficient")


def load_config(
    source: str | Path | Mapping | RunConfig, overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None
) -> RunConfig:
    """Read YAML (or a mapping), apply overrides, fill in the method's settings, check everything.

    overrides: `key=value`, `--key value` and `--flag` as typed on a command line; values: {dotted key: value}.
    Raises one InputError that lists every unknown key, wrong type and impossible value.
    """
    raw, name = _read_source(source)
    problems: list[str] = []
    changes = _parse_values(parse_overrides(overrides, problems), problems) | _plain(values or {}, "overrides")
    forget_preset(raw, changes.get("method"))
    if changes.get("method") in (None, raw.get("method")):
        _as_saved(raw)
    for key, value in changes.items():
        set_key(raw, key, value, problems)
    kind = kind_of(raw)
    method = raw["method"] = kind.method if raw.get("method") in (None, "") else raw["method"]
    if not isinstance(method, str) or method not in PRESETS:
        problems.append(f"method: unknown {brief(method)}; valid: {', '.join(PRESETS)}")
        method = kind.method  # so that the other problems are found too
    _settle_options(raw, problems)
    _fill_training(raw, kind.training)
    fill_defaults(raw, preset_defaults(method, raw))
    if isinstance(raw.get("training"), dict):
        raw["training"] = training_values(raw["training"], problems)
    config = run_settings().read(raw, problems)
    if config.stream.scenario is None:
        config.stream.scenario = (
            "domain_incremental" if config.stream.domain_column is not None else "class_incremental"
        )
    if config.head.kind == "lda" and config.head.means is None:
        alike = config.kind.has_head and config.stream.scenario == "class_incremental"  # a label is one class
        config.head.means = "class" if alike else "task"
    groups = {key for key, value in config.to_dict().items() if isinstance(value, dict)}
    told = {problem.partition(":")[0] for problem in problems} - groups  # there a default stands in for a wrong value
    problems += [problem for problem in value_problems(config) if problem.partition(":")[0] not in told]
    raise_all(problems, name)
    return config


@cache
def run_settings() -> Settings:
    """All settings of a run."""
    return Settings(RunConfig)


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved settings as YAML."""
    write_text(path, config_text(config))


def config_text(config: RunConfig) -> str:
    """The resolved settings as YAML."""
    settings = config.to_dict()
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    return yaml.safe_dump(settings, sort_keys=False) if NEXT_LINE in text else text


def _fill_training(raw: dict, defaults: Mapping[str, float | str]) -> None:
    """Put in an alpha of twice the rank, with use_rslora RSLORA_ALPHA; a learning rate, with the head's, a schedule and
    a batch size; epochs where no number of steps is given."""
    lora = raw["lora"] if isinstance(raw.get("lora"), Mapping) else {}
    rank = as_number(lora.get("r"))
    if lora.get("use_rslora") is True:
        fill_defaults(raw, {"lora": {"alpha": RSLORA_ALPHA}})
    elif isinstance(rank, int | float) and not isinstance(rank, bool) and rank > 0:
        fill_defaults(raw, {"lora": {"alpha": 2 * rank}})
    training = {} if raw.get("training") is None else raw["training"]
    if not isinstance(training, Mapping):
        return
    given = {key for key, value in training.items() if value is not None}
    decided = set(defaults) - {"num_train_epochs"} if "learning_rate" in given else set()
    decided |= {"num_train_epochs"} if "max_steps" in given else set()
    fill_defaults(raw, {"training": {key: value for key, value in defaults.items() if key not in decided}})


def _merge_and_options(raw: Mapping) -> tuple[dict, dict]:
    """(the settings of the merge, its method's options), each {} where it is no mapping."""
    merge: dict = raw["merge"] if isinstance(raw.get("merge"), dict) else {}
    return merge, merge["options"] if isinstance(merge.get("options"), dict) else {}


def _contradicted(merge: Mapping, options: Mapping) -> list[str]:
    """Options of the merging method whose own key in `merge` has another value."""
    both = [key for key in KEYS_AND_OPTIONS if merge.get(key) is not None and options.get(key) is not None]
    return [key for key in both if as_number(merge[key]) != as_number(options[key])]


def _settle_options(raw: dict, problems: list[str]) -> None:
    """An option of the merging method that has a key of its own too is one setting: two answers are a problem."""
    merge, options = _merge_and_options(raw)
    problems += [
        f"merge.{key} is {brief(merge[key])} and merge.options.{key} {brief(options[key])}: one setting; leave one out"
        for key in _contradicted(merge, options)
    ]
    if merge.get("on_zero_curvature") is None and "on_zero_curvature" in options:
        merge["on_zero_curvature"] = options["on_zero_curvature"]


def _as_saved(raw: dict) -> None:
    """A run's own config.yaml, which has every setting, of before there were some: they mean what was done then."""
    head = raw.get("head")
    if isinstance(head, dict) and {"drift", "ridge", "strict"} <= head.keys() and "training" not in head:
        head |= {"training": "task"} | ({"means": "class"} if head.get("kind") == "lda" else {})
    if {setting.name for setting in fields(RunConfig)} - {"stream"} <= raw.keys():
        merge, options = _merge_and_options(raw)
        for key in _contradicted(merge, options):
            del options[key]  # it had no effect then
        training = raw["training"]
        if isinstance(training, dict):
            by_steps = training.get("max_steps") is not None  # no epochs are filled in beside it
            meant = {key: value for key, value in TRANSFORMERS_TRAINING.items() if not (by_steps and "epochs" in key)}
            fill_defaults(training, meant)


def _read_source(source: str | Path | Mapping | RunConfig) -> tuple[dict, str]:
    if isinstance(source, RunConfig | Mapping):
        return _plain(source, "config"), "config"
    path = Path(source)
    if not path.is_file():
        raise InputError(f"config {path} does not exist")
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise InputError(f"config {path}: expected a mapping of settings, found {type(raw).__name__}")
    return to_plain(raw), f"config {path}"


def _plain(source: Mapping | RunConfig, what: str) -> dict:
    """A mapping's copy in YAML's types; InputError where it has no end."""
    try:
        return to_plain(source.to_dict() if isinstance(source, RunConfig) else source)
    except RecursionError as error:
        raise InputError(f"{what}: a value contains itself, or is nested too deeply") from error


def _parse_values(pairs: Sequence[tuple[str, str]], problems: list[str]) -> dict[str, Any]:
    """{key: the value of its text}; of a key that is given twice the last counts, as on any command line."""
    values = {}
    for key, text in pairs:
        try:
            values[key] = parse_value(text)
        except InputError as error:
            problems.append(f"override {key}: {error}")
    return values


def differing_keys(finished: Mapping, now: Mapping, path: str = "") -> list[str]:
    """Settings that contradict those of the finished part of a run."""
    differing = []
    for key in [*finished, *(key for key in now if key not in finished)]:
        name, old, new = f"{path}{key}", finished.get(key), now.get(key)
        if name in FREE_KEYS or old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            differing += differing_keys(old, new, name + ".")
        else:
            differing.append(f"{name}: {old!r} in the finished run, {new!r} now")
    return differing


NULL_IS_A_VALUE = ("max_rank",)  # keys whose null is a value: no limit


def to_plain(value: Any) -> Any:
    """A copy in YAML's types, mappings in their order."""
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def parse_overrides(arguments: Sequence[str], problems: list[str]) -> list[tuple[str, str]]:
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
        if argument.startswith("--"):
            key = key.replace("-", "_")
        if equals:
            pairs.append((key, value))
        elif argument.startswith("--"):
            waiting = key
        else:
            problems.append(f"override {argument!r}: expected key=value or --key value")
    return [*pairs, (waiting, "true")] if waiting is not None else pairs


def set_key(raw: dict, key: str, value: Any, problems: list[str]) -> None:
    """Set a dotted key of nested settings; a problem is added where the path runs through a value."""
    *parents, last = key.split(".")
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


def fill_defaults(raw: dict, defaults: Mapping) -> None:
    """Put defaults where `raw` has nothing, or null that stands for nothing."""
    for key, value in defaults.items():
        if isinstance(value, Mapping):
            if raw.get(key) is None:
                raw[key] = {}
            if isinstance(raw[key], dict):
                fill_defaults(raw[key], value)
        elif key not in raw or (raw[key] is None and key not in NULL_IS_A_VALUE):
            raw[key] = value
