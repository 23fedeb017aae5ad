"""Terms that a strategy adds to the training loss: elastic weights, orthogonal subspaces, the frozen base's prediction.

A penalty is called once for each micro-step, after the model's own forward pass, and returns a scalar in the loss's
own unit. Penalties of the weights see the task's product unperturbed.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, Protocol

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from pm_hf.errors import InputError
from pm_hf.fisher import adapted_layers, head_matrix, layer_product
from pm_hf.language import IGNORED
from pm_hf.merging.curvature import Curvature
from pm_hf.modeling import find_head
from pm_hf.targets import bare, is_language, target_logits, target_mask

Divergence = Literal["kl", "reverse_kl", "js", "tv"]


class Penalty(Protocol):
    """What is added to the loss of one micro-batch.

    per_target: whether the value is a mean over the micro-batch's targets, as the loss is; else it depends on the
    weights alone.
    """

    per_target: bool

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], logits: Tensor) -> Tensor:
        """A scalar; batch: the inputs with `labels`; logits: the model's own, with their graph."""
        ...


class ElasticWeights:
    """λ(½θᵀSθ − θᵀM) over the adapted weights, θ = θ̂_{t−1} + Δ relative to the base (EWC, arXiv 1612.00796).

    S = ΣFᵢ and M = ΣFᵢθ*ᵢ are the running sums of the earlier tasks' diagonal Fisher, so the penalty is
    ½λ Σᵢ (θ − θ*ᵢ)ᵀFᵢ(θ − θ*ᵢ) up to a constant, with one state for any number of tasks. A head that all tasks share is
    penalised too where the curvature covers it. Computed in float32 from the dense change of each module, (out, in);
    the value is taken relative to the weights at the time when this is made, where it is 0. InputError when the
    curvature is of another kind or of other modules.
    """

    per_target = False

    def __init__(self, model: nn.Module, adapter: str, curvature: Curvature, weight: float) -> None:
        if curvature.settings.kind != "fisher":
            raise InputError(f"the EWC penalty needs a diagonal Fisher, found kind {curvature.settings.kind!r}")
        layers = adapted_layers(model, adapter)
        if missing := sorted(set(layers) - curvature.modules):
            raise InputError(f"the EWC penalty needs the curvature of every adapted module, it lacks {missing[0]}")
        self.weight, self._terms = weight, list[tuple[Callable[[], Tensor], Tensor, Tensor]]()
        for name in sorted(curvature.modules):
            change: Product | Change
            if name in layers:
                others = [other for other in layers[name].active_adapters if other != adapter]
                before = layer_product(layers[name], others).dense() if others else None
                change = Product(layers[name], adapter)
            else:
                before = head_matrix(find_head(model, name)).B
                change = Change(find_head(model, name))
            # λ(½ΔᵀSΔ − Δᵀ(M − Sθ̂)): only what moves with Δ
            S, pull = curvature.sum_of(name).float(), curvature.M[name].float()
            if not curvature.fits(name, tuple(change().shape)):  # type: ignore[arg-type]  # (out, in)
                raise InputError(f"the curvature of {name} has shape {tuple(S.shape)}, its weight another")
            self._terms.append((change, S, pull if before is None else pull - S * before))

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], logits: Tensor) -> Tensor:
        """The penalty, whatever the batch."""
        parts = []
        for index, (change, S, pull) in enumerate(self._terms):
            delta = change()
            if S.device != delta.device:  # this was made before the Trainer moved the model
                S, pull = S.to(delta.device), pull.to(delta.device)
                self._terms[index] = (change, S, pull)
            parts.append((delta * (0.5 * S * delta - pull)).sum())
        return self.weight * torch.stack(parts).sum()


class OrthogonalSubspaces:
    """λ Σ |A_old A_tᵀ|, the sum of absolute values over all adapted modules (O-LoRA, arXiv 2310.14152).

    A_old: the stacked A of every earlier task (R, in), that is the running merge's own factor as long as it was
    merged exactly, factors side by side; A_t: the task's (r, in).
    """

    per_target = False

    def __init__(self, model: nn.Module, adapter: str, merged: str, weight: float) -> None:
        self.weight, self._adapter, self._merged = weight, adapter, merged
        self._layers = [layer for layer in adapted_layers(model, adapter).values() if merged in layer.lora_A]
        if not self._layers:
            raise InputError(f"the O-LoRA penalty needs the earlier tasks' factors, the model has no adapter {merged}")

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], logits: Tensor) -> Tensor:
        """The penalty, whatever the batch."""
        parts = []
        for layer in self._layers:
            old, new = (layer.lora_A[name].weight.float() for name in (self._merged, self._adapter))
            parts.append((old.detach() @ new.T).abs().sum())
        return self.weight * torch.stack(parts).sum()


class BaseDivergence:
    """λ·D between the frozen base's prediction p and the model's q, the mean over examples (target tokens).

    The base is the model without any LoRA, in eval mode; a class head is the one being trained, as the checkpoint has
    none for these classes. D: kl = KL(p‖q), reverse_kl = KL(q‖p), js = ½KL(p‖m) + ½KL(q‖m) with m = (p + q)/2,
    tv = ½Σ|p − q|, all in nats, float32 (self-regularisation of OrthSR, arXiv 2407.08374).
    """

    per_target = True

    def __init__(self, weight: float, divergence: Divergence = "kl") -> None:
        self.weight, self.divergence = weight, divergence

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], logits: Tensor) -> Tensor:
        """One forward pass of the base, without gradients."""
        with without_lora(model), torch.no_grad():
            if is_language(batch):
                base = target_logits(model, batch)[0]
                logits = logits[target_mask(batch["labels"], shifted=_shifted(model))]
            else:
                base = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        return self.weight * divergence(base.float(), logits.float(), self.divergence).mean()


class Product:
    """s·BA of one layer's adapter with its graph, (out, in) float32, at the scaling it had when this was made."""

    def __init__(self, layer: LoraLayer, adapter: str) -> None:
        self.layer, self.adapter, self.scaling = layer, adapter, layer.scaling[adapter]

    def __call__(self) -> Tensor:
        """The product now."""
        A, B = (factors[self.adapter].weight.float() for factors in (self.layer.lora_A, self.layer.lora_B))
        return self.scaling * (B @ A)


class Change:
    """[weight | bias] of a Linear with its graph, (out, in + 1) float32, less what it was when this was made."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear, self.before = linear, head_matrix(linear).B.clone()

    def __call__(self) -> Tensor:
        """The difference now."""
        weight, bias = self.linear.weight.float(), self.linear.bias
        now = weight if bias is None else torch.cat([weight, bias.float()[:, None]], dim=1)
        self.before = self.before.to(now.device)
        return now - self.before


def target_count(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Number of a batch's targets: examples, or of a language model target tokens; a scalar."""
    labels = batch["labels"]
    if not is_language(batch):
        return (labels != IGNORED).sum()
    return target_mask(labels, shifted=_shifted(model)).sum()


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
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
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


def _shifted(model: nn.Module) -> bool:
    """Whether logits at t predict token t + 1 (causal models), not labels[t] (encoder-decoder models)."""
    return not bare(model).config.is_encoder_decoder
