from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml
from helpers import refusal, with_changes
from transformers import TrainingArguments

from pm_hf.config.kinds import STREAM_KINDS
from pm_hf.config.loading import TRANSFORMERS_TRAINING, load_config, save_config
from pm_hf.config.presets import PRESETS, preset_notes
from pm_hf.config.schema import RunConfig
from pm_hf.config.training import MANAGED_ARGUMENTS
from pm_hf.errors import InputError

EVERY = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))
CONFIGS = [path for path in EVERY if path.parent.name != "launch"]  # whose files are the launcher's
SMALL = {"output_dir": "out", "method": "pm", "model": {"base": "tiny"}, "stream": {"class_groups": 2}}


def small(**changes):
    """The smallest valid settings, with dotted changes."""
    return with_changes(SMALL, changes)


def leaves(kind, path=""):
    """Dotted name of every field that is not a group of settings."""
    for field in fields(kind):
        hint = get_type_hints(kind)[field.name]
        if is_dataclass(hint):
            yield from leaves(hint, f"{path}{field.name}.")
        else:
            yield f"{path}{field.name}"


LEAVES = list(leaves(RunConfig))


def test_method_fills_what_the_yaml_leaves_out():
    config = load_config(small(method="pm_gram_lda"))
    assert (config.curvature.kind, config.merge.freedom, config.head.kind) == ("gram", "free", "lda")
    assert config.perturbation.scale == 0.5
    assert config.trains is True
    assert config.lora.r == 8  # a default that no method sets


def test_yaml_beats_the_method_and_the_command_line_beats_the_yaml(tmp_path):
    path = tmp_path / "c.yaml"
    changes = {"head__kind": "linear", "perturbation__scale": 0.25, "lora__r": 4}
    path.write_text(yaml.safe_dump(small(method="pm_gram_lda", **changes)))
    config = load_config(path, ["lora.r=16", "perturbation.scale=0"])
    assert config.head.kind == "linear"
    assert config.lora.r == 16
    assert config.perturbation.scale == 0
    assert config.curvature.kind == "gram"


def test_method_given_on_the_command_line_fills_the_settings():
    config = load_config(small(method="pm"), ["method=sequential"])
    assert (config.method, config.merge.method, config.curvature.kind) == ("sequential", "sequential", None)


def test_null_in_the_yaml_takes_the_method_s_value():
    assert load_config(small(method="pm_gram", curvature__kind=None)).curvature.kind == "gram"


@pytest.mark.parametrize(
    "override",
    [["lora.r=3"], ["--lora.r=3"], ["--lora.r", "3"]],
)
def test_override_forms_mean_the_same(override):
    assert load_config(SMALL, override).lora.r == 3


@pytest.mark.parametrize(
    "overrides", [["--stream.shared_labels"], ["--stream.shared-labels", "seed=5"], ["--stream.shared_labels", "true"]]
)
def test_flag_without_a_value_is_true(overrides):
    assert load_config(SMALL, overrides).stream.shared_labels is True


def test_flag_followed_by_another_option_keeps_both():
    config = load_config(SMALL, ["--stream.shared_labels", "--seed", "7"])
    assert config.stream.shared_labels is True
    assert config.seed == 7


def test_overrides_do_not_change_the_mapping_given():
    settings = small()
    load_config(settings, ["lora.r=3", "method=best"])
    assert settings == SMALL


def test_number_in_scientific_notation_is_a_number():
    config = load_config(SMALL, ["merge.coefficient=1e-3", "training.learning_rate=1e-3"])
    assert config.merge.coefficient == 1e-3
    assert float(config.training["learning_rate"]) == 1e-3


def test_override_can_hold_a_list_or_a_mapping():
    config = load_config(SMALL, ["lora.target_modules=[key, value]", "stream.class_groups={a: [x], b: [y]}"])
    assert config.lora.target_modules == ["key", "value"]
    assert config.stream.class_groups == {"a": ["x"], "b": ["y"]}


def test_null_class_groups_stays_none():
    config = load_config(small(stream__class_groups=None, stream__tasks=[{"name": "a"}]))
    assert config.stream.class_groups is None
    assert [task.name for task in config.stream.tasks] == ["a"]


