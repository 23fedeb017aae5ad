"""Settings from a mapping: each value in its field's type, or a problem that names it and what was expected."""

import enum
import math
import reprlib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pm_hf.files import path_problem

LARGEST, LARGEST_FLOAT = 10**18, 1e30  # magnitude of an int, of a float; both are float32 numbers
PATH = "path"  # Annotated[str, PATH]: a file, a folder, or a Hub id in their place


class _Brief(reprlib.Repr):
    """repr of at most some hundred characters, whatever the size of the value."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 80, 80

    def repr_int(self, x: int, level: int) -> str:
        """Long integers, which Python refuses to write, by their size."""
        return repr(x) if x.bit_length() <= 128 else f"an integer of {x.bit_length()} bits"


brief = _Brief().repr


def from_mapping(kind: type, raw: Any, path: str, problems: list[str]) -> Any:
    """A dataclass from a mapping; problems are collected and the default stands in for a wrong value."""
    if not isinstance(raw, Mapping):
        problems.append(f"{path or 'config'}: expected settings by name, found {brief(raw)}")
        return kind()
    hints, known = get_type_hints(kind, include_extras=True), [f.name for f in fields(kind)]
    valid = ", ".join(known)
    problems += [f"{join(path, key)}: unknown key; valid: {valid}" for key in raw if key not in known]
    values = {}
    for name in known:
        if name in raw:
            before = len(problems)
            value = convert(hints[name], raw[name], join(path, name), problems)
            groups = value if isinstance(value, list) and value else [value]
            if len(problems) == before or all(map(is_dataclass, groups)):  # groups keep what is right in them
                values[name] = value
    return kind(**values)


def convert(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
    """The value in the type of a field's annotation; what does not fit is added to the problems.

    A value of one of the types stays as it is. Otherwise text that is a number (YAML reads 1e-3 as text) is the number,
    and a whole number is an int, however it is written. Numbers are finite; no text holds what no file could.
    """
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if fault := _fault(value):
        problems.append(f"{path}: {fault}")
        return value
    for match in (_match, _match_number):
        for option in options:
            fits, converted = match(option, value, path, problems)
            if fits:
                if fault := _fault(converted):
                    problems.append(f"{path}: {fault}")
                return converted
    problems.append(f"{path}: expected {_describe(options)}, found {brief(value)}{_spelling(options, value)}")
    return value


def _match(option: Any, value: Any, path: str, problems: list[str]) -> tuple[bool, Any]:
    """(whether the value is of this type, the value)."""
    origin = get_origin(option)
    if option is Any:
        problems += nested_faults(value, path)
        return True, value
    if option is type(None):
        return value is None, None
    if origin is Annotated and option.__metadata__[0] == PATH:
        if isinstance(value, str) and (fault := path_problem(value)):
            problems.append(f"{path}: {fault}")
        return isinstance(value, str), value
    if choices := _choices(option):
        return isinstance(value, str | int) and value in choices, value
    if is_dataclass(option) and isinstance(option, type):
        return (True, from_mapping(option, {} if value is None else value, path, problems))
    if origin is list:
        if not isinstance(value, list):
            return False, value
        (inner,) = get_args(option)
        return True, [convert(inner, item, f"{path}[{i}]", problems) for i, item in enumerate(value)]
    if option is dict or origin is dict:
        if isinstance(value, dict):
            problems += nested_faults(value, path, names=origin is dict)
        return isinstance(value, dict), value
    if option is float and isinstance(value, int) and not isinstance(value, bool):
        return True, float(value)
    if option in (int, float, str, bool):
        return isinstance(value, option) and (option is bool or not isinstance(value, bool)), value
    return False, value


def _match_number(option: Any, value: Any, *_: Any) -> tuple[bool, Any]:
    """(whether the value is a number of this type in another spelling, the number)."""
    if option not in (int, float) or isinstance(value, bool) or not isinstance(value, float | str):
        return False, value
    try:
        number = float(value)
    except ValueError:
        return False, value
    if option is float:
        return True, number
    if not number.is_integer():  # so is one that is not finite
        return False, value
    try:
        return True, int(value)  # exact, where the text is an integer
    except ValueError:
        return True, int(number)


def nested_faults(value: Any, path: str, *, names: bool = True) -> Iterator[str]:
    """What is wrong inside a mapping or list of any values. names: whether the keys of mappings must be text."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if names and not isinstance(key, str):
                yield f"{path}: expected names as keys, found {brief(key)}"
            yield from nested_faults(item, join(path, key), names=names)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from nested_faults(item, f"{path}[{index}]", names=names)
    elif fault := _fault(value):
        yield f"{path}: {fault}"


def as_number(value: Any) -> Any:
    """Text that is a number, as YAML leaves 1e-3, as the number."""
    return _match_number(float, value)[1] if isinstance(value, str) else value


def join(path: str, key: object) -> str:
    """Dotted name of a setting; a key that could not be printed as it is is quoted."""
    name = key if isinstance(key, str) and key.isprintable() and 0 < len(key) <= 80 else brief(key)
    return f"{path}.{name}" if path else name


def _fault(value: Any) -> str | None:
    """Why no setting can have this number or text."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"expected a finite number, found {value}"
    if isinstance(value, int | float) and abs(value) > (limit := LARGEST if isinstance(value, int) else LARGEST_FLOAT):
        return f"expected a number of at most {limit:.0e} in magnitude, found {brief(value)}"
    if isinstance(value, str) and ("\0" in value or any("\ud800" <= character <= "\udfff" for character in value)):
        return f"expected text, found {brief(value)} with a character that no file holds"
    return None


def _choices(option: Any) -> tuple:
    """The values that an enum, a Literal, or a text annotated with a tuple of names may take; none for other types."""
    if get_origin(option) is Literal:
        return get_args(option)
    if isinstance(option, type) and issubclass(option, enum.Enum):
        return tuple(member.value for member in option)
    return option.__metadata__[0] if get_origin(option) is Annotated else ()


def _describe(options: Sequence[Any]) -> str:
    names = []
    for option in options:
        if get_origin(option) is Annotated and option.__metadata__[0] == PATH:
            names.append("str")
        elif choices := _choices(option):
            names += [str(choice) for choice in choices]
        else:
            names.append("null" if option is type(None) else getattr(option, "__name__", str(option)))
    return " or ".join(names)


def _spelling(options: Sequence[Any], value: Any) -> str:
    """What to do where YAML read another type than was meant."""
    if isinstance(value, bool) and any("no" in _choices(option) for option in options):
        return '; YAML reads no as false: write "no"'
    wants_text = any(option is str for option in options)
    return "; put it into quotes" if wants_text and isinstance(value, int | float) else ""
