"""What the tests of the trainer share: tiny models, data and arguments."""

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback

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
