"""The run's settings: defaults < method < YAML < command line, checked as a whole before anything runs."""

import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from pm_hf.config.presets import PRESETS, forget_preset, kind_of, preset_defaults
from pm_hf.config.rules import value_problems
from pm_hf.config.schema import RunConfig
from pm_hf.errors import InputError, raise_all
from pm_hf.files import write_text

# what may change when a finished run is continued; the data of finished tasks is compared by its fingerprint
FREE_KEYS = (
    *("output_dir", "data_dir", "max_forgetting", "training.report_to", "training.run_name"),
    *("stream.tasks", "stream.class_groups", "stream.domain_column", "stream.order"),
    "merge.on_zero_curvature",  # finished tasks had a curvature, or are as it was then
)


# what a saved config.yaml without these meant before a kind of stream had defaults: those of TrainingArguments
TRANSFORMERS_TRAINING = {"learning_rate": 5e-5, "num_train_epochs": 3}

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
    changes = {key: parse_value(text) for key, text in parse_overrides(overrides, problems)} | to_plain(values or {})
    forget_preset(raw, changes.get("method"))
    if changes.get("method") in (None, raw.get("method")):
        _as_saved(raw)
    for key, value in changes.items():
        set_key(raw, key, value, problems)
    kind = kind_of(raw)
    method = raw["method"] = raw.get("method") or kind.method
    if not isinstance(method, str) or method not in PRESETS:
        problems.append(f"method: unknown {method!r}; valid: {', '.join(PRESETS)}")
        method = kind.method  # so that the other problems are found too
    _settle_options(raw, problems)
    _fill_training(raw, kind.training)
    if not kind.has_head:
        fill_defaults(raw, {"head": {"kind": "none"}})
    fill_defaults(raw, preset_defaults(method, raw))
    config = from_mapping(RunConfig, raw, "", problems)
    if config.stream.scenario is None:
        config.stream.scenario = "domain_incremental" if config.stream.domain_column else "class_incremental"
    if config.head.kind == "lda" and config.head.means is None:
        config.head.means = "task" if config.stream.scenario == "domain_incremental" else "class"
    config.training = {key: as_number(value) for key, value in config.training.items()}
    raise_all(problems + value_problems(config), name)
    return config


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved settings as YAML."""
    write_text(path, config_text(config))


def config_text(config: RunConfig) -> str:
    """The resolved settings as YAML."""
    return yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)


def _fill_training(raw: dict, defaults: Mapping[str, float | str]) -> None:
    """Put in an alpha of twice the rank; a learning rate, with the head's, a schedule and a batch size; epochs where no
    number of steps is given."""
    lora = raw.get("lora")
    rank = lora.get("r") if isinstance(lora, Mapping) else None
    if isinstance(rank, int):
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
        f"merge.{key} is {merge[key]!r} and merge.options.{key} {options[key]!r}: one setting; leave one out"
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
        if isinstance(raw["training"], dict):
            fill_defaults(raw["training"], TRANSFORMERS_TRAINING)


def _read_source(source: str | Path | Mapping | RunConfig) -> tuple[dict, str]:
    if isinstance(source, RunConfig):
        return source.to_dict(), "config"
    if isinstance(source, Mapping):
        return to_plain(source), "config"
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


def parse_value(text: str) -> Any:
    """A value as YAML reads it."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


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


def from_mapping(kind: type, raw: Any, path: str, problems: list[str]) -> Any:
    """A dataclass from a mapping; problems are collected and the default stands in for a wrong value."""
    if not isinstance(raw, Mapping):
        problems.append(f"{path or 'config'}: expected settings by name, found {raw!r}")
        return kind()
    hints, known = get_type_hints(kind, include_extras=True), [f.name for f in fields(kind)]
    valid = ", ".join(known)
    problems += [f"{_join(path, key)}: unknown key; valid: {valid}" for key in raw if key not in known]
    values = {}
    for name in known:
        if name in raw:
            before = len(problems)
            value = _convert(hints[name], raw[name], _join(path, name), problems)
            if len(problems) == before or is_dataclass(value):  # a group keeps what is right in it
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
    if choices := _choices(option):
        return isinstance(value, str | int) and value in choices, value
    if is_dataclass(option) and isinstance(option, type):
        return (True, from_mapping(option, {} if value is None else value, path, problems))
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


def _choices(option: Any) -> tuple:
    """The values that a Literal, or a text annotated with a tuple of names, may take; none for other types."""
    if get_origin(option) is Literal:
        return get_args(option)
    return option.__metadata__[0] if get_origin(option) is Annotated else ()


def _as_float(value: Any) -> tuple[bool, Any]:
    """YAML reads 1e-3 as text; it is a number."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False, value
    try:
        return True, float(value)
    except ValueError:
        return False, value


def as_number(value: Any) -> Any:
    """Text that is a number, as YAML leaves 1e-3, as the number."""
    return _as_float(value)[1] if isinstance(value, str) else value


def _describe(options: Sequence[Any]) -> str:
    names = []
    for option in options:
        if choices := _choices(option):
            names += [str(choice) for choice in choices]
        else:
            names.append("null" if option is type(None) else getattr(option, "__name__", str(option)))
    return " or ".join(names)


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)
