"""Evaluation during training: never perturbed, several data sets, the best model, early stopping and resuming."""

import pytest
import torch
from helpers.models import (
    OLD_NAME,
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
from peft.tuners.lora import LoraLayer
from transformers import EarlyStoppingCallback, TrainerCallback

from pm_hf import PMConfig, PMTrainer

pytestmark = pytest.mark.filterwarnings(OLD_NAME)
EVERY = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}


def make_trainer(folder, model=None, callbacks=(), eval_dataset=None, **settings) -> PMTrainer:
    args = quick_arguments(folder, PMConfig, **settings)
    return PMTrainer(
        model=model or lora_bert(),
        args=args,
        train_dataset=rows(24),
        eval_dataset=eval_dataset or rows(10, seed=7),
        callbacks=[*callbacks],
    )


def two_adapters():
    """A frozen adapter beside the one that is trained."""
    return activate_all(lora_bert("merged", "task"), "task")


MODELS = {"default": lora_bert, "named": lambda: lora_bert("task"), "beside a frozen one": two_adapters}


@pytest.fixture(params=MODELS)
def build(request):
    """A function that builds a model, always the same weights."""
    return MODELS[request.param]


class Keep(TrainerCallback):
    """The trained weights at every evaluation, by step."""

    def __init__(self):
        self.states = {}

    def on_evaluate(self, args, state, control, model=None, **_):
        self.states[state.global_step] = trained_state(model)


def test_evaluation_is_never_perturbed(tmp_path, monkeypatch):
    pin(monkeypatch, 1.5)
    model, keep = lora_bert("task"), Keep()
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    plain, seen = layers[0].scaling["task"], {True: set(), False: set()}
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, _: seen[layer.training].add(layer.scaling["task"]))
    trainer = make_trainer(tmp_path, model, [keep], eval_strategy="steps", eval_steps=2, eval_on_start=True)
    trainer.train()
    assert seen == {True: {1.5 * plain}, False: {plain}}
    losses = logged(trainer, "eval_loss")
    assert len(losses) == 4
    for (_, state), loss in zip(sorted(keep.states.items()), losses, strict=True):
        model.load_state_dict(state, strict=False)
        assert loss == pytest.approx(model.eval()(**batch(rows(10, seed=7))).loss.item(), rel=2e-6)


def test_several_eval_data_sets_give_a_loss_each_and_one_of_them_chooses_the_best(tmp_path, build):
    data, keep = {"first": rows(10, seed=7), "second": rows(10, seed=8)}, Keep()
    metric = {"metric_for_best_model": "eval_second_loss", "load_best_model_at_end": True}
    trainer = make_trainer(tmp_path, build(), [keep], data, max_steps=8, learning_rate=0.02, **EVERY, **metric)
    trainer.train()
    second = logged(trainer, "eval_second_loss")
    assert len(second) == len(logged(trainer, "eval_first_loss")) == 8
    assert logged(trainer, "eval_loss") == []
    assert second != logged(trainer, "eval_first_loss")
    best = 1 + second.index(min(second))
    assert best not in (1, 8)  # neither the first nor the last one
    assert trainer.state.best_global_step == best
    assert_equal_states(trained_state(trainer.model), keep.states[best])
    found = trainer.evaluate()
    assert found["eval_second_loss"] == pytest.approx(min(second), rel=1e-6)


def stopping(folder, build, callbacks=(), patience=3, **settings):
    """A trainer that stops early: its rate is too high, so it gets worse."""
    settings = {"max_steps": 24, "learning_rate": 0.15, "load_best_model_at_end": True} | EVERY | settings
    return make_trainer(folder, build(), [EarlyStoppingCallback(patience), *callbacks], **settings)


def test_early_stopping_keeps_the_best_weights(tmp_path, build):
    keep = Keep()
    trainer = stopping(tmp_path, build, [keep])
    trainer.train()
    losses = logged(trainer, "eval_loss")
    best = 1 + losses.index(min(losses))
    assert best > 1
    assert trainer.state.global_step == len(losses) == best + 3 < 24
    assert_equal_states(trained_state(trainer.model), keep.states[best])
    assert not all(torch.equal(keep.states[best][n], value) for n, value in keep.states[best + 3].items())


def test_a_resumed_early_stopping_counts_on_and_ends_where_the_uninterrupted_one_does(tmp_path, build):
    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == cut:
                raise KeyboardInterrupt

    whole = stopping(tmp_path / "whole", build)
    whole.train()
    cut = whole.state.global_step - 1  # two evaluations without a better one are behind it
    with pytest.raises(KeyboardInterrupt):
        stopping(tmp_path / "cut", build, [Interrupt()]).train()
    resumed = stopping(tmp_path / "cut", build, restore_callback_states_from_checkpoint=True)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step
    assert resumed.state.best_global_step == whole.state.best_global_step
    assert logged(resumed, "eval_loss") == logged(whole, "eval_loss")
    assert_equal_states(trained_state(whole.model), trained_state(resumed.model))
