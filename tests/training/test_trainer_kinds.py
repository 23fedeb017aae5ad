"""PerturbationMixin in front of other trainers: Seq2SeqTrainer and TRL's SFTTrainer."""

from dataclasses import dataclass

import pytest
import torch
from helpers.models import OLD_NAME, logged, quick_arguments
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)

from pm_hf import InputError, PerturbationArguments, PerturbationMixin

pytestmark = pytest.mark.filterwarnings(OLD_NAME)


@dataclass
class PMSeq2SeqConfig(PerturbationArguments, Seq2SeqTrainingArguments):
    pass


class PMSeq2SeqTrainer(PerturbationMixin, Seq2SeqTrainer):
    pass


def tiny_t5() -> nn.Module:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=20,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        dropout_rate=0.0,
    )
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q", "v"])
    return get_peft_model(T5ForConditionalGeneration(config), lora)


def copies(count: int) -> list[dict]:
    """Sequences to be copied."""
    tokens = torch.randint(2, 6, (count, 4), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in tokens]


def check_it_trained(trainer) -> None:
    trainer.train()
    losses = logged(trainer, "loss")
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert set(trainer.perturbation_counts) == {0.5, 1.0, 1.5}
    assert sum(trainer.perturbation_counts.values()) == trainer.state.global_step == len(losses)
    assert set(logged(trainer, "perturbation_factor")) == {0.5, 1.0, 1.5}


def test_seq2seq_trainer_with_the_mixin_trains_and_generates(tmp_path):
    args = quick_arguments(tmp_path, PMSeq2SeqConfig, max_steps=40, learning_rate=3e-2, predict_with_generate=True)
    trainer = PMSeq2SeqTrainer(model=tiny_t5(), args=args, train_dataset=copies(40), eval_dataset=copies(4))
    check_it_trained(trainer)
    generated = trainer.predict(copies(4), max_new_tokens=4).predictions
    assert generated.ndim == 2  # tokens, not logits
    assert set(generated.flatten().tolist()) <= {-100, *range(20)}


def test_seq2seq_arguments_without_perturbation_name_the_class_to_define(tmp_path):
    args = quick_arguments(tmp_path, Seq2SeqTrainingArguments)
    message = r"PMSeq2SeqTrainingArguments\(PerturbationArguments, Seq2SeqTrainingArguments\)"
    with pytest.raises(InputError, match=message):
        PMSeq2SeqTrainer(model=tiny_t5(), args=args, train_dataset=copies(4))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL's default uses it
def test_sft_trainer_with_the_mixin_trains_with_perturbed_steps(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    @dataclass
    class PMSFTConfig(PerturbationArguments, trl.SFTConfig):
        pass

    class PMSFTTrainer(PerturbationMixin, trl.SFTTrainer):
        pass

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", "one", "two", "three", "four"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,
    )
    trainer = PMSFTTrainer(
        model=LlamaForCausalLM(config),
        args=quick_arguments(tmp_path, PMSFTConfig, max_steps=40, learning_rate=3e-2, max_length=16),
        train_dataset=Dataset.from_dict({"text": ["one two three four", "two three four one"] * 20}),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj"]),
    )
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(start) == 12
    check_it_trained(trainer)
    now = dict(trainer.model.named_parameters())
    assert all(not torch.equal(now[name], value) for name, value in start.items())
    assert [m.scaling for m in trainer.model.modules() if isinstance(m, LoraLayer)] == [{"default": 2.0}] * 6
