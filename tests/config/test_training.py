"""`training:` is typed and in range before anything is made; what only the Trainer can tell is tried once before."""

from dataclasses import fields

import pytest
from helpers import refusal

from pm_hf.config.loading import load_config
from pm_hf.config.training import BELOW_ONE, OWN_FIELDS, RANGES, training_values
from pm_hf.training.task_trainer import training_arguments
from pm_hf.training.trainer import PMConfig

BASE = {"output_dir": "out", "model": {"base": "tiny"}, "stream": {"class_groups": 2}}
NAN = float("nan")


def config(**training):
    return load_config(BASE | {"training": training})


def problem(**training):
    return refusal(config, **training).removeprefix("config: ")


def test_the_fields_are_those_of_the_trainers_arguments():
    problems: list[str] = []
    training_values({field.name: None for field in fields(PMConfig)} | {"zebra": 1}, problems)
    assert "training: zebra are not fields of TrainingArguments" in problems  # and none is near
    own = {"perturbation_scale", "perturbation_probabilities", "perturbation_adapter", "task_index", *OWN_FIELDS}
    parent = {field.name for field in fields(PMConfig.__mro__[2])}
    assert {field.name for field in fields(PMConfig)} - parent == own
    assert {*RANGES, *BELOW_ONE} <= {field.name for field in fields(PMConfig)}


def defaults():
    """{field: default} of what `training` may set."""
    from pm_hf.config.training import MANAGED_ARGUMENTS

    made = PMConfig(output_dir="x")
    named = {field.name: field.default for field in fields(PMConfig) if field.name not in MANAGED_ARGUMENTS}
    return {name: value for name, value in named.items() if isinstance(value, int | float | str | None)} | {
        "dataloader_num_workers": made.dataloader_num_workers
    }


def test_every_default_is_taken_as_it_is():
    values = {name: value for name, value in defaults().items() if name != "output_dir"}
    problems: list[str] = []
    assert len(values) > 70
    assert training_values(values, problems) == values
    assert not problems


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ({"max_steps": "10"}, 10),
        ({"max_steps": "1e3"}, 1000),
        ({"per_device_train_batch_size": 8.0}, 8),
        ({"run_name": "1e3"}, "1e3"),
        ({"run_name": "007"}, "007"),
        ({"learning_rate": "1e-3"}, 1e-3),
        ({"learning_rate": 0}, 0),
        ({"num_train_epochs": 3}, 3),
        ({"num_train_epochs": "3"}, 3.0),
        ({"head_learning_rate": "1e-2"}, 1e-2),
        ({"lr_scheduler_type": "cosine"}, "cosine"),
        ({"lr_scheduler_kwargs": {"num_cycles": 0.5}}, {"num_cycles": 0.5}),
        ({"report_to": ["none"]}, ["none"]),
        ({"fsdp": True}, True),
        ({"fsdp": "full_shard"}, "full_shard"),
        ({"optim_args": "momentum=0.9,nesterov=true"}, "momentum=0.9,nesterov=true"),
        ({"warmup_steps": 0.1}, 0.1),
        ({"trackio_static_space_id": False}, False),
        ({"debug": "underflow_overflow"}, "underflow_overflow"),
    ],
    ids=str,
)
def test_a_value_has_its_fields_type(given, value):
    read = config(**given).training[next(iter(given))]
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rate": "fast"}, "training.learning_rate: expected float, found 'fast'"),
        ({"learning_rate": [1, 2]}, "training.learning_rate: expected float, found [1, 2]"),
        ({"learning_rate": NAN}, "training.learning_rate: expected a finite number, found nan"),
        ({"learning_rate": -1.0}, "training.learning_rate: must be at least 0, found -1.0"),
        ({"num_train_epochs": "abc"}, "training.num_train_epochs: expected float, found 'abc'"),
        ({"per_device_train_batch_size": 0}, "training.per_device_train_batch_size: must be at least 1, found 0"),
        ({"per_device_train_batch_size": 1.5}, "training.per_device_train_batch_size: expected int, found 1.5"),
        ({"per_device_eval_batch_size": 0}, "training.per_device_eval_batch_size: must be at least 1, found 0"),
        ({"gradient_accumulation_steps": 0}, "training.gradient_accumulation_steps: must be at least 1, found 0"),
        ({"max_grad_norm": NAN}, "training.max_grad_norm: expected a finite number, found nan"),
        ({"max_grad_norm": -1}, "training.max_grad_norm: must be at least 0, found -1"),
        ({"weight_decay": NAN}, "training.weight_decay: expected a finite number, found nan"),
        ({"head_learning_rate": NAN}, "training.head_learning_rate: expected a finite number, found nan"),
        ({"weight_decay": 1e30}, "training.weight_decay: must be in [0, 1e+08], found 1e+30"),
        ({"learning_rate": 1e31}, "training.learning_rate: expected a number of at most 1e+30 in magnitude"),
        ({"label_smoothing_factor": 2}, "training.label_smoothing_factor: must be in [0, 1], found 2"),
        ({"adam_beta1": 2.0}, "training.adam_beta1: must be in [0, 1), found 2.0"),
        ({"adam_beta2": 1}, "training.adam_beta2: must be in [0, 1), found 1"),
        ({"dataloader_num_workers": -1}, "training.dataloader_num_workers: must be in [0, 1024], found -1"),
        ({"max_steps": True}, "training.max_steps: expected int, found True"),
        ({"max_steps": -5}, "training.max_steps: must be at least -1, found -5"),
        ({"optim_args": "a"}, "training.optim_args: expected key=value,key=value, found 'a'"),
        ({"optim_args": "momentum=0.9,eps=nan"}, "training.optim_args: expected a finite number, found nan"),
        (
            {"lr_scheduler_kwargs": '{"num_cycles": NaN}'},
            "training.lr_scheduler_kwargs.num_cycles: expected a finite number, found nan",
        ),
        ({"lr_scheduler_kwargs": "{a"}, "training.lr_scheduler_kwargs: expected JSON, found '{a'"),
        ({"lr_scheduler_kwargs": '{"a":' * 5000}, "training.lr_scheduler_kwargs: expected JSON, found "),
        ({"run_name": 2024}, "training.run_name: expected str or null, found 2024; put it into quotes"),
        ({"run_name": "a\0b"}, r"training.run_name: expected text, found 'a\x00b' with a character that no file holds"),
        (
            {"save_strategy": False},
            "training.save_strategy: expected no or steps or epoch or best, found False; "
            'YAML reads no as false: write "no"',
        ),
        ({"log_level": "loud"}, "training.log_level: expected detail or debug or info or "),
        ({"optim": "zebra"}, "training.optim: expected adamw_torch or "),
        ({"debug": ["zebra"]}, "training.debug[0]: expected underflow_overflow or "),
        ({"bf16": "yes"}, "training.bf16: expected bool, found 'yes'"),
        ({"parallelism_config": {"a": 1}}, "training.parallelism_config: expected null, found {'a': 1}"),
        (
            {"lr_scheduler_kwargs": {"num_cycles": [1, {"x": NAN}]}},
            "training.lr_scheduler_kwargs.num_cycles[1].x: expected a finite number, found nan",
        ),
    ],
    ids=str,
)
def test_a_wrong_value_is_told_by_its_name(given, message):
    assert problem(**given).startswith(message)


