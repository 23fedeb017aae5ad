"""What the tests of the trainer share: tiny models, data and arguments."""

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, TrainerCallback

import pm_hf.training.trainer

# PEFT asks any model for a property of which newer transformers warn
OLD_NAME = "ignore:.*is_gradient_checkpointing.*:FutureWarning"
LENGTH = 8


def tiny_bert(dropout: float = 0.0, labels: int = 3) -> BertForSequenceClassification:
    """BERT with 2 layers of width 16 and a random head."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=LENGTH,
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
        max_position_embeddings=LENGTH,
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
    tokens = torch.randint(0, 40, (count, LENGTH), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % labels} for row in tokens]


def language_rows(count: int, seed: int = 4) -> list[dict]:
    """Token sequences whose first k tokens are no targets, k from 0 to LENGTH - 2, so their target counts differ."""
    found = rows(count, seed=seed)
    return [
        row | {"labels": row["input_ids"].where(torch.arange(LENGTH) >= i % (LENGTH - 1), -100)}
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


# {kind: (a function that builds the model, a function that makes so many rows)}
KINDS = {"classifier": (lora_bert, rows), "language model": (lora_llama, language_rows)}
