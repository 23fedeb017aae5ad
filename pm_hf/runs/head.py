"""The analytic head of a finished task: drift, new classes, rows of the merged adapter."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pm_hf.adapters.folder import replace_head
from pm_hf.config.schema import HeadSettings
from pm_hf.data.stream import Task
from pm_hf.measuring.analytic_head import HeadStatistics, held_out_temperature, merge_temperature, ridge_drift
from pm_hf.measuring.scores import Scorer
from pm_hf.models.lora import find_head
from pm_hf.runs.start import STATISTICS_FILE, StreamState


def start_analytic_head(
    model: nn.Module, state: StreamState, task: Task, head: str, scorer: Scorer, settings: HeadSettings
) -> RemovableHandle | None:
    """Give a task's rows their analytic values before they are trained, and let them compete with all that is known.

    model: as training starts, at the running merge. The rows of the labels that the task trains (its own classes, and
    those that are replayed) are those of linear discriminant analysis on its own features and on what is known, with
    the temperature that fits rows of the task held out in turn. Until the handle is removed, the head's logits (n, C)
    are followed by those of the fixed rows of every other class seen, computed in float32, so that a cross-entropy over
    the task's labels is one over all. None where no other class is known. The curvature is measured without them: H is
    of the cross-entropy among the task's own classes, as P&M is published.
    """
    features = scorer.features_of(model.to(scorer.device), task.train, task.own, head)
    known = HeadStatistics() if state.statistics is None else HeadStatistics.load(state.statistics)
    apart = settings.means == "task"
    statistics = known.added(features, _class_indices(task), list(task.own), apart=apart)
    temperature = held_out_temperature(known, features, task.train.labels, apart=apart)
    weight, bias = (value / temperature for value in statistics.solve())
    linear = find_head(model, head)
    newest = {label: row for row, label in enumerate(statistics.labels)}
    trained = [(place, newest[label]) for place, label in enumerate(task.labels) if label in newest]
    places, rows = (list(numbers) for numbers in zip(*trained, strict=True))
    with torch.no_grad():
        linear.weight[places] = weight[rows].to(linear.weight)
        linear.bias[places] = bias[rows].to(linear.bias)
    others = [row for row, label in enumerate(statistics.labels) if label not in task.labels]
    if not others:
        return None
    fixed, offset = (values[others].float().to(linear.weight.device) for values in (weight, bias))

    def against_all(_: nn.Module, args: tuple[Tensor], logits: Tensor) -> Tensor:
        """The task's logits, then those of the fixed rows."""
        device = args[0].device  # that of a replica, where there are several
        with torch.autocast(device.type, enabled=False):
            found = torch.nn.functional.linear(args[0].float(), fixed.to(device), offset.to(device))
        return torch.cat([logits.float(), found], dim=-1)

    return linear.register_forward_hook(against_all)


def update_analytic_head(
    folder: Path, state: StreamState, task: Task, head: str, scorer: Scorer, settings: HeadSettings, *, moved: bool
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
    statistics = statistics.added(features, _class_indices(task), list(task.own), apart=settings.means == "task")
    temperature = statistics.temperature or merge_temperature(statistics, features, task.train.labels)
    if settings.strict and statistics.temperature is None:
        statistics = statistics.frozen(temperature)
    statistics.save(folder / STATISTICS_FILE)
    weight, bias = (value if statistics.temperature else value / temperature for value in statistics.solve())
    replace_head(merged, head, weight, bias, statistics.labels)


def _class_indices(task: Task) -> Tensor:
    """Index in task.own of every training row's label."""
    index = {label: i for i, label in enumerate(task.own)}
    return torch.tensor([index[label] for label in task.train.labels])
