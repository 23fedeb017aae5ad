"""The analytic head of a finished task: drift, new classes, rows of the merged adapter."""

from pathlib import Path

import torch

from pm_hf.adapter_writer import replace_head
from pm_hf.adapters import open_adapter
from pm_hf.heads import HeadStatistics, merge_temperature, ridge_drift
from pm_hf.released import STATISTICS, State
from pm_hf.scoring import Scorer
from pm_hf.settings import HeadSettings
from pm_hf.tasks import Task


def update_head(
    folder: Path, state: State, task: Task, head: str, scorer: Scorer, settings: HeadSettings, *, moved: bool
) -> None:
    """Follow the backbone's drift, pool in the task's own classes, write the rows into folder/merged.

    moved: whether the task trained the backbone. The statistics are saved beside the merge.
    """
    merged = folder / "merged"
    statistics = HeadStatistics() if state.statistics is None else HeadStatistics.load(state.statistics)
    labels = open_adapter(merged).labels[head]
    features = scorer.features(merged, task.train, task.own, head)
    if statistics.labels and settings.drift == "ridge" and moved and state.merged is not None:
        past = scorer.features(state.merged, task.train, task.own, head)
        statistics = statistics.moved(ridge_drift(past, features, settings.ridge))
    index = {label: i for i, label in enumerate(task.own)}
    targets = torch.tensor([index[label] for label in task.train.labels])
    statistics = statistics.added(features, targets, list(task.own))
    columns = torch.tensor([statistics.labels.index(label) for label in task.own])
    temperature = statistics.temperature or merge_temperature(statistics, features, columns[targets])
    if settings.strict and statistics.temperature is None:
        statistics = statistics.frozen(temperature)
    statistics.save(folder / STATISTICS)
    weight, bias = (value if statistics.temperature else value / temperature for value in statistics.solve())
    order = torch.tensor([statistics.labels.index(label) for label in labels])
    replace_head(merged, head, weight[order], bias[order])
