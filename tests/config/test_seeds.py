"""Settings of several seeds."""

import pytest
from helpers import refusal
from helpers.streams import settings, write_yaml

from pm_hf.config.loading import load_config
from pm_hf.config.seeds import load_seeds


@pytest.fixture
def path(tmp_path):
    return write_yaml(tmp_path / "c.yaml", settings("base", tmp_path, tmp_path / "runs", seed=7))


def test_each_seed_has_a_folder_of_its_own_and_all_else_in_common(path, tmp_path):
    configs = load_seeds(path, ["lora.r=3"], ["2", "0"])
    assert [(config.seed, config.output_dir) for config in configs] == [
        (2, str(tmp_path / "runs" / "seed-2")),
        (0, str(tmp_path / "runs" / "seed-0")),
    ]
    same = {"seed": 0, "output_dir": ""}
    wanted = load_config(path, ["lora.r=3"]).to_dict() | same
    assert all(config.to_dict() | same == wanted for config in configs)


@pytest.mark.parametrize(
    ("seeds", "overrides", "words"),
    [
        (["0", "x"], [], "--seeds: expected whole numbers from 0 on, found x"),
        (["-1"], [], "--seeds: expected whole numbers from 0 on, found -1"),
        ([], [], "--seeds: expected whole numbers from 0 on, found none"),
        (["1", "0", "1"], [], "--seeds: 1 is given twice"),
        (["1", "0"], ["seed=3"], "seed and --seeds are both given"),
        (["1", "0"], ["--seed", "3"], "seed and --seeds are both given"),
        (["1", "0"], ["lora.r=x"], "lora.r: expected"),
    ],
)
def test_what_is_refused(path, seeds, overrides, words):
    assert words in refusal(load_seeds, path, overrides, seeds)
