"""The analytic head of a finished task: drift, new classes, rows of the merged adapter."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pm_hf.adapter_writer import replace_head
from pm_hf.heads import HeadStatistics, held_out_temperature, merge_temperature, ridge_drift
from pm_hf.modeling import find_head
from pm_hf.released import STATISTICS, State
from pm_hf.scoring import Scorer
from pm_hf.settings import HeadSettings
from pm_hf.tasks import Task


def start_head(
    model: nn.Module, state: State, task: Task, head: str, scorer: Scorer, settings: HeadSettings
) -> RemovableHandle | None:
    """Give a task's rows their analytic values before they are trained, and let them compete with all that is known.

    model: as training starts, at the running merge. The rows of the task's classes are those of linear discriminant
    analysis on its own features there, with the temperature that fits rows held out of them in turn. Until the handle
    is removed, the head's logits (n, C) are followed by those of the fixed rows of every other class seen, so that a
    cross-entropy over the task's classes is one over all.
    None where no other class is known.
    """
    features = scorer.features_of(model.to(scorer.device), task.train, task.own, head)
    known = HeadStatistics() if state.statistics is None else HeadStatistics.load(state.statistics)
    apart = settings.means == "task"
    statistics = known.added(features, _targets(task), list(task.own), apart=apart)
    temperature = held_out_temperature(known, features, task.train.labels, apart=apart)
    own, (weight, bias) = _newest(statistics, task), (value / temperature for value in statistics.solve())
    linear = find_head(model, head)
    place = torch.tensor([task.labels.index(label) for label in task.own])
    with torch.no_grad():
        linear.weight[place] = weight[own].to(linear.weight)
        linear.bias[place] = bias[own].to(linear.bias)
    others = [row for row, label in enumerate(statistics.labels) if label not in task.own]
    if not others:
        return None
    fixed, offset = weight[others].to(linear.weight), bias[others].to(linear.bias)

    def against_all(_: nn.Module, args: tuple[Tensor], logits: Tensor) -> Tensor:
        """The task's logits, then those of the fixed rows, float32."""
        return torch.cat([logits.float(), torch.nn.functional.linear(args[0].float(), fixed, offset)], dim=-1)

    return linear.register_forward_hook(against_all)


def update_head(
    folder: Path, state: State, task: Task, head: str, scorer: Scorer, settings: HeadSettings, *, moved: bool
) -> None:
    """Follow the backbone's drift, add the task's own classes, write the rows into folder/merged.

    moved: whether the task trained the backbone. The statistics are saved beside the merge. With `means: task` a class
    has a row for every task that it comes in, and the row with the largest logit decides.
    """
    merged = folder / "merged"
    statistics = HeadStatistics() if state.statistics is None else HeadStatistics.load(state.statistics)
    features = scorer.features(merged, task.train, task.own, head)
    if statistics.labels and settings.drift == "ridge" and moved and state.merged is not None:
        past = scorer.features(state.merged, task.train, task.own, head)
        statistics = statistics.moved(ridge_drift(past, features, settings.ridge))
    targets = _targets(task)
    statistics = statistics.added(features, targets, list(task.own), apart=settings.means == "task")
    columns = _newest(statistics, task)
    temperature = statistics.temperature or merge_temperature(statistics, features, columns[targets])
    if settings.strict and statistics.temperature is None:
        statistics = statistics.frozen(temperature)
    statistics.save(folder / STATISTICS)
    weight, bias = (value if statistics.temperature else value / temperature for value in statistics.solve())
    replace_head(merged, head, weight, bias, statistics.labels)


def _targets(task: Task) -> Tensor:
    """Index in task.own of every training row's label."""
    index = {label: i for i, label in enumerate(task.own)}
    return torch.tensor([index[label] for label in task.train.labels])


def _newest(statistics: HeadStatistics, task: Task) -> Tensor:
    """The last row of each of the task's classes."""
    rows = {label: row for row, label in enumerate(statistics.labels)}
    return torch.tensor([rows[label] for label in task.own])
