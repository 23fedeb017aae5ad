"""Rehearsal against slow references: who is in a batch, and the soft cross-entropy of its rows one by one."""

import copy
from collections import Counter

import pytest
import torch
from helpers.models import (
    OLD_NAME,
    TARGETS,
    activate_all,
    assert_close,
    assert_equal_states,
    quick_arguments,
    tiny_model,
    tiny_tokenizer,
    trained_state,
)
from helpers.rehearsal import soft_loss, some_pool
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from pm_hf.data.language import CausalEncoder, Seq2SeqEncoder
from pm_hf.data.pool import soft_collate
from pm_hf.data.rows import Rows
from pm_hf.models.language_model import IGNORED, soft_cross_entropy
from pm_hf.models.task_model import TaskModel
from pm_hf.training.penalties import BaseDivergence
from pm_hf.training.rehearsal import HalfNew, SoftTargets
from pm_hf.training.task_trainer import TaskTrainer, step_loss, train
from pm_hf.training.trainer import PMConfig

pytestmark = pytest.mark.filterwarnings(OLD_NAME)
NEW = Rows(
    ["Text: red1", "Text: dark4 pale3 gold1", "Text: blue1 gold2", "Text: pale1"], [" gold", " dark", " red", ""]
)


def setting(kind):
    """(model with a task adapter, encoder)."""
    torch.manual_seed(1)
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS[kind], fan_in_fan_out=kind == "gpt2")
    model = activate_all(get_peft_model(tiny_model(kind), lora, adapter_name="task"), "task")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model, (Seq2SeqEncoder if kind == "t5" else CausalEncoder)(tiny_tokenizer(kind), 24)


def trainer_of(folder, model, encoder, examples, penalties=(), **settings):
    defaults = {"perturbation_scale": 0.0, "perturbation_adapter": "task", "remove_unused_columns": False}
    return TaskTrainer(
        model=model,
        args=quick_arguments(folder, PMConfig, **defaults | settings),
        train_dataset=examples,
        data_collator=soft_collate(encoder.collate),
        penalties=[*penalties, SoftTargets()],
        compute_loss_func=step_loss() if model.config.is_encoder_decoder else None,
    )


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "t5"])
@pytest.mark.parametrize("parts", [1, 3])
def test_a_step_has_the_gradient_of_the_soft_cross_entropy_over_all_target_tokens(tmp_path, kind, parts):
    model, encoder = setting(kind)
    mixed = [*encoder.examples(NEW)[:3], *some_pool(3).examples(encoder)]
    loss, count = soft_loss(model, mixed)
    (loss / count).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    found = {}
    trainer = trainer_of(
        *(tmp_path, model, encoder, mixed),
        per_device_train_batch_size=len(mixed) // parts,
        gradient_accumulation_steps=parts,
        max_steps=1,
        max_grad_norm=0.0,
    )
    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(
        lambda *_: found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(loss.detach()) / count, rel=1e-4)
    assert_close(found, expected, 1e-4)


@torch.no_grad()
def test_the_normaliser_cancels_in_the_penalty():
    model, encoder = setting("llama")
    batch = soft_collate(encoder.collate)(some_pool(3).examples(encoder))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**inputs).logits
    chosen = logits[:, :-1][batch["labels"][:, 1:] != IGNORED]
    hard = -chosen.log_softmax(-1).gather(1, batch["labels"][batch["labels"] != IGNORED][:, None])[:, 0]
    soft = soft_cross_entropy(chosen, batch["soft_tokens"], batch["soft_weights"])
    assert float(SoftTargets()(model, batch, logits)) == pytest.approx(float((soft - hard).mean()), rel=1e-4)
    plain = encoder.collate(encoder.examples(NEW))
    assert float(SoftTargets()(model, plain, logits)) == 0


def test_other_penalties_see_no_soft_targets(tmp_path):
    model, encoder = setting("llama")
    trainer = trainer_of(tmp_path, model, encoder, some_pool(4).examples(encoder), [BaseDivergence(1.0)], max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0


@pytest.mark.parametrize(("new", "rows"), [(5, 3), (4, 9), (3, 3), (1, 1), (7, 1)])
def test_half_of_the_rows_are_new_and_the_pool_goes_round(new, rows):
    sampler, drawn = HalfNew(new, rows, seed=3), []
    for epoch in range(6):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert len(order) == len(sampler) == 2 * new
        assert sorted(order[::2]) == list(range(new))
        assert all(new <= index < new + rows for index in order[1::2])
        drawn += order[1::2]
        assert order == list(sampler)
    counts = Counter(drawn)
    assert len(counts) == min(rows, 6 * new)
    assert max(counts.values()) - min(counts.values()) <= 1
    for start in range(0, len(drawn) - rows + 1, rows):
        assert len(set(drawn[start : start + rows])) == rows


def test_epochs_and_seeds_differ_in_their_order():
    sampler, other = HalfNew(20, 20, 0), HalfNew(20, 20, 1)
    first, another = list(sampler), list(other)
    sampler.set_epoch(1)
    assert first != list(sampler)
    assert first != another


class BreakOff(TrainerCallback):
    """Ends the training like Ctrl-C once a checkpoint of a step is written."""

    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def trained(folder, base, encoder, callbacks=()):
    """(weights, (new, pool) rows of each batch, record) of a copy of the model trained on NEW and the pool."""
    shares, model = [], copy.deepcopy(base)

    def collate(examples):
        shares.append((sum("soft" not in e for e in examples), sum("soft" in e for e in examples)))
        return encoder.collate(examples)

    args = quick_arguments(
        *(folder, PMConfig),
        num_train_epochs=3,
        max_steps=-1,
        save_strategy="steps",
        save_steps=1,
        perturbation_scale=0.5,
        perturbation_adapter="task",
        remove_unused_columns=False,
    )
    examples, rehearsed = encoder.examples(NEW), some_pool().examples(encoder)
    record = train(TaskModel(model, None), examples, collate, args, callbacks, rehearsed=rehearsed)
    return trained_state(model), shares, record


def test_every_batch_is_half_new_and_a_broken_off_training_goes_on_bit_for_bit(tmp_path):
    model, encoder = setting("llama")
    whole, shares, record = trained(tmp_path / "whole", model, encoder)
    assert shares == [(2, 2)] * 6  # four new rows, two batches an epoch
    assert record.optimizer_steps == 6
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "broken", model, encoder, [BreakOff(3)])  # in the middle of the second epoch
    again, shares, _ = trained(tmp_path / "broken", model, encoder)
    assert shares == [(2, 2)] * 3
    assert_equal_states(whole, again)
