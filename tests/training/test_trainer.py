"""The perturbed training step: what it draws, what it scales, what it adds to the gradient, what it refuses."""

import math
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from helpers.models import (
    OLD_NAME,
    Watch,
    activate_all,
    assert_equal_states,
    batch,
    logged,
    lora_bert,
    pin,
    quick_arguments,
    rows,
    trained_state,
)
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import HfArgumentParser, Trainer, TrainingArguments

import pm_hf.training.trainer
from pm_hf import InputError, PerturbationArguments, PMConfig, PMTrainer
from pm_hf.models.contexts import scaled_adapter
from pm_hf.models.lora import trainable_lora_adapters
from pm_hf.training.trainer import perturbation_factor

pytestmark = pytest.mark.filterwarnings(OLD_NAME)
THIRDS = (1 / 3, 1 / 3, 1 / 3)


def make_trainer(folder, model=None, callbacks=None, **settings) -> PMTrainer:
    args = quick_arguments(folder, PMConfig, **settings)
    return PMTrainer(model=model or lora_bert(), args=args, train_dataset=rows(24), callbacks=callbacks)


def scalings(model) -> list[dict]:
    return [dict(layer.scaling) for layer in model.modules() if isinstance(layer, LoraLayer)]


# ---- the trajectory


def test_scale_zero_repeats_the_plain_trainer_bit_for_bit_with_dropout(tmp_path):
    args = quick_arguments(tmp_path, TrainingArguments, weight_decay=0.1)
    plain = Trainer(model=lora_bert(dropout=0.2), args=args, train_dataset=rows(24))
    plain.train()
    ours = make_trainer(tmp_path, lora_bert(dropout=0.2), perturbation_scale=0.0, weight_decay=0.1)
    start = trained_state(ours.model)
    ours.train()
    assert_equal_states(trained_state(plain.model), trained_state(ours.model))
    assert logged(plain, "loss") == logged(ours, "loss")
    assert logged(plain, "grad_norm") == logged(ours, "grad_norm")
    assert len(logged(ours, "loss")) == 6
    assert all(not torch.equal(start[name], value) for name, value in trained_state(ours.model).items())


def test_a_positive_scale_changes_the_trajectory(tmp_path):
    states = []
    for scale in (0.0, 0.5):
        trainer = make_trainer(tmp_path, perturbation_scale=scale)
        trainer.train()
        states.append(trained_state(trainer.model))
    assert any(factor != 1 for factor in trainer.perturbation_counts)
    left, right = states
    assert all(not torch.equal(left[name], right[name]) for name in left)


def test_drawing_factors_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    for step in range(100):
        perturbation_factor(0.5, THIRDS, seed=0, task=0, step=step, micro_step=0, rank=0)
    assert torch.equal(before, torch.get_rng_state())


# ---- the factors


def test_the_factor_is_a_pure_function_of_each_of_its_five_coordinates():
    origin = {"seed": 1, "task": 2, "step": 3, "micro_step": 4, "rank": 5}
    again = [perturbation_factor(0.5, THIRDS, **origin) for _ in range(3)]
    assert len(set(again)) == 1
    for name in origin:
        along = [perturbation_factor(0.5, THIRDS, **origin | {name: value}) for value in range(40)]
        assert set(along) == {1.0, 1.5, 0.5}, name
        assert along == [perturbation_factor(0.5, THIRDS, **origin | {name: value}) for value in range(40)]


def test_coordinates_with_the_same_digits_in_other_places_are_independent():
    left = [perturbation_factor(0.5, THIRDS, seed=0, task=0, step=i, micro_step=1, rank=0) for i in range(300)]
    right = [perturbation_factor(0.5, THIRDS, seed=0, task=0, step=1, micro_step=i, rank=0) for i in range(300)]
    agreeing = sum(a == b for a, b in zip(left, right, strict=True)) / 300
    assert abs(agreeing - 1 / 3) < 0.1


