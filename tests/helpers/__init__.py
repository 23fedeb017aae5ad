"""What tests share: tiny models, streams, adapters, references."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pm_hf.errors import InputError


def with_changes(config: dict, changes: dict) -> dict:
    """A copy of nested settings with the changes, whose keys have __ for the dot."""
    made = copy.deepcopy(config)
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = made
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return made


def changed(content: Any, place: Sequence, value: Any) -> Any:
    """A copy of JSON content with another value at the place, which is keys and indices; ... removes it."""
    made = copy.deepcopy(content)
    *parents, last = place
    inner = made
    for key in parents:
        inner = inner[key]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return made


def edited_json(file: Path, /, **values) -> None:
    """Write other values to the keys of a JSON file; ... removes one."""
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def flip(file: Path) -> None:
    """Change one bit of a file's last byte."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


def interrupt_second_call(monkeypatch, owner, name):
    """Ctrl-C when a function of a module is called for the second time; the list grows with every call."""
    function, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


def refusal(call, /, *args, **kwargs) -> str:
    """The message of the InputError that the call raises, which is one line."""
    try:  # without pytest, as benchmarks import these helpers
        call(*args, **kwargs)
    except InputError as error:
        message = str(error)
        assert "\n" not in message, message
        return message
    raise AssertionError("nothing was refused")
