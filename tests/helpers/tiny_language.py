"""Tiny language models with their tokenizers, made in-process and saved to folders."""

import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

KINDS = ("red", "blue", "green", "gold", "dark", "pale")
WORDS = [f"{kind}{i}" for kind in KINDS for i in range(5)]
PLAIN = ["Text", "Task", "Answer", "Colour", "user", "assistant", "system", ":", ",", "?", *KINDS]
SPECIAL = ["[PAD]", "[UNK]", "[BOS]", "[EOS]", "[USER]", "[SAYS]"]
CHAT = (
    "{% for m in messages %}{{ '[USER]' if m['role'] == 'user' else '[SAYS]' }} {{ m['content'] }}[EOS]\n"
    "{% endfor %}{% if add_generation_prompt %}[SAYS] {% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TARGETS = {  # LoRA's target modules: all that a layer has
    "llama": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    "qwen2": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "t5": ["q", "v", "o", "wi", "wo"],
}
LENGTH = 64  # GPT-2's positions
SIZE = len(SPECIAL) + len(PLAIN) + len(WORDS)
BYTES = 384  # vocabulary of the byte-level tokenizer at most


def word_tokenizer(*, bos: bool = False, eos: bool = False, chat: bool = True) -> PreTrainedTokenizerFast:
    """One token for each word; bos: texts begin with [BOS]; eos: they end with [EOS] (as T5's do)."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *PLAIN, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(name, vocabulary[name]) for name in ("[BOS]", "[EOS]")]
    template = ["[BOS]"] * bos + ["$A"] + ["[EOS]"] * eos
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ends)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token="[BOS]" if bos else None,
        eos_token="[EOS]",
        additional_special_tokens=["[USER]", "[SAYS]"],
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = CHAT if chat else None
    return made


def byte_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE without bos: texts and their spaces round-trip; the chat template is ChatML."""
    trained = Tokenizer(models.BPE())
    trained.normalizer, trained.decoder = normalizers.NFC(), decoders.ByteLevel()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated")
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trained.pre_tokenizer = pre_tokenizers.Sequence([split, byte])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=BYTES, special_tokens=special, initial_alphabet=alphabet)
    texts = [word for word in [*PLAIN, *WORDS] for _ in range(3)]
    trained.train_from_iterator([*texts, *(f" {text}" for text in texts)], trainer)
    bpe = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in bpe["merges"]]
    made = Qwen2Tokenizer(vocab=bpe["vocab"], merges=merges, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    made.chat_template = CHATML
    return made


def tiny_tokenizer(kind: str):
    """Bytes for qwen2, words for the others; Llama's texts begin with [BOS], T5's end with [EOS]."""
    if kind == "qwen2":
        return byte_tokenizer()
    return word_tokenizer(bos=kind == "llama", eos=kind == "t5", chat=kind != "t5")


def tiny_model(kind: str, seed: int = 0) -> torch.nn.Module:
    """Two layers of width 32 with random weights: llama, qwen2, gpt2 (learned positions) or t5; no dropout."""
    torch.manual_seed(seed)
    ends = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    rotary = {**shape, "num_key_value_heads": 2, "initializer_range": 0.15, "max_position_embeddings": 256}
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**rotary, vocab_size=SIZE, **ends)).eval()
    if kind == "qwen2":
        ends = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2}
        return Qwen2ForCausalLM(Qwen2Config(**rotary, vocab_size=BYTES, tie_word_embeddings=True, **ends)).eval()
    if kind == "gpt2":
        still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.15}
        width = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": LENGTH, "vocab_size": SIZE}
        return GPT2LMHeadModel(GPT2Config(**width, **still, **ends)).eval()
    if kind == "t5":
        width = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": SIZE}
        ends = {"pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0}
        return T5ForConditionalGeneration(T5Config(**width, dropout_rate=0.0, **ends)).eval()
    raise ValueError(kind)


def tiny_folder(kind: str, folder: Path, seed: int = 0) -> Path:
    """Checkpoint and tokenizer of a kind of model."""
    tiny_model(kind, seed).save_pretrained(folder)
    tiny_tokenizer(kind).save_pretrained(folder)
    return folder
