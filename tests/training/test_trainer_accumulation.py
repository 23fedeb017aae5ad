"""Gradient accumulation: many small micro-batches give the gradient of one large batch, each with its own factor."""

import pytest
import torch
from accelerate import Accelerator
from helpers.models import (
    OLD_NAME,
    Gradients,
    assert_close,
    assert_equal_states,
    batch,
    language_rows,
    logged,
    lora_bert,
    lora_llama,
    multiplied_gradients,
    pin,
    quick_arguments,
    rows,
    trained_state,
)
from peft.tuners.lora import LoraLayer
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

import pm_hf.training.trainer
from pm_hf import PMConfig, PMTrainer
from pm_hf.models.contexts import scaled_adapter
from pm_hf.training.trainer import perturbation_factor

pytestmark = pytest.mark.filterwarnings(OLD_NAME)


def make_trainer(folder, model, data, size, accumulation, callbacks=(), **settings) -> PMTrainer:
    args = quick_arguments(
        folder,
        PMConfig,
        **{"max_grad_norm": 0.0, "optim": "sgd", "train_sampling_strategy": "sequential"} | settings,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
    )
    return PMTrainer(model=model, args=args, train_dataset=data, callbacks=[*callbacks])


def test_eight_micro_batches_of_one_are_one_batch_of_eight_without_perturbation(tmp_path, kind):
    check_that_one_by_eight_is_eight_by_one(tmp_path, kind, perturbation_scale=0.0)


def test_eight_micro_batches_of_one_are_one_batch_of_eight_with_one_pinned_factor(tmp_path, monkeypatch, kind):
    pin(monkeypatch, 1.5)
    check_that_one_by_eight_is_eight_by_one(tmp_path, kind)


def check_that_one_by_eight_is_eight_by_one(folder, kind, **settings):
    build, make = kind
    found = []
    for size, accumulation in ((8, 1), (1, 8)):
        gradients = Gradients()
        settings = settings | {"max_steps": 3, "learning_rate": 0.1, "lr_scheduler_type": "constant"}
        trainer = make_trainer(folder, build(), make(24), size, accumulation, [gradients], **settings)
        trainer.train()
        found.append((gradients.found, trained_state(trainer.model), logged(trainer, "loss")))
    (whole, end, losses), (parts, other_end, other_losses) = found
    assert len(whole) == len(parts) == 3
    for left, right in zip(parts, whole, strict=True):
        assert_close(left, right)
    assert_close(other_end, end)
    assert other_losses == pytest.approx(losses, rel=1e-6)
    assert all(not torch.equal(value, trained_state(build())[name]) for name, value in end.items())


def test_the_plain_trainer_sums_a_classifiers_micro_batches(tmp_path):
    """The defect (transformers #47688) that is worked around; when this fails, Transformers has repaired it."""
    norms = []
    for size, accumulation in ((8, 1), (1, 8)):
        settings = {"max_steps": 1, "per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        args = quick_arguments(tmp_path, TrainingArguments, train_sampling_strategy="sequential", **settings)
        trainer = Trainer(model=lora_bert(), args=args, train_dataset=rows(8))
        trainer.train()
        norms += logged(trainer, "grad_norm")
    assert norms[1] == pytest.approx(8 * norms[0], rel=1e-4)


def test_a_model_that_divides_by_the_items_trains_as_with_the_plain_trainer(tmp_path):
    """Asking it what it does with their number leaves the random state alone."""
    settings = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2}
    args = quick_arguments(tmp_path, TrainingArguments, **settings)
    plain = Trainer(model=lora_llama(lora_dropout=0.3), args=args, train_dataset=language_rows(24))
    plain.train()
    args = quick_arguments(tmp_path, PMConfig, perturbation_scale=0.0, **settings)
    ours = PMTrainer(model=lora_llama(lora_dropout=0.3), args=args, train_dataset=language_rows(24))
    ours.train()
    assert ours.model_accepts_loss_kwargs
    assert_equal_states(trained_state(plain.model), trained_state(ours.model))


