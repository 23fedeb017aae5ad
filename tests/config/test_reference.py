"""What is said of the settings: JSON Schema, help, what methods set."""

import json
from pathlib import Path

import pytest
import transformers
import yaml
from helpers import refusal

from pm_hf.config.loading import load_config
from pm_hf.config.presets import PRESETS
from pm_hf.config.reference import (
    as_yaml,
    flat,
    json_schema,
    method_settings,
    setting_help,
    setting_rows,
    settings_help,
    task_rows,
)
from pm_hf.config.training import MANAGED_ARGUMENTS

CONFIGS = Path(__file__).parents[2] / "configs"
EVERY = [path for path in sorted(CONFIGS.rglob("*.yaml")) if path.parent.name != "launch"]
MARK = "# yaml-language-server: $schema="
ROOT = Path(__file__).parents[2]


def resolved(schema, node):
    return schema["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node


def unknown(schema, node, value, path=""):
    """Keys of a value that the JSON Schema has not."""
    node = resolved(schema, node)
    for option in node.get("anyOf", []):
        if "items" in option and isinstance(value, list):
            for item in value:
                yield from unknown(schema, option["items"], item, path)
    if "properties" not in node:
        return
    for key, inner in value.items():
        if key in node["properties"]:
            yield from unknown(schema, node["properties"][key], inner, f"{path}{key}.")
        else:
            yield path + key


@pytest.mark.parametrize("path", EVERY, ids=lambda path: path.name)
def test_every_config_names_its_schema_and_has_keys_of_it(path):
    first, _, text = path.read_text(encoding="utf-8").partition("\n")
    assert first.startswith(MARK), f"the first line is to be {MARK}… as in other configs"
    schema = json.loads((path.parent / first.removeprefix(MARK)).read_text(encoding="utf-8"))
    assert not list(unknown(schema, schema, yaml.safe_load(text)))


def test_a_strange_key_is_none_of_the_schema():
    schema = json_schema()
    assert list(unknown(schema, schema, {"lora": {"rank": 3}, "training": {"lr": 1}, "seed": 1})) == [
        *("lora.rank", "training.lr")
    ]


def test_the_schema_of_the_configs_is_the_one_of_the_code():
    saved = json.loads((CONFIGS / "pm_hf.schema.json").read_text(encoding="utf-8"))
    made = json_schema()
    if f"transformers=={transformers.__version__}\n" not in (ROOT / "constraints.txt").read_text(encoding="utf-8"):
        del saved["properties"]["training"], made["properties"]["training"]
    assert saved == made, "run: pm-hf schema > configs/pm_hf.schema.json"


def test_the_schema_says_types_ranges_and_what_it_is():
    schema = json_schema()
    rank = schema["$defs"]["LoraSettings"]["properties"]["r"]
    assert (rank["type"], rank["minimum"], rank["maximum"], rank["default"]) == ("integer", 1, 8192, 8)
    length = schema["$defs"]["StreamSettings"]["properties"]["max_length"]
    assert (length["unit"], length["minimum"]) == ("tokens", 1)
    coefficient = schema["$defs"]["MergeSettings"]["properties"]["coefficient"]["anyOf"]
    assert {"type": "number", "minimum": 0, "maximum": 1} in coefficient
    assert schema["properties"]["method"]["enum"] == list(PRESETS)
    training = schema["properties"]["training"]
    assert training["additionalProperties"] is False
    assert not MANAGED_ARGUMENTS & training["properties"].keys()
    assert training["properties"]["learning_rate"]["default"] == 5e-05
    assert "cosine" in training["properties"]["lr_scheduler_type"]["enum"]


def test_rows_have_type_unit_range_and_default():
    rows = {row.name: row for row in setting_rows()}
    assert rows["lora.r"][1:] == ("int, in [1, 8192]", "8", "rank")
    assert rows["stream.max_length"].takes == "int (tokens), at least 1"
    assert rows["merge.coefficient"].takes == "float or average or fisher or search or null, in [0, 1]"
    assert rows["perturbation.probabilities"].default == "[0.333, 0.333, 0.333]"
    assert "lora" not in rows
    assert {"name", "train"} <= {row.name for row in task_rows()}
    assert [row.name for row in setting_rows("merge")] == [name for name in rows if name.startswith("merge.")]


def test_a_setting_is_explained_with_who_sets_it():
    text = setting_help("perturbation.scale", 200)
    assert text.startswith("perturbation.scale  float or null, in [0, 1); default null\n    ε\n")
    assert "set to 0.5 by pm, pm_trace" in text
    assert "set to 0.002 by text-classification, image-classification" in setting_help("training.learning_rate", 200)
    group = setting_help("lora", 100)
    assert all(f"lora.{name}  " in group for name in ("r", "alpha", "dropout", "target_modules"))
    assert settings_help(100).count("\n    ") >= len(setting_rows())
    assert max(map(len, settings_help(60).splitlines())) < 140


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("lora.rank", "did you mean lora.r?"),
        ("training.lr", "did you mean training.learning_rate?"),
        ("zebra", "pm-hf help lists them"),
    ],
)
def test_no_setting_is_explained_that_is_none(name, way):
    assert refusal(setting_help, name, 100) == f"{name}: no such setting; {way}"


@pytest.mark.parametrize("method", PRESETS)
def test_what_a_method_sets_is_what_a_run_has(method):
    base = {"output_dir": "out", "method": method, "model": {"base": "tiny"}, "stream": {"class_groups": 2}}
    language = base | {"stream": {"kind": "causal-lm", "tasks": [{"name": "a", "train": "a.csv", "test": "a.csv"}]}}
    for streams, row in method_settings(method).items():
        config = flat(load_config(language if streams else base).to_dict())
        assert {name: config[name] for name in row} == row


def test_values_are_written_as_a_yaml_has_them():
    assert [as_yaml(value) for value in (None, True, 0.5, "a", [], {}, "no")] == [
        *("null", "true", "0.5", "a", "[]", "{}", "'no'")
    ]
