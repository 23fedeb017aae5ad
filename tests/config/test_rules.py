"""Settings of a strategy that contradict each other are refused before anything runs."""

import pytest
from helpers import refusal
from helpers.streams import settings

from pm_hf.config.loading import load_config


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("sequential", {"ewc_weight": -1.0}, "strategy.ewc_weight: must be at least 0"),
        ("sequential", {"averaging_period": 1.5}, "strategy.averaging_period: must be in [0, 1]"),
        ("sequential", {"averaging_weight": 0.0}, "strategy.averaging_weight: must be in (0, 1]"),
        ("sequential", {"divergence": "l2"}, "strategy.divergence"),
        ("joint", {"individual": True}, "strategy: joint and individual exclude each other"),
        ("joint", {"replay_per_class": 2}, "no task has a past; leave out replay_per_class"),
        ("individual", {"olora_weight": 1.0, "averaging_period": 0.5}, "leave out olora_weight, averaging_period"),
        ("sequential", {"ewc_weight": 1.0}, "strategy.ewc_weight: needs curvature.kind fisher, found None"),
        ("pm_gram", {"ewc_weight": 1.0}, "strategy.ewc_weight: needs curvature.kind fisher, found gram"),
        ("cofima", {"ewc_weight": 1.0}, "merge.method cofima keeps one task's Fisher"),
        ("average", {"olora_weight": 1.0}, "needs merge.method sequential and merge.max_rank null, to keep every A"),
    ],
)
def test_impossible_strategies_are_refused(tmp_path, method, changes, message):
    config = settings(tmp_path / "base", tmp_path, tmp_path / "run", method=method, strategy=changes)
    assert message in refusal(load_config, config)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("individual", {"base_kl_weight": 1.0}),
        ("pm", {"replay_per_class": 2, "base_kl_weight": 1.0, "divergence": "js"}),
        ("pm", {"ewc_weight": 10.0, "averaging_period": 0.5}),
        ("ewc", {"replay_per_class": 2}),
    ],
)
def test_strategies_combine_where_that_makes_sense(tmp_path, method, changes):
    config = load_config(settings(tmp_path / "base", tmp_path, tmp_path / "run", method=method, strategy=changes))
    assert {key: getattr(config.strategy, key) for key in changes} == changes
