"""RehearsalMixin in front of TRL's SFTTrainer and of Trainer: a step's loss and gradient, row by row."""

from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset
from helpers import refusal
from helpers.models import OLD_NAME, assert_close, lora_bert, quick_arguments, rows, tiny_model, tiny_tokenizer
from helpers.rehearsal import soft_loss, some_pool
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from pm_hf import PerturbationArguments, PerturbationMixin, PMConfig, Pool, RehearsalMixin
from pm_hf.data.language import CausalEncoder
from pm_hf.data.rows import Rows
from pm_hf.models.language_model import IGNORED

pytestmark = [
    pytest.mark.filterwarnings(OLD_NAME),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),  # TRL's default uses it
]
PROMPTS = ["Text: red1", "Text: dark4 pale3 gold1", "Text: blue1 gold2", "Text: pale1"]
ANSWERS = [" gold", " dark", " red", " pale"]
LORA = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
PLAIN = {"perturbation_scale": 0.0, "max_steps": 1, "max_grad_norm": 0.0, "bf16": False}  # TRL's default is bf16


def sft_trainer(folder, columns, pool, **settings):
    """SFTTrainer with both mixins on the tiny Llama."""
    trl = pytest.importorskip("trl")

    @dataclass
    class Config(PerturbationArguments, trl.SFTConfig):
        pass

    class Made(RehearsalMixin, PerturbationMixin, trl.SFTTrainer):
        pass

    return Made(
        model=tiny_model("llama"),
        args=quick_arguments(folder, Config, **PLAIN | {"max_length": 24} | settings),
        train_dataset=Dataset.from_dict(columns),
        processing_class=tiny_tokenizer("llama"),
        peft_config=LORA,
        pool=pool,
    )


def plain_trainer(folder, pool, **settings):
    """Trainer with both mixins, on rows that the encoder made."""

    class Made(RehearsalMixin, PerturbationMixin, Trainer):
        pass

    tokenizer = tiny_tokenizer("llama")
    encoder = CausalEncoder(tokenizer, 24)
    return Made(
        model=get_peft_model(tiny_model("llama"), LORA),
        args=quick_arguments(folder, PMConfig, **PLAIN | settings),
        train_dataset=encoder.examples(Rows(PROMPTS, ANSWERS)),
        data_collator=encoder.collate,
        processing_class=tokenizer,
        pool=pool,
    )


def made(kind, folder, pool, **settings):
    if kind == "trainer":
        return plain_trainer(folder, pool, **settings)
    columns = {"prompt": PROMPTS, "completion": ANSWERS} if kind == "completions" else {"text": PROMPTS}
    return sft_trainer(folder, columns, pool, **settings)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("kind", ["trainer", "completions", "text"])
def test_a_step_has_the_gradient_of_the_soft_cross_entropy_over_all_target_tokens(kind, parts, tmp_path):
    size = {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts}
    trainer = made(kind, tmp_path, some_pool(4), **size)
    torch.manual_seed(3)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    order = list(trainer._get_train_sampler())
    assert sum(place < 4 for place in order) == 4
    assert {place < 4 for place in order[: len(order) // parts : 2]} == {True}
    mixed = [dict(trainer.train_dataset[place]) for place in order]
    for example in mixed:
        example["labels"] = [IGNORED, *example.get("labels", example["input_ids"])[1:]]  # nothing predicts the first
    loss, count = soft_loss(trainer.model.eval(), mixed)
    (loss / count).backward()
    expected = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad(set_to_none=True)
    found = {}
    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(
        lambda *_: found.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(loss.detach()) / count, rel=1e-3)
    assert_close(found, expected, 1e-4)


def test_an_evaluation_has_the_trainer_s_own_loss(tmp_path):
    held = {"prompt": PROMPTS[:2], "completion": ANSWERS[:2]}
    losses = []
    for pool in (Pool(), some_pool(4)):
        trainer = sft_trainer(tmp_path, {"prompt": PROMPTS, "completion": ANSWERS}, pool)
        evaluated = sft_trainer(tmp_path, held, Pool()).train_dataset
        losses.append(trainer.evaluate(evaluated)["eval_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_steps_are_perturbed_and_an_empty_pool_changes_nothing(tmp_path):
    rehearsing = sft_trainer(
        tmp_path, {"prompt": PROMPTS, "completion": ANSWERS}, some_pool(4), perturbation_scale=0.5, max_steps=12
    )
    rehearsing.train()
    assert set(rehearsing.perturbation_counts) == {0.5, 1.0, 1.5}
    without = plain_trainer(tmp_path, Pool())
    assert len(without.train_dataset) == 4
    assert without.compute_loss_func is None


def test_what_cannot_be_rehearsed_is_refused_before_any_step(tmp_path):
    class Made(RehearsalMixin, Trainer):
        pass

    arguments = quick_arguments(tmp_path, TrainingArguments, label_smoothing_factor=0.1)
    message = refusal(
        Made,
        model=lora_bert(),
        args=arguments,
        train_dataset=rows(8),
        compute_loss_func=lambda *_, **__: None,
        pool=some_pool(2),
    )
    for part in ("processing_class must be the tokenizer", "compute_loss_func", "label_smoothing_factor must be 0"):
        assert part in message
    columns = {"prompt": PROMPTS, "completion": ANSWERS}
    assert "packing joins rows" in refusal(sft_trainer, tmp_path, columns, some_pool(2), packing=True)
