"""Bases in 4 and 8 bits: what is quantized and what is not, what still learns on them, and what is refused."""

import importlib.util

import pytest
import torch
from helpers import edited_json, refusal
from helpers.models import TARGETS, language_rows, tiny_folder
from helpers.streams import language_settings, write_base
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from pm_hf.config.loading import load_config
from pm_hf.config.schema import LoraSettings, ModelSettings
from pm_hf.models.contexts import PACKING_FLAG
from pm_hf.models.loading import load_base
from pm_hf.models.quantized import is_quantized
from pm_hf.models.task_model import build_task_model
from pm_hf.runs.learner import learn
from pm_hf.training.task_trainer import training_arguments

BITS = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}
LANGUAGE = {"llama": "causal-lm", "gpt2": "causal-lm", "t5": "seq2seq-lm"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of tiny models; `masked` is a BERT whose checkpoint lacks the pooler."""
    folder = tmp_path_factory.mktemp("bases")
    write_base(folder / "bert")
    torch.manual_seed(0)
    shape = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(**shape, intermediate_size=16)).save_pretrained(folder / "masked")
    for name in LANGUAGE:
        tiny_folder(name, folder / name)
    return folder


def load(bases, name, bits):
    kind = LANGUAGE.get(name, "text-classification")
    labels = () if name in LANGUAGE else ("a", "b", "c")
    return load_base(ModelSettings(str(bases / name), quantization=bits), labels, 3, kind)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("bert", {"classifier"}),
        ("masked", {"classifier", "bert.pooler.dense"}),
        ("llama", {"lm_head"}),
        ("gpt2", {"lm_head"}),
        ("t5", {"lm_head", "wo"}),  # which T5 keeps as it is in any low precision
    ],
)
def test_all_linear_layers_are_quantized_but_heads_and_what_the_checkpoint_lacks(bases, bits, name, whole):
    model, lacking = load(bases, name, bits)
    plain, lacking_too = load(bases, name, None)
    assert is_quantized(model)
    assert not is_quantized(plain)
    assert lacking == lacking_too
    kinds = {module: type(layer).__name__ for module, layer in model.named_modules()}
    linear = [n for n, m in plain.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    left = {module for module in linear if kinds[module] == "Linear"}
    assert {kinds[module] for module in set(linear) - left} == {BITS[bits]}
    assert {module if module in whole else module.rpartition(".")[2] for module in left} == whole
    expected = dict(plain.named_parameters())
    for module, parameter in model.named_parameters():
        if parameter.is_floating_point():  # what is not quantized is what it is without, new layers included
            assert torch.equal(parameter, expected[module]), module
    assert model.name_or_path == str(bases / name)


@pytest.mark.parametrize("bits", BITS)
def test_a_base_that_was_evaluated_still_learns(bases, bits):
    """On CPUs with bfloat16 instructions 4-bit layers would lay their weights out for inference, which no gradient
    passes."""
    settings = ModelSettings(str(bases / "llama"), quantization=bits)
    model = build_task_model(settings, LoraSettings(r=2), (), None, 0, 0, kind="causal-lm").model
    inputs = {name: value[None] for name, value in language_rows(1)[0].items()}
    with torch.no_grad():
        before = model.eval()(**inputs).loss
    model.train()(**inputs).loss.backward()
    assert not any(getattr(layer, PACKING_FLAG, False) for layer in model.modules())
    gradients = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert all(gradient is not None and gradient.norm() > 0 for gradient in gradients)
    with torch.no_grad():
        assert model.eval()(**inputs).loss == before


def test_without_bitsandbytes_nothing_is_begun(language_data, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a)
    )
    message = refusal(learn, language_settings(language_data, tmp_path / "run", model__quantization="nf4"))
    assert (
        "model.quantization nf4 needs bitsandbytes, of the extra quantized: pip install 'pm_hf[quantized]'" in message
    )
    assert not (tmp_path / "run").exists()


def test_weights_that_are_stored_quantized_are_not_quantized_again(tmp_path):
    base = tiny_folder("llama", tmp_path / "stored")
    edited_json(base / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    message = refusal(load_base, ModelSettings(str(base), quantization="int8"), (), 0, "causal-lm")
    assert "are stored quantized (gptq); leave model.quantization out, or name the model" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__quantization": "nf5"}, "model.quantization: expected nf4 or int8 or null, found 'nf5'"),
        ({"model__quantization": "nf4", "model__gguf_file": "x.gguf"}, "the weights of a GGUF file are unpacked"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, changes, message):
    assert message in refusal(load_config, language_settings(tmp_path, tmp_path / "run", **changes))


def test_packed_weights_are_not_sharded(tmp_path):
    changes = {"model__quantization": "nf4", "training__fsdp": "full_shard"}
    config = load_config(language_settings(tmp_path, tmp_path / "run", **changes))
    assert "packed weights are not spread over processes" in refusal(training_arguments, config, tmp_path / "run", 0)


def test_every_target_of_the_tests_is_a_linear_layer_here_too(bases):
    for name in LANGUAGE:
        settings = ModelSettings(str(bases / name), quantization="nf4")
        lora = LoraSettings(r=2, target_modules=TARGETS[name])
        built = build_task_model(settings, lora, (), None, 0, 0, kind=LANGUAGE[name])
        trained = {n for n, p in built.model.named_parameters() if p.requires_grad}
        assert trained == {n for n, _ in built.model.named_parameters() if ".lora_" in n}
