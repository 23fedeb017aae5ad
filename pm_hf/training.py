"""One task's training: the Trainer's arguments, its checkpoints, the call."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from accelerate.utils import DistributedType
from transformers import (
    EvalPrediction,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import get_reporting_integration_callbacks
from transformers.training_args import ParallelMode

from pm_hf.checkpoints import last_checkpoint
from pm_hf.errors import InputError, raise_all
from pm_hf.modeling import TASK, TaskModel
from pm_hf.penalties import Penalty
from pm_hf.processes import on_main
from pm_hf.regularised import RegularisedTrainer, step_loss
from pm_hf.rows import Examples
from pm_hf.settings import RunConfig
from pm_hf.targets import bare
from pm_hf.trainer import PMConfig

FULL = "FULL_STATE_DICT"
WHOLE = ("ewc_weight", "olora_weight", "averaging_period")  # of the strategy: what reads weights at every step
DEFAULTS = {
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
) -> dict[str, Any]:
    """Train one task in place, from its newest checkpoint if there is one; what step.json says about it.

    evaluated: rows for `eval_strategy`, with eval_loss and, of classifiers, eval_accuracy among the classes that the
    task is trained against: its own head's, or with `head.training: seen` all that were seen.
    Raises DivergedError at the step whose loss or gradient is not finite; the checkpoint before it stays.
    """
    causal = built.head is None and not bare(built.model).config.is_encoder_decoder
    trainer = RegularisedTrainer(
        model=built.model,
        args=args,
        train_dataset=examples,
        eval_dataset=evaluated,
        compute_metrics=None if built.head is None else accuracy,
        data_collator=collate,
        penalties=penalties,
        compute_loss_func=None if causal else step_loss(args.label_smoothing_factor),
    )
    times = StepTimes()
    for callback in (times, *callbacks):
        trainer.add_callback(callback)
    trainer.remove_callback(PrinterCallback)
    checkpoint = on_main(lambda: last_checkpoint(Path(args.output_dir)))
    trainer.continue_from(checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    built.model.zero_grad(set_to_none=True)
    done = trainer.progress()
    timing = {"step_seconds": median(times.seconds)} if times.seconds else {}  # none: a checkpoint of the last step
    state, best = trainer.state, {}
    if args.load_best_model_at_end:
        best = {"best_step": state.best_global_step, f"best_{args.metric_for_best_model}": state.best_metric}
    loss = fmean(done.losses) / max(1, state.global_step)
    counts = {"optimizer_steps": state.global_step, "factors": done.factors, "log": done.log}
    return timing | {"training_loss": loss, **best, **counts}


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """{"accuracy": share of the rows (n,) whose label has the largest logit of (n, C)}."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}


class EarlyStopping(TrainerCallback):
    """Ends the training when `patience` evaluations in a row were not better than the best one before them.

    They are counted in the log, which a checkpoint has: a continued training counts on, and one that was over is over.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Count in the checkpoint's log."""
        return self.on_evaluate(args, state, control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Count, and stop where it is enough."""
        key, sign = f"eval_{str(args.metric_for_best_model).removeprefix('eval_')}", 1 if args.greater_is_better else -1
        found = {entry["step"]: sign * entry[key] for entry in state.log_history if key in entry}
        values = [-math.inf if math.isnan(value) else value for value in found.values()]
        since = len(values) - 1 - values.index(max(values)) if values else 0
        if since >= self.patience:
            control.should_training_stop = True
        return control


class StepTimes(TrainerCallback):
    """Seconds of each optimizer step, without what callbacks and checkpoints take between two."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """The clock starts."""
        self._began = time.perf_counter()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """The clock stops."""
        self.seconds.append(time.perf_counter() - self._began)


def training_arguments(config: RunConfig, checkpoints: Path, index: int) -> PMConfig:
    """PMConfig of one task; InputError for fields that TrainingArguments does not have or refuses."""
    known = {field.name for field in dataclasses.fields(PMConfig) if field.init}
    unknown = sorted(set(config.training) - known)
    if unknown:
        raise InputError(f"training: {', '.join(unknown)} are not fields of TrainingArguments")
    kept = {"save_total_limit": 2} if config.training.get("load_best_model_at_end") else {}  # the best and the last one
    values = {**DEFAULTS, **kept, "use_cpu": not torch.cuda.is_available(), **config.training}
    try:
        args = PMConfig(
            output_dir=str(checkpoints),
            seed=config.seed,
            task_index=index,
            perturbation_scale=config.perturbation.scale or 0.0,
            perturbation_probabilities=config.perturbation.probabilities,
            perturbation_adapter=TASK,
            remove_unused_columns=False,
            **values,
        )
    except InputError:
        raise
    except (TypeError, ValueError, ImportError) as error:
        raise InputError(f"training: {' '.join(str(error).split())}") from error
    _check_trackers(args)
    raise_all(_sharding_problems(config, args), "training")
    return args


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
    if args.fsdp and settings.get("state_dict_type", FULL) != FULL:
        problems.append(f"fsdp_config.state_dict_type: must be {FULL}: a checkpoint has the whole adapter")
    if args.deepspeed and args.distributed_state.distributed_type != DistributedType.DEEPSPEED:
        problems.append("deepspeed: accelerate leaves it out on the CPU; use fsdp there, or neither")
    spread = args.fsdp or (plugin is not None and plugin.zero_stage == 3)
    reading = [name for name in WHOLE if getattr(config.strategy, name)]
    if spread and reading:
        problems.append(f"strategy.{reading[0]} reads whole weights at every step, FSDP and ZeRO-3 spread them")
    return problems


def precision(args: PMConfig) -> torch.dtype | None:
    """The autocast dtype that accelerate trains with, None for float32; on a CPU it leaves `fp16` out."""
    if args.bf16:
        return torch.bfloat16
    return torch.float16 if args.fp16 and args.device.type != "cpu" else None