@pytest.mark.parametrize("groups", [3, "groups.json", {"a": ["x"]}])
def test_class_groups_keep_their_type(groups):
    assert load_config(small(stream__class_groups=groups)).stream.class_groups == groups


def test_all_problems_stand_in_one_error():
    config = small(typo=1, method="magic", lora__r="eight", stream__scenario="other", model__bass="x")
    message = refusal(load_config, config, ["nonsense"])
    assert "config: 6 problems" in message
    assert "typo: unknown key; valid: output_dir, method, seed" in message
    assert "model.bass: unknown key, did you mean model.base?; valid: base, revision" in message
    assert f"method: unknown 'magic'; valid: {', '.join(PRESETS)}" in message
    assert "lora.r: expected int, found 'eight'" in message
    assert "stream.scenario: expected class_incremental or domain_incremental or null, found 'other'" in message
    assert "override 'nonsense': expected key=value or --key value" in message


def test_impossible_values_are_listed_together():
    message = refusal(
        load_config,
        {"lora": {"r": 0}, "curvature": {"samples": 0, "shrinkage": 1}, "merge": {"max_rank": 0}, "head": {"ridge": 0}}
        | {"stream": {"class_groups": 2, "domain_column": "d", "train_per_class": 0}},
    )
    for expected in (
        "output_dir: required",
        "model.base: required",
        "lora.r: must be in [1, 8192], found 0",
        "curvature.samples: must be at least 1",
        "curvature.shrinkage: must be in [0, 1)",
        "merge.max_rank: must be at least 1",
        "head.ridge: must be positive",
        "stream.train_per_class: must be at least 1",
        "task_configs is needed, found class_groups, domain_column",
    ):
        assert expected in message


def test_unknown_keys_and_impossible_values_are_reported_at_once():
    message = refusal(load_config, small(typo=1, lora__r=0))
    assert "typo: unknown key" in message
    assert "lora.r: must be in [1, 8192], found 0" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"stream__class_groups": None},
            "task_column, task_files, task_configs is needed, found none",
        ),
        ({"head__strict": True}, "head.strict: belongs to head.kind: lda"),
        ({"trains": False}, "trains: false needs head.kind: lda"),
        ({"method": "sequential", "merge__method": "pm"}, "method pm needs fisher or gram, or merge.coefficient"),
        ({"method": "pm_gram_lda", "merge__coefficient": 0.5}, "freedom free has no single coefficient"),
        ({"method": "average", "merge__freedom": "module"}, "merge.freedom: module belongs to merge.method pm"),
        ({"lora": 3}, "lora: expected settings by name, found 3"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(change, message):
    assert message in refusal(load_config, small(**change))


@pytest.mark.parametrize(
    "change",
    [
        {"lora__dropout": 2.0},
        {"lora__alpha": 0},
        {"stream__max_length": 0},
        {"seed": -1},
        {"merge__coefficient": float("nan")},
        {"max_forgetting": float("nan")},
    ],
    ids=lambda change: next(iter(change)),
)
def test_value_that_can_only_fail_later_is_refused(change):
    assert next(iter(change)).replace("__", ".") in refusal(load_config, small(**change))


@pytest.mark.parametrize("key", LEAVES)
def test_every_field_s_type_is_checked(key):
    wrong = {
        "training": 3,
        "merge.options": 3,
        "stream.answers": 3,
        "stream.class_groups": [1],
        "lora.target_modules": 3,
    }.get(key, {"no": "such"})
    message = refusal(load_config, small(**{key.replace(".", "__"): wrong}))
    assert f"{key}: expected " in message or (key == "method" and "method: unknown" in message)


def test_every_group_of_settings_is_covered_by_the_type_check():
    assert len(LEAVES) >= 46
    assert {key.split(".")[0] for key in LEAVES} == {field.name for field in fields(RunConfig)}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", True),
        ("seed", 1.5),
        ("lora__dropout", True),
        ("stream__shared_labels", 1),
        ("lora__target_modules", [1]),
    ],
)
def test_python_s_loose_types_do_not_pass(key, value):
    assert "expected" in refusal(load_config, small(**{key: value}))


def test_problems_inside_a_list_of_tasks_name_the_entry():
    config = small(stream__class_groups=None, stream__tasks=[{"name": "a"}, {"nme": "b"}, {"name": 3}])
    message = refusal(load_config, config)
    assert "stream.tasks[1].nme: unknown key" in message
    assert "stream.tasks[2].name: expected str, found 3" in message


