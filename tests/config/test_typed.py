"""Numbers, texts and paths that no setting can have are told by the setting's name."""

from typing import get_args, get_origin, get_type_hints

import pytest
from helpers import refusal

from pm_hf.config import schema
from pm_hf.config.loading import load_config
from pm_hf.config.schema import RunConfig
from pm_hf.config.typed import brief, convert
from pm_hf.merging.coefficient import Freedom
from pm_hf.merging.curvature import CurvatureKind
from pm_hf.merging.methods.base import Start
from pm_hf.training.penalties import Divergence

BASE = {"output_dir": "out", "model.base": "tiny", "stream.class_groups": 2}
NAN, INF = float("nan"), float("inf")


def problem(**values):
    return refusal(load_config, {}, values=BASE | {key.replace("__", "."): value for key, value in values.items()})


def floats(kind=RunConfig, path=""):
    """Dotted names of the settings that are numbers with a fraction."""
    for name, hint in kind.__annotations__.items():
        if isinstance(hint, type) and hasattr(hint, "__annotations__"):
            yield from floats(hint, f"{path}{name}.")
        elif hint is float or (get_origin(hint) is not list and float in get_args(hint)):
            yield path + name


def test_the_float_settings_are_found():
    assert {"strategy.ewc_weight", "merge.coefficient", "head.ridge", "max_forgetting"} <= set(floats())
    assert len(list(floats())) >= 14


@pytest.mark.parametrize("value", [NAN, INF, -INF, "nan", "-inf", "1e999"])
@pytest.mark.parametrize("name", list(floats()))
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
        (int, "10", 10),
        (int, "1e3", 1000),
        (int, 10.0, 10),
        (int, str(10**18 - 1), 10**18 - 1),
        (float, "1e-3", 1e-3),
        (float, 2, 2.0),
        (float | None, "2", 2.0),
        (str | None, "1e3", "1e3"),
        (int | str | dict, "3", "3"),
        (int | str | dict, 3, 3),
        (list[float], ["1", 2], [1.0, 2.0]),
        (str | bool, "no", "no"),
    ],
)
def test_a_number_is_its_fields_number_and_text_stays_text(hint, given, expected):
    problems: list[str] = []
    value = convert(hint, given, "x", problems)
    assert (value, type(value), problems) == (expected, type(expected), [])


@pytest.mark.parametrize(
    ("hint", "given"),
    [(int, 1.5), (int, "1.5"), (int, "ten"), (int, True), (float, "x"), (str, 3), (bool, 1), (int, None)],
)
def test_another_type_is_a_problem(hint, given):
    problems: list[str] = []
    convert(hint, given, "x", problems)
    assert len(problems) == 1
    assert problems[0].startswith(f"x: expected {hint.__name__}, found {given!r}")


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
    assert problem(seed=2**32) == "config: seed: must be below 2**32"
    assert "seed: must be at least 0" in problem(seed=-1)


def test_a_rank_is_one_that_a_layer_may_have():
    assert problem(lora__r=10**9) == "config: lora.r: must be at most 8192"
    assert load_config({}, values=BASE | {"lora.r": 8192}).lora.r == 8192


def test_choices_are_those_of_what_they_are_handed_to():
    """schema.py writes them out, for the page of all settings shows its lines."""
    merge = get_type_hints(schema.MergeSettings)
    assert (merge["train_from"], merge["freedom"]) == (Start | None, Freedom | None)
    assert get_type_hints(schema.CurvatureSettings)["kind"] == CurvatureKind | None
    assert get_type_hints(schema.StrategySettings)["divergence"] == Divergence
