"""Scores of a merged adapter on the tasks of a stream, loaded as every user loads it."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import evaluate
import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pm_hf.adapters.folder import open_adapter
from pm_hf.config.schema import RunConfig
from pm_hf.data.encoders import TextEncoder, check_length, check_tokens, match_padding
from pm_hf.data.language import CausalEncoder, Seq2SeqEncoder
from pm_hf.data.rows import Encoder, Examples, Rows
from pm_hf.data.stream import Task, batches
from pm_hf.measuring.analytic_head import HeadStatistics, class_logits
from pm_hf.measuring.language_scores import LanguageScorer
from pm_hf.models.contexts import autocast, evaluating
from pm_hf.models.loading import has_tokenizer, load_merged
from pm_hf.models.lora import find_head

MOST_CONFUSIONS = 20  # pairs of classes that are kept
ACCURACY_DESCRIPTION = "Accuracy of argmax over all classes seen, and of argmax inside the task's own classes."


class IncrementalAccuracy(evaluate.Metric):
    """Class-incremental and task-incremental accuracy of one task's test rows.

    compute(predictions=(n, C) logits over all classes seen, references=(n,) row indices, own=row indices of the
    task's classes) returns {"class_incremental": …, "task_incremental": …}, both shares in [0, 1].
    Works offline, unlike `evaluate.load("accuracy")`.
    """

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=ACCURACY_DESCRIPTION, citation="", inputs_description="", features=datasets.Features(features)
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
    encoder: Encoder
    batch_size: int
    autocast: torch.dtype | None
    device: torch.device = torch.device("cpu")
    cut: dict[str, int] = field(default_factory=dict)  # {task: test rows longer than max_length}
    # {task: counts of (class, class that it was taken for)} of the classifier that was scored last
    taken: dict[str, Counter[tuple[str, str]]] = field(default_factory=dict)
    # {task: which of its test rows are right among all classes (answers)} of the model that was scored last
    right: dict[str, list[bool]] = field(default_factory=dict)

    def load(self, merged: Path, head: str | None) -> tuple[PeftModel, list[str]]:
        """The merged adapter on its base, as every user loads it, and the labels of its head's rows."""
        labels = [] if head is None else open_adapter(merged).labels[head]
        model = load_merged(self.config.model, merged, labels, self.config.stream.kind)
        check_length(self.config, model.get_base_model())
        match_padding(model, self.encoder)
        if has_tokenizer(merged):
            check_tokens(self.encoder, model.get_base_model())
        return model.to(self.device), labels

    def features(self, merged: Path, rows: Rows, labels: Sequence[str], head: str) -> Tensor:
        """Input of the head's Linear under a merged adapter, (n, d)."""
        return self.features_of(self.load(merged, head)[0], rows, labels, head)

    def features_of(self, model: nn.Module, rows: Rows, labels: Sequence[str], head: str) -> Tensor:
        """Input of the model's head, (n, d), in eval mode."""
        return self._forward(model, self.encoder.examples(rows, labels), head)[0]

    def logits(self, model: nn.Module, task: Task, labels: Sequence[str], head: str) -> tuple[Tensor, list[int]]:
        """Logits of a task's test rows, (n, C), and the index of each one's label, both over the distinct `labels`.

        labels: of the head's rows; of several rows of one label the largest logit is taken.
        """
        rows = self._forward(model, self.encoder.examples(task.test, list(dict.fromkeys(labels))), head)[1]
        logits, classes = class_logits(rows, labels)
        return logits, [classes.index(label) for label in task.test.labels]

    def _forward(self, model: nn.Module, rows: Examples, head: str) -> tuple[Tensor, Tensor]:
        """Features and logits in the order of `rows`; batches are made of texts of like length."""
        if isinstance(self.encoder, TextEncoder):
            order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
            back = torch.tensor(order).argsort()
            features, logits = self._forward_in_order(model, [rows[i] for i in order], head)
            return features[back] if len(features) else features, logits[back]
        return self._forward_in_order(model, rows, head)

    def _forward_in_order(self, model: nn.Module, rows: Examples, head: str) -> tuple[Tensor, Tensor]:
        return features_and_logits(model, batches(self.encoder, rows, self.batch_size), head, self.autocast)

    def score(
        self,
        merged: Path,
        head: str | None,
        tasks: Sequence[Task],
        answers: HeadStatistics | None = None,
        *,
        loss: bool = False,
        generate: bool = True,
    ) -> list[dict[str, float]]:
        """Scores of each task: accuracies of a classifier, or those of `LanguageScorer` for a language model.

        answers: what a language model's answers are chosen by, of which it then has the accuracies only. loss: of a
        classifier also the mean cross-entropy inside the task's own classes, in nats. generate: whether a language
        model generates, for its exact_match.
        """
        return self.score_loaded(*self.load(merged, head), head, tasks, answers, loss=loss, generate=generate)

    def score_loaded(
        self,
        model: nn.Module,
        labels: Sequence[str],
        head: str | None,
        tasks: Sequence[Task],
        answers: HeadStatistics | None = None,
        *,
        loss: bool = False,
        generate: bool = True,
    ) -> list[dict[str, float]]:
        """The same of what `load` gave."""
        if head is None:
            return self._score_language(model, tasks, answers, generate)
        classes = list(dict.fromkeys(labels))
        scores = []
        for task in tasks:
            logits, truth = self.logits(model, task, labels, head)
            self.cut[task.name] = getattr(self.encoder, "cut", 0)
            scores.append(self._accuracies(task, logits, classes))
            if loss:
                own = [classes.index(label) for label in task.own]
                inside = torch.tensor([own.index(row) for row in truth])
                scores[-1]["loss"] = float(cross_entropy(logits[:, own].double(), inside))
        return scores

    def _accuracies(self, task: Task, logits: Tensor, classes: Sequence[str]) -> dict[str, float]:
        """Accuracies on a task's test rows of logits (n, C) over distinct classes; what was taken for what is kept."""
        truth, own = ([classes.index(label) for label in labels] for labels in (task.test.labels, task.own))
        said = [classes[row] for row in logits.argmax(1).tolist()]
        self.taken[task.name] = Counter(zip(task.test.labels, said, strict=True))
        self.right[task.name] = [label == answer for label, answer in zip(task.test.labels, said, strict=True)]
        metric = IncrementalAccuracy(keep_in_memory=True)
        accuracies: dict[str, float] = metric.compute(predictions=logits.numpy(), references=truth, own=own)
        return accuracies

    def language_scorer(self, model: nn.Module) -> LanguageScorer:
        """Scores of a language model, in this one's batches and precision."""
        assert isinstance(self.encoder, CausalEncoder | Seq2SeqEncoder)
        return LanguageScorer(model, self.encoder, self.batch_size, self.autocast)

    def _score_language(
        self, model: nn.Module, tasks: Sequence[Task], answers: HeadStatistics | None, generate: bool
    ) -> list[dict[str, float]]:
        seen = list(dict.fromkeys(answer for task in tasks for answer in task.own))
        scorer, rows = self.language_scorer(model), None if answers is None else answers.solve()
        scores = []
        for task in tasks:
            if answers is None or rows is None or not task.own:
                scores.append(scorer.scores(task.test, task.own, seen if task.own else (), generate=generate))
                if task.own:
                    self.right[task.name] = list(scorer.right)
            else:
                states = scorer.prompt_states(task.test, [int(answers.layer or 0)])[0].double()
                scores.append(self._accuracies(task, *class_logits(states @ rows[0].T + rows[1], answers.labels)))
            self.cut[task.name] = scorer.encoder.cut
        return scores

    def confusions(self, tasks: Sequence[Task]) -> list[tuple[str, str, int, int]]:
        """(class, another that test rows of it were taken for, how many, test rows of the class), most first, at most
        MOST_CONFUSIONS; [] for a language model that is not scored by analytic answers."""
        counts = sum((self.taken.get(task.name, Counter()) for task in tasks), Counter[tuple[str, str]]())
        rows = Counter[str]()
        for (label, _), count in counts.items():
            rows[label] += count
        wrong = [(label, said, count, rows[label]) for (label, said), count in counts.items() if label != said]
        return sorted(wrong, key=lambda pair: (-pair[2], pair[:2]))[:MOST_CONFUSIONS]

    def cut_notes(self, tasks: Sequence[Task]) -> list[str]:
        """What is to be said of test rows that were scored without a part of them."""
        return [
            cut_note(self.cut[task.name], len(task.test), f"test rows of {task.name}")
            for task in tasks
            if self.cut.get(task.name)
        ]


def cut_note(count: int, rows: int, kind: str) -> str:
    """What is to be said of rows that are longer than the model is shown."""
    return f"{count} of {rows} {kind} are longer than stream.max_length and were cut"


@torch.no_grad()
def features_and_logits(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], head: str, precision: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """(features (n, d), logits (n, C)) in float32 and eval mode; the features are the input of the head's Linear."""
    features: list[Tensor] = []
    logits: list[Tensor] = []
    device = next(model.parameters()).device

    def keep(_: nn.Module, args: tuple) -> None:
        if args[0].ndim == 2:  # a head that sees every token has no pooled feature
            features.append(args[0].float().cpu())

    handle = find_head(model, head).register_forward_pre_hook(keep)
    try:
        with evaluating(model):
            for batch in batches:
                inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
                with autocast(device, precision):
                    logits.append(model(**inputs).logits.float().cpu())
    finally:
        handle.remove()
    return torch.cat(features) if features else torch.empty(0), torch.cat(logits)