def test_training_keys_that_the_learner_sets_are_refused():
    message = refusal(load_config, small(training={"output_dir": "x", "seed": 3, "learning_rate": 1e-3}))
    assert "training: output_dir, seed are decided by pm_hf, which never uploads; remove them" in message


def test_managed_keys_are_real_training_arguments():
    from pm_hf.training.trainer import PMConfig

    assert {field.name for field in fields(PMConfig)} >= MANAGED_ARGUMENTS


def test_unknown_training_keys_are_refused():
    message = refusal(
        load_config, small(training={"learning_rte": 1e-3, "epochs": 3, "learning_rate": "1e-3", 1: 2}, lora__r=0)
    )
    assert "training: 1, epochs, learning_rte are not fields of TrainingArguments" in message
    assert "lora.r: must be in [1, 8192], found 0" in message


def test_training_number_written_as_text_reaches_the_trainer_as_a_number(tmp_path):
    from pm_hf.training.task_trainer import training_arguments

    config = load_config(small(training={"learning_rate": "1e-3"}))
    assert training_arguments(config, tmp_path, 0).learning_rate == 1e-3


def test_curvature_and_scores_have_the_precision_that_accelerate_trains_with(tmp_path):
    import torch

    from pm_hf.training.task_trainer import precision, training_arguments

    found = [
        precision(training_arguments(load_config(small(training={"use_cpu": True, **asked})), tmp_path, 0))
        for asked in ({}, {"bf16": True}, {"fp16": True})
    ]
    assert found == [None, torch.bfloat16, None]


@pytest.mark.parametrize("method", PRESETS)
def test_resolved_config_reads_back_equal(tmp_path, method):
    config = load_config(
        small(method=method, training={"learning_rate": "3e-3", "bf16": False}, stream__class_groups={"ä": ["1"]})
    )
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert load_config(config) == config


@pytest.mark.parametrize(
    ("kind", "method", "merge"),
    [
        ("text-classification", "best", "pm"),
        ("image-classification", "best", "pm"),
        ("causal-lm", "best", "average"),
        ("seq2seq-lm", "best", "average"),
    ],
)
def test_what_a_yaml_leaves_open_is_the_kinds(kind, method, merge):
    stream = {"kind": kind, "tasks": [{"name": "a", "train": "t.csv", "test": "t.csv"}]}
    config = load_config({"output_dir": "out", "model": {"base": "tiny"}, "stream": stream, "method": None})
    assert (config.method, config.merge.method) == (method, merge)
    assert config.training == STREAM_KINDS[kind].training
    assert (config.lora.r, config.lora.alpha) == (8, 16)


RATE = {"learning_rate", "head_learning_rate", "lr_scheduler_type", "per_device_train_batch_size"}


@pytest.mark.parametrize(
    ("given", "filled"),
    [
        ({}, {*RATE, "num_train_epochs"}),
        ({"learning_rate": 1e-4}, {"num_train_epochs"}),  # the head's too, with transformers' schedule and batch size
        ({"head_learning_rate": 0.5}, {*RATE, "num_train_epochs"}),
        ({"per_device_train_batch_size": 4}, {*RATE, "num_train_epochs"}),
        ({"max_steps": 7}, RATE),
        ({"num_train_epochs": 2}, RATE),
        ({"learning_rate": None}, {*RATE, "num_train_epochs"}),
    ],
)
def test_what_is_given_of_the_training_is_kept(given, filled):
    kept = {name: value for name, value in given.items() if value is not None}
    defaults = STREAM_KINDS["text-classification"].training
    assert load_config(small(training=given)).training == {name: defaults[name] for name in filled} | kept


def test_alpha_is_twice_the_rank():
    assert load_config(small(lora={"r": 3})).lora.alpha == 6
    assert load_config(small(lora={"r": 3, "alpha": 4})).lora.alpha == 4


def test_settings_of_a_run_before_the_kinds_had_defaults_are_those_of_then():
    saved = load_config(small()).to_dict()
    saved["training"] = {}
    assert load_config(saved).training == TRANSFORMERS_TRAINING
    defaults = TrainingArguments(output_dir="out", use_cpu=True)
    assert {name: getattr(defaults, name) for name in TRANSFORMERS_TRAINING} == TRANSFORMERS_TRAINING


