"""Texts as batches: what a row gives does not depend on its batch, and what is cut is counted."""

import pytest
import torch
from helpers.models import LENGTH, SIZE, word_tokenizer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from pm_hf import InputError
from pm_hf.config.schema import ModelSettings, RunConfig, StreamSettings
from pm_hf.data.encoders import TextEncoder, check_length, match_padding
from pm_hf.data.rows import Rows

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": SIZE, "num_labels": 3}
WIDE = SHAPE | {"intermediate_size": 24, "max_position_embeddings": LENGTH, "initializer_range": 0.2}
MODELS = {
    "bert": (BertForSequenceClassification, BertConfig, WIDE),
    "bloom": (BloomForSequenceClassification, BloomConfig, SHAPE | {"initializer_range": 0.2}),
    "gpt2": (GPT2ForSequenceClassification, GPT2Config, SHAPE | {"n_positions": LENGTH, "initializer_range": 0.2}),
    "pythia": (GPTNeoXForSequenceClassification, GPTNeoXConfig, WIDE),
    "llama": (LlamaForSequenceClassification, LlamaConfig, WIDE | {"num_key_value_heads": 2}),
    "opt": (
        OPTForSequenceClassification,
        OPTConfig,
        {k: v for k, v in WIDE.items() if k != "intermediate_size"} | {"ffn_dim": 24, "word_embed_proj_dim": 16},
    ),
    "qwen2": (Qwen2ForSequenceClassification, Qwen2Config, WIDE | {"num_key_value_heads": 2}),
}
TEXTS = ["red0", "red1 blue2 green3 gold4 dark0 pale1", "blue1 red2 [EOS]", "[EOS] dark1 [UNK] pale2"]


def make(name, pad_in_config):
    kind, config, settings = MODELS[name]
    torch.manual_seed(0)
    return kind(config(**settings, pad_token_id=pad_in_config, bos_token_id=2, eos_token_id=3)).eval()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", ["[PAD]", None])
@pytest.mark.parametrize("name", MODELS)
def test_the_logits_of_a_row_do_not_depend_on_its_batch(name, pad, side):
    """Whatever the tokenizer's pad token and side, and whatever the model's config says of them."""
    for pad_in_config in (None, 0, 7):
        tokenizer, model = word_tokenizer(), make(name, pad_in_config)
        tokenizer.pad_token, tokenizer.padding_side = pad, side
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
        encoder = TextEncoder(tokenizer, 16)
        match_padding(model, encoder)
        examples = encoder.examples(Rows(TEXTS, ["x"] * len(TEXTS)), ["x"])

        def logits(rows, encoder=encoder, model=model):
            inputs = {key: value for key, value in encoder.collate(rows).items() if key != "labels"}
            with torch.no_grad():
                return model(**inputs).logits

        alone = torch.cat([logits([example]) for example in examples])
        assert torch.allclose(alone, logits(examples), atol=1e-5)


@pytest.mark.parametrize(
    ("lacking", "expected"), [((), "[PAD]"), (("pad",), "[EOS]"), (("pad", "eos"), "[UNK]"), (("pad", "unk"), "[EOS]")]
)
def test_another_special_token_takes_the_place_of_a_pad_token_that_is_not_there(lacking, expected):
    tokenizer = word_tokenizer()
    for kind in lacking:
        setattr(tokenizer, f"{kind}_token", None)
    encoder = TextEncoder(tokenizer, 16)
    batch = encoder.collate(encoder.examples(Rows(["red0 red1", "red0"], ["x", "x"]), ["x"]))
    assert batch["input_ids"][1, 1] == word_tokenizer().convert_tokens_to_ids(expected)
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_a_tokenizer_without_any_special_token_is_refused_with_the_way_out():
    tokenizer = word_tokenizer()
    for kind in ("pad", "eos", "unk"):
        setattr(tokenizer, f"{kind}_token", None)
    with pytest.raises(InputError, match=r"neither a pad token .*tokenizer_config.json"):
        TextEncoder(tokenizer, 16)


@pytest.mark.parametrize("eos", [False, True])
def test_rows_that_are_cut_are_counted_and_rows_that_just_fit_are_not(eos):
    encoder = TextEncoder(word_tokenizer(eos=eos), 4)
    fit = 4 - eos
    rows = Rows([" ".join(["red0"] * count) for count in (1, fit, fit + 1, 40, fit)], ["x"] * 5)
    examples = encoder.examples(rows, ["x"])
    assert [len(example["input_ids"]) for example in examples] == [1 + eos, 4, 4, 4, 4]
    assert encoder.cut == 2
    encoder.examples(rows.take([0, 1]), ["x"])
    assert encoder.cut == 0


def test_texts_may_be_as_long_as_the_model_has_positions():
    """RoBERTa's table has rows that no position uses."""
    bert = BertForSequenceClassification(BertConfig(**WIDE))
    roberta = RobertaForSequenceClassification(RobertaConfig(**WIDE, pad_token_id=1))
    for model, most in ((bert, LENGTH), (roberta, LENGTH - 2)):
        config = RunConfig(model=ModelSettings("tiny"), stream=StreamSettings(max_length=most))
        check_length(config, model)
        with torch.no_grad():
            model(input_ids=torch.full((1, most), 5))
        config.stream.max_length += 1
        with pytest.raises(InputError, match=f"max_length {most + 1} is more than the {most} positions of tiny"):
            check_length(config, model)
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, most + 1), 5))
