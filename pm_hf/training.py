"""One task's training: the Trainer's arguments, its checkpoints, the call."""

import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from pm_hf.errors import InputError
from pm_hf.files import read_json
from pm_hf.modeling import TASK, TaskModel
from pm_hf.penalties import Penalty
from pm_hf.regularised import RegularisedTrainer
from pm_hf.rows import Examples
from pm_hf.settings import RunConfig
from pm_hf.trainer import PMConfig

DEFAULTS = {
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "logging_strategy": "epoch",
    "disable_tqdm": True,
    "logging_nan_inf_filter": False,  # a diverged loss shall be seen
    "report_to": "none",
}


def train(
    built: TaskModel,
    examples: Examples,
    collate: Callable,
    args: PMConfig,
    callbacks: Sequence[TrainerCallback] = (),
    penalties: Sequence[Penalty] = (),
) -> dict[str, Any]:
    """Train one task in place, from its newest checkpoint if there is one; what step.json says about it.

    Raises DivergedError at the step whose loss or gradient is not finite; the checkpoint before it stays.
    """
    trainer = RegularisedTrainer(
        model=built.model, args=args, train_dataset=examples, data_collator=collate, penalties=penalties
    )
    times = StepTimes()
    for callback in (times, *callbacks):
        trainer.add_callback(callback)
    trainer.remove_callback(PrinterCallback)
    loss = trainer.train(resume_from_checkpoint=last_checkpoint(Path(args.output_dir))).training_loss
    if not math.isfinite(loss):
        raise RuntimeError(f"the training loss is {loss}; lower the learning rate")
    built.model.zero_grad(set_to_none=True)
    counts = {f"{factor:g}": count for factor, count in sorted(trainer.perturbation_counts.items())}
    timing = {"step_seconds": median(times.seconds)} if times.seconds else {}  # none: a checkpoint of the last step
    return timing | {"training_loss": loss, "optimizer_steps": trainer.state.global_step, "factors": counts}


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
    values = {**DEFAULTS, "use_cpu": not torch.cuda.is_available(), **config.training}
    try:
        return PMConfig(
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
    except (TypeError, ValueError) as error:
        raise InputError(f"training: {' '.join(str(error).split())}") from error


def precision(args: PMConfig) -> torch.dtype | None:
    """The autocast dtype of the arguments, None for float32."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def last_checkpoint(folder: Path) -> str | None:
    """Newest complete checkpoint; half-written ones (their state file is the last to be written) are removed."""
    while folder.is_dir() and (newest := get_last_checkpoint(str(folder))) is not None:
        try:
            read_json(Path(newest) / "trainer_state.json")
            return newest
        except InputError:
            shutil.rmtree(newest)
    return None
