"""A slow, obvious reference of the curvature: one example at a time, unpadded, autograd on the dense weights."""

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from pm_hf.config.schema import LoraSettings, ModelSettings
from pm_hf.models.task_model import build_task_model

PREFIX = "base_model.model."


def task_model(base, adapters: int = 2, rows: int = 3) -> nn.Module:
    """BERT with a task adapter and, below it, a frozen second one; B random in both."""
    lora = LoraSettings(r=2, alpha=4, dropout=0.1, target_modules=["key", "value"])
    model = build_task_model(ModelSettings(str(base)), lora, list("abcdef")[:rows], None, 0, 0).model
    if adapters == 2:
        model.add_adapter("merged", model.peft_config["task"])
    generator = torch.Generator().manual_seed(3)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data.normal_(0, 0.2, generator=generator)
            parameter.requires_grad_(".task." in name)
    for layer in lora_layers(model).values():
        layer.set_adapter(list(layer.scaling))
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_("lora_" in name and ".task" in name)
    return model


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    return {n.removeprefix(PREFIX): m for n, m in model.named_modules() if isinstance(m, LoraLayer)}


def examples(count: int, seed: int = 0, classes: int = 3) -> list[dict[str, Tensor]]:
    """Sequences of 3 to 9 tokens with a label, unpadded."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 10, (count,), generator=generator).tolist()
    draw = [torch.randint(4, 50, (length,), generator=generator) for length in lengths]
    return [{"input_ids": ids, "labels": torch.randint(0, classes, (), generator=generator)} for ids in draw]


def batches(rows: list[dict[str, Tensor]], size: int, length: int | None = None) -> list[dict[str, Tensor]]:
    """Padded batches; the padding is token 7, which is a word, so that only the mask tells."""
    found = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        width = length or max(len(row["input_ids"]) for row in part)
        ids = torch.full((len(part), width), 7)
        mask = torch.zeros(len(part), width, dtype=torch.long)
        for at, row in enumerate(part):
            ids[at, : len(row["input_ids"])], mask[at, : len(row["input_ids"])] = row["input_ids"], 1
        labels = torch.stack([row["labels"] for row in part])
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def gradients(model: nn.Module, weights: list[Tensor], row: dict[str, Tensor], label: Tensor) -> list[Tensor]:
    """Gradient of one example's loss with respect to dense weights."""
    logits = model(input_ids=row["input_ids"][None]).logits
    return list(torch.autograd.grad(F.cross_entropy(logits, label[None]), weights))


def dense_weights(model: nn.Module) -> dict[str, Tensor]:
    """The frozen base weights, made to require gradients: dL/dW₀ is the gradient of the whole dense weight."""
    model.eval()
    return {name: layer.base_layer.weight.requires_grad_(True) for name, layer in lora_layers(model).items()}


def fisher(model: nn.Module, rows: list[dict[str, Tensor]], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mean over examples of the squared gradient for the example's own label."""
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for row in rows:
        for name, g in zip(weights, gradients(model, list(weights.values()), row, row["labels"]), strict=True):
            total[name] += g.square()
    return {name: value / len(rows) for name, value in total.items()}


def exact_fisher(model: nn.Module, rows: list[dict[str, Tensor]], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mean over examples of Σ_c p(c|x)·(∇ −log p(c|x))²: every label enumerated."""
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for row in rows:
        with torch.no_grad():
            probabilities = model(input_ids=row["input_ids"][None]).logits[0].softmax(-1)
        for label, p in enumerate(probabilities):
            found = gradients(model, list(weights.values()), row, torch.tensor(label))
            for name, g in zip(weights, found, strict=True):
                total[name] += p * g.square()
    return {name: value / len(rows) for name, value in total.items()}


@torch.no_grad()
def gram(model: nn.Module, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Mean over examples of Σ_tokens x xᵀ for each module on its own."""
    inputs: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0]))
        for name, layer in lora_layers(model).items()
    ]
    model.eval()
    total = dict.fromkeys(lora_layers(model), 0.0)
    for row in rows:
        model(input_ids=row["input_ids"][None])
        for name, x in inputs.items():
            for token in x[0]:
                total[name] = total[name] + torch.outer(token, token)
    for handle in handles:
        handle.remove()
    return {name: value / len(rows) for name, value in total.items()}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """‖found − expected‖/‖expected‖, the largest over the modules."""
    assert found.keys() == expected.keys(), (sorted(found), sorted(expected))
    return max(float((found[name] - value).norm() / value.norm()) for name, value in expected.items())
