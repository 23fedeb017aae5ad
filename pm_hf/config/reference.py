"""What every setting is, from the schema: JSON Schema for editors, text for a terminal, rows for a page."""

import textwrap
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import yaml

from pm_hf.config.kinds import STREAM_KINDS
from pm_hf.config.loading import run_settings
from pm_hf.config.presets import LANGUAGE_PRESETS, PRESETS
from pm_hf.config.schema import RunConfig
from pm_hf.config.training import training_settings
from pm_hf.config.typed import range_words, type_words
from pm_hf.errors import InputError


class SettingRow(NamedTuple):
    """One setting. name: dotted; takes: type, unit and range; default: as in a YAML; about: its meaning."""

    name: str
    takes: str
    default: str
    about: str


def json_schema() -> dict[str, Any]:
    """JSON Schema of a run's YAML, with the fields of `training:` as this transformers has them."""
    properties = dict(run_settings().json["properties"])
    properties["training"] = training_settings().json | {"description": properties["training"]["description"]}
    properties["method"] = properties["method"] | {"enum": list(PRESETS)}
    title = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Settings of pm-hf train"}
    return title | run_settings().json | {"properties": properties}


def setting_rows(group: str = "") -> list[SettingRow]:
    """The settings of a group, or all of them, with those of their groups; not the fields of `training`."""
    defaults = flat(asdict(RunConfig()))
    return [
        _row(name, node, defaults.get(name))
        for name, node in run_settings().walk()
        if "properties" not in node and f"{name}.".startswith(f"{group}." if group else "")
    ]


def task_rows() -> list[SettingRow]:
    """What a task of `stream.tasks` can say."""
    tasks = run_settings().json["$defs"]["TaskSettings"]["properties"]
    return [_row(name, node, node["default"]) for name, node in tasks.items()]


def settings_help(width: int) -> str:
    """All settings, each with type, range, default, unit and meaning, in lines of at most so many characters."""
    return "\n".join(_paragraph(row, width) for row in setting_rows())


def setting_help(name: str, width: int) -> str:
    """The same of one setting, with what the methods and the kinds of stream set it to, or of a group's settings.

    InputError for a name that is no setting, with those that may be meant.
    """
    settings = training_settings() if name.startswith("training.") else run_settings()
    nodes = dict(settings.walk())
    if name not in nodes:
        near = settings.meant(name, [key.rpartition(".")[2] for key in nodes if _group(key) == _group(name)])
        raise InputError(f"{name}: no such setting; {f'did you mean {near[0]}?' if near else 'pm-hf help lists them'}")
    rows = setting_rows(name) or [_row(name, nodes[name], nodes[name].get("default"))]
    text = "\n".join(_paragraph(row, width) for row in rows)
    return text if len(rows) > 1 else "\n".join([text, *_set_by(name)])


def method_settings(method: str) -> dict[str, dict[str, Any]]:
    """{streams: {dotted setting: value}}: what a method of a stream sets where the YAML is silent."""
    defaults = flat(asdict(RunConfig()))
    rows = {"": PRESETS[method]} | ({"language models": LANGUAGE_PRESETS[method]} if method in LANGUAGE_PRESETS else {})
    return {
        streams: {name: value for name, value in flat(row).items() if value != defaults[name]}
        for streams, row in rows.items()
    }


def flat(settings: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """{dotted name: value} of nested groups; an empty mapping is a value."""
    named: dict[str, Any] = {}
    for key, value in settings.items():
        named |= flat(value, f"{path}{key}.") if isinstance(value, Mapping) and value else {f"{path}{key}": value}
    return named


def as_yaml(value: Any) -> str:
    """A value as it stands in a YAML, in one line."""
    return (
        yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6).removesuffix("\n...\n").strip()
    )


def _row(name: str, node: Mapping, default: Any) -> SettingRow:
    unit = f" ({node['unit']})" if "unit" in node else ""
    takes = ", ".join(filter(None, (type_words(node) + unit, range_words(node))))
    rounded = [round(item, 3) for item in default] if isinstance(default, list) else default
    return SettingRow(name, takes, as_yaml(rounded), node.get("description", ""))


def _paragraph(row: SettingRow, width: int) -> str:
    lines = textwrap.wrap(row.about, width, initial_indent="    ", subsequent_indent="    ")
    return "\n".join([f"{row.name}  {row.takes}; default {row.default}", *lines])


def _set_by(name: str) -> list[str]:
    """Who sets a setting where the YAML is silent, a line for each value."""
    values: dict[str, list[str]] = {}
    for method in PRESETS:
        for streams, row in method_settings(method).items():
            if name in row:
                values.setdefault(as_yaml(row[name]), []).append(f"{method} ({streams})" if streams else method)
    for name_of_kind, kind in STREAM_KINDS.items():
        if (value := flat({"training": kind.training, "method": kind.method}).get(name)) is not None:
            values.setdefault(as_yaml(value), []).append(name_of_kind)
    return [f"    set to {value} by {', '.join(who)}" for value, who in values.items()]


def _group(name: str) -> str:
    return name.rpartition(".")[0]