def test_each_micro_batch_has_its_own_factor_and_the_weight_of_its_targets(tmp_path, monkeypatch, kind):
    build, make = kind
    factors = [1.0, 1.5, 0.5, 1.5]
    pin(monkeypatch, *factors)
    data, gradients = make(8), Gradients()
    make_trainer(tmp_path, build(), data, 2, 4, [gradients], max_steps=1).train()
    parts = [batch(data[start : start + 2]) for start in range(0, 8, 2)]
    expected = multiplied_gradients(build(), parts, factors)
    assert_close(gradients.found[0], expected)
    same_factor = multiplied_gradients(build(), parts, [1.0] * 4)
    assert all((same_factor[name] - value).norm() > 0.05 * value.norm() for name, value in expected.items())


def test_a_mean_of_micro_batch_means_would_be_seen():
    """The rows of the language model have unequal target counts."""
    data = language_rows(8)
    parts = [batch([row]) for row in data]
    whole = multiplied_gradients(lora_llama(), parts, [1.0] * 8)
    means = [multiplied_gradients(lora_llama(), [part], [1.0]) for part in parts]
    for name, value in whole.items():
        assert (sum(mean[name] for mean in means) / 8 - value).norm() > 0.05 * value.norm()


def test_the_last_accumulation_of_an_epoch_may_be_shorter(tmp_path, monkeypatch, kind):
    build, make = kind
    calls, drawn = [], []

    def record(*args, **kwargs):
        calls.append((kwargs["step"], kwargs["micro_step"]))
        drawn.append(perturbation_factor(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(pm_hf.training.trainer, "perturbation_factor", record)
    data, gradients = make(10), Gradients()
    settings = {"max_steps": -1, "num_train_epochs": 2, "learning_rate": 0.0}
    make_trainer(tmp_path, build(), data, 2, 3, [gradients], **settings).train()
    assert calls == [(step, micro) for step in range(4) for micro in range(2 if step % 2 else 3)]
    parts = [batch(data[start : start + 2]) for start in range(0, 10, 2)]
    steps = [(parts[:3], drawn[0:3]), (parts[3:], drawn[3:5]), (parts[:3], drawn[5:8]), (parts[3:], drawn[8:10])]
    assert len(gradients.found) == 4
    for found, (micro_batches, factors) in zip(gradients.found, steps, strict=True):
        assert_close(found, multiplied_gradients(build(), micro_batches, factors))


def test_a_run_resumed_between_uneven_accumulations_equals_the_uninterrupted_one(tmp_path, kind):
    class Interrupt(TrainerCallback):
        def on_substep_end(self, args, state, control, **_):
            if state.global_step == 5:
                raise KeyboardInterrupt

    build, make = kind
    settings = {"max_steps": -1, "num_train_epochs": 4, "train_sampling_strategy": "random", "optim": "adamw_torch"}
    saving = {"save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(tmp_path / "whole", build(), make(10), 2, 3, **settings)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "cut", build(), make(10), 2, 3, [Interrupt()], **settings, **saving).train()
    resumed = make_trainer(tmp_path / "cut", build(), make(10), 2, 3, **settings, **saving)
    resumed.train(resume_from_checkpoint=True)
    assert_equal_states(trained_state(whole.model), trained_state(resumed.model))
    assert logged(whole, "perturbation_factor") == logged(resumed, "perturbation_factor")
    assert sum(whole.perturbation_counts.values()) == 20
    assert sum(resumed.perturbation_counts.values()) == 7  # steps 5, 6 and 7 of 3, 2, 3, 2, 3, 2, 3, 2 micro-batches


def test_a_loop_of_ones_own_with_accumulate_takes_the_trainers_step(tmp_path, monkeypatch):
    factors = [0.5, 1.5]
    pin(monkeypatch, *factors)
    data = rows(8)
    trainer = make_trainer(tmp_path, lora_bert(), data, 2, 2, max_steps=2, learning_rate=0.1)
    trainer.train()

    accelerator, model = Accelerator(gradient_accumulation_steps=2, cpu=True), lora_bert()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 2)  # the Trainer's default
    prepared = accelerator.prepare(model, optimizer, schedule, DataLoader(data, batch_size=2, collate_fn=batch))
    model, optimizer, schedule, loader = prepared
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    for index, inputs in enumerate(loader):
        with accelerator.accumulate(model), scaled_adapter(layers, "default", factors[index % 2]):
            accelerator.backward(model(**inputs).loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    assert_close(trained_state(model), trained_state(trainer.model), 1e-6)