@pytest.mark.parametrize("probabilities", [THIRDS, (0.5, 0.25, 0.25), (0.0, 0.5, 0.5), (1.0, 0.0, 0.0)])
def test_frequencies_match_the_probabilities(probabilities):
    draws = 20_000
    found = Counter(
        perturbation_factor(0.3, probabilities, seed=0, task=1, step=step, micro_step=0, rank=0)
        for step in range(draws)
    )
    expected = dict(zip((1.0, 1.3, 0.7), probabilities, strict=True))
    assert set(found) == {factor for factor, p in expected.items() if p}
    chi_square = sum((found[factor] - draws * p) ** 2 / (draws * p) for factor, p in expected.items() if p)
    assert chi_square < 13.8  # 0.1 % of samples of the right distribution exceed this with 2 degrees of freedom


def test_every_logged_factor_is_the_pure_functions(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=12, task_index=4, seed=11)
    trainer.train()
    expected = [perturbation_factor(0.5, THIRDS, seed=11, task=4, step=s, micro_step=0, rank=0) for s in range(12)]
    assert logged(trainer, "perturbation_factor") == expected
    assert trainer.perturbation_counts == Counter(expected)
    assert len(set(expected)) == 3


def test_the_log_holds_the_mean_since_the_last_log(tmp_path):
    trainer = make_trainer(tmp_path, logging_steps=3)
    trainer.train()
    factors = [perturbation_factor(0.5, THIRDS, seed=3, task=0, step=s, micro_step=0, rank=0) for s in range(6)]
    assert logged(trainer, "perturbation_factor") == [sum(factors[:3]) / 3, sum(factors[3:]) / 3]


def test_gradient_accumulation_draws_one_factor_for_each_micro_step(tmp_path, monkeypatch):
    calls = []

    def record(*args, **kwargs):
        calls.append((kwargs["step"], kwargs["micro_step"]))
        return perturbation_factor(*args, **kwargs)

    monkeypatch.setattr(pm_hf.training.trainer, "perturbation_factor", record)
    trainer = make_trainer(tmp_path, max_steps=3, gradient_accumulation_steps=4, per_device_train_batch_size=1)
    trainer.train()
    assert calls == [(step, micro) for step in range(3) for micro in range(4)]
    factors = [perturbation_factor(0.5, THIRDS, seed=3, task=0, step=0, micro_step=m, rank=0) for m in range(4)]
    assert logged(trainer, "perturbation_factor")[0] == sum(factors) / 4


def test_training_twice_with_one_trainer_draws_the_same_factors(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, seed=2)
    drawn = []
    for _ in range(4):
        trainer.train()
        drawn += [entry["perturbation_factor"] for entry in trainer.state.log_history if "loss" in entry]
    expected = perturbation_factor(0.5, THIRDS, seed=2, task=0, step=0, micro_step=0, rank=0)
    assert drawn == [expected] * 4


# ---- what is scaled, and when


def test_only_the_trained_adapter_is_scaled_in_every_layer_through_forward_and_backward(tmp_path, monkeypatch):
    pin(monkeypatch, 1.5)
    model = activate_all(lora_bert("merged", "task"), "task")
    before, during = scalings(model), []
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]

    def watch(module, inputs, output):
        during.append(("forward", scalings(model)))
        output.register_hook(lambda _: during.append(("backward", scalings(model))))

    for layer in layers:
        layer.register_forward_hook(watch)
    trainer = make_trainer(tmp_path, model, max_steps=2)
    trainer.train()
    expected = [{"merged": 2.0, "task": 3.0}] * len(layers)
    assert len(layers) == 4
    assert Counter(kind for kind, _ in during) == {"forward": 8, "backward": 8}
    assert all(seen == expected for _, seen in during)
    assert scalings(model) == before == [{"merged": 2.0, "task": 2.0}] * 4


def test_the_perturbed_loss_is_that_of_a_model_whose_product_was_multiplied(tmp_path, monkeypatch):
    pin(monkeypatch, 0.5)
    examples = batch(rows(24))
    trainer = make_trainer(tmp_path, max_steps=1, per_device_train_batch_size=24)
    trainer.train()
    (loss,) = logged(trainer, "loss")
    by_hand = lora_bert()
    for name, parameter in by_hand.named_parameters():
        if "lora_B" in name:
            parameter.data *= 0.5
    assert loss == pytest.approx(by_hand(**examples).loss.item(), rel=2e-6)
    assert loss != pytest.approx(lora_bert()(**examples).loss.item(), rel=2e-5)


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_scaling_is_restored_after_an_exception(tmp_path, monkeypatch, place):
    pin(monkeypatch, 1.5)
    model = activate_all(lora_bert("merged", "task"), "task")
    before = scalings(model)

    def fail(*_):
        assert scalings(model) != before
        raise RuntimeError(f"failed in {place}")

    def fail_later(module, inputs, output):
        output.register_hook(fail)

    layer = next(m for m in model.modules() if isinstance(m, LoraLayer))
    layer.register_forward_hook(fail if place == "forward" else fail_later)
    with pytest.raises(RuntimeError, match=f"failed in {place}"):
        make_trainer(tmp_path, model).train()
    assert scalings(model) == before


