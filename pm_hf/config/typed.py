"""Settings as typed fields that describe themselves, and mappings read as them.

A field says its meaning, unit and range in `setting`; pydantic reads and checks it and makes the JSON Schema. A value
of the field's type stays as it is; text that is a number (YAML reads 1e-3 as text) is the number, and a whole number is
an int, however it is written. Numbers are finite; no text holds what no file could. Nothing else is converted.
"""

import math
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property, reduce
from operator import getitem
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ConfigDict, GetCoreSchemaHandler, Strict, TypeAdapter
from pydantic import ValidationError as RefusedError
from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core.core_schema import literal_schema

from pm_hf.files import path_problem

LARGEST, LARGEST_FLOAT = 10**18, 1e30  # magnitude of an int, of a float; both are float32 numbers
MODEL = ConfigDict(extra="forbid")  # of every group of settings
LIMITS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
BOUNDS = tuple(LIMITS.values())
TYPES = {"integer": "int", "number": "float", "string": "str", "boolean": "bool", "array": "list"}
TYPES |= {"object": "dict", "null": "null"}  # JSON Schema's names, and what they are called in a message
OUT_OF_RANGE = ("greater_than_equal", "greater_than", "less_than_equal", "less_than")  # pydantic's errors of numbers


class _Brief(reprlib.Repr):
    """repr of at most some hundred characters, whatever the size of the value."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 80, 80

    def repr_int(self, x: int, level: int) -> str:
        """Long integers, which Python refuses to write, by their size."""
        return repr(x) if x.bit_length() <= 128 else f"an integer of {x.bit_length()} bits"


brief = _Brief().repr


def setting(default: Any, about: str, unit: str | None = None, **limits: float) -> Any:
    """A field of a group of settings. default: its value, or what makes it; about: its meaning; limits: ge, gt, le, lt
    of a number."""
    made = {"default_factory": default} if callable(default) else {"default": default}
    extra = None if unit is None else {"unit": unit}
    return field(**made, metadata={"description": about, "json_schema_extra": extra, **limits})


# ---- the types of fields


def as_number(value: Any) -> Any:
    """Text that is a number, as YAML leaves 1e-3, as the number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def nested_faults(value: Any, place: str = "", *, names: bool = True) -> Iterator[tuple[str, str]]:
    """(place, what is wrong there) inside a mapping or list of any values. names: whether keys must be text."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if names and not isinstance(key, str):
                yield place, f"expected names as keys, found {brief(key)}"
            yield from nested_faults(item, f"{place}.{_shown(key)}", names=names)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from nested_faults(item, f"{place}[{index}]", names=names)
    elif fault := _fault(value):
        yield place, fault


def _fault(value: Any) -> str | None:
    """Why no setting can have this number or text."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"expected a finite number, found {value}"
    if isinstance(value, int | float) and abs(value) > (limit := LARGEST if isinstance(value, int) else LARGEST_FLOAT):
        return f"expected a number of at most {limit:.0e} in magnitude, found {brief(value)}"
    if isinstance(value, str) and ("\0" in value or any("\ud800" <= character <= "\udfff" for character in value)):
        return f"expected text, found {brief(value)} with a character that no file holds"
    return None


def _whole(value: Any) -> Any:
    number = as_number(value)
    if not isinstance(number, float) or not number.is_integer():
        return value
    try:
        return int(value)  # exact, where the text is an integer
    except ValueError:
        return int(number)


def _possible(value: Any) -> Any:
    return _without(nested_faults(value), value)


def _path(value: Any) -> Any:
    fault = _fault(value) or (path_problem(value) if isinstance(value, str) else None)
    return _without([("", fault)] if fault else [], value)


def _without(faults: Any, value: Any) -> Any:
    if told := list(faults):
        raise PydanticCustomError("faults", "{faults}", {"faults": told})
    return value


