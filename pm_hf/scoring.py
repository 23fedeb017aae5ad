"""Scores of a merged adapter on the tasks seen, loaded as every user loads it; an offline `evaluate.Metric`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
import torch

from pm_hf.adapters import open_adapter
from pm_hf.config import RunConfig
from pm_hf.modeling import forward, load_published
from pm_hf.tasks import Task, batches, encode

DESCRIPTION = "Accuracy of argmax over all classes seen, and of argmax inside the task's own classes."


class IncrementalAccuracy(evaluate.Metric):
    """Class-incremental and task-incremental accuracy of one task's test rows.

    compute(predictions=(n, C) logits over all classes seen, references=(n,) row indices, own=row indices of the
    task's classes) returns {"class_incremental": …, "task_incremental": …}, both shares in [0, 1].
    Works offline, unlike `evaluate.load("accuracy")`.
    """

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation="", inputs_description="", features=datasets.Features(features)
        )

    def _compute(self, predictions: list, references: list, own: list[int]) -> dict[str, float]:
        logits, truth, rows = np.asarray(predictions), np.asarray(references), np.asarray(own)
        inside = rows[logits[:, rows].argmax(1)]
        return {
            "class_incremental": float((logits.argmax(1) == truth).mean()),
            "task_incremental": float((inside == truth).mean()),
        }


@dataclass(frozen=True)
class Scorer:
    """Runs merged adapters, loaded as every user loads them."""

    config: RunConfig
    tokenizer: Any
    batch_size: int
    autocast: torch.dtype | None
    device: torch.device = torch.device("cpu")

    def load(self, merged: Path, head: str) -> torch.nn.Module:
        """The merged adapter on its base, as every user loads it."""
        return load_published(self.config.model, merged, open_adapter(merged).labels[head]).to(self.device)

    def features(self, merged: Path, rows: Sequence[dict], head: str) -> torch.Tensor:
        """Input of the head's Linear, (n, d)."""
        return self._forward(self.load(merged, head), rows, head)[0]

    def logits(
        self, model: torch.nn.Module, task: Task, labels: Sequence[str], head: str
    ) -> tuple[torch.Tensor, list[int]]:
        """Logits of a task's test rows over all `labels`, (n, C), and the row index of each one's label."""
        rows = encode(self.tokenizer, task.test, labels, self.config.stream.max_length)
        return self._forward(model, rows, head)[1], [row["labels"] for row in rows]

    def _forward(self, model: torch.nn.Module, rows: Sequence[dict], head: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and logits in the order of `rows`; batches are made of texts of like length."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
        back = torch.tensor(order).argsort()
        together = batches(self.tokenizer, [rows[i] for i in order], self.batch_size)
        features, logits = forward(model, together, head, self.autocast)
        return features[back] if len(features) else features, logits[back]

    def score(self, merged: Path, head: str, tasks: Sequence[Task]) -> list[dict[str, float]]:
        """Class-incremental and task-incremental accuracy of each task."""
        labels = open_adapter(merged).labels[head]
        model, metric = self.load(merged, head), IncrementalAccuracy(keep_in_memory=True)
        scores = []
        for task in tasks:
            logits, truth = self.logits(model, task, labels, head)
            own = [labels.index(label) for label in task.labels]
            scores.append(metric.compute(predictions=logits.numpy(), references=truth, own=own))
        return scores
