"""PMTrainer with a strategy's penalties, and what else a strategy does to the weights before and during training."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pm_hf.adapters import Adapter
from pm_hf.checkpoints import WholeCheckpoints
from pm_hf.errors import InputError
from pm_hf.fisher import adapted_layers
from pm_hf.language import IGNORED
from pm_hf.penalties import Penalty, target_count
from pm_hf.processes import gather
from pm_hf.sharding import local, shard_on_cpu
from pm_hf.targets import bare, is_language
from pm_hf.trainer import PMTrainer


class DivergedError(RuntimeError):
    """A loss or a gradient is NaN or infinite; nothing was updated with it and the checkpoint before it stays."""


def step_loss(smoothing: float = 0.0) -> Callable[..., Tensor]:
    """Cross-entropy of classifiers and encoder-decoder models, the mean over the targets of a whole step, as Trainer's
    `compute_loss_func`.

    Their own loss (BERT's, T5's) takes `num_items_in_batch` and leaves it unused, and Trainer then leaves the sum over
    the micro-steps of gradient accumulation undivided (transformers #47688). -100 is no target.
    """

    def loss(outputs: Mapping[str, Tensor], labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits, targets = outputs["logits"].float().flatten(0, -2), labels.flatten()
        total = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing)
        return total / ((targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)

    return loss


class RegularisedTrainer(WholeCheckpoints, PMTrainer):
    """The only change to PMTrainer is that the penalties are added to the loss, and that a loss that diverges ends it.

    (An encoder-decoder's decoder gets its input also where Trainer computes the loss, or smooths its labels, itself.)
    A penalty of the weights is averaged over the micro-batches of a step; one that is a mean over targets is weighted
    by their number, as the loss is. Raises DivergedError before the optimizer step whose loss, or whose gradient, is
    not finite (of a gradient that a scaler looks after, the scaler skips the step itself). A training that a callback
    stops before its first step makes none.
    """

    def __init__(self, *args: Any, penalties: Sequence[Penalty] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.penalties = list(penalties)
        self._finite = _Finite(self)
        self.add_callback(self._finite)

    def create_accelerator_and_postprocess(self) -> None:
        """Trainer's; `fsdp` shards on CPUs too."""
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and getattr(self.accelerator.state, "fsdp_plugin", None) is None:
            shard_on_cpu(self.accelerator, self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    def _save_rng_state(self, output_dir: str) -> None:
        """Trainer's, in all processes before the state file is written that makes the checkpoint a complete one."""
        super()._save_rng_state(output_dir)
        gather(None)

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Trainer's loss plus the penalties."""
        batch = dict(inputs)  # Trainer takes the labels away where it computes the loss itself
        if is_language(batch) and bare(model).config.is_encoder_decoder:  # its decoder's input is made of them
            inputs = batch | {"decoder_input_ids": bare(model).prepare_decoder_input_ids_from_labels(batch["labels"])}
        if not self.penalties or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[1]
        for penalty in self.penalties:
            loss = loss + self._share(penalty, batch, num_items_in_batch) * penalty(self.model, batch, logits)
        return (loss, outputs) if return_outputs else loss

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """PMTrainer's step; its loss is remembered until the optimizer step."""
        loss = super().training_step(model, *args, **kwargs)
        self._finite.losses.append(loss.detach())
        return loss

    def _share(self, penalty: Penalty, batch: Mapping[str, Tensor], items: Any) -> Any:
        """What a penalty counts for in this micro-step, so that the step's sum is its mean, as the loss's is."""
        if self.compute_loss_func is None and (not self.model_accepts_loss_kwargs or items is None):
            return 1.0  # Trainer divides the loss by the number of micro-steps
        if not penalty.per_target or items is None:
            return 1 / self.current_gradient_accumulation_steps
        everywhere = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return everywhere * target_count(self.model, batch) / items


class _Finite(TrainerCallback):
    """DivergedError before a step whose loss or gradient is not finite; one synchronisation a step."""

    def __init__(self, trainer: RegularisedTrainer) -> None:
        self._trainer, self.losses = trainer, list[Tensor]()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Forget the losses of a training that was broken off."""
        self.losses.clear()

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Look at the loss of every micro-step, and at the gradient of every trained parameter."""
        losses, step = torch.stack(self.losses), state.global_step + 1
        self.losses.clear()
        checks = [losses.isfinite().all()]
        if self._trainer.accelerator.scaler is None and self._trainer.optimizer is not None:
            parameters = [p for group in self._trainer.optimizer.param_groups for p in group["params"]]
            checks += [local(p.grad).isfinite().all().to(losses.device) for p in parameters if p.grad is not None]
        if bool(torch.stack(checks).all()):
            return
        found = "gradient is not finite" if bool(checks[0]) else f"training loss is {float(losses.sum())}"
        raise DivergedError(
            f"the {found} at step {step} of the task; lower the learning rate in another output_dir, or look at the "
            "rows; the checkpoint before it is kept"
        )


class SequentialAveraging(TrainerCallback):
    """Every pT of a task's T optimizer steps, and at the end: θ ← (1 − β)θ + βθ_before (SFA, arXiv 2501.05559).

    period: p, in (0, 1]; weight: 1 − β. θ_before is the model before the task, where the task's product is 0: its B is
    scaled by 1 − β. The rows of `head`, a head that all tasks share, go back towards what they were; None: the head is
    the task's own.
    """

    def __init__(self, model: nn.Module, adapter: str, head: nn.Linear | None, period: float, weight: float) -> None:
        self.period, self.weight = period, weight
        self._factors = [layer.lora_B[adapter].weight for layer in adapted_layers(model, adapter).values()]
        rows = [] if head is None else list(head.parameters())
        self._rows = [(row, row.detach().clone()) for row in rows]

    @torch.no_grad()
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Average where it is time to."""
        interval = max(1, round(self.period * state.max_steps))
        if state.global_step % interval == 0 or state.global_step == state.max_steps:
            for factor in self._factors:
                factor.mul_(self.weight)
            for row, before in self._rows:
                row.lerp_(before.to(row.device), 1 - self.weight)


@torch.no_grad()
def orthonormal_start(model: nn.Module, adapter: str, previous: Adapter) -> None:
    """A starts as the orthonormal basis of the rows of the last task's A, B as its B (SLAO, arXiv 2512.23017).

    The basis is Q of Aᵀ = QR with R's diagonal positive, so rows that are orthonormal already stay as they are.
    A scaling that differs from the last task's goes into B. Raises InputError when the ranks or modules differ.
    """
    for name, layer in adapted_layers(model, adapter).items():
        if name not in previous.layouts:
            raise InputError(f"{previous.path} has no factors of {name}, from which training was to start")
        A, B = (previous.tensor(f"{name}.lora_{factor}.weight").float() for factor in "AB")
        Q, R = torch.linalg.qr(A.T)
        start = {"A": (Q * _signs(R.diagonal())).T, "B": B * (previous.scaling[name] / layer.scaling[adapter])}
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
