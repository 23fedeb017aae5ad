"""Regular expressions of a config are whole, short, and quick on the names of a model's layers."""

import re
import time

import pytest
from helpers import refusal

from pm_hf.config import patterns
from pm_hf.config.loading import load_config
from pm_hf.config.patterns import LAYER_NAMES, pattern_problem
from pm_hf.errors import InputError

BASE = {"output_dir": "out", "model.base": "tiny", "stream.class_groups": 2}
GOOD = [
    *("all-linear", ".*", r".*layers\.\d+\.(q|v)_proj", r"(.*\.)*query", r".*\.layer\.(1[01]|[0-9])\..*(query|value)"),
    *("model", r"(?!lm_head).*proj", "[a-z]+", r"(?:encoder|decoder)\.block\.\d{1,2}\..*\.(k|v)"),
]
CATASTROPHIC = [
    r"([a-z_.]+)+!",
    r"(\w+\.?)*\d\dx",
    "(.*)*(.*)*x!",
    r"((a|[a-z_.])*)*!",
    r"^(([a-z_.0-9])+.)+([A-Z!])+$",
]


@pytest.mark.parametrize("pattern", GOOD)
def test_ordinary_patterns_are_taken(pattern):
    assert pattern_problem(pattern) is None
    assert load_config({}, values=BASE | {"lora.target_modules": pattern}).lora.target_modules == pattern


@pytest.mark.parametrize("pattern", ["(", "[a", "a{99999999999}", "(?P<x>a)(?P<x>b)", "*", "(?z)", r"\8"])
@pytest.mark.parametrize("name", ["lora.target_modules", "training.optim_target_modules"])
def test_what_is_no_pattern_is_refused(name, pattern):
    said = refusal(load_config, {}, values=BASE | {name: pattern})
    assert f"{name}: {pattern!r} is no regular expression: " in said


@pytest.mark.parametrize("pattern", CATASTROPHIC)
def test_a_pattern_that_never_ends_is_refused_in_time(monkeypatch, pattern):
    monkeypatch.setattr(patterns, "MOST_SECONDS", 0.3)
    began = time.perf_counter()
    assert "write it without a repetition inside of a repetition, or list the names" in pattern_problem(pattern)
    assert time.perf_counter() - began < 10


def test_a_long_pattern_is_refused():
    with pytest.raises(InputError, match="lora.target_modules: a pattern of 1001 characters, at most 1000 are taken"):
        load_config({}, values=BASE | {"lora.target_modules": "x" * 1001})


@pytest.mark.parametrize("nothing", ["", []])
def test_no_layer_at_all_is_refused(nothing):
    with pytest.raises(InputError, match="lora.target_modules: names no layer; null: PEFT's for the model"):
        load_config({}, values=BASE | {"lora.target_modules": nothing})


def test_the_trial_matches_as_peft_does():
    assert pattern_problem(r"(.*\.)*query") is None
    assert [name for name in LAYER_NAMES if re.fullmatch(r"(.*\.)*query", name)] == [LAYER_NAMES[1]]
