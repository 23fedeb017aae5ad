"""Terms that a strategy adds to the training loss: elastic weights, drift of outputs, orthogonal subspaces, the frozen
base's prediction.

A penalty is called once for each micro-step, after the model's own forward pass, and returns a scalar in the loss's
own unit. Penalties of the weights see the task's product unperturbed.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal, Protocol

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from pm_hf.errors import InputError
from pm_hf.merging.curvature import Curvature
from pm_hf.merging.lowrank import LowRank
from pm_hf.models.contexts import without_lora
from pm_hf.models.language_model import has_token_targets, predicts_next_token, target_logits, target_mask
from pm_hf.models.lora import HeadDelta, LoraDelta, adapted_layers, find_head, head_matrix, layer_product, lora_factors

Divergence = Literal["kl", "reverse_kl", "js", "tv"]
DRIFT_NATS = 0.1  # what the last task's change of its own outputs costs with `strategy.drift_weight: 1`


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
            change: LoraDelta | HeadDelta
            if name in layers:
                others = [other for other in layers[name].active_adapters if other != adapter]
                before = layer_product(layers[name], others).dense() if others else None
                change = LoraDelta(layers[name], adapter)
            else:
                before = head_matrix(find_head(model, name)).B
                change = HeadDelta(find_head(model, name))
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


class OutputDrift:
    """λ·tr(D(ΣG)Dᵀ)/n summed over the adapted modules, D = θ − θ̂_{t−1}: what a task changes of the outputs that the
    inputs of the n earlier tasks have (TAK, arXiv 2602.17385, without its factor of the outputs).

    ΣG: sum of the earlier tasks' Grams (in, in), of which each is a mean over examples of Σ_tokens xxᵀ, so the trace
    over n is Σ_tokens‖Dx‖², the mean over tasks and examples. λ = weight · 0.1 nat / tr(Δ_{t−1}G_{t−1}Δ_{t−1}ᵀ): with
    weight 1 a task that changes as much on the earlier tasks' inputs as the last one did on its own pays 0.1 nat.
    offset: {module: (where the training starts) − θ̂_{t−1}, (out, in)}, None where it starts at θ̂_{t−1}. Computed in
    float32 from the factors, nothing of the size (out, in). A head in the curvature is left out. InputError when the
    curvature is of another kind or of other modules, and when the last task changed nothing, so that λ has no scale.
    """

    per_target = False

    def __init__(
        self,
        model: nn.Module,
        adapter: str,
        curvature: Curvature,
        weight: float,
        offset: Mapping[str, LowRank] | None = None,
    ) -> None:
        if curvature.settings.kind != "gram":
            raise InputError(f"the drift penalty needs the Gram of the inputs, found kind {curvature.settings.kind!r}")
        layers = adapted_layers(model, adapter)
        if missing := sorted(set(layers) - curvature.modules):
            raise InputError(f"the drift penalty needs the curvature of every adapted module, it lacks {missing[0]}")
        last = sum(curvature.current[name] for name in layers)
        if not last > 0:
            raise InputError("the last task changed no output, so strategy.drift_weight has no scale; leave it out")
        self.adapter, self.weight = adapter, weight * DRIFT_NATS / (last * curvature.tasks)
        self._terms, self._grams = list[tuple[LoraLayer, float, str, LowRank | None]](), dict[str, Tensor]()
        for name, layer in layers.items():
            owner, width = curvature.owner.get(name, name), layer.lora_A[adapter].in_features
            gram = self._grams.setdefault(owner, curvature.sum_of(name))
            if tuple(gram.shape) != (width, width):
                raise InputError(f"the Gram of {name} has shape {tuple(gram.shape)}, its input {width} entries")
            self._terms.append((layer, layer.scaling[adapter], owner, None if offset is None else offset[name]))

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], logits: Tensor) -> Tensor:
        """The penalty, whatever the batch."""
        parts = []
        for layer, scaling, owner, before in self._terms:
            B, A = lora_factors(layer, self.adapter)
            B = scaling * B
            if before is not None:
                B, A = torch.cat([B, before.B.to(B)], dim=1), torch.cat([A, before.A.to(A)])
            if self._grams[owner].device != A.device:  # this was made before the Trainer moved the model
                self._grams[owner] = self._grams[owner].to(A.device)
            parts.append(((B.T @ B) * (A @ self._grams[owner] @ A.T)).sum())
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
            if has_token_targets(batch):
                base = target_logits(model, batch)[0]
                logits = logits[target_mask(batch["labels"], shifted=predicts_next_token(model))]
            else:
                base = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        return self.weight * divergence(base.float(), logits.float(), self.divergence).mean()


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