def test_all_of_them_stand_in_one_error_with_everything_else():
    wrong = {
        "learning_rate": "fast",
        "num_train_epochs": 1,
        "max_steps": [],
        "zebra": 1,
        3: 4,
        "seed": 1,
        "adam_beta1": 2,
    }
    message = refusal(load_config, BASE | {"training": wrong, "lora": {"r": 0}, "seed": 2**40, "typo": 1})
    for part in (
        "config: 8 problems: ",
        "training: 3, zebra are not fields of TrainingArguments",
        "training.learning_rate: expected float",
        "training.max_steps: expected int, found []",
        "training: seed are decided by pm_hf",
        "training.adam_beta1: must be in [0, 1)",
        "typo: unknown key",
        "lora.r: must be in [1, 8192], found 0",
        "seed: must be in [0, 4294967296)",
    ):
        assert part in message


def test_a_problem_of_the_whole_group_does_not_hide_another():
    message = problem(zebra=1, eval_strategy="epoch", seed=3)
    assert "zebra are not fields" in message
    assert "eval_strategy and load_best_model_at_end need rows to evaluate on" in message
    assert "seed are decided by pm_hf" in message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optim": "sgd", "optim_args": "momentum=x"}, "no optimizer and schedule can be made: could not convert"),
        ({"optim": "lomo"}, "no optimizer and schedule can be made: You need to install `lomo_optim`"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "no optimizer and schedule can be made: One of min_lr"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"x": 1}}, "unexpected keyword argument 'x'"),
        ({"lr_scheduler_kwargs": "abc"}, "no optimizer and schedule can be made: "),
        ({"dataloader_persistent_workers": True}, "no data loader can be made: persistent_workers option needs"),
        ({"dataloader_multiprocessing_context": "fork"}, "no data loader can be made: multiprocessing_context"),
        (
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"zebra": 1}},
            "no checkpointed activation",
        ),
        ({"use_liger_kernel": True}, "no model with Liger kernels can be made: No module named 'liger_kernel'"),
        ({"accelerator_config": "none.json"}, "No such file or directory: 'none.json'"),
        ({"accelerator_config": {"zebra": 1}}, "unexpected keyword argument 'zebra'"),
    ],
    ids=str,
)
def test_what_the_trainer_could_not_be_made_of_is_refused(tmp_path, given, message):
    settings = config(**given)
    said = refusal(training_arguments, settings, tmp_path / "run", 0)
    assert said.startswith("training: ")
    assert message in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "given",
    [
        {"optim": "sgd", "optim_args": "momentum=0.9"},
        {"optim": "adafactor"},
        {"optim": "rmsprop"},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-5}},
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": '{"num_cycles": 0.5}'},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 3}},
        {"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 5},
        {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 4, "dataloader_persistent_workers": True},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
        {"learning_rate": 0.0, "weight_decay": 1e8, "adam_epsilon": 0.0},
    ],
    ids=str,
)
def test_what_the_trainer_can_be_made_of_is_taken(tmp_path, given):
    args = training_arguments(config(use_cpu=True, **given), tmp_path, 0)
    assert {name: getattr(args, name) for name in given if name != "lr_scheduler_kwargs"} == {
        name: value for name, value in given.items() if name != "lr_scheduler_kwargs"
    }


def test_the_trial_leaves_the_random_state_alone(tmp_path):
    import torch

    torch.manual_seed(3)
    before = torch.get_rng_state()
    training_arguments(config(use_cpu=True, activation_checkpointing=True), tmp_path, 0)
    assert torch.equal(torch.get_rng_state(), before)