def test_a_method_for_classifiers_says_so_of_a_language_model():
    stream = {"kind": "causal-lm", "tasks": [{"name": "a", "train": "t.csv", "test": "t.csv"}]}
    (note,) = preset_notes(load_config(small(method="pm_gram_lda", stream=stream)))
    assert "method pm_gram_lda is for classifiers: causal-lm has no class head" in note
    for method in ("pm", "best"):
        assert not preset_notes(load_config(small(method=method, stream=stream)))
    assert not preset_notes(load_config(small(method="best")))


def test_best_of_a_language_model_rehearses_and_its_coefficient_can_be_another():
    stream = {"kind": "causal-lm", "tasks": [{"name": "a", "train": "t.csv", "test": "t.csv"}]}
    config = load_config(small(method="best", stream=stream))
    assert (config.strategy.replay, config.merge.coefficient, config.head.kind) == ("generated", 1.0, "none")
    for other in ("average", "search", 0.5):
        changed = load_config(small(method="best", stream=stream, merge__coefficient=other))
        assert (changed.merge.coefficient, changed.computes_coefficient) == (other, False)
    plain = load_config(config, values={"method": "pm"})
    assert (plain.strategy.replay, plain.merge.coefficient, plain.measures_curvature) == ("none", None, True)
    assert load_config(plain, values={"merge.coefficient": "fisher"}).measures_curvature


def test_a_language_model_that_is_not_trained_has_analytic_answers():
    stream = {"kind": "causal-lm", "tasks": [{"name": "a", "train": "t.csv", "test": "t.csv"}]}
    frozen = load_config(small(method="frozen", stream=stream))
    assert (frozen.head.kind, frozen.head.means, frozen.trains) == ("lda", "task", False)
    assert not preset_notes(frozen)
    bare = load_config(small(method="frozen", stream=stream, head__kind="none"))
    assert (bare.head.kind, bare.trains) == ("none", False)  # the base, untouched
    average = load_config(frozen, values={"method": "average"})
    assert (average.head.kind, average.trains) == ("none", True)
    assert load_config(average, values={"method": "frozen"}).head.kind == "lda"
    assert load_config(small(method="joint", trains=False, stream=stream)).head.kind == "none"


def test_list_of_tasks_reads_back_equal(tmp_path):
    config = load_config(small(stream__class_groups=None, stream__tasks=[{"name": "a", "train": "t.csv"}]))
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_shipped_config_loads(path):
    config = load_config(path)
    assert config.model.base
    assert config.method in PRESETS


