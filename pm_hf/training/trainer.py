"""PMTrainer: the Trainer whose training step scales the current task's LoRA product by 1, 1 + ε or 1 − ε."""

import hashlib
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from pm_hf.adapters.checks import config_problems
from pm_hf.adapters.layout import ADAPTER_WEIGHTS, peft_type
from pm_hf.config.rules import perturbation_problems
from pm_hf.errors import InputError, raise_all
from pm_hf.models.contexts import evaluating, keep_differentiable, scaled_adapter
from pm_hf.models.lora import trainable_lora_adapters
from pm_hf.models.sharded import assign_whole, is_sharded


def perturbation_factor(
    scale: float, probabilities: Sequence[float], *, seed: int, task: int, step: int, micro_step: int, rank: int
) -> float:
    """The factor of one micro-step: a pure function of its arguments, so that resuming repeats it.

    A uniform number is taken from SHA-256, so no random generator is read or advanced.
    """
    digest = hashlib.sha256(f"{seed}/{task}/{step}/{micro_step}/{rank}".encode()).digest()
    uniform = int.from_bytes(digest[:8], "big") / 2**64
    if uniform < probabilities[0]:
        return 1.0
    return 1 + scale if uniform < probabilities[0] + probabilities[1] else 1 - scale


@dataclass
class PerturbationArguments:
    """Settings of the perturbation; put it before any other arguments: `class C(PerturbationArguments, SFTConfig)`.

    Every step uses the LoRA product scaled by 1, 1 + ε or 1 − ε. With equal probabilities for the last two this adds
    ½ε²(p₊ + p₋)·ΔᵀHΔ to the expected loss, to second order (arXiv 2505.22389).
    """

    perturbation_scale: float = field(default=0.5, metadata={"help": "ε, 0 ≤ ε < 1; 0 trains as Trainer does"})
    perturbation_probabilities: list[float] = field(
        default_factory=lambda: [1 / 3, 1 / 3, 1 / 3],
        metadata={"help": "probabilities of the factors 1, 1 + ε, 1 − ε; the last two must be equal"},
    )
    perturbation_adapter: str | None = field(
        default=None, metadata={"help": "adapter to scale; default: the only one with trainable LoRA weights"}
    )
    task_index: int = field(default=0, metadata={"help": "index of the task in the stream, part of the random seed"})
    head_learning_rate: float | None = field(
        default=None,
        metadata={"help": "learning rate of trainable parameters that are not LoRA; default: learning_rate"},
    )

    def __post_init__(self) -> None:
        self.perturbation_probabilities = tuple(self.perturbation_probabilities)  # type: ignore[assignment]
        raise_all(perturbation_problems(self.perturbation_scale, self.perturbation_probabilities), "perturbation")
        parent = getattr(super(), "__post_init__", None)
        if parent is not None:
            parent()


@dataclass
class PMConfig(PerturbationArguments, TrainingArguments):
    """TrainingArguments plus the perturbation's settings; nothing else differs from the parent's defaults."""


class _Drawn(TrainerCallback):
    """What was drawn since a training began; a retry, `auto_find_batch_size`'s too, begins anew."""

    def __init__(self) -> None:
        self.counts: Counter[float] = Counter()
        self.since_log: list[float] = []
        self.micro_step = (-1, -1)  # (global step, micro-step within it)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.counts.clear()
        self.since_log, self.micro_step = [], (-1, -1)


# what a mixin that stands before a Trainer builds on
BeforeTrainer: Any = Trainer if TYPE_CHECKING else object


