"""Rehearsal of pool rows beside a task's own: half of every batch, and what their soft targets add to the loss."""

import random
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler

from pm_hf.data.language import CausalEncoder
from pm_hf.data.pool import SOFT_TOKENS, SOFT_WEIGHTS, Pool, soft_collate, without_soft_targets
from pm_hf.data.rows import Examples
from pm_hf.errors import raise_all
from pm_hf.models.language_model import (
    IGNORED,
    predicts_next_token,
    soft_cross_entropy,
    soft_logits,
    target_mask,
)
from pm_hf.models.sharded import transformer_of
from pm_hf.training.trainer import BeforeTrainer


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

    Added to the loss of the labels it makes the rows' loss the `soft_cross_entropy` with the probabilities of
    `soft_collate`. The normaliser of the softmax cancels: the difference is z_label − `soft_logits`, in the logits z.
    """

    per_target = True

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], logits: Tensor) -> Tensor:
        """A scalar in nats, float32; 0 for a batch without soft targets."""
        if SOFT_TOKENS not in batch:
            return torch.zeros((), device=logits.device)
        labels = batch["labels"]
        chosen = logits[target_mask(labels, shifted=predicts_next_token(model))].float()  # (n, V)
        hard = chosen.gather(1, labels[labels != IGNORED][:, None])[:, 0]
        return (hard - soft_logits(chosen, batch[SOFT_TOKENS], batch[SOFT_WEIGHTS])).mean()


class HalfNewMixin(BeforeTrainer):
    """The only change is what is trained on after `rehearse`: half of every batch are the examples that it got."""

    train_dataset: Any
    data_collator: Any
    _half_new: HalfNew | None = None

    def rehearse(self, examples: Examples) -> None:
        """From now on half of every batch are these examples (see `HalfNew`), with their `soft` targets."""
        task = getattr(self.args, "task_index", 0)
        self._half_new = HalfNew(len(self.train_dataset), len(examples), self.args.seed + task)
        self.train_dataset = Joined(self.train_dataset, examples)
        self.data_collator = soft_collate(self.data_collator)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler[int] | None:
        return self._half_new or super()._get_train_sampler(*args, **kwargs)


class Joined(Dataset):
    """The examples of one sequence, then those of another."""

    def __init__(self, first: Examples, second: Examples) -> None:
        self.first, self.second = first, second

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, index: int) -> dict:
        return self.first[index] if index < len(self.first) else self.second[index - len(self.first)]


class RehearsalMixin(HalfNewMixin):
    """Generated rehearsal for any Trainer of causal language models, TRL's SFTTrainer among them.

    Put it before the Trainer, and before PerturbationMixin where both are used: `class T(RehearsalMixin,
    PerturbationMixin, SFTTrainer)`; the trainer then takes `pool`, a Pool. Half of every batch are rows of the task,
    each of them once an epoch, half rows of the pool, which go round in an order that depends on the seed and
    `task_index` alone, so a resumed training sees the rows that it would have seen. The loss is −Σ_k q_k log p_k in
    nats, the mean over the target tokens of a step, with the stored probabilities q of a pool row and q = 1 on the
    label of the task's rows. It needs the logits; SFTTrainer runs a second forward pass without gradient for its own
    metrics. Pool rows are encoded with `processing_class` (a tokenizer) and cut to the `max_length` of the arguments.
    With an empty pool (the first task) nothing is changed. Raises InputError for an encoder-decoder, packed or
    padding-free rows, a stream without a length, a loss function of one's own, label smoothing, or no tokenizer.
    """

    _signature_columns: Any
    _soft: tuple[Tensor, Tensor] | None = None  # token ids and probabilities of the batch whose loss is computed

    def __init__(self, *args: Any, pool: Pool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not pool.rows:
            return
        raise_all(self._rehearsal_problems(), "rehearsal")
        collate = self.data_collator

        def of_tokens(examples: list[dict]) -> dict[str, Tensor]:
            batch: dict[str, Tensor] = collate(examples)
            batch["labels"][:, 0] = IGNORED  # nothing predicts the first token
            return batch

        encoder = CausalEncoder(self.processing_class, getattr(self.args, "max_length", None) or sys.maxsize)
        examples = pool.examples(encoder)
        self.data_collator, self.compute_loss_func = of_tokens, self._loss_of_soft_targets
        self.rehearse([{name: row[name] for name in ("input_ids", "labels", "soft")} for row in examples])

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The Trainer's, of the batch without its soft targets, which its loss function is told."""
        self._soft = (inputs[SOFT_TOKENS], inputs[SOFT_WEIGHTS]) if SOFT_TOKENS in inputs else None
        return super().compute_loss(model, without_soft_targets(inputs), return_outputs, num_items_in_batch)

    def _loss_of_soft_targets(
        self, outputs: Mapping[str, Tensor], labels: Tensor, num_items_in_batch: Any = None
    ) -> Tensor:
        mask = target_mask(labels, shifted=True)
        hard = labels[:, 1:][mask[:, :-1]][:, None]
        losses = soft_cross_entropy(outputs["logits"][mask].float(), *(self._soft or (hard, torch.ones_like(hard))))
        return losses.sum() / (len(losses) if num_items_in_batch is None else num_items_in_batch)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "soft" not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, "soft"]

    def _rehearsal_problems(self) -> list[str]:
        """Why this trainer cannot rehearse a pool."""
        args, smoothing = self.args, self.args.label_smoothing_factor
        checks = (
            (not callable(self.processing_class), "processing_class must be the tokenizer that encodes the pool"),
            (transformer_of(self.model).config.is_encoder_decoder, "encoder-decoders rehearse in pm-hf train only"),
            (
                getattr(args, "packing", False),
                "packing joins rows, and no batch would be half new; leave it out",
            ),
            (getattr(args, "padding_free", False), "padding_free joins the rows of a batch; leave it out"),
            (not hasattr(self.train_dataset, "__len__"), "the training rows must have a length, to be half of a batch"),
            (self.compute_loss_func is not None, "compute_loss_func is the loss of the soft targets; leave it out"),
            (smoothing > 0, f"label_smoothing_factor must be 0: targets are soft already, found {smoothing}"),
        )
        return [problem for applies, problem in checks if applies]
