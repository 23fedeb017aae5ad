"""Numbers, texts and paths that no setting can have are told by the setting's name."""

from dataclasses import make_dataclass
from typing import get_type_hints

import pytest
from helpers import refusal

from pm_hf.config import schema
from pm_hf.config.loading import load_config
from pm_hf.config.schema import RunConfig
from pm_hf.config.typed import MODEL, Flag, Keyed, Number, Settings, Text, Whole, brief, type_words
from pm_hf.merging.coefficient import Freedom
from pm_hf.merging.curvature import CurvatureKind
from pm_hf.merging.methods.base import Start
from pm_hf.training.penalties import Divergence

BASE = {"output_dir": "out", "model.base": "tiny", "stream.class_groups": 2}
NAN, INF = float("nan"), float("inf")


def problem(**values):
    return refusal(load_config, {}, values=BASE | {key.replace("__", "."): value for key, value in values.items()})


def floats():
    """Dotted names of the settings that are numbers with a fraction."""
    return [name for name, node in Settings(RunConfig).walk() if "float" in type_words(node).split(" or ")]


def read(hint, given):
    """(the value of a field x, the problems)."""
    problems: list[str] = []
    kind = make_dataclass("OneField", [("x", hint, None)], namespace={"__pydantic_config__": MODEL})
    return Settings(kind).read({"x": given}, problems).x, problems


def test_the_float_settings_are_found():
    assert {"strategy.ewc_weight", "merge.coefficient", "head.ridge", "max_forgetting"} <= set(floats())
    assert len(floats()) >= 14


@pytest.mark.parametrize("value", [NAN, INF, -INF, "nan", "-inf", "1e999"])
@pytest.mark.parametrize("name", floats())
def test_no_setting_is_nan_or_infinite(name, value):
    assert f"{name}: expected a finite number, found " in problem(**{name: value})


@pytest.mark.parametrize("name", [*floats(), "seed", "lora.r", "lora.alpha", "merge.max_rank", "training.max_steps"])
def test_no_setting_is_larger_than_a_float32(name):
    for value in (10**400, 10**5000, -(10**30)):
        message = problem(**{name: value})
        assert f"{name}: expected a number of at most 1e+18 in magnitude, found " in message
        assert len(message) < 300


@pytest.mark.parametrize(
    ("hint", "given", "expected"),
    [
        (Whole, "10", 10),
        (Whole, "1e3", 1000),
        (Whole, 10.0, 10),
        (Whole, str(10**18 - 1), 10**18 - 1),
        (Number, "1e-3", 1e-3),
        (Number, 2, 2.0),
        (Number | None, "2", 2.0),
        (Text | None, "1e3", "1e3"),
        (list[Number], ["1", 2], [1.0, 2.0]),
        (Text | Flag, "no", "no"),
        (Keyed, {1: "a"}, {1: "a"}),
    ],
    ids=lambda value: str(value).partition("(")[0],  # without the addresses of validators, which differ by process
)
def test_a_number_is_its_fields_number_and_text_stays_text(hint, given, expected):
    value, problems = read(hint, given)
    assert (value, type(value), problems) == (expected, type(expected), [])


@pytest.mark.parametrize(
    ("hint", "name", "given"),
    [
        *((Whole, "int", value) for value in (1.5, "1.5", "ten", True, None)),
        *((Number, "float", "x"), (Text, "str", 3), (Flag, "bool", 1), (Flag | None, "bool or null", "yes")),
    ],
)
def test_another_type_is_a_problem(hint, name, given):
    _, (problem,) = read(hint, given)
    assert problem.startswith(f"x: expected {name}, found {given!r}")


@pytest.mark.parametrize(("given", "value"), [("3", "3"), (3, 3), (3.0, 3), ({"a": ["b"]}, {"a": ["b"]})])
def test_a_number_in_quotes_is_a_files_name_where_one_may_stand(given, value):
    read = load_config({}, values=BASE | {"stream.class_groups": given}).stream.class_groups
    assert (read, type(read)) == (value, type(value))


