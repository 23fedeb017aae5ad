"""Terms that a strategy adds to the training loss: elastic weights, orthogonal subspaces, the frozen base's prediction.

A penalty is called once for each micro-step, inside the forward pass, and returns a scalar in the loss's own unit.
Penalties of the weights see the task's product unperturbed.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, Protocol

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from pm_hf.errors import InputError
from pm_hf.fisher import adapted_layers, layer_product
from pm_hf.merging.curvature import Curvature
from pm_hf.targets import bare, is_language, target_mask

Divergence = Literal["kl", "reverse_kl", "js", "tv"]


class Penalty(Protocol):
    """What is added to the loss of one micro-batch."""

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], logits: Tensor) -> Tensor:
        """A scalar; batch: the inputs with `labels`; logits: the model's own, with their graph."""
        ...


class ElasticWeights:
    """λ(½θᵀSθ − θᵀM) over the adapted weights, θ = θ̂_{t−1} + Δ relative to the base (EWC, arXiv 1612.00796).

    S = ΣFᵢ and M = ΣFᵢθ*ᵢ are the running sums of the earlier tasks' diagonal Fisher, so the penalty is
    ½λ Σᵢ (θ − θ*ᵢ)ᵀFᵢ(θ − θ*ᵢ) up to a constant, with one state for any number of tasks. Computed in float32 from the
    dense product of each module, (out, in); the value is taken relative to Δ = 0, where it is 0.
    """

    def __init__(self, model: nn.Module, adapter: str, curvature: Curvature, weight: float) -> None:
        if curvature.settings.kind != "fisher":
            raise InputError(f"the EWC penalty needs a diagonal Fisher, found kind {curvature.settings.kind!r}")
        layers = adapted_layers(model, adapter)
        if strange := sorted(set(layers) ^ curvature.modules):
            raise InputError(f"the curvature and the adapter differ in their modules, first {strange[0]}")
        self.weight, self._terms = weight, []
        for name, layer in layers.items():
            # λ(½ΔᵀSΔ − Δᵀ(M − Sθ̂)): only what moves with Δ
            S = curvature.sum_of(name).float()
            before = layer_product(layer, [other for other in layer.active_adapters if other != adapter])
            pull = curvature.M[name].float() - S * before.dense()
            device = layer.lora_A[adapter].weight.device
            self._terms.append((Product(layer, adapter), S.to(device), pull.to(device)))

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], logits: Tensor) -> Tensor:
        """The penalty, whatever the batch."""
        parts = []
        for product, S, pull in self._terms:
            delta = product()
            parts.append((delta * (0.5 * S * delta - pull)).sum())
        return self.weight * torch.stack(parts).sum()


class OrthogonalSubspaces:
    """λ Σ |A_old A_tᵀ|, the sum of absolute values over all adapted modules (O-LoRA, arXiv 2310.14152).

    A_old: the stacked A of every earlier task (R, in), that is the running merge's own factor as long as it was
    merged exactly and by concatenation; A_t: the task's (r, in).
    """

    def __init__(self, model: nn.Module, adapter: str, merged: str, weight: float) -> None:
        self.weight = weight
        self._pairs = [
            (layer.lora_A[merged].weight.detach().float(), layer.lora_A[adapter].weight)
            for layer in adapted_layers(model, adapter).values()
            if merged in layer.lora_A
        ]
        if not self._pairs:
            raise InputError(f"the O-LoRA penalty needs the earlier tasks' factors, the model has no adapter {merged}")

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], logits: Tensor) -> Tensor:
        """The penalty, whatever the batch."""
        return self.weight * torch.stack([(old @ new.float().T).abs().sum() for old, new in self._pairs]).sum()


class BaseDivergence:
    """λ·D between the frozen base's prediction p and the model's q, the mean over examples (target tokens).

    The base is the model without any LoRA, in eval mode; a class head is the one being trained, as the checkpoint has
    none for these classes. D: kl = KL(p‖q), reverse_kl = KL(q‖p), js = ½KL(p‖m) + ½KL(q‖m) with m = (p + q)/2,
    tv = ½Σ|p − q|, all in nats, float32 (self-regularisation of OrthSR, arXiv 2407.08374).
    """

    def __init__(self, weight: float, divergence: Divergence = "kl") -> None:
        self.weight, self.divergence = weight, divergence

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], logits: Tensor) -> Tensor:
        """One forward pass of the base, without gradients."""
        language, shifted = is_language(batch), not bare(model).config.is_encoder_decoder
        # an encoder-decoder makes the decoder's input of the labels
        inputs = {name: value for name, value in batch.items() if name != "labels" or (language and not shifted)}
        with without_lora(model), torch.no_grad():
            base = model(**inputs).logits
        if language:
            mask = target_mask(batch["labels"], shifted=shifted)
            base, logits = base[mask], logits[mask]
        found = divergence(base.float(), logits.float(), self.divergence)
        return self.weight * found.mean()


class Product:
    """s·BA of one layer's adapter with its graph, (out, in) float32, at the scaling it had when this was made."""

    def __init__(self, layer: LoraLayer, adapter: str) -> None:
        self.layer, self.adapter, self.scaling = layer, adapter, layer.scaling[adapter]

    def __call__(self) -> Tensor:
        """The product now."""
        A, B = (factors[self.adapter].weight.float() for factors in (self.layer.lora_A, self.layer.lora_B))
        return self.scaling * (B @ A)


def divergence(base: Tensor, logits: Tensor, kind: Divergence) -> Tensor:
    """D between softmax(base) and softmax(logits), (N, C) each, of every row, (N,), in nats."""
    log_p, log_q = base.log_softmax(-1), logits.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    if kind == "kl":
        return (p * (log_p - log_q)).sum(-1)
    if kind == "reverse_kl":
        return (q * (log_q - log_p)).sum(-1)
    if kind == "tv":
        return 0.5 * (p - q).abs().sum(-1)
    log_m = torch.stack([log_p, log_q]).logsumexp(0) - torch.log(torch.tensor(2.0))
    return 0.5 * ((p * (log_p - log_m)).sum(-1) + (q * (log_q - log_m)).sum(-1))


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """The model without any LoRA product and in eval mode, saved modules as they are; restored on any exception."""
    modes = {module: module.training for module in model.modules()}
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    before = [layer._disable_adapters for layer in layers]
    model.eval()
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, off in zip(layers, before, strict=True):
            layer._disable_adapters = off
        for module, mode in modes.items():
            module.training = mode
