"""One task's training: its trainer, the Trainer's arguments, the call."""

import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import (
    EvalPrediction,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    get_scheduler,
)
from transformers.integrations import get_reporting_integration_callbacks
from transformers.training_args import ParallelMode

from pm_hf.config.schema import RunConfig
from pm_hf.data.pool import without_soft_targets
from pm_hf.data.rows import Examples
from pm_hf.distributed import on_main_process
from pm_hf.errors import InputError, raise_all
from pm_hf.models.language_model import IGNORED, has_token_targets, target_count
from pm_hf.models.sharded import local_part, shard_on_cpu, transformer_of
from pm_hf.models.task_model import TASK_ADAPTER, TaskModel
from pm_hf.training.callbacks import StepTimes
from pm_hf.training.checkpoints import AtomicCheckpoints, last_checkpoint
from pm_hf.training.penalties import Penalty
from pm_hf.training.record import TrainingRecord
from pm_hf.training.rehearsal import HalfNewMixin, SoftTargets
from pm_hf.training.trainer import PMConfig, PMTrainer


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


class TaskTrainer(HalfNewMixin, AtomicCheckpoints, PMTrainer):
    """PMTrainer with atomic checkpoints, penalties added to the loss, and an end where the loss diverges.

    A penalty of the weights is averaged over the micro-batches of a step; one that is a mean over targets is weighted
    by their number, as the loss is. Raises DivergedError before the optimizer step whose loss, or whose gradient, is
    not finite (of a gradient that a scaler looks after, the scaler skips the step itself). Besides, `fsdp` shards on
    CPUs too, an encoder-decoder's decoder gets its input also where Trainer computes the loss, or smooths its labels,
    itself, and a training that a callback stops before its first step makes none.
    """

    def __init__(self, *args: Any, penalties: Sequence[Penalty] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.penalties = list(penalties)
        self._finite = FiniteLoss(self)
        self.add_callback(self._finite)

    def create_accelerator_and_postprocess(self) -> None:
        """Trainer's; `fsdp` shards on CPUs too."""
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and getattr(self.accelerator.state, "fsdp_plugin", None) is None:
            shard_on_cpu(self.accelerator, self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Trainer's loss plus the penalties."""
        batch = dict(inputs)  # Trainer takes the labels away where it computes the loss itself
        inputs = without_soft_targets(inputs)
        inner = transformer_of(model)
        if has_token_targets(batch) and inner.config.is_encoder_decoder:  # its decoder's input is made of them
            inputs |= {"decoder_input_ids": inner.prepare_decoder_input_ids_from_labels(batch["labels"])}
        if not self.penalties or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[1]
        for penalty in self.penalties:
            loss = loss + self._share(penalty, batch, num_items_in_batch) * penalty(self.model, batch, logits)
        return (loss, outputs) if return_outputs else loss

    def _ask_for_the_loss(self, inputs: dict[str, Any], items: Any) -> None:
        super()._ask_for_the_loss(without_soft_targets(inputs), items)

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


class FiniteLoss(TrainerCallback):
    """DivergedError before a step whose loss or gradient is not finite; one synchronisation a step."""

    def __init__(self, trainer: TaskTrainer) -> None:
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
            checks += [local_part(p.grad).isfinite().all().to(losses.device) for p in parameters if p.grad is not None]
        if bool(torch.stack(checks).all()):
            return
        reason = "gradient is not finite" if bool(checks[0]) else f"training loss is {float(losses.sum())}"
        raise DivergedError(
            f"the {reason} at step {step} of the task; lower the learning rate in another output_dir, or look at the "
            "rows; the checkpoint before it is kept"
        )


FULL_STATE_DICT = "FULL_STATE_DICT"


# settings of the strategy whose terms read weights at every step
READS_WHOLE_WEIGHTS = ("ewc_weight", "drift_weight", "olora_weight", "averaging_period")


TRAINING_DEFAULTS = {
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "logging_strategy": "epoch",
    "disable_tqdm": True,
    "logging_nan_inf_filter": False,  # a diverged loss shall be seen
    "report_to": "none",
    "ddp_find_unused_parameters": False,  # every trained parameter is used in every step
}


def train(
    built: TaskModel,
    examples: Examples,
    collate: Callable,
    args: PMConfig,
    callbacks: Sequence[TrainerCallback] = (),
    penalties: Sequence[Penalty] = (),
    evaluated: Examples | None = None,
    rehearsed: Examples = (),
) -> TrainingRecord:
    """Train one task in place, from its newest checkpoint if there is one; what step.json says about it.

    rehearsed: examples of the pool (`Pool.examples`), which are half of every batch.
    evaluated: rows for `eval_strategy`, with eval_loss and, of classifiers, eval_accuracy among the classes that the
    task is trained against: its own head's, or with `head.training: seen` all that were seen.
    Raises DivergedError at the step whose loss or gradient is not finite; the checkpoint before it stays.
    """
    causal = built.head is None and not transformer_of(built.model).config.is_encoder_decoder
    trainer = TaskTrainer(
        model=built.model,
        args=args,
        train_dataset=examples,
        eval_dataset=evaluated,
        compute_metrics=None if built.head is None else accuracy,
        data_collator=collate,
        penalties=[*penalties, SoftTargets()] if rehearsed else penalties,
        compute_loss_func=None if causal else step_loss(args.label_smoothing_factor),
    )
    if rehearsed:
        trainer.rehearse(rehearsed)
    times = StepTimes()
    for callback in (times, *callbacks):
        trainer.add_callback(callback)
    trainer.remove_callback(PrinterCallback)
    newest = on_main_process(lambda: last_checkpoint(Path(args.output_dir)))
    trainer.continue_from(newest)
    trainer.train(resume_from_checkpoint=newest)
    built.model.zero_grad(set_to_none=True)
    done = trainer.progress()
    state, best = trainer.state, {}
    if args.load_best_model_at_end:
        best = {"best_step": state.best_global_step, f"best_{args.metric_for_best_model}": state.best_metric}
    return TrainingRecord(
        training_loss=fmean(done.losses) / max(1, state.global_step),
        optimizer_steps=state.global_step,
        factors=done.factors,
        log=done.log,
        step_seconds=median(times.seconds) if times.seconds else None,  # none: a checkpoint of the last step
        best=best,
    )


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """{"accuracy": share of the rows (n,) whose label has the largest logit of (n, C)}."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}


def training_arguments(config: RunConfig, checkpoints: Path, index: int) -> PMConfig:
    """PMConfig of one task; InputError for what TrainingArguments refuses, and for what no optimizer, schedule or
    loader can be made of."""
    limit = {"save_total_limit": 2} if config.training.get("load_best_model_at_end") else {}  # the best, the newest
    values = {**TRAINING_DEFAULTS, **limit, "use_cpu": not torch.cuda.is_available(), **config.training}
    try:
        args = PMConfig(
            output_dir=str(checkpoints),
            seed=config.seed,
            task_index=index,
            perturbation_scale=config.perturbation.scale or 0.0,
            perturbation_probabilities=config.perturbation.probabilities,
            perturbation_adapter=TASK_ADAPTER,
            remove_unused_columns=False,
            **values,
        )
    except InputError:
        raise
    except (TypeError, ValueError, ImportError, OSError, LookupError, AttributeError, NotImplementedError) as error:
        raise InputError(f"training: {' '.join(str(error).split())}") from error
    _check_trackers(args)
    raise_all(_sharding_problems(config, args) + _parts_that_fail(args), "training")
    return args


def _parts_that_fail(args: PMConfig) -> list[str]:
    """What the Trainer makes of the arguments later, made now of one number: what of it fails, and why."""
    makers = {
        "data loader": _make_loader,
        "optimizer and schedule": _make_schedule,
        "compiled model": _make_compiler,
        "model with Liger kernels": _import_liger,
        "checkpointed activation": _make_checkpointed,
    }
    problems = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for part, make in makers.items():
            try:
                make(args)
            except Exception as error:  # whatever a constructor says of its arguments
                reason = " ".join(str(error).split()) or type(error).__name__
                problems.append(f"no {part} can be made: {reason}")
    return problems


def _make_loader(args: PMConfig) -> None:
    DataLoader(
        [0],  # type: ignore[arg-type]
        batch_size=args.per_device_train_batch_size,
        num_workers=args.dataloader_num_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        persistent_workers=args.dataloader_persistent_workers,
        multiprocessing_context=getattr(args, "dataloader_multiprocessing_context", None),
    )


def _make_schedule(args: PMConfig) -> None:
    """Of optimizers that look for modules in the model (GaLore, APOLLO, LOMO) only whether they are installed."""
    if args.deepspeed:
        return
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
    except ValueError as error:
        if "model" in str(error) and (args.optim_target_modules or "lomo" in args.optim):
            return
        raise
    parameter = nn.Parameter(torch.zeros(1))
    if not issubclass(kind, torch.optim.Optimizer):
        return
    optimizer = kind([{"params": [parameter], "weight_decay": args.weight_decay}], **settings)
    schedule = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.get_warmup_steps(10),
        num_training_steps=10,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    if isinstance(schedule, LambdaLR):
        for _ in range(10):
            schedule.step()


def _make_compiler(args: PMConfig) -> None:
    if args.torch_compile:
        torch.compile(nn.Identity(), backend=args.torch_compile_backend, mode=args.torch_compile_mode)


def _make_checkpointed(args: PMConfig) -> None:
    if args.gradient_checkpointing:
        checkpoint(torch.neg, torch.zeros(1), **{"use_reentrant": False, **(args.gradient_checkpointing_kwargs or {})})


def _import_liger(args: PMConfig) -> None:
    if args.use_liger_kernel:
        importlib.import_module("liger_kernel")


def _check_trackers(args: PMConfig) -> None:
    """InputError for a tracker that transformers does not know or that is not installed."""
    try:
        for kind in get_reporting_integration_callbacks(args.report_to):
            kind()
    except (ImportError, RuntimeError, ValueError) as error:
        raise InputError(f"training.report_to: {' '.join(str(error).split())}") from error


def _sharding_problems(config: RunConfig, args: PMConfig) -> list[str]:
    """What of FSDP and DeepSpeed accelerate would leave out without a word, or breaks during the training."""
    settings, plugin, problems = args.fsdp_config or {}, args.deepspeed_plugin, []
    if args.fsdp and args.parallel_mode != ParallelMode.DISTRIBUTED:
        problems.append("fsdp spreads the weights over processes and there is one; launch several, or leave it out")
    if args.fsdp and int(settings.get("version", 2)) != 2:
        problems.append(f"fsdp_config.version: must be 2, found {settings['version']}")
    if args.fsdp and settings.get("state_dict_type", FULL_STATE_DICT) != FULL_STATE_DICT:
        problems.append(f"fsdp_config.state_dict_type: must be {FULL_STATE_DICT}: a checkpoint has the whole adapter")
    if args.deepspeed and args.distributed_state.distributed_type != DistributedType.DEEPSPEED:
        problems.append("deepspeed: accelerate leaves it out on the CPU; use fsdp there, or neither")
    spread = args.fsdp or (plugin is not None and plugin.zero_stage == 3)
    reading = [name for name in READS_WHOLE_WEIGHTS if getattr(config.strategy, name)]
    if config.model.quantization is not None and (spread or args.deepspeed):
        problems.append(
            f"model.quantization {config.model.quantization}: packed weights are not spread over processes; leave out "
            "fsdp and deepspeed, every process then holds the small base whole"
        )
    if spread and reading:
        problems.append(f"strategy.{reading[0]} reads whole weights at every step, FSDP and ZeRO-3 spread them")
    return problems


def precision(args: PMConfig) -> torch.dtype | None:
    """The autocast dtype that accelerate trains with, None for float32; on a CPU it leaves `fp16` out."""
    if args.bf16:
        return torch.bfloat16
    return torch.float16 if args.fp16 and args.device.type != "cpu" else None
