"""What a training leaves in step.json; apart from the trainer, so that reading it loads no model library."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

CHANCE_SHARE = 0.9  # of the loss of guessing: at the end of a training that learned next to nothing
SAME_LOSS = 0.99  # share of its first loss, where there is no guessing


@dataclass(frozen=True)
class TrainingRecord:
    """What step.json says of a task's training.

    training_loss: mean over its optimizer steps and processes. factors: {factor: how often it was drawn}. log: [step,
    loss, factor] of some steps. step_seconds: median, None where no step was timed. best: {"best_step": …,
    "best_<metric>": …} where the best model was loaded. cut_rows: rows that are longer than the model is shown.
    """

    training_loss: float
    optimizer_steps: int
    factors: dict[str, int]
    log: list[list[float]]
    step_seconds: float | None = None
    best: dict[str, Any] = field(default_factory=dict)
    cut_rows: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Its keys in step.json; those that say nothing are left out."""
        timing = {} if self.step_seconds is None else {"step_seconds": self.step_seconds}
        counts = {"optimizer_steps": self.optimizer_steps, "factors": self.factors, "log": self.log}
        cut = {"cut_rows": self.cut_rows} if self.cut_rows else {}
        return timing | {"training_loss": self.training_loss, **self.best, **counts} | cut

    def learning_note(self, classes: int | None) -> str | None:
        """What is to be said of a training that ends near chance, ln(classes) nats; of a language model (None), of one
        that ends where it began. The first and the last quarter of the log's losses are compared."""
        losses = [loss for _, loss, _ in self.log]
        quarter = max(1, len(losses) // 4)
        if len(losses) < 2 or classes == 1:
            return None
        first, last = fmean(losses[:quarter]), fmean(losses[-quarter:])
        guessing = SAME_LOSS * first if classes is None else CHANCE_SHARE * math.log(classes)
        if last < guessing:
            return None
        ending = f"the training loss went from {first:.3g} to {last:.3g}"
        if classes is not None:
            ending += f" where guessing among {classes} classes has {math.log(classes):.3g}"
        return f"{ending}: the task was hardly learned; raise training.learning_rate or num_train_epochs"

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> "TrainingRecord | None":
        """From the keys of step.json; None where no training is in it."""
        if "training_loss" not in content:
            return None
        return cls(
            content["training_loss"],
            content.get("optimizer_steps", 0),
            content.get("factors") or {},
            content.get("log") or [],
            content.get("step_seconds"),
            {key: value for key, value in content.items() if key.startswith("best_")},
            content.get("cut_rows", 0),
        )