def test_scaling_is_restored_bit_for_bit_from_any_factor():
    model = lora_bert(use_rslora=True)  # scaling 4/√2 is no binary fraction
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    before = scalings(model)
    for factor in (1.3, 0.7, 1e-3):
        with scaled_adapter(layers, "default", factor):
            assert scalings(model) == [{"default": s["default"] * factor} for s in before]
        assert scalings(model) == before


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(tmp_path, monkeypatch, use_reentrant):
    pin(monkeypatch, 1.5)
    gradients = []

    def keep(model):
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})

    recomputing = {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": use_reentrant},
    }
    runs = []
    for settings in ({}, recomputing):
        model, runs = lora_bert(), [*runs, []]
        model.enable_input_require_grads()  # what a reentrant checkpoint needs below frozen embeddings
        seen = next(m for m in model.modules() if isinstance(m, LoraLayer))
        seen.register_forward_hook(lambda *_, run=runs[-1]: run.append(1))
        make_trainer(tmp_path, model, [Watch(keep)], max_steps=1, max_grad_norm=0.0, **settings).train()
    assert [len(run) for run in runs] == [1, 2]  # the forward did run again inside backward
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys()
    for name in plain:
        assert plain[name].abs().max() > 0
        torch.testing.assert_close(recomputed[name], plain[name], rtol=1e-6, atol=1e-9)


# ---- settings and errors


def test_command_line_sets_the_perturbation(tmp_path):
    words = ["--output_dir", str(tmp_path), "--perturbation_probabilities", "0.5", "0.25", "0.25"]
    words += ["--perturbation_scale", "0.2", "--perturbation_adapter", "task", "--task_index", "3"]
    (args,) = HfArgumentParser(PMConfig).parse_args_into_dataclasses([*words, "--head_learning_rate", "1e-2"])
    assert args.perturbation_probabilities == (0.5, 0.25, 0.25)
    assert (args.perturbation_scale, args.perturbation_adapter, args.task_index) == (0.2, "task", 3)
    assert args.head_learning_rate == 0.01


def test_defaults_differ_from_the_parents_in_nothing():
    args, parent = PMConfig(output_dir="x", use_cpu=True), TrainingArguments(output_dir="x", use_cpu=True)
    assert args.perturbation_scale == 0.5
    assert args.perturbation_probabilities == THIRDS
    ours, theirs = args.to_dict(), parent.to_dict()
    assert {key: ours[key] for key in theirs} == theirs
    assert set(ours) - set(theirs) == set(PerturbationArguments.__dataclass_fields__)


@pytest.mark.parametrize("scale", [-0.1, 1.0, 2.0, math.nan])
def test_a_scale_outside_zero_to_one_is_refused(scale):
    with pytest.raises(InputError, match=rf"perturbation scale must be in \[0, 1\), found {scale}"):
        PMConfig(output_dir="x", perturbation_scale=scale)


@pytest.mark.parametrize(
    ("probabilities", "message"),
    [
        ((0.4, 0.4, 0.2), r"probabilities of 1\+ε and 1−ε must be equal, found 0.4 and 0.2"),
        ((0.3, 0.3, 0.3), r"must be three values >= 0 that sum to 1, found \[0.3, 0.3, 0.3\]"),
        ((0.5, 0.5), r"must be three values >= 0 that sum to 1, found \[0.5, 0.5\]"),
        ((), r"must be three values >= 0 that sum to 1, found \[\]"),
        ((2.0, -0.5, -0.5), r"must be three values >= 0 that sum to 1"),
        ((math.nan, 0.5, 0.5), r"must be three values >= 0 that sum to 1"),
    ],
)
def test_wrong_probabilities_are_refused(probabilities, message):
    with pytest.raises(InputError, match=message):
        PMConfig(output_dir="x", perturbation_probabilities=probabilities)


