"""Tiny models of every kind with their tokenizers, what they are trained on, and slow scores of them."""

import io
import json
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    BertConfig,
    BertForSequenceClassification,
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
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import pm_hf.training.trainer
from helpers import with_changes

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


PICTURE_SIZE, SQUARE = 12, 4  # pixels of a picture's edge and of the square's
SHAPES = ("bar", "box", "dot", "hat", "key", "zip")
TINY = {
    "image_size": PICTURE_SIZE,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "initializer_range": 0.2,  # wide enough for a random encoder to carry the square to the [CLS] position
}
PICTURE_TARGETS = ["k_proj", "v_proj"]


def save_vit(folder: Path) -> Path:
    """A ViT of 2 layers of width 32 with a head of 3 rows, and its processor."""
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(**TINY, num_labels=3)).save_pretrained(folder)
    save_processor(folder)
    return folder


def save_processor(folder: Path) -> None:
    """An image processor for pictures of PICTURE_SIZE pixels."""
    mean = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    ViTImageProcessorPil(size={"height": PICTURE_SIZE, "width": PICTURE_SIZE}, **mean).save_pretrained(folder)


def draw(labels, classes, seed: int, dim: float = 0.0) -> np.ndarray:
    """uint8 (n, size, size, 3): noise and a bright square at the place of each label; dim: 0 to 1, how much darker."""
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 60, (len(labels), PICTURE_SIZE, PICTURE_SIZE, 3))
    across = PICTURE_SIZE // SQUARE
    for picture, label in zip(pictures, labels, strict=True):
        row, column = divmod(list(classes).index(label) % across**2, across)
        place = (slice(row * SQUARE, (row + 1) * SQUARE), slice(column * SQUARE, (column + 1) * SQUARE))
        picture[place] = rng.integers(200, 256, (SQUARE, SQUARE, 3)) * (1 - dim)
    return pictures.astype(np.uint8)


def write_npz(path: Path, classes=SHAPES, train: int = 16, test: int = 6, domains=None) -> Path:
    """An .npz file of all classes; with domains, each one draws with a brightness of its own."""
    arrays = {"classes": np.array(classes)}
    if domains:
        arrays["domains"] = np.array(domains)
    for side, count, seed in (("train", train, 1), ("test", test, 1001)):
        labels = [label for label in classes for _ in range(count)]
        parts = [draw(labels, classes, seed + i, dim=0.5 * i) for i in range(len(domains or [""]))]
        arrays[f"x_{side}"] = np.concatenate(parts)
        arrays[f"y_{side}"] = np.array([list(classes).index(label) for label in labels] * len(parts), dtype=np.int16)
        if domains:
            arrays[f"domain_{side}"] = np.repeat(np.arange(len(parts)), len(labels))
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
    return path


def encoded(picture: np.ndarray, kind: str = "PNG", mode: str | None = None) -> bytes:
    """The bytes of a picture file."""
    buffer, image = io.BytesIO(), Image.fromarray(picture)
    (image.convert(mode) if mode else image).save(buffer, kind)
    return buffer.getvalue()


def image_settings(base, data, output, method="pm", **changes) -> dict:
    """Settings of a class-incremental stream of 3 tasks with 2 classes each; `changes` are keys with __ for the dot."""
    config = {
        "output_dir": str(output),
        "data_dir": str(data),
        "method": method,
        "model": {"base": str(base)},
        "stream": {
            "kind": "image-classification",
            "train": "shapes.npz",
            "test": "shapes.npz",
            "class_groups": 3,
        },
        "lora": {"r": 2, "alpha": 4, "target_modules": PICTURE_TARGETS},
        "curvature": {"samples": 16},
        "training": {
            "num_train_epochs": 6,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 32,
            "learning_rate": 1e-2,
            "head_learning_rate": 2e-2,
        },
    }
    return with_changes(config, changes)


# PEFT asks any model for a property of which newer transformers warn
OLD_NAME = "ignore:.*is_gradient_checkpointing.*:FutureWarning"
ROW_LENGTH = 8


def tiny_bert(dropout: float = 0.0, labels: int = 3) -> BertForSequenceClassification:
    """BERT with 2 layers of width 16 and a random head."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=ROW_LENGTH,
        initializer_range=0.2,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=labels,
    )
    return BertForSequenceClassification(config)


def lora_bert(*adapters: str, dropout: float = 0.0, **config) -> nn.Module:
    """tiny_bert with LoRA adapters on key and value; the last one is active and trains, B random in all of them."""
    torch.manual_seed(1)
    lora = LoraConfig(**{"r": 2, "lora_alpha": 4, "lora_dropout": dropout, "target_modules": ["key", "value"]} | config)
    first, *others = adapters or ("default",)
    model = get_peft_model(tiny_bert(dropout), lora, adapter_name=first)
    for name in others:
        model.add_adapter(name, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    model.set_adapter((adapters or ("default",))[-1])
    return model


def tiny_llama(width: int = 16) -> LlamaForCausalLM:
    """Llama with 2 layers and random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=ROW_LENGTH,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