_POSSIBLE = BeforeValidator(_possible)
Whole = Annotated[int, Strict(), _POSSIBLE, BeforeValidator(_whole)]
Number = Annotated[float, Strict(), _POSSIBLE, BeforeValidator(as_number)]
Text = Annotated[str, Strict(), _POSSIBLE]
FilePath = Annotated[str, Strict(), BeforeValidator(_path)]  # a text that can name a file; ~ is the home folder
Flag = Annotated[bool, Strict(), _POSSIBLE]
Named = Annotated[dict[str, Any], _POSSIBLE]  # any values by name
Keyed = Annotated[dict, BeforeValidator(lambda value: _without(nested_faults(value, names=False), value))]
Anything = Annotated[Any, AfterValidator(lambda value: _without(nested_faults(value, names=False), value))]


@dataclass(frozen=True)
class Choices:
    """Annotated[str, Choices(names)]: one of names that stand elsewhere."""

    names: tuple[str, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Pydantic's own entry point."""
        return literal_schema(list(self.names))


# ---- mappings


class Settings:
    """A dataclass or TypedDict of settings: reads mappings as it, and describes itself. name: what leads its keys."""

    def __init__(self, kind: Any, name: str = "") -> None:
        self.adapter: TypeAdapter[Any] = TypeAdapter(kind)
        self.name = name

    @cached_property
    def json(self) -> dict[str, Any]:
        """JSON Schema, with a `unit` where a field has one."""
        return _tidy(self.adapter.json_schema())

    def read(self, raw: Any, problems: list[str]) -> Any:
        """A mapping as this type. Problems are collected, each led by its setting; what is wrong is left out."""
        kept = self._known(self.json, raw, self.name, problems)
        while True:
            try:
                return self.adapter.validate_python(kept)
            except RefusedError as refused:
                errors = refused.errors(include_url=False, include_input=False)
            told: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
            for error in errors:
                place = self._setting(error["loc"])
                told.setdefault(place, []).append({**error, "loc": error["loc"][len(place) :]})
            for place in told:
                group = reduce(getitem, place[:-1], kept)
                name, node = reduce(join, place, self.name), reduce(self._inner, place, self.json)
                problems += _explain(name, node, group.pop(place[-1]), told[place])

    def walk(self, node: Mapping | None = None, path: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
        """(dotted name, JSON Schema) of every setting and group, in order; those of lists of groups left out."""
        node, path = self.json if node is None else node, self.name if path is None else path
        for key in node.get("properties", {}):
            inner = self._inner(node, key)
            yield join(path, key), inner
            yield from self.walk(inner, join(path, key))

    def meant(self, name: str, keys: Iterable[str]) -> list[str]:
        """The settings that a dotted name may stand for that is none. keys: those of its group."""
        group, _, last = name.rpartition(".")
        near = [key for key in keys if f"_{last}_" in f"_{key}_" or last == "".join(w[:1] for w in key.split("_"))][:2]
        near += get_close_matches(last, keys, n=2, cutoff=0.7)
        elsewhere = [setting for setting, _ in self.walk() if setting.rpartition(".")[0] != group]
        far = [] if near else get_close_matches(name, elsewhere, n=2, cutoff=0.75)
        return far or [join(group, key) for key in dict.fromkeys(near or filter(last.startswith, keys))]

    def _known(self, node: Mapping, raw: Any, path: str, problems: list[str]) -> Any:
        """A copy of groups without keys that are no settings."""
        if isinstance(raw, list):
            items = self._inner(node, 0)
            return [self._known(items, item, join(path, index), problems) for index, item in enumerate(raw)]
        if "properties" not in node:
            return raw
        if raw is not None and not isinstance(raw, Mapping):
            problems.append(f"{path or 'config'}: expected settings by name, found {brief(raw)}")
        known, kept = node["properties"], {}
        for key, value in raw.items() if isinstance(raw, Mapping) else ():
            name = join(path, key if isinstance(key, str) else brief(key))
            if key in known:
                kept[key] = self._known(self._inner(node, key), value, name, problems)
            else:
                meant = f", did you mean {' or '.join(near)}?" if (near := self.meant(name, known)) else ""
                problems.append(f"{name}: unknown key{meant}; valid: {', '.join(known)}")
        return kept

    def _inner(self, node: Mapping, part: Any) -> dict[str, Any]:
        """JSON Schema of a group's setting by its name, or of a list's items by an index; {} where there is none."""
        if isinstance(part, int):
            inner: dict[str, Any] = next((option["items"] for option in options(node) if "items" in option), {})
        else:
            inner = node.get("properties", {}).get(part, {})
        return self.json["$defs"][inner["$ref"].rpartition("/")[2]] | inner if "$ref" in inner else inner

    def _setting(self, location: tuple[Any, ...]) -> tuple[Any, ...]:
        """The part of a place that leads to a setting: pydantic goes on with members of unions and items of lists."""
        node = self.json
        for length, part in enumerate(location, 1):
            node = self._inner(node, part)
            if "properties" not in node and "properties" not in self._inner(node, 0):
                return location[:length]
        return location


def join(path: str, key: str | int) -> str:
    """Dotted name of a setting, or of a list's item by its index; a key that could not be printed is quoted."""
    if isinstance(key, int):
        return f"{path}[{key}]"
    return f"{path}.{_shown(key)}" if path else _shown(key)


def options(node: Mapping) -> list[dict[str, Any]]:
    """JSON Schema of each of the types that a setting may have."""
    return node.get("anyOf", [node])


def choices(node: Mapping) -> list[str]:
    """The values that a setting may have, where they are a few."""
    return [str(value) for option in options(node) for value in option.get("enum", [option.get("const")]) if value]


def type_words(node: Mapping) -> str:
    """`int or null`: what a setting may be, choices by their values."""
    words = [choices(option) or [TYPES.get(option.get("type", ""), "any")] for option in options(node)]
    return " or ".join(word for few in words for word in few)


def range_words(node: Mapping) -> str:
    """`in [0, 1)` or `at least 1`: what a setting's number must be; empty where it may be any."""
    limits = {key: value for option in (node, *options(node)) for key, value in option.items() if key in BOUNDS}
    low, high = (next((_plain(limits[key]) for key in pair if key in limits), "") for pair in (BOUNDS[:2], BOUNDS[2:]))
    opens, closes = "(" if "exclusiveMinimum" in limits else "[", ")" if "exclusiveMaximum" in limits else "]"
    if low and high:
        return f"in {opens}{low}, {high}{closes}"
    if low:
        return f"at least {low}" if "minimum" in limits else "positive" if low == "0" else f"above {low}"
    return high and f"{'at most' if 'maximum' in limits else 'below'} {high}"


def _explain(name: str, node: Mapping, value: Any, told: list[dict[str, Any]]) -> list[str]:
    """What is wrong with a setting's value, from pydantic's errors of it."""
    faults = [fault for error in told if error["type"] == "faults" for fault in error["ctx"]["faults"]]
    if faults:
        return [f"{name}{place}: {fault}" for place, fault in dict.fromkeys(faults)]
    if any(error["type"] in OUT_OF_RANGE for error in told):
        return [f"{name}: must be {' or '.join([*choices(node), range_words(node)])}, found {brief(value)}"]
    lists = [option["items"] for option in options(node) if "items" in option]
    index = next((part for error in told for part in error["loc"] if isinstance(part, int)), None)
    if lists and index is not None:
        name, node, value = join(name, index), lists[0], value[index]
    return [f"{name}: expected {type_words(node)}, found {brief(value)}{_spelling(node, value)}"]


def _spelling(node: Mapping, value: Any) -> str:
    """What to do where YAML read another type than was meant."""
    if isinstance(value, bool) and "no" in choices(node):
        return '; YAML reads no as false: write "no"'
    wants_text = any(option.get("type") == "string" and not choices(option) for option in options(node))
    return "; put it into quotes" if wants_text and isinstance(value, int | float) else ""


def _plain(number: float) -> str:
    return f"{number:g}" if float(f"{number:g}") == number else str(number)


def _shown(key: object) -> str:
    return key if isinstance(key, str) and key.isprintable() and 0 < len(key) <= 80 else brief(key)


def _tidy(node: Any) -> Any:
    """JSON Schema without titles that repeat names, and with limits under their names there."""
    if isinstance(node, list):
        return [_tidy(item) for item in node]
    if not isinstance(node, dict):
        return node
    titled = isinstance(node.get("title"), str)
    return {LIMITS.get(key, key): _tidy(item) for key, item in node.items() if not (titled and key == "title")}