def test_shipped_configs_were_found():
    assert len(CONFIGS) == 25


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("a: [1", "is not valid YAML"),
        ("- 1\n- 2\n", "expected a mapping of settings, found list"),
        ("", "expected a mapping of settings, found NoneType"),
    ],
)
def test_unreadable_config_is_one_clear_error(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_text(text)
    assert message in refusal(load_config, path)


def test_override_that_goes_into_a_value_is_refused():
    assert "override seed.deep: seed is not a group of settings" in refusal(load_config, small(seed=1), ["seed.deep=2"])


@pytest.mark.parametrize("arguments", [["--seed", "3"], ["seed=1", "--seed=3"], ["method=best", "--seed", "3"]])
def test_command_line_accepts_every_form_of_an_override(tmp_path, monkeypatch, capsys, arguments):
    from pm_hf import cli
    from pm_hf.runs import learner

    (tmp_path / "c.yaml").write_text(yaml.safe_dump(SMALL))
    seeds = []

    def stop(config):
        seeds.append(config.seed)
        raise InputError("stopped here")

    monkeypatch.setattr(learner, "learn", stop)
    assert cli.main(["train", "--config", str(tmp_path / "c.yaml"), *arguments]) == cli.BAD_INPUT
    assert "stopped here" in capsys.readouterr().err
    assert seeds == [3]


def test_another_method_on_a_resolved_config_brings_its_own_settings():
    resolved = load_config(small(method="pm", lora__r=4))
    other = load_config(resolved, values={"method": "frozen"})
    assert (other.merge.method, other.perturbation.scale, other.curvature.kind) == ("sequential", 0.0, None)
    assert (other.head.kind, other.trains, other.lora.r) == ("lda", False, 4)
    kept = load_config(resolved, values={"perturbation.scale": 0.25, "method": "pm_gram"})
    assert (kept.perturbation.scale, kept.curvature.kind, kept.merge.freedom) == (0.25, "gram", "free")


def test_a_split_decides_the_scenario():
    by_domain = small()
    by_domain["stream"] = {"train": "a.csv", "test": "b.csv", "domain_column": "d"}
    assert load_config(by_domain).stream.scenario == "domain_incremental"
    assert load_config(small()).stream.scenario == "class_incremental"
    by_domain["stream"]["scenario"] = "class_incremental"
    assert "domain_column makes a domain_incremental stream" in refusal(load_config, by_domain)


@pytest.mark.parametrize("key", ["hub_token", "push_to_hub", "save_only_model"])
def test_nothing_that_uploads_or_holds_a_token_is_a_setting(key):
    assert f"training: {key} are decided by pm_hf" in refusal(load_config, small() | {"training": {key: "secret"}})


def test_a_run_of_before_a_setting_existed_is_read_as_what_it_did():
    saved = load_config(small(method="best")).to_dict()
    assert (saved["head"]["training"], saved["head"]["means"]) == ("seen", "class")
    for key in ("training", "means"):
        del saved["head"][key]
    before = load_config(saved)
    assert (before.head.training, before.head.means) == ("task", "class")
    again = load_config(saved, ["method=best"])
    assert again.head.training == "task"
    other = load_config(saved | {"method": "pm"}, ["method=best", "head.kind=lda"])
    assert other.head.training == "seen"


def test_an_option_with_a_key_of_its_own_takes_effect():
    config = load_config(small(merge__options={"on_zero_curvature": "error"}))
    assert config.merge.on_zero_curvature == "error"
    assert load_config(config.to_dict()).merge.on_zero_curvature == "error"
    assert load_config(small()).merge.on_zero_curvature == "average"


@pytest.mark.parametrize(
    ("merge", "names"),
    [
        ({"on_zero_curvature": "average", "options": {"on_zero_curvature": "error"}}, "on_zero_curvature"),
        ({"method": "coma", "coefficient": 0.3, "options": {"coefficient": "0.5"}}, "coefficient"),
    ],
)
def test_two_answers_to_one_setting_of_the_merge_are_refused(merge, names):
    assert f"merge.{names} is" in refusal(load_config, small(merge=merge))
    assert f"merge.options.{names}" in refusal(load_config, small(merge=merge))
    merge["options"][names] = merge[names]
    load_config(small(merge=merge))


def test_a_saved_run_whose_option_had_no_effect_is_read_as_what_it_did():
    saved = load_config(small()).to_dict()
    saved["merge"]["options"] = {"on_zero_curvature": "error"}
    config = load_config(saved)
    assert (config.merge.on_zero_curvature, config.merge.options) == ("average", {})
    saved = load_config(small(method="coma", merge__options={"coefficient": 0.5})).to_dict()
    assert load_config(saved).merge.options == {"coefficient": 0.5}
    saved["merge"]["coefficient"] = 0.3
    config = load_config(saved)
    assert (config.merge.coefficient, config.merge.options) == (0.3, {})


def test_a_wrong_merging_method_is_told_those_of_a_stream():
    valid = "pm or average or coma or sequential or cofima or magmax or opcm or slao or null"
    assert f"merge.method: expected {valid}, found 'tias'" in refusal(load_config, small(merge__method="tias"))


@pytest.mark.parametrize("rank", [4, 4.0, "4"])
def test_alpha_is_twice_the_rank_however_that_is_written(rank):
    config = load_config(small(lora={"r": rank}))
    assert (config.lora.r, config.lora.alpha) == (4, 8)


def test_a_run_by_steps_comes_back_without_epochs(tmp_path):
    config = load_config(small(training={"max_steps": 3}))
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert "num_train_epochs" not in config.training


def test_a_character_that_yaml_writes_and_does_not_read_comes_back(tmp_path):
    config = load_config(small(stream__text_column="a\x85b"))
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_a_column_of_domains_without_a_name_is_one_of_domains():
    config = load_config(small(stream__class_groups=None, stream__domain_column=""))
    assert config.stream.scenario == "domain_incremental"
