"""YAML ends in its value or in one line that names the file and the line."""

import datetime

import pytest
import yaml
from helpers import refusal

from pm_hf.config.loading import load_config
from pm_hf.config.yaml_text import parse_value, read_yaml
from pm_hf.errors import InputError

SETTINGS = "output_dir: out\nmodel: {base: tiny}\nstream: {class_groups: 2}\n"  # the next is line 4


def nine(before):
    return f"[{', '.join([before] * 9)}]"


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} {nine(f'*a{i - 1}')}\n" for i in range(1, 12))
MERGED_LAUGHS = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: {nine(f'*a{i - 1}')}}}\n" for i in range(1, 12))
CHAIN = "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 300)) + "seed: *a299\n"

REFUSED = {
    "key twice": ("seed: 1\nseed: 1\n", "line 5: key 'seed' stands twice, first in line 4; leave one out"),
    "group twice": ("lora: {r: 2}\nlora: {alpha: 3}\n", "line 5: key 'lora' stands twice, first in line 4"),
    "nested key twice": ("lora:\n  r: 2\n  alpha: 2\n  r: 2\n", "line 7: key 'r' stands twice, first in line 5"),
    "key twice in a list": ("stream2: [{a: 1, a: 2}]\n", "line 4: key 'a' stands twice"),
    "number twice": ("a: {1: x, 0x1: y}\n", "line 4: key 1 stands twice"),
    "laughs": (f"{LAUGHS}seed: *a11\n", "its aliases expand to more than 1,000,000 values"),
    "merged laughs": (f"{MERGED_LAUGHS}lora: *a11\n", "its aliases expand to more than 1,000,000 values"),
    "mapping inside itself": ("training: &t {a: *t}\n", "line 4: an alias stands inside of what it stands for"),
    "list inside itself": ("seed: &t [1, [*t]]\n", "line 4: an alias stands inside of what it stands for"),
    "merge of itself": ("lora: &l {<<: *l}\n", "line 4: an alias stands inside of what it stands for"),
    "deep": (f"seed: {'[' * 600}{']' * 600}\n", "line 4: nested deeper than 100 levels"),
    "less deep": (f"seed: {'[' * 150}{']' * 150}\n", "line 4: nested deeper than 100 levels"),
    "deep by aliases": (CHAIN, "nested deeper than 100 levels"),
    "long int": (f"seed: {'9' * 5000}\n", "line 4: '9999"),
    "explicit date": ("seed: !!timestamp 2026-13-45\n", "line 4: '2026-13-45' cannot be read as timestamp"),
    "no date at all": ("seed: !!timestamp zebra\n", "line 4: 'zebra' cannot be read as timestamp"),
    "empty int": ("seed: !!int ''\n", "line 4: '' cannot be read as int"),
    "no bool": ("seed: !!bool maybe\n", "line 4: 'maybe' cannot be read as bool"),
    "tab": ("lora:\n\tr: 2\n", r"line 5: found character '\\t' that cannot start any token; indent with spaces"),
    "python": ("seed: !!python/object/apply:os.getcwd []\n", "line 4: could not determine a constructor for the tag"),
    "list as key": ("? [a]\n: 2\n", "line 4: found unhashable key"),
    "set as key": ("!!set a: 1\n", "line 4: found unhashable key"),
    "two documents": (
        f"---\n{SETTINGS}",
        "line 4: expected a single document in the stream but found another document",
    ),
    "unknown alias": ("seed: *x\n", "line 4: found undefined alias"),
    "control character": ("seed: \x01\n", "line 4: character #x0001 is not allowed"),
    "NUL": ("seed: \0\n", "line 4: character #x0000 is not allowed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_nobody_means_is_one_line_with_its_line(tmp_path, case):
    text, message = REFUSED[case]
    path = tmp_path / "c.yaml"
    path.write_text(SETTINGS + text)
    said = refusal(load_config, path)
    assert said.startswith(f"config {path} is not valid YAML: line ")
    assert message.replace("\\\\", "\\") in said
    assert len(said.splitlines()) == 1
    assert len(said) < 500


@pytest.mark.parametrize(
    ("content", "line", "byte"),
    [
        (f"{SETTINGS}# caf\xe9\n".encode("latin-1"), 4, "e9"),
        (SETTINGS.encode("utf-16"), 1, "ff"),
        (bytes(range(128, 256)), 1, "80"),
    ],
    ids=["latin-1", "UTF-16", "binary"],
)
def test_what_is_not_utf_8_is_told_by_line_and_byte(tmp_path, content, line, byte):
    (tmp_path / "c.yaml").write_bytes(content)
    assert refusal(load_config, tmp_path / "c.yaml") == (
        f"config {tmp_path / 'c.yaml'}: line {line}: byte 0x{byte} is not UTF-8; save the file as UTF-8"
    )


def test_a_byte_order_mark_is_no_character(tmp_path):
    (tmp_path / "c.yaml").write_bytes(f"{SETTINGS}seed: 3\n".encode("utf-8-sig"))
    assert load_config(tmp_path / "c.yaml").seed == 3


def test_dates_are_text_as_no_setting_is_a_date(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("a: 2026-11-05\nb: 2026-13-45\nc: [2026-11-05 10:00:00]\n2026-01-01: d\n")
    assert read_yaml(path) == {"a": "2026-11-05", "b": "2026-13-45", "c": ["2026-11-05 10:00:00"], "2026-01-01": "d"}
    path.write_text(f"{SETTINGS}seed: 2026-13-45\n")
    with pytest.raises(InputError, match=r"c.yaml: seed: expected int, found '2026-13-45'$"):
        load_config(path)


def test_aliases_and_merge_keys_mean_what_they_mean(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("a: &a {r: 2, alpha: 3}\nb: {<<: *a, r: 4}\nc: [*a, *a]\nd: {<<: [*a, {z: 1}]}\n")
    assert read_yaml(path) == {
        "a": {"r": 2, "alpha": 3},
        "b": {"r": 4, "alpha": 3},
        "c": [{"r": 2, "alpha": 3}] * 2,
        "d": {"r": 2, "alpha": 3, "z": 1},
    }


def test_groups_that_share_an_alias_are_groups_of_their_own(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "output_dir: out\nmethod: pm\nmodel: {base: x}\nstream: {class_groups: 2}\nhead: &e {}\nmerge: *e\n"
    )
    assert load_config(path).head.kind == "linear"


PLAIN = [1, -2.5, True, None, "text", "1e-3", "yes it is", [1, [2]], {"a": {"b": [1]}}, "007", "0o7", "x: y", "ä", ""]


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_ordinary_values_are_those_of_safe_load(tmp_path, value):
    text = yaml.safe_dump({"key": value}, allow_unicode=True)
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    assert read_yaml(tmp_path / "c.yaml") == yaml.safe_load(text) == {"key": value}


@pytest.mark.parametrize("text", ["{text}: a", "[1", "*x", "a: b: c", "!foo bar", "'x", "@x", "%"])
def test_an_override_that_is_no_yaml_is_the_text(text):
    assert parse_value(text) == text


@pytest.mark.parametrize(
    ("text", "value"), [("10", 10), ("[a, b]", ["a", "b"]), ("2026-01-02", "2026-01-02"), ("", None)]
)
def test_an_override_is_its_yaml(text, value):
    assert parse_value(text) == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora={r: 2, r: 3}", "override lora: key 'r' stands twice"),
        ("stream.class_groups={a: [x], b: [y], a: [z]}", "override stream.class_groups: key 'a' stands twice"),
        (f"seed={'9' * 5000}", "override seed: '999"),
        ("seed=&a [*a]", "override seed: an alias stands inside"),
        (f"seed={'[' * 600}{']' * 600}", "override seed: nested deeper than 100 levels"),
        ("seed=2026-13-45", "seed: expected int, found '2026-13-45'"),
    ],
)
def test_an_override_that_nobody_means_is_a_problem_among_others(tmp_path, override, message):
    path = tmp_path / "c.yaml"
    path.write_text(f"{SETTINGS}typo: 1\n")
    said = refusal(load_config, path, [override])
    assert message in said
    assert "2 problems: " in said
    assert "typo: unknown key" in said


def test_a_mapping_that_contains_itself_is_refused():
    settings = {"output_dir": "x", "training": {}}
    settings["training"]["a"] = settings
    with pytest.raises(InputError, match="a value contains itself"):
        load_config(settings)
    with pytest.raises(InputError, match="overrides: a value contains itself"):
        load_config({}, values={"training": settings})


def test_objects_of_python_are_no_settings():
    with pytest.raises(InputError, match="expected int, found datetime.date"):
        load_config({"seed": datetime.date(2026, 1, 2), "output_dir": "x"})


@pytest.mark.parametrize("value", ["010", "-007", "1:30"])
def test_numbers_of_another_base_are_refused(tmp_path, value):
    (tmp_path / "c.yaml").write_text(f"seed: {value}\n")
    with pytest.raises(InputError, match=f"line 1: {value} is a number of another base in YAML; put it in quotes"):
        read_yaml(tmp_path / "c.yaml")