PATHS = ("output_dir", "data_dir", "model.base", "start_from", "stream.train", "stream.test", "stream.dataset")


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("~nosuchuser", "'~nosuchuser': there is no user 'nosuchuser'; give the folder's whole path"),
        ("~nosuchuser/runs/x", "there is no user 'nosuchuser'"),
        ("a\0b", "expected text, found 'a\\x00b' with a character that no file holds"),
        ("\ud800", "expected text, found '\\ud800' with a character that no file holds"),
        ("x/" + "y" * 300, "a name of 300 bytes, a file system takes 255"),
        ("ä" * 200, "a name of 400 bytes, a file system takes 255"),
    ],
)
def test_text_that_is_no_path_is_refused(name, value, message):
    said = problem(**{name: value})
    assert f"{name}: " in said
    assert message in said
    assert "problems" not in said  # and said once


def test_paths_of_a_list_of_tasks_are_checked_too():
    message = problem(stream__class_groups=None, stream__tasks=[{"name": "a"}, {"name": "b", "train": "~nosuchuser/b"}])
    assert "stream.tasks[1].train: '~nosuchuser/b': there is no user" in message


def test_home_and_ordinary_names_are_paths():
    for value in ("~", "~/runs", "runs/~x", "a b", "owner/name", "x" * 255, "a~b"):
        assert load_config({}, values=BASE | {"output_dir": value, "stream.train": value}).output_dir == value


def test_a_key_is_told_as_one_printable_line():
    assert r"'a\nb\x1b[2J': unknown key" in problem(**{"a\nb\x1b[2J": 1})
    assert problem(**{"k" * 1000: 1}).index(": unknown key") < 200


def test_names_of_options_are_text():
    assert "merge.options: expected names as keys, found 1" in problem(merge__options={1: 2})
    assert "merge.options.floor: expected a finite number, found nan" in problem(merge__options={"floor": NAN})


LARGE = {
    "number": 10**10**5,
    "text": "x" * 10**6,
    "lists": [[[["x" * 1000] * 1000] * 1000] * 1000],
    "mapping": {i: i for i in range(10**4)},
}


@pytest.mark.parametrize("kind", LARGE)
def test_what_was_found_is_told_in_few_words(kind):
    assert len(brief(LARGE[kind])) < 2000


def test_seeds_are_those_that_every_generator_takes():
    assert load_config({}, values=BASE | {"seed": 2**32 - 1}).seed == 2**32 - 1
    assert problem(seed=2**32) == "config: seed: must be in [0, 4294967296), found 4294967296"
    assert "seed: must be in [0, 4294967296), found -1" in problem(seed=-1)


def test_a_rank_is_one_that_a_layer_may_have():
    assert problem(lora__r=10**9) == "config: lora.r: must be in [1, 8192], found 1000000000"
    assert load_config({}, values=BASE | {"lora.r": 8192}).lora.r == 8192


def test_choices_are_those_of_what_they_are_handed_to():
    """schema.py writes them out, so that a type checker knows them."""
    merge = get_type_hints(schema.MergeSettings)
    assert (merge["train_from"], merge["freedom"]) == (Start | None, Freedom | None)
    assert get_type_hints(schema.CurvatureSettings)["kind"] == CurvatureKind | None
    assert get_type_hints(schema.StrategySettings)["divergence"] == Divergence


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("lora.rank", "lora.r"),
        ("lora_alpha", "lora.alpha"),
        ("strem", "stream"),
        ("merge.rank", "merge.max_rank"),
        ("stream.max_len", "stream.max_length"),
        ("training.lr", "training.learning_rate"),
        ("training.epochs", "training.num_train_epochs"),
        ("training.batch_size", "training.per_device_train_batch_size"),
    ],
)
def test_a_key_that_is_none_is_told_what_it_may_mean(written, meant):
    message = problem(**{written: 1})
    assert f"did you mean {meant}" in message
    assert "did you mean" not in problem(zebra=1)


def test_a_key_of_a_task_is_told_what_it_may_mean():
    message = problem(stream__class_groups=None, stream__tasks=[{"name": "a", "trian": "a.csv"}])
    assert "stream.tasks[0].trian: unknown key, did you mean stream.tasks[0].train?" in message


def test_all_problems_of_one_list_and_of_free_settings_are_told_by_their_place():
    assert "perturbation.probabilities[1]: expected float, found 'x'" in problem(
        perturbation__probabilities=[1, "x", 2]
    )
    assert "merge.options.a.b[1]: expected a finite number, found nan" in problem(merge__options={"a": {"b": [1, NAN]}})


def test_every_setting_says_what_it_is():
    for name, node in Settings(RunConfig).walk():
        assert node["description"].strip(), name
