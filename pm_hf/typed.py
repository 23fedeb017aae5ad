"""Plain nested settings to typed dataclasses: overrides, types, and every problem by its dotted name."""

import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

NULLS = ("max_rank",)  # keys whose null is a value: no limit


def plain(value: Any) -> Any:
    """A copy in YAML's types, mappings in their order."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def pairs(arguments: Sequence[str], problems: list[str]) -> list[tuple[str, str]]:
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


def parsed(text: str) -> Any:
    """A value as YAML reads it."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def put(raw: dict, key: str, value: Any, problems: list[str]) -> None:
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


def fill(raw: dict, defaults: Mapping) -> None:
    """Put defaults where `raw` has nothing, or null that stands for nothing."""
    for key, value in defaults.items():
        if isinstance(value, Mapping):
            if raw.get(key) is None:
                raw[key] = {}
            if isinstance(raw[key], dict):
                fill(raw[key], value)
        elif key not in raw or (raw[key] is None and key not in NULLS):
            raw[key] = value


def build(kind: type, raw: Any, path: str, problems: list[str]) -> Any:
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
            if len(problems) == found or is_dataclass(value):  # a group keeps what is right in it
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
        return (True, build(option, {} if value is None else value, path, problems))
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


def number(value: Any) -> Any:
    """Text that is a number, as YAML leaves 1e-3, as the number."""
    return _as_float(value)[1] if isinstance(value, str) else value


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
