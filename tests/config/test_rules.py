"""Settings of a strategy that contradict each other are refused before anything runs."""

import pytest
from helpers import refusal
from helpers.streams import language_settings, settings

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
        ("cofima", {"ewc_weight": 1.0}, "merge.method cofima keeps one task's curvature"),
        ("best", {"drift_weight": 1.0}, "strategy.drift_weight: needs curvature.kind gram, found fisher"),
        ("individual", {"drift_weight": 1.0}, "no task has a past; leave out drift_weight"),
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
        ("pm_gram", {"drift_weight": 1.0, "base_kl_weight": 1.0}),
    ],
)
def test_strategies_combine_where_that_makes_sense(tmp_path, method, changes):
    config = load_config(settings(tmp_path / "base", tmp_path, tmp_path / "run", method=method, strategy=changes))
    assert {key: getattr(config.strategy, key) for key in changes} == changes


WRITTEN = {"strategy__replay": "generated"}


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("joint", WRITTEN, "strategy.replay: generated: with joint or individual no task has a past"),
        ("individual", WRITTEN, "strategy.replay: generated: with joint or individual no task has a past"),
        ("replay", WRITTEN, "replay_per_class keeps training rows instead; choose one of the two"),
        ("average", WRITTEN | {"trains": False}, "trains: false trains nothing on the written rows"),
        ("average", WRITTEN | {"training__fsdp": "full_shard"}, "leave out training.fsdp and training.deepspeed"),
        ("average", WRITTEN | {"strategy__pool_rows": 0}, "strategy.pool_rows: must be at least 1"),
        ("average", {"strategy__replay": "real"}, "strategy.replay: expected none or generated, found 'real'"),
        ("average", {"merge__coefficient": "search"}, "set strategy.replay: generated, or give a number"),
        (
            "average",
            {"merge__coefficient": "find"},
            "merge.coefficient: expected float or average or fisher or search or null, found 'find'",
        ),
        ("average", {"merge__coefficient": 1.5}, "merge.coefficient: must be average or fisher or search or in [0, 1]"),
        ("average", {"merge__coefficient": "fisher"}, "fisher is the closed form of merge.method pm"),
        ("pm_gram", {"merge__coefficient": "fisher"}, "found pm with gram"),
        ("pm_gram", {"merge__coefficient": "average"}, "freedom free has no single coefficient"),
        ("magmax", WRITTEN | {"merge__coefficient": "search"}, "which merge.method magmax with train_from"),
        (
            "average",
            WRITTEN | {"merge__coefficient": "search", "merge__train_from": "last"},
            "search needs steps from the running merge, which merge.method average with train_from last",
        ),
        (
            "pm_gram",
            WRITTEN | {"merge__coefficient": "search"},
            "merge.coefficient: freedom free has no single coefficient",
        ),
    ],
)
def test_written_rows_and_the_search_are_refused_where_they_make_no_sense(tmp_path, method, changes, message):
    assert message in refusal(load_config, language_settings(tmp_path, tmp_path / "run", method=method, **changes))


def test_classifiers_write_no_rows(tmp_path):
    config = settings(tmp_path / "base", tmp_path, tmp_path / "run", method="average", strategy__replay="generated")
    assert "text-classification cannot; use replay_per_class" in refusal(load_config, config)


@pytest.mark.parametrize("method", ["pm", "average", "sequential", "slao", "coma"])
def test_written_rows_combine_with_the_methods(tmp_path, method):
    config = load_config(language_settings(tmp_path, tmp_path / "run", method=method, **WRITTEN))
    assert config.strategy.replay == "generated"
    if method in ("pm", "average"):
        asked = WRITTEN | {"merge__coefficient": "search"}
        config = load_config(language_settings(tmp_path, tmp_path / "run", method=method, **asked))
        assert config.strategy.replay == "generated"
        assert config.merge.coefficient == "search"
