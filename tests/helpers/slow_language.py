"""Tiny language models with two adapters, and the slow reference of their curvature: one unpadded example at a time."""

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from helpers.per_example import lora_layers
from pm_hf.models.language_model import IGNORED

WORDS = 11
CAUSAL = ("llama", "gpt2", "qwen2")
KINDS = (*CAUSAL, "t5")
TARGETS = {  # LoRA's target modules; T5's are in the encoder, the decoder and between them
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],  # Conv1D: weights (in, out)
    "qwen2": ["k_proj", "v_proj", "up_proj"],
    "t5": ["q", "v", "wo"],
}
MODULES = {"llama": 6, "gpt2": 4, "qwen2": 6, "t5": 16}
ENDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}


def base_model(kind: str, seed: int = 0, words: int = WORDS) -> PreTrainedModel:
    """Two layers of width 12 with dropout; random weights."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    rotary = {**shape, "num_key_value_heads": 1, "initializer_range": 0.4, "attention_dropout": 0.2}
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**rotary, **ENDS, vocab_size=words))
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**rotary, **ENDS, vocab_size=words, tie_word_embeddings=True))
    if kind == "gpt2":
        width = {"n_embd": 12, "n_layer": 2, "n_head": 2, "n_positions": 16, "initializer_range": 0.4}
        return GPT2LMHeadModel(GPT2Config(**width, **ENDS, vocab_size=words, resid_pdrop=0.2))
    width = {"d_model": 12, "d_kv": 6, "d_ff": 20, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.2}
    config = T5Config(**width, vocab_size=words, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config)


def task_model(kind: str, targets: list[str] | None = None, words: int = WORDS) -> nn.Module:
    """A model with a task adapter and, below it, a frozen second one, both active; A and B random."""
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=targets or TARGETS[kind], fan_in_fan_out=kind == "gpt2")
    model = get_peft_model(base_model(kind, words=words), lora, adapter_name="task")
    model.add_adapter("merged", lora)
    generator = torch.Generator().manual_seed(3)
    for layer in lora_layers(model).values():
        layer.set_adapter(["merged", "task"])
    for name, parameter in sorted(model.named_parameters()):
        parameter.requires_grad_("lora_" in name and ".task." in name)
        if "lora_" in name:
            parameter.data.normal_(0, 0.2, generator=generator)
    return model


def rows(kind: str, sizes: list[tuple[int, int]], seed: int = 0, words: int = WORDS) -> list[dict[str, Tensor]]:
    """Unpadded examples with (prompt, completion) tokens each; a causal prompt is masked in the labels."""
    generator, found = torch.Generator().manual_seed(seed), []
    for before, after in sizes:
        prompt, completion = (torch.randint(2, words, (size,), generator=generator) for size in (before, after))
        if kind == "t5":
            found.append({"input_ids": prompt, "labels": completion})
            continue
        masked = torch.full_like(prompt, IGNORED)
        found.append({"input_ids": torch.cat([prompt, completion]), "labels": torch.cat([masked, completion])})
    return found


SIZES = [(3, 2), (5, 1), (2, 4), (4, 3), (1, 5), (6, 2), (3, 3)]


def batches(examples: list[dict[str, Tensor]], size: int, extra: int = 0) -> list[dict[str, Tensor]]:
    """Batches padded on the right, by `extra` more than needed, with token 3, a word, so that only the mask tells."""
    found = []
    for start in range(0, len(examples), size):
        part = examples[start : start + size]
        ids = [row["input_ids"] for row in part]
        columns = {"input_ids": (ids, 3), "attention_mask": ([torch.ones_like(row) for row in ids], 0)}
        columns["labels"] = ([row["labels"] for row in part], IGNORED)
        found.append({name: padded(*column, extra) for name, column in columns.items()})
    return found


def padded(parts: list[Tensor], value: int, extra: int = 0) -> Tensor:
    width = max(len(part) for part in parts) + extra
    return torch.stack([torch.cat([part, part.new_full((width - len(part),), value)]) for part in parts])


def logits_of(model: nn.Module, row: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(logits (n, V), tokens (n,)) of the target positions of one example, from a full forward of it alone."""
    model.eval()
    ids, labels = row["input_ids"][None], row["labels"]
    if model.config.is_encoder_decoder:
        start = torch.tensor([model.config.decoder_start_token_id])
        shifted = torch.cat([start, labels[:-1].masked_fill(labels[:-1] == IGNORED, model.config.pad_token_id)])
        logits = model(input_ids=ids, decoder_input_ids=shifted[None], use_cache=False).logits[0]
    else:
        logits, labels = model(input_ids=ids, use_cache=False).logits[0, :-1], labels[1:]
    at = [t for t in range(len(labels)) if labels[t] != IGNORED]
    return logits[at], labels[at]


def dense_weights(model: nn.Module) -> dict[str, Tensor]:
    """The frozen base weights, made to require gradients."""
    return {name: layer.base_layer.weight.requires_grad_(True) for name, layer in lora_layers(model).items()}


def freeze(model: nn.Module) -> None:
    """The base weights as they were."""
    for layer in lora_layers(model).values():
        layer.base_layer.weight.requires_grad_(False)


def gradients(model: nn.Module, row: dict[str, Tensor], tokens: list[int] | None = None, reduction: str = "mean"):
    """{module: G (out, in)} of one example's loss for its own target tokens, or for others; a token at a time."""
    weights = dense_weights(model)
    logits, targets = logits_of(model, row)
    targets = targets.tolist() if tokens is None else tokens
    loss = sum(torch.logsumexp(line, 0) - line[token] for line, token in zip(logits, targets, strict=True))
    loss = loss / len(targets) if reduction == "mean" else loss
    found = torch.autograd.grad(loss, list(weights.values()))
    transposed = model.config.model_type == "gpt2"
    freeze(model)
    return {name: g.T if transposed else g for name, g in zip(weights, found, strict=True)}


def fisher(model: nn.Module, examples: list[dict[str, Tensor]], reduction: str = "mean") -> dict[str, Tensor]:
    """Mean over examples of G∘G."""
    found = [gradients(model, row, reduction=reduction) for row in examples]
    return {name: sum(g[name].square() for g in found) / len(found) for name in found[0]}


def means(fishers: dict[str, Tensor]) -> dict[str, Tensor]:
    """{module: means of F over its columns, then over its rows}, (out + in,)."""
    return {name: torch.cat([F.mean(1), F.mean(0)]) for name, F in fishers.items()}


@torch.no_grad()
def gram(model: nn.Module, examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Mean over examples of Σ_tokens x xᵀ of each module on its own."""
    total: dict[str, Tensor] = {}

    def add(name: str):
        def hook(_, args):
            for token in args[0].reshape(-1, args[0].shape[-1]):
                total[name] = total.get(name, 0.0) + torch.outer(token, token) / len(examples)

        return hook

    handles = [layer.register_forward_pre_hook(add(name)) for name, layer in lora_layers(model).items()]
    for row in examples:
        logits_of(model, row)
    for handle in handles:
        handle.remove()
    return total
