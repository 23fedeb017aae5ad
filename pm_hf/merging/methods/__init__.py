"""The merging methods: one table of rows, each of which stands beside its kernel in a file of its family."""

from collections.abc import Mapping
from typing import Any

from pm_hf.errors import InputError, raise_all
from pm_hf.merging.methods.adamerging import ADAMERGING, ADAMERGING_TRIMMED, ADARANK
from pm_hf.merging.methods.base import Method
from pm_hf.merging.methods.curvature_weighted import COFIMA, LOT
from pm_hf.merging.methods.doge import DOGE
from pm_hf.merging.methods.linear import AVERAGE, COMA, PM, SEQUENTIAL, TASK_ARITHMETIC
from pm_hf.merging.methods.lore import LORE
from pm_hf.merging.methods.magmax import MAGMAX
from pm_hf.merging.methods.opcm import OPCM
from pm_hf.merging.methods.slao import SLAO
from pm_hf.merging.methods.ties import DARE, DARE_TIES, TIES

_ROWS = (
    PM,
    AVERAGE,
    SEQUENTIAL,
    COMA,
    COFIMA,
    TASK_ARITHMETIC,
    TIES,
    DARE,
    DARE_TIES,
    MAGMAX,
    OPCM,
    LOT,
    LORE,
    DOGE,
    SLAO,
    ADAMERGING,
    ADAMERGING_TRIMMED,
    ADARANK,
)
METHODS: dict[str, Method] = {method.name: method for method in _ROWS}


def get_method(name: str) -> Method:
    """The method, or an InputError that lists the valid names."""
    if name not in METHODS:
        raise InputError(f"unknown merging method {name!r}; valid: {', '.join(METHODS)}")
    return METHODS[name]


def read_options(method_name: str, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """All options of a method: those given, converted to their type ("0.2" → 0.2), defaults for the others.

    One InputError lists every unknown key and every value that is out of range.
    """
    options = get_method(method_name).options
    values: dict[str, Any] = {key: option.default for key, option in options.items()}
    problems = []
    for key, value in (given or {}).items():
        if key not in options:
            problems.append(f"unknown option {key!r}; valid: {', '.join(options) or 'none'}")
            continue
        try:
            values[key] = options[key].read(value)
        except ValueError as error:
            problems.append(f"option {key} must fit {options[key].about!r}: {error}, found {value!r}")
    raise_all(problems, f"method {method_name}")
    return values