class PerturbedStepMixin(BeforeTrainer):
    """The only change is `training_step`: one factor is drawn, forward and backward run with the task's product scaled
    by it. The mean of the factors since the last log is logged as `perturbation_factor`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, PerturbationArguments):
            kind = type(self.args).__name__
            raise InputError(
                f"args of type {kind} have no perturbation settings; define "
                f"`@dataclass class PM{kind}(PerturbationArguments, {kind})` and pass that"
            )
        self._drawn = _Drawn()
        self.add_callback(self._drawn)
        self._scaled: tuple[torch.nn.Module, str, list[LoraLayer]] | None = None
        if self.model is not None:
            self._perturbed()
            keep_differentiable(self.model)

    @property
    def perturbation_counts(self) -> Counter[float]:
        """How often each factor was used by this process since the training began or was resumed."""
        return self._drawn.counts

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Trainer's training step with the task adapter scaled by the factor drawn for this micro-step."""
        adapter, layers = self._perturbed()
        with scaled_adapter(layers, adapter, self._next_factor()):
            return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean factor since the last log to every training log."""
        if "loss" in logs and (drawn := self._drawn.since_log):
            logs = logs | {"perturbation_factor": sum(drawn) / len(drawn)}
            self._drawn.since_log = []
        super().log(logs, *args, **kwargs)

    def _next_factor(self) -> float:
        step, micro = self._drawn.micro_step
        now = self.state.global_step
        self._drawn.micro_step = (now, micro + 1 if step == now else 0)
        factor = perturbation_factor(
            self.args.perturbation_scale,
            self.args.perturbation_probabilities,
            seed=self.args.seed,
            task=self.args.task_index,
            step=now,
            micro_step=self._drawn.micro_step[1],
            rank=self.args.process_index,
        )
        self._drawn.counts[factor] += 1
        self._drawn.since_log.append(factor)
        return factor

    def _perturbed(self) -> tuple[str, list[LoraLayer]]:
        """(adapter, its layers), looked for once for each model."""
        if self._scaled is None or self._scaled[0] is not self.model:
            adapter = trained_adapter(self.model, self.args.perturbation_adapter)
            layers = [m for m in self.model.modules() if isinstance(m, LoraLayer) and adapter in m.scaling]
            self._scaled = (self.model, adapter, layers)
        return self._scaled[1:]


class AdapterLoadingMixin(BeforeTrainer):
    """The only change is what a checkpoint is loaded into, on resume and for the best model: the trained adapter, by
    its name. Trainer's own code confuses it with a frozen one, or looks for an adapter called "default" only."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Restore the trained adapter and its head; frozen adapters and requires_grad stay as they are."""
        self._load_adapter(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        """The same from the best checkpoint."""
        self._load_adapter(self.state.best_model_checkpoint)

    def _load_adapter(self, checkpoint: str | os.PathLike) -> None:
        adapter = trained_adapter(self.model, self.args.perturbation_adapter)
        folder = Path(checkpoint) if adapter == "default" else Path(checkpoint) / adapter
        if not (folder / ADAPTER_WEIGHTS).is_file():
            raise InputError(
                f"checkpoint {checkpoint} holds no adapter {adapter!r}: {folder / ADAPTER_WEIGHTS} does not exist"
            )
        stored = load_file(folder / ADAPTER_WEIGHTS)
        expected = get_peft_model_state_dict(self.model, adapter_name=adapter, save_embedding_layers=False)
        missing, unexpected = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
        if missing or unexpected:
            raise InputError(
                f"checkpoint {folder} does not fit the model: missing {missing[:3]}, unexpected {unexpected[:3]}"
            )
        if is_sharded(self.model):
            for name, value in stored.items():
                assign_whole(expected[name], value)
        else:
            set_peft_model_state_dict(self.model, stored, adapter_name=adapter)


class HeadLearningRateMixin(BeforeTrainer):
    """The only change is the optimizer's groups: parameters that are not LoRA are trained with `head_learning_rate`."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Trainer's optimizer; parameters that are not LoRA move to groups of their own."""
        optimizer = super().create_optimizer(*args, **kwargs)
        rate = self.args.head_learning_rate
        if rate is None or any(group.get("head") for group in optimizer.param_groups):
            return optimizer
        heads = {id(p) for n, p in self.model.named_parameters() if p.requires_grad and "lora_" not in n}
        for group in list(optimizer.param_groups):
            of_heads = [p for p in group["params"] if id(p) in heads]
            if of_heads:
                group["params"] = [p for p in group["params"] if id(p) not in heads]
                optimizer.add_param_group({**group, "params": of_heads, "lr": rate, "head": True})
        return optimizer


class AccumulatedLossMixin(BeforeTrainer):
    """The only change is the loss of a model that takes `num_items_in_batch` and ignores it, as most classifiers do: it
    is the mean over accumulated batches and processes. Trainer trains with their sum (transformers #47688)."""

    model_accepts_loss_kwargs: bool
    _loss_asked = False  # whether the model was asked what it does with num_items_in_batch

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Trainer's training step; before the first one the model is asked."""
        if num_items_in_batch is not None and not self._loss_asked:
            self._loss_asked = True
            self._ask_for_the_loss(inputs, num_items_in_batch)
        return super().training_step(model, inputs, num_items_in_batch)

    @torch.no_grad()
    def _ask_for_the_loss(self, inputs: dict[str, Any], items: Any) -> None:
        """`model_accepts_loss_kwargs` is false for a model whose loss stays the same with twice the number of items."""
        parts = self.args.gradient_accumulation_steps * self.args.world_size
        own_loss = self.label_smoother is not None or self.compute_loss_func is not None
        if parts == 1 or own_loss or not self.model_accepts_loss_kwargs:
            return
        inputs = self._prepare_inputs(inputs)
        with evaluating(self.model):  # no dropout: the random state stays as it is
            losses = [float(self.model(**inputs, num_items_in_batch=items * times)["loss"]) for times in (1, 2)]
        if math.isclose(*losses, rel_tol=1e-2):
            self.model_accepts_loss_kwargs = False


class PerturbationMixin(AccumulatedLossMixin, PerturbedStepMixin, HeadLearningRateMixin, AdapterLoadingMixin):
    """The four changes of PMTrainer for any Trainer, each of them a mixin of its own.

    Put it before a Trainer: `class PMSFTTrainer(PerturbationMixin, SFTTrainer)`, with args that include
    `PerturbationArguments`. In every step one factor is drawn, and forward and backward run with the task's product
    scaled by it; the mean of the factors since the last log is logged as `perturbation_factor`. Resuming and loading
    the best model restore the trained adapter by its name, and parameters that are not LoRA are trained with
    `head_learning_rate`. Where a model takes `num_items_in_batch` and ignores it, the loss is the mean over accumulated
    batches and processes (transformers #47688).
    """


class PMTrainer(PerturbationMixin, Trainer):
    """Trainer with the changes of PerturbationMixin: each step scales the task's LoRA product by 1, 1 + ε or 1 − ε.

    One forward and one backward, as always (Perturb-and-Merge, arXiv 2505.22389). With `perturbation_scale=0` the
    trajectory equals Trainer's bit for bit, but for the loss that AccumulatedLossMixin mends.
    """


def trained_adapter(model: torch.nn.Module, name: str | None) -> str:
    """The adapter called `name`, or by default the only one with trainable LoRA weights; InputError where there is none
    or several, or where its product is no task vector."""
    trainable = trainable_lora_adapters(model)
    if name is None and len(trainable) != 1:
        raise InputError(
            f"expected exactly one adapter with trainable LoRA weights, found {trainable or 'none'}; "
            "name one with perturbation_adapter, or freeze the others"
        )
    adapter = name or trainable[0]
    configs = getattr(model, "peft_config", {})
    if adapter not in configs:
        raise InputError(f"perturbation_adapter {adapter!r} is not an adapter of the model; found {sorted(configs)}")
    settings = configs[adapter].to_dict()
    problems = config_problems(settings)
    if peft_type(settings) == "ADALORA":
        problems.append("AdaLoRA prunes while it trains, its product is no task vector yet; train a plain LoRA")
    raise_all(problems, f"adapter {adapter!r}")
    return adapter