def lora_llama(base: nn.Module | None = None, **config) -> nn.Module:
    """tiny_llama, or another base, with LoRA on query and value, B random."""
    torch.manual_seed(1)
    lora = LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]} | config)
    model = get_peft_model(tiny_llama() if base is None else base, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def activate_all(model: nn.Module, trained: str) -> nn.Module:
    """All adapters active in every layer, only `trained` trainable."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.set_adapter(list(layer.scaling))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and f".{trained}." in name)
    return model


def rows(count: int, labels: int = 3, seed: int = 2) -> list[dict]:
    """Token sequences whose class can be read off the first token."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 40, (count, ROW_LENGTH), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % labels} for row in tokens]


def language_rows(count: int, seed: int = 4) -> list[dict]:
    """Token sequences whose first k tokens are no targets, k from 0 to ROW_LENGTH - 2: unequal target counts."""
    found = rows(count, seed=seed)
    return [
        row | {"labels": row["input_ids"].where(torch.arange(ROW_LENGTH) >= i % (ROW_LENGTH - 1), -100)}
        for i, row in enumerate(found)
    ]


def batch(examples: list[dict]) -> dict[str, Tensor]:
    """Rows stacked."""
    return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}


def quick_arguments(folder, kind, **settings):
    """Arguments of `kind` for a few silent steps on the CPU."""
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    return kind(**defaults | settings)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the trainable parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def logged(trainer, key: str) -> list[float]:
    """The values of one key in the trainer's log."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def assert_equal_states(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Same names, same bits."""
    assert left.keys() == right.keys()
    assert left
    differing = [name for name in left if not torch.equal(left[name], right[name])]
    assert differing == []


class Watch(TrainerCallback):
    """Calls `before_step(model)` when the gradients are complete, before the optimizer uses them."""

    def __init__(self, before_step):
        self.before_step = before_step

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.before_step(model)


class OutOfMemory(TrainerCallback):
    """Fails like a full GPU in the second micro-step of a step as long as batches are larger than 4."""

    def __init__(self, trainer, step=1):
        self.trainer, self.step = trainer, step

    def on_substep_end(self, args, state, control, **_):
        if self.trainer._train_batch_size > 4 and state.global_step + 1 == self.step:
            raise RuntimeError("CUDA out of memory.")


def pin(monkeypatch, *factors: float) -> None:
    """Micro-step k of every step uses the k-th factor, or the only one given."""
    monkeypatch.setattr(
        pm_hf.training.trainer, "perturbation_factor", lambda *_, micro_step, **__: factors[micro_step % len(factors)]
    )


def summed_loss(model: nn.Module, inputs: dict[str, Tensor], smoothing: float = 0.0) -> tuple[Tensor, int]:
    """(sum of the cross-entropies of a batch's targets, their number), from the logits."""
    logits, labels = model(**{key: value for key, value in inputs.items() if key != "labels"}).logits, inputs["labels"]
    if labels.ndim == 2:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    total = cross_entropy(logits, labels, reduction="sum", ignore_index=-100, label_smoothing=smoothing)
    return total, int((labels != -100).sum())


def multiplied_gradients(
    model: nn.Module, micro_batches: list[dict], factors: list[float], smoothing: float = 0.0
) -> dict[str, Tensor]:
    """Gradient of the mean loss over the targets of all micro-batches, the k-th seen by a model whose B is multiplied.

    The slow twin of the perturbed step: B is changed in place, and the chain rule's factor is put on its gradient.
    """
    products = {name: p for name, p in model.named_parameters() if p.requires_grad and "lora_B" in name}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in products.items()}
    total = {name: torch.zeros_like(p) for name, p in trained.items()}
    targets = 0
    for inputs, factor in zip(micro_batches, factors, strict=True):
        for name, p in products.items():
            p.data = before[name] * factor
        loss, count = summed_loss(model, inputs, smoothing)
        targets += count
        for (name, _), gradient in zip(trained.items(), torch.autograd.grad(loss, list(trained.values())), strict=True):
            total[name] += gradient * (factor if name in products else 1)
    for name, p in products.items():
        p.data = before[name]
    return {name: gradient / targets for name, gradient in total.items()}


class Gradients(Watch):
    """Keeps the gradients of every optimizer step in `found`."""

    def __init__(self):
        self.found: list[dict[str, Tensor]] = []
        super().__init__(
            lambda model: self.found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
        )


def assert_close(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Same names, relative distance of each tensor below the tolerance, none of them zero."""
    assert left.keys() == right.keys()
    assert left
    for name, value in left.items():
        assert right[name].norm() > 0, name
        assert (value - right[name]).norm() <= tolerance * right[name].norm(), name


def ones(*ids):
    return torch.tensor([list(ids)])


@torch.no_grad()
def log_probabilities(model, prompt, answer):
    """Log-probability of each token of the answer, and whether it is the likeliest."""
    if model.config.is_encoder_decoder:
        start = [model.config.decoder_start_token_id]
        logits = model(input_ids=ones(*prompt), decoder_input_ids=ones(*start, *answer[:-1])).logits[0]
    else:
        logits = model(input_ids=ones(*prompt, *answer), use_cache=False).logits[0, len(prompt) - 1 : -1]
    found = logits.log_softmax(-1)
    return found[torch.arange(len(answer)), answer], logits.argmax(-1) == torch.tensor(answer)


def mean_log_probability(model, encoder, prompt, answer):
    """Of an answer's tokens after a prompt."""
    return float(log_probabilities(model, encoder.prompt(prompt), encoder.completion(prompt, answer))[0].mean())


@torch.no_grad()
def greedy(model, prompt, end, longest):
    """Token by token, each from a forward pass over everything before it."""
    said = []
    for _ in range(longest):
        if model.config.is_encoder_decoder:
            start = model.config.decoder_start_token_id
            logits = model(input_ids=ones(*prompt), decoder_input_ids=ones(start, *said)).logits
        else:
            logits = model(input_ids=ones(*prompt, *said), use_cache=False).logits
        token = int(logits[0, -1].argmax())
        if token == end:
            break
        said.append(token)
    return said
