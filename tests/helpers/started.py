"""Adapter folders of every kind that a run may start from, as PEFT saves them, on tiny language models."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from helpers.models import SIZE, tiny_model, word_tokenizer
from pm_hf.config.kinds import STREAM_KINDS

BOTH = ["embed_tokens", "lm_head"]
COPIED = {"save_embedding_layers": True}
BASES = ("llama", "tied", "padded", "gpt2", "t5", "mixtral")
# PEFT's own words about what the folders below hold
PEFT_WARNINGS = (
    "ignore:Setting `save_embedding_layers`:UserWarning",
    "ignore:`lora_bias=True` was passed:UserWarning",
    "ignore:Adapter 'default'. .* invalid shape:UserWarning",
    "ignore:fan_in_fan_out is set to False:UserWarning",
    "ignore:Model .* `tie_word_embeddings=True`:UserWarning",
)


def attention(base: str, *more: str) -> dict:
    """The target modules of a base's attention, and others."""
    return {"target_modules": [*{"t5": ["q", "v"], "gpt2": ["c_attn"]}.get(base, ["q_proj", "v_proj"]), *more]}


@dataclass(frozen=True)
class Kind:
    """An adapter folder: the base it is of, its LoraConfig, the rows that its vocabulary was resized to."""

    base: str
    config: Mapping = field(default_factory=dict)
    rows: int | None = None
    saves: Mapping = field(default_factory=dict)  # what save_pretrained is told

    @property
    def stream(self) -> str:
        return "seq2seq-lm" if self.base == "t5" else "causal-lm"

    @property
    def auto(self) -> type:
        return getattr(transformers, STREAM_KINDS[self.stream].auto_model)


def saving(base: str, *modules: str) -> dict:
    return attention(base) | {"modules_to_save": list(modules)}


KINDS = {
    "plain": Kind("llama"),
    "a scaling that is no power of 2": Kind("llama", {"lora_alpha": 5, "r": 3}),
    "rslora": Kind("llama", {"use_rslora": True}),
    "patterns": Kind("llama", {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.1.self_attn.v_proj": 7}}),
    "some layers": Kind("llama", {"layers_to_transform": [1]}),
    "an expression": Kind("llama", {"target_modules": r".*layers\.0.*(q_proj|down_proj)"}),
    "bias": Kind("llama", {"lora_bias": True}),
    "saved embeddings": Kind("llama", saving("llama", *BOTH)),
    "saved input embeddings": Kind("llama", saving("llama", "embed_tokens")),
    "saved output embeddings": Kind("llama", saving("llama", "lm_head")),
    "saved norms": Kind("llama", saving("llama", "norm", "input_layernorm")),
    "a saved linear layer": Kind("llama", saving("llama", "layers.0.mlp.down_proj")),
    "LoRA on the embeddings": Kind("llama", attention("llama", "embed_tokens")),
    "LoRA on the output": Kind("llama", attention("llama", "lm_head")),
    "LoRA on both": Kind("llama", attention("llama", *BOTH)),
    "resized and saved": Kind("llama", saving("llama", *BOTH), SIZE + 3),
    "resized and copied": Kind("llama", rows=SIZE + 3, saves=COPIED),
    "resized with LoRA on both": Kind("llama", attention("llama", *BOTH), SIZE + 3, COPIED),
    "a smaller vocabulary": Kind("padded", saving("padded", *BOTH), SIZE),
    "tied, input saved": Kind("tied", saving("tied", "embed_tokens")),
    "tied, both saved": Kind("tied", saving("tied", *BOTH)),
    "tied, kept tied": Kind("tied", saving("tied", "embed_tokens") | {"ensure_weight_tying": True}),
    "tied, LoRA on the embeddings": Kind("tied", attention("tied", "embed_tokens")),
    "tied, resized and copied": Kind("tied", rows=SIZE + 2, saves=COPIED),
    "tied, resized and both saved": Kind("tied", saving("tied", *BOTH), SIZE + 2),
    "Conv1D": Kind("gpt2", attention("gpt2", "c_proj")),
    "saved positions": Kind("gpt2", saving("gpt2", "wpe", "ln_f")),
    "LoRA on wte": Kind("gpt2", attention("gpt2", "wte")),
    "LoRA on wte and wpe": Kind("gpt2", attention("gpt2", "wte", "wpe")),
    "T5": Kind("t5"),
    "T5, output saved": Kind("t5", saving("t5", "lm_head")),
    "T5, norm saved": Kind("t5", saving("t5", "final_layer_norm")),
    "T5, embeddings saved": Kind("t5", saving("t5", "shared", "lm_head")),
    "T5, resized": Kind("t5", rows=SIZE + 3, saves=COPIED),
    "experts": Kind("mixtral", {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
}


def base_model(name: str) -> nn.Module:
    """A tiny model with random weights; padded: with more rows than the tokenizer has tokens."""
    torch.manual_seed(0)
    if name == "mixtral":
        shape = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
        more = {"num_key_value_heads": 2, "num_local_experts": 3, "initializer_range": 0.2}
        return MixtralForCausalLM(MixtralConfig(**shape, **more, vocab_size=SIZE)).eval()
    if name in ("tied", "padded"):
        config = tiny_model("llama").config
        config.tie_word_embeddings, config.vocab_size = name == "tied", SIZE + 12 * (name == "padded")
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()
    return tiny_model(name)


def save_base(name: str, folder: Path) -> None:
    """A checkpoint with its tokenizer."""
    base_model(name).save_pretrained(folder)
    word_tokenizer(bos=name == "llama", eos=name == "t5").save_pretrained(folder)


def save_start(kind: Kind, base: Path, folder: Path) -> Path:
    """A LoRA of random values, as PEFT saves it; what is saved whole is moved as well."""
    model = kind.auto.from_pretrained(base)
    if kind.rows is not None:
        torch.manual_seed(3)
        model.resize_token_embeddings(kind.rows, mean_resizing=False)
    model = get_peft_model(model, LoraConfig(**{"r": 2, "lora_alpha": 4} | attention(kind.base) | dict(kind.config)))
    torch.manual_seed(1)
    for name, value in model.named_parameters():
        if any(part in name for part in ("lora_B", "embedding_B", "modules_to_save")):
            value.data += 0.3 * torch.randn_like(value)
    model.save_pretrained(folder, **kind.saves)
    return folder


def load_alone(kind: Kind, base: Path, folder: Path) -> PeftModel:
    """A folder as PEFT alone loads it, on a base of its vocabulary."""
    model = kind.auto.from_pretrained(base)
    if kind.rows is not None:
        model.resize_token_embeddings(kind.rows, mean_resizing=False)
    return PeftModel.from_pretrained(model, str(folder)).eval()
