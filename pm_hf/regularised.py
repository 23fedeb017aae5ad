"""PMTrainer with a strategy's penalties, and what else a strategy does to the weights before and during training."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pm_hf.adapters import Adapter
from pm_hf.errors import InputError
from pm_hf.fisher import adapted_layers
from pm_hf.penalties import Penalty
from pm_hf.trainer import PMTrainer


class DivergedError(RuntimeError):
    """A loss or a gradient is NaN or infinite; nothing was updated with it and the checkpoint before it stays."""


class RegularisedTrainer(PMTrainer):
    """The only change to PMTrainer is that the penalties are added to the loss, and that a loss that diverges ends it.

    The sum of the penalties is averaged over the micro-batches of a step, as the loss is. Raises DivergedError at the
    first micro-step whose loss is not finite, and before the optimizer step whose gradient is not (unless a gradient
    scaler is at work: it skips such steps itself).
    """

    def __init__(self, *args: Any, penalties: Sequence[Penalty] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.penalties = list(penalties)
        self.add_callback(_FiniteGradients(self))

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Trainer's loss plus the penalties."""
        if not self.penalties or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        batch = dict(inputs)  # Trainer takes the labels away where it smooths them
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[1]
        extra = torch.stack([penalty(self.model, batch, logits) for penalty in self.penalties]).sum()
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:  # the loss is a part of the step's mean
            extra = extra / self.current_gradient_accumulation_steps
        loss = loss + extra
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """PMTrainer's step, unless its loss is not finite."""
        loss = super().training_step(model, *args, **kwargs)
        if not math.isfinite(value := float(loss)):
            raise DivergedError(
                f"the training loss is {value} at step {self.state.global_step + 1}; lower the learning rate, or "
                "look at the rows"
            )
        return loss


class _FiniteGradients(TrainerCallback):
    """DivergedError before a step whose gradient is not finite."""

    def __init__(self, trainer: RegularisedTrainer) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Look at every trainable parameter's gradient."""
        if self._trainer.accelerator.scaler is not None:
            return
        for name, parameter in self._trainer.model.named_parameters():
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
                raise DivergedError(
                    f"the gradient of {name} is not finite at step {state.global_step + 1}; lower the learning rate"
                )


class SequentialAveraging(TrainerCallback):
    """Every `interval` optimizer steps, and at the end: θ ← βθ + (1 − β)θ_before (SFA, arXiv 2501.05559).

    θ_before is the model before the task, where the task's product is 0: its B is scaled by β. The rows of `head`, a
    head that all tasks share, go back towards what they were; None: the head is the task's own.
    """

    def __init__(self, model: nn.Module, adapter: str, head: nn.Linear | None, interval: int, weight: float) -> None:
        self.interval, self.weight = interval, weight
        self._factors = [layer.lora_B[adapter].weight for layer in adapted_layers(model, adapter).values()]
        rows = [] if head is None else list(head.parameters())
        self._rows = [(row, row.detach().clone()) for row in rows]

    @torch.no_grad()
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Average where it is time to."""
        if state.global_step % self.interval == 0 or state.global_step == state.max_steps:
            for factor in self._factors:
                factor.mul_(self.weight)
            for row, before in self._rows:
                row.lerp_(before, 1 - self.weight)


@torch.no_grad()
def orthonormal_start(model: nn.Module, adapter: str, previous: Adapter) -> None:
    """A starts as the orthonormal basis of the rows of the last task's A, B as its B (SLAO, arXiv 2512.23017).

    The basis is Q of Aᵀ = QR with R's diagonal positive, so rows that are orthonormal already stay as they are.
    Raises InputError when the ranks or modules differ.
    """
    for name, layer in adapted_layers(model, adapter).items():
        if name not in previous.layouts:
            raise InputError(f"{previous.path} has no factors of {name}, from which training was to start")
        A, B = (previous.tensor(f"{name}.lora_{factor}.weight").float() for factor in "AB")
        Q, R = torch.linalg.qr(A.T)
        start = {"A": (Q * _signs(R.diagonal())).T, "B": B}
        for factor, value in start.items():
            weight = getattr(layer, f"lora_{factor}")[adapter].weight
            if weight.shape != value.shape:
                raise InputError(
                    f"{previous.path}: lora_{factor} of {name} has shape {tuple(value.shape)}, the new task's "
                    f"{tuple(weight.shape)}; use one lora.r for all tasks"
                )
            weight.copy_(value)


def _signs(values: Tensor) -> Tensor:
    return torch.where(values < 0, -1.0, 1.0)
