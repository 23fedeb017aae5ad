"""What a run would do, before it does anything: `pm-hf train --dry-run`."""

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pm_hf.config.loading import load_config
from pm_hf.config.schema import RunConfig
from pm_hf.data.rows import Rows
from pm_hf.data.stream import Task
from pm_hf.distributed import process_count
from pm_hf.models.lora import adapted_layers
from pm_hf.models.task_model import TASK_ADAPTER, TaskModel
from pm_hf.runs.learner import Run, prepare
from pm_hf.text import text_table
from pm_hf.training.task_trainer import training_arguments

MANY = 5  # tasks whose seconds are named


@dataclass(frozen=True)
class TaskPreview:
    """One task. classes: its own, () where answers are free text; train, held_out, test: rows; cut: training and test
    rows that max_length shortens; steps: of its optimizer, 0 where nothing is trained."""

    name: str
    classes: tuple[str, ...]
    train: int
    held_out: int
    test: int
    cut: int
    steps: int


@dataclass(frozen=True)
class Preview:
    """A run that was not started.

    done: tasks that are finished in its folder. modules: number of adapted modules; parameters, head: trained values of
    the LoRA and of the head's last Linear, all None where only the base's weights tell. seconds: of one step, where
    steps were timed.
    """

    config: RunConfig
    tasks: Sequence[TaskPreview]
    done: int
    modules: int | None
    parameters: int | None
    head: int | None
    seconds: float | None = None

    def __str__(self) -> str:
        """For a terminal."""
        config, lines = self.config, ["dry run: everything was read and checked, nothing is trained or written"]
        lines += [f"base {config.model.base}, {config.stream.kind}; method {config.method}: {_method(config)}"]
        if not config.trains:
            lines += ["trained: nothing, only the head is computed"]
        elif self.modules is None:
            lines += [f"trained: LoRA of rank {config.lora.r}; in how many modules only the weights of the base tell"]
        else:
            head = f", and a head of {self.head:,}" if self.head else ""
            lines += [
                f"trained: LoRA of rank {config.lora.r} in {self.modules} modules, {self.parameters:,} values{head}"
            ]
        if config.kind.has_head and config.trains:
            seen = config.head.training == "seen" or config.shared_head
            lines += ["trained against: " + ("all classes seen so far" if seen else "the task's own classes")]
        lines += self._table()
        if config.rehearses:
            parts = [f"{config.strategy.base_samples} samples of the base"] if config.samples_base else []
            kept = "rows" if config.keeps_pool else "texts, which are written again before each task"
            parts += [f"from the second task on at most {config.strategy.pool_rows} written {kept}"]
            lines += [f"half of every batch: {', '.join(parts)}"]
        if self.seconds is not None:
            whole = [task.steps * self.seconds for task in self.tasks[self.done :]]
            lines += [
                f"time: {self.seconds:.3g} s a step here, {_duration(sum(whole))} of training in {len(whole)} tasks "
                f"({', '.join(map(_duration, whole[:MANY]))}{', …' * (len(whole) > MANY)}); curvature, scoring and "
                "writing come on top"
            ]
        goes_on = f"; {self.done} of {len(self.tasks)} tasks are finished there" if self.done else ""
        return "\n".join([*lines, f"would write to {config.output_dir}{goes_on}"])

    def _table(self) -> list[str]:
        head = ("task", "classes", "train", "held out", "test", "cut", "steps")
        rows = [
            (
                f"{number} {task.name}" + " (finished)" * (number <= self.done),
                str(len(task.classes) or "–"),
                *(f"{value:,}" for value in (task.train, task.held_out, task.test, task.cut, task.steps)),
            )
            for number, task in enumerate(self.tasks, start=1)
        ]
        return text_table([head, *rows])


def preview(config: str | os.PathLike | Mapping | RunConfig, timed: int = 0, **overrides: Any) -> Preview:
    """Read and check everything that `learn` checks before it trains, and say what it would do; nothing is written.

    timed: steps of the first task's training that are made and timed, in a folder of their own that goes away; 0: none,
    and the base's weights are not loaded. Raises InputError as `learn` does.
    """
    source = config if isinstance(config, Mapping | RunConfig) else Path(config)
    settings = load_config(source, values=overrides)
    run, built = prepare(settings)
    modules = parameters = head = None
    if built is not None and settings.trains:
        modules, parameters, head = _trained(built)
    return Preview(
        settings,
        [_of_task(run, index) for index in range(len(run.stream.tasks))],
        run.folder.finished(),
        modules,
        parameters,
        head,
        _step_seconds(run, timed) if timed and settings.trains else None,
    )


def _of_task(run: Run, index: int) -> TaskPreview:
    task, config = run.stream.tasks[index], run.config
    cut = sum(_cut(run, rows, task) for rows in (task.train, task.test))
    steps = _steps(run, index) if run.trains_backbone(index) else 0
    own = tuple(dict.fromkeys(task.own or (task.labels if config.kind.has_head else ())))
    return TaskPreview(task.name, own, len(task.train), len(task.eval), len(task.test), cut, steps)


def _cut(run: Run, rows: Rows, task: Task) -> int:
    if not hasattr(run.encoder, "cut") or not len(rows):
        return 0
    run.encoder.examples(rows, task.labels)
    return int(run.encoder.cut)


def _steps(run: Run, index: int) -> int:
    """Optimizer steps of a task's training, as the Trainer counts them."""
    args, task = training_arguments(run.config, run.folder.task(index).checkpoints, index), run.stream.tasks[index]
    if args.max_steps > 0:
        return int(args.max_steps)
    rows = len(task.train) + len(task.replayed)
    if run.config.rehearses and (index or run.config.samples_base or run.folder.start is not None):
        rows *= 2  # a rehearsed row beside each new one
    batch = args.train_batch_size * process_count()
    batches = rows // batch if args.dataloader_drop_last else math.ceil(rows / batch)
    whole, rest = divmod(batches, args.gradient_accumulation_steps)
    return math.ceil(args.num_train_epochs * max(1, whole + (rest > 0)))


def _trained(built: TaskModel) -> tuple[int, int, int]:
    """(adapted modules, trained values of their factors, of the head) of a task's model."""
    sizes = {name: p.numel() for name, p in built.model.named_parameters() if p.requires_grad}
    factors = sum(size for name, size in sizes.items() if f".{TASK_ADAPTER}" in name and ".lora_" in name)
    return len(adapted_layers(built.model, TASK_ADAPTER)), factors, sum(sizes.values()) - factors


def _step_seconds(run: Run, steps: int) -> float | None:
    """Median of so many steps of the first task, in seconds, after a first one."""
    short = {"max_steps": steps + 1, "report_to": "none", "disable_tqdm": True, "load_best_model_at_end": False}
    short |= {"save_strategy": "no", "eval_strategy": "no", "logging_strategy": "no"}
    with tempfile.TemporaryDirectory() as folder:
        timed = replace(run.config, output_dir=folder, training=run.config.training | short)
        return Run(timed, run.stream).time_first_task()


def _method(config: RunConfig) -> str:
    """The settings that make the method, in one line."""
    merge, coefficient = config.merge, config.merge.coefficient
    parts = [f"merge {merge.method}"]
    if coefficient is not None:
        parts.append(f"α {coefficient}" if isinstance(coefficient, str) else f"α {coefficient:g}")
    parts += [f"perturbation ε {config.perturbation.scale:g}"] if config.perturbation.scale else []
    parts += [f"head {config.head.kind}"] if config.kind.has_head else []
    parts += ["written rows"] if config.rehearses else []
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