def test_all_wrong_settings_are_listed_at_once():
    with pytest.raises(InputError, match=r"2 problems: .*found 3.*must be equal"):
        PMConfig(output_dir="x", perturbation_scale=3, perturbation_probabilities=(0.4, 0.4, 0.2))


def test_two_trainable_adapters_need_a_name(tmp_path):
    def both():
        model = lora_bert("first", "second")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        return model

    assert trainable_lora_adapters(both()) == ["first", "second"]
    message = r"exactly one adapter with trainable LoRA weights, found \['first', 'second'\]; name one with"
    with pytest.raises(InputError, match=message):
        make_trainer(tmp_path, both())
    trainer = make_trainer(tmp_path, both(), perturbation_adapter="first")
    assert trainer._perturbed()[0] == "first"


def test_no_trainable_adapter_is_an_error(tmp_path):
    model = lora_bert()
    model.requires_grad_(False)
    with pytest.raises(InputError, match="exactly one adapter with trainable LoRA weights, found none"):
        make_trainer(tmp_path, model)


def test_an_unknown_adapter_name_lists_the_known_ones(tmp_path):
    with pytest.raises(InputError, match=r"'other' is not an adapter of the model; found \['first', 'second'\]"):
        make_trainer(tmp_path, lora_bert("first", "second"), perturbation_adapter="other")


def test_arguments_without_perturbation_settings_are_refused(tmp_path):
    args = quick_arguments(tmp_path, TrainingArguments)
    with pytest.raises(InputError, match=r"PMTrainingArguments\(PerturbationArguments, TrainingArguments\)"):
        PMTrainer(model=lora_bert(), args=args, train_dataset=rows(4))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora=True makes the update more than scaling·BA; .*train with use_dora=False"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' rewrites the base weights"),
        ({"bias": "lora_only"}, "bias='lora_only' trains the base's biases"),
    ],
)
def test_adapters_whose_product_is_not_the_update_are_refused(tmp_path, config, message):
    with pytest.raises(InputError, match=f"adapter 'default': .*{message}"):
        make_trainer(tmp_path, lora_bert(**config))


def test_a_subclass_of_the_arguments_keeps_the_checks():
    @dataclass
    class Other(PerturbationArguments):
        extra: int = 0

    assert Other(extra=2).perturbation_probabilities == THIRDS
    with pytest.raises(InputError, match="must be in"):
        Other(perturbation_scale=1)


# ---- the head's learning rate


def test_head_learning_rate_moves_the_head_into_groups_of_its_own(tmp_path):
    model = get_peft_model(
        lora_bert().unload(), LoraConfig(r=2, target_modules=["key"], modules_to_save=["classifier"])
    )
    seen = []
    trainer = make_trainer(
        tmp_path,
        model,
        [Watch(lambda _: seen.append([(g["lr"], g.get("head", False)) for g in trainer.optimizer.param_groups]))],
        max_steps=4,
        learning_rate=1e-3,
        head_learning_rate=1e-1,
        weight_decay=0.2,
        lr_scheduler_type="linear",
    )
    trainer.train()
    names = {id(p): n for n, p in model.named_parameters()}
    groups = trainer.optimizer.param_groups
    for group in groups:
        assert all(("classifier" in names[id(p)]) == group.get("head", False) for p in group["params"])
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters() if p.requires_grad)  # each once
    decay = {names[id(p)].rpartition(".")[2]: g["weight_decay"] for g in groups if g.get("head") for p in g["params"]}
    assert decay == {"weight": 0.2, "bias": 0.0}
    for step, rates in enumerate(seen):
        share = 1 - step / 4  # the schedule lowers both
        assert {(round(lr, 9), head) for lr, head in rates} == {
            (round(1e-3 * share, 9), False),
            (round(1e-1 * share, 9), True),
        }
    assert len(seen) == 4


def test_without_a_head_learning_rate_the_groups_are_the_trainers(tmp_path):
    trainer = make_trainer(tmp_path, learning_rate=1e-3)
    assert [(g["lr"], len(g["params"])) for g in trainer.create_optimizer().param_groups] == [(1e-3, 8), (1e-3, 0)]
