"""Rehearsal of pool rows beside a task's own: half of every batch, and what their soft targets add to the loss."""

import random
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from pm_hf.data.pool import SOFT_TOKENS, SOFT_WEIGHTS
from pm_hf.models.language_model import IGNORED, predicts_next_token, target_mask


class HalfNew(Sampler[int]):
    """Indices of new rows (0 … new − 1) and pool rows (new … new + pool − 1) in turns, 2·new of them an epoch.

    Every epoch has each new row once; the pool rows go round in an order of their own, each as often as any other. A
    pure function of the seed and the epoch, so a continued training sees the rows that it would have seen.
    """

    def __init__(self, new: int, pool: int, seed: int) -> None:
        self.new, self.pool, self.seed, self.epoch = new, pool, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Trainer says which epoch begins."""
        self.epoch = epoch

    def __len__(self) -> int:
        return 2 * self.new

    def __iter__(self) -> Iterator[int]:
        new, at = self._order("new", self.new, self.epoch), self.epoch * self.new
        rounds = range(at // self.pool, (at + self.new - 1) // self.pool + 1)
        pool = [index for number in rounds for index in self._order("pool", self.pool, number)]
        for place, index in enumerate(new):
            yield index
            yield self.new + pool[at % self.pool + place]

    def _order(self, which: str, count: int, number: int) -> list[int]:
        return random.Random(f"{which}/{self.seed}/{number}").sample(range(count), count)


class SoftTargets:
    """The soft cross-entropy of a batch's soft targets less the cross-entropy of its labels, a mean over target tokens.

    Added to the loss of the labels it makes the rows' loss −Σ_k q_k log p_k with the probabilities q of `soft_collate`.
    As Σ_k q_k = 1 the normaliser of the softmax cancels: the difference is z_label − Σ_k q_k z_k, in the logits z.
    """

    per_target = True

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], logits: Tensor) -> Tensor:
        """A scalar in nats, float32; 0 for a batch without soft targets."""
        if SOFT_TOKENS not in batch:
            return torch.zeros((), device=logits.device)
        labels = batch["labels"]
        chosen = logits[target_mask(labels, shifted=predicts_next_token(model))].float()  # (n, V)
        hard = chosen.gather(1, labels[labels != IGNORED][:, None])[:, 0]
        soft = (chosen.gather(1, batch[SOFT_TOKENS]) * batch[SOFT_WEIGHTS]).sum(1)
        return (hard - soft).mean()
