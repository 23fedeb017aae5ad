"""The fuzz of `make fuzz` in small: adapters merge as their dense sum whatever wrote them, or are refused."""

import pytest
from helpers.fuzz import REFUSED, RIGHT, adapters, few, judged
from hypothesis import given

NOTHING = {"config": {}, "tensors": {}, "labels": None, "report": None, "prefix": adapters.PREFIX, "damage": []}


@few(60)
@given(adapters.CASES)
def test_any_folder_is_merged_as_the_sum_or_refused(case):
    assert judged(adapters, case) in (RIGHT, REFUSED)


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({}, RIGHT),
        ({"config": {"lora_alpha": 10**400}}, REFUSED),
        ({"config": {"layers_to_transform": "0"}}, REFUSED),
        ({"config": {"base_model_name_or_path": "a\0b"}}, REFUSED),
        ({"config": {"use_rslora": [True]}}, REFUSED),
        ({"config": {"lora_bias": "false"}}, REFUSED),
        ({"report": {"tasks": 10**400}}, RIGHT),
    ],
    ids=lambda value: str(value)[:60],
)
def test_folders_that_were_found(changes, outcome):
    assert judged(adapters, NOTHING | changes) == outcome
