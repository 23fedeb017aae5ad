"""What a language model predicts: its logits at the target tokens of a batch, and how many there are."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pm_hf.models.contexts import logits_only_at
from pm_hf.models.sharded import transformer_of

IGNORED = -100  # label of a position where nothing is predicted
ROUNDING = 1e-4  # of probabilities that are kept to six digits and sum to 1


def has_token_targets(batch: Mapping[str, Any]) -> bool:
    """Whether a batch's labels are token ids (N, T), not classes (N,)."""
    return batch["labels"].ndim == 2


def target_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(logits (n, V), target token (n,), example (n,)) of the n target positions of a batch, example by example.

    Causal models predict token t + 1 at t; encoder-decoder models predict labels[t] at t. The output embedding sees the
    n positions only, so nothing as large as (N, T, V) exists.
    """
    encoder_decoder = bool(transformer_of(model).config.is_encoder_decoder)
    labels = batch["labels"]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if encoder_decoder:
        inputs["decoder_input_ids"] = transformer_of(model).prepare_decoder_input_ids_from_labels(labels=labels)
    else:
        inputs["use_cache"] = False  # type: ignore[assignment]
    mask = target_mask(labels, shifted=not encoder_decoder)
    aim = labels if encoder_decoder else labels.roll(-1, dims=1)
    with logits_only_at(model, mask):
        logits = model(**inputs).logits
    return logits.reshape(-1, logits.shape[-1]), aim[mask], mask.nonzero()[:, 0]


def target_mask(labels: Tensor, *, shifted: bool) -> Tensor:
    """(N, T) bool: where the logits predict a target token, labels[t + 1] where `shifted`, else labels[t]."""
    targets = labels != IGNORED
    return torch.cat([targets[:, 1:], targets.new_zeros(len(targets), 1)], dim=1) if shifted else targets


def soft_cross_entropy(logits: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
    """−Σ_k q_k log p_k − (1 − Σ_k q_k) log(1 − Σ_k p_k) of each of n target positions, (n,), in nats.

    The tokens without a q are one event together: likeliest tokens alone, taken for the whole distribution, would teach
    that no other token can follow. logits: (n, V), in the dtype to compute in; tokens, weights: (n, K) token ids and
    their q, 0 where there is none.
    """
    return logits.logsumexp(1) - soft_logits(logits, tokens, weights)


def soft_logits(logits: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
    """Σ_k q_k z_k + (1 − Σ_k q_k) log Σ_others exp z of each target position, (n,): what `soft_cross_entropy` subtracts
    from the log of the softmax's normaliser. A rest below ROUNDING is none."""
    soft = (logits.gather(1, tokens) * weights).sum(1)
    rest = 1 - weights.sum(1)
    some = (rest > ROUNDING).nonzero()[:, 0]
    if not len(some):
        return soft
    known = torch.where(weights[some] > 0, tokens[some], tokens[some, :1])  # padding names the first token again
    others = logits[some].scatter(1, known, -torch.inf).logsumexp(1)
    return soft.index_add(0, some, (rest[some] * others).to(soft.dtype))


def target_count(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Number of a batch's targets: examples, or of a language model target tokens; a scalar."""
    labels = batch["labels"]
    if not has_token_targets(batch):
        return (labels != IGNORED).sum()
    return target_mask(labels, shifted=predicts_next_token(model)).sum()


def predicts_next_token(model: nn.Module) -> bool:
    """Whether logits at t predict token t + 1 (causal models), not labels[t] (encoder-decoder models)."""
    return not transformer_of(model).config.is_encoder_decoder
