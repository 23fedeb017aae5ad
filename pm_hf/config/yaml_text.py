"""YAML as text, safely: what a person could not have meant is one InputError with its line, never a hang or a guess.

A key that stands twice, an alias that contains itself or expands without end, nesting without end and numbers that
cannot be read are refused. Dates stay text, as no setting is a date.
"""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from pm_hf.config.typed import brief
from pm_hf.errors import InputError

MOST_VALUES = 1_000_000  # of a file, each alias counted as what it stands for
MOST_LEVELS = 100  # of nesting
_DATE, _MERGE, _INT = (f"tag:yaml.org,2002:{name}" for name in ("timestamp", "merge", "int"))
_OTHER_BASE = re.compile(r"[-+]?(0[0-7_]+|[0-9][0-9_]*(:[0-5]?[0-9])+)")  # 010 would be 8, 1:30 would be 90


class _RefusedError(yaml.MarkedYAMLError):
    """Well-formed YAML that is not read."""


def _refuse(problem: str, node: Node) -> _RefusedError:
    return _RefusedError(problem=problem, problem_mark=node.start_mark)


class _Loader(yaml.SafeLoader):
    """SafeLoader whose every failure is a YAMLError with a line, and which does not make dates of plain text."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != _DATE]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        """SafeLoader's; a scalar that its type cannot hold (an int of 5000 digits, an explicit date) is refused."""
        if not isinstance(node, ScalarNode):
            return super().construct_object(node, deep)
        if node.tag == _INT and _OTHER_BASE.fullmatch(node.value):
            raise _refuse(f"{node.value} is a number of another base in YAML; put it in quotes, or write it out", node)
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError, LookupError, AttributeError, TypeError) as error:
            kind = node.tag.rpartition(":")[2]
            raise _refuse(f"{brief(node.value)} cannot be read as {kind}", node) from error

    def document(self) -> Any:
        """The one document; None where the text is empty."""
        node = self.get_single_node()
        if node is None:
            return None
        self._measure(node, {}, set())
        return self.construct_document(node)

    def _measure(self, node: Node, known: dict[int, tuple[int, int]], above: set[int]) -> tuple[int, int]:
        """(number of values, levels) of a node with its aliases expanded; refuses what is too large or says a key
        twice. known: nodes that were measured; above: those around this one."""
        if id(node) in above:
            raise _refuse("an alias stands inside of what it stands for", node)
        if id(node) in known:
            return known[id(node)]
        above.add(id(node))
        inner = [self._measure(child, known, above) for child in self._children(node)]
        above.remove(id(node))
        values, levels = 1 + sum(size for size, _ in inner), 1 + max((height for _, height in inner), default=0)
        if levels > MOST_LEVELS:
            raise _refuse(f"nested deeper than {MOST_LEVELS} levels", node)
        if values > MOST_VALUES:
            raise _refuse(f"its aliases expand to more than {MOST_VALUES:,d} values", node)
        known[id(node)] = values, levels
        return values, levels

    def _children(self, node: Node) -> list[Node]:
        if isinstance(node, SequenceNode):
            return node.value
        if not isinstance(node, MappingNode):
            return []
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            if not isinstance(key, ScalarNode) or key.tag == _MERGE:
                continue
            name = self.construct_object(key)
            if not isinstance(name, Hashable):
                raise _refuse("found unhashable key", key)
            if name in lines:
                raise _refuse(f"key {brief(name)} stands twice, first in line {lines[name]}; leave one out", key)
            lines[name] = key.start_mark.line + 1
        return [child for pair in node.value for child in pair]


def _load(text: str) -> Any:
    """The value of a text; YAMLError with a line where it is none."""
    loader = _Loader(text)
    try:
        return loader.document()
    except RecursionError as error:
        mark = loader.get_mark()
        raise _RefusedError(problem=f"nested deeper than {MOST_LEVELS} levels", problem_mark=mark) from error
    finally:
        loader.dispose()


def read_yaml(path: Path, what: str = "config") -> Any:
    """The value of a YAML file in UTF-8; InputError with `what`, its path and the line where it cannot be read."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read: {error.strerror or error}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
        raise InputError(
            f"{what} {path}: line {line}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8"
        ) from error
    try:
        return _load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{what} {path} is not valid YAML: {_explain(error, text)}") from error


def parse_value(text: str) -> Any:
    """A value as YAML reads it, the text itself where it is no YAML; InputError for YAML that is not read."""
    try:
        return _load(text)
    except _RefusedError as error:
        raise InputError(str(error.problem)) from error
    except yaml.YAMLError:
        return text


def _explain(error: yaml.YAMLError, text: str) -> str:
    """`line 3: what is wrong there`."""
    if isinstance(error, yaml.reader.ReaderError):
        character = error.character if isinstance(error.character, int) else ord(error.character[:1])
        return f"line {text.count(chr(10), 0, error.position) + 1}: character #x{character:04x} is not allowed"
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "context", None) or str(error)
    if problem.startswith("but "):
        problem = f"{getattr(error, 'context', None) or ''} {problem}"
    where = "" if mark is None else f"line {mark.line + 1}: "
    tab = "; indent with spaces" if "'\\t'" in problem else ""
    return where + " ".join(problem.split()) + tab
