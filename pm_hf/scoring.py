"""Accuracy of a merged model on the tasks seen, as an offline `evaluate.Metric`."""

import datasets
import evaluate
import numpy as np

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
