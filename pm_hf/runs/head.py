"""What a run does with the classification head of a task: nothing, train its rows, or compute them from statistics.

Language models have no head; what their answers are chosen by can be computed in the same way.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pm_hf.adapters.folder import folded_tasks, replace_head, scale_adapter
from pm_hf.config.schema import HeadSettings, RunConfig
from pm_hf.data.rows import Rows
from pm_hf.data.stream import Task, sample, sample_classes
from pm_hf.errors import InputError
from pm_hf.measuring.analytic_head import (
    SOLVERS,
    HeadStatistics,
    compared,
    held_out_temperature,
    leave_one_out,
    merge_temperature,
    ridge_drift,
)
from pm_hf.measuring.bound_head import DIRECTIONS
from pm_hf.measuring.gate import GATE_SCALES, Gate, LineFeatures, ScaleState, deployed_scale, judge
from pm_hf.measuring.head_search import NODES, head_search
from pm_hf.measuring.line_search import Point
from pm_hf.measuring.scores import Scorer
from pm_hf.merging.curvature import FULL_PRECISION
from pm_hf.merging.lowrank import LowRank
from pm_hf.models.contexts import scaled_adapter
from pm_hf.models.loading import LOADED_ADAPTER
from pm_hf.models.lora import adapted_layers, find_head, head_matrix
from pm_hf.models.task_model import TASK_ADAPTER, TaskModel
from pm_hf.runs.paths import STATISTICS_FILE, TaskPaths
from pm_hf.runs.start import TaskStart, base_misfit

LAYER_ROWS = 1024  # of the first task's training rows, that the layer of analytic answers is chosen by


class HeadPolicy:
    """What happens to the head around a task's training: nothing, where language models have none."""

    def check(self, built: TaskModel) -> None:
        """InputError where this cannot be done with the model's head."""

    def before_training(self, built: TaskModel, task: Task, start: TaskStart) -> AbstractContextManager[Any]:
        """Prepare the rows; what holds while the task trains is a context."""
        return nullcontext()

    def curvature_heads(self, built: TaskModel, start: TaskStart) -> dict[str, LowRank] | None:
        """{head: its [weight | bias] before the task, (rows, in + 1)} of a head that belongs into the curvature."""
        return None

    def search(self, built: TaskModel, task: Task, start: TaskStart, rows: int) -> list[Point]:
        """What the coefficient of a trained task is searched with, measured on about so many of its rows; nothing."""
        return []

    def after_merge(
        self, paths: TaskPaths, task: Task, start: TaskStart, head: str | None, *, trained: bool
    ) -> list[str]:
        """Give the merge its final rows; what is to be said of it. trained: whether the task trained the backbone."""
        return []

    def gate(self, paths: TaskPaths, task: Task, start: TaskStart, head: str | None) -> dict[str, Any]:
        """Deploy the merge at the scale that the gate lets through; `gate` of step.json. {}: without one, as it is."""
        return {}

    def answers(self, statistics: Path | None) -> HeadStatistics | None:
        """What a language model's answers are chosen by, from the file beside a merge; None: its likelihoods."""
        return None


class LinearHead(HeadPolicy):
    """Rows that are trained with the task and merged by label; inside the curvature where all tasks share them."""

    def __init__(self, *, in_curvature: bool) -> None:
        self.in_curvature = in_curvature

    def curvature_heads(self, built: TaskModel, start: TaskStart) -> dict[str, LowRank] | None:
        """The shared head before the task. Rows are absolute values: before the first merge there is nothing."""
        if not self.in_curvature or built.head is None:
            return None
        if start.running is not None:
            return {built.head: start.running.head_matrix(built.head)}
        return {built.head: head_matrix(find_head(built.model, built.head)).scale(0.0)}


class AnalyticHead(HeadPolicy):
    """Rows of linear discriminant analysis, computed from each class's mean and one scatter matrix.

    With `training: seen` a task's rows start there and compete with the fixed rows of every class seen.
    """

    def __init__(self, settings: HeadSettings, scorer: Scorer) -> None:
        self.settings, self.scorer = settings, scorer
        self._kept: tuple[tuple[Path, str], Tensor] | None = None  # of `_features_before`
        self._after: tuple[Path, list[Tensor]] | None = None  # a merge, and features of `_row_sets` under it

    def check(self, built: TaskModel) -> None:
        """The discriminants need a bias."""
        if find_head(built.model, str(built.head)).bias is None:
            raise InputError(f"head.kind lda needs a head with a bias, {built.head} has none; use head.kind: linear")

    def before_training(self, built: TaskModel, task: Task, start: TaskStart) -> AbstractContextManager[Any]:
        """Start the task's rows at their analytic values, and let them compete with all that is known.

        The model is at the running merge. The rows of the labels that the task trains (its own classes, and those that
        are replayed) are those of its own features and of what is known, with the temperature that fits rows of the
        task held out in turn. Within the context the head's logits (n, C) are followed by those of the fixed rows of
        every other class seen, computed in float32, so that a cross-entropy over the task's labels is one over all. The
        curvature is measured without them: H is of the cross-entropy
        among the task's own classes, as P&M is published.
        """
        self._kept = None  # of a task that is finished
        if self.settings.training != "seen":
            return nullcontext()
        head, own_mean = str(built.head), self.settings.means == "task"
        features = self.scorer.features_of(built.model.to(self.scorer.device), task.train, task.own, head)
        seen = _load_statistics(start.statistics)
        targets = _class_indices(task.train, task.own)
        statistics = seen.added(features, targets, list(task.own), one_mean_per_task=own_mean)
        temperature = held_out_temperature(seen, features, task.train.labels, one_mean_per_task=own_mean)
        weight, bias = (value / temperature for value in statistics.solve())
        linear = find_head(built.model, head)
        newest = {label: row for row, label in enumerate(statistics.labels)}
        trained = [(place, newest[label]) for place, label in enumerate(task.labels) if label in newest]
        places, rows = (list(numbers) for numbers in zip(*trained, strict=True))
        with torch.no_grad():
            linear.weight[places] = weight[rows].to(linear.weight)
            linear.bias[places] = bias[rows].to(linear.bias)
        others = [row for row, label in enumerate(statistics.labels) if label not in task.labels]
        return _compete(linear, weight[others], bias[others]) if others else nullcontext()

    def after_merge(
        self, paths: TaskPaths, task: Task, start: TaskStart, head: str | None, *, trained: bool
    ) -> list[str]:
        """Follow the backbone's drift, add the task's own classes, write the rows into the merge.

        The statistics are saved beside the merge. With `means: task` a class has a row for every task that it comes
        in, and the row with the largest logit decides. Rows that were held out of the training without being asked for
        are in the statistics of their classes.
        """
        module, settings = str(head), self.settings
        known = _load_statistics(start.statistics, self.directions, self._base)
        features = self._features(paths.merged, task, module, [1.0])[1.0]
        self._after = paths.merged, features
        if known.labels and settings.drift == "ridge" and trained and start.running is not None:
            before = self._features_before(start.running.path, task, module)
            known = known.moved(ridge_drift(before, features[0], settings.ridge))
        statistics, solver, rows = self._solved(known, features, task)
        statistics.save(paths.statistics)
        replace_head(paths.merged, module, *rows, statistics.labels)
        return [] if solver == _best_solver(known.losses) else [f"head.solver: {solver} from {task.name} on"]

    @property
    def _base(self) -> str:
        return self.scorer.config.model.base_precision

    @property
    def directions(self) -> int:
        """Directions that the statistics keep of each class."""
        return 0 if self.settings.solver == "lda" else DIRECTIONS

    def _solved(
        self, known: HeadStatistics, features: Sequence[Tensor], task: Task
    ) -> tuple[HeadStatistics, str, tuple[Tensor, Tensor]]:
        """(statistics with the task's own classes, the solver, (weight (C, d), bias (C,)) of the head).

        known: the statistics without the task; features: of its training rows (n, d) and, where there are more, of
        those held out (m, d), which count where the run holds them out without being asked for.
        """
        rows = task.train.with_rows(task.eval) if self.scorer.config.holds_out_rows else task.train
        values = torch.cat(list(features))[: len(rows)]
        statistics, temperature = self._with_task(known, values, rows, task.own)
        statistics, solver, temperature = self._solver(known, statistics, temperature, values, rows)
        weight, bias = SOLVERS[solver](statistics)
        if not statistics.temperature:
            weight, bias = weight / temperature, bias / temperature
        return statistics, solver, (weight, bias)

    def _solver(
        self, known: HeadStatistics, statistics: HeadStatistics, temperature: float, features: Tensor, rows: Rows
    ) -> tuple[HeadStatistics, str, float]:
        """(statistics with what the solvers lose on rows held out in turn, of all tasks, the solver of the rows, their
        temperature). known: the statistics without the task; temperature: that of the discriminants."""
        settings, own_mean = self.settings, self.settings.means == "task"
        if settings.solver == "lda":
            return statistics, "lda", temperature
        asked = tuple(SOLVERS) if settings.solver == "search" else (settings.solver,)
        measured = compared(known, features, rows.labels, asked, one_mean_per_task=own_mean)
        losses = {name: known.losses.get(name, 0.0) + nats for name, (nats, _) in measured.items()} or known.losses
        solver = _best_solver(losses)
        return replace(statistics, losses=losses), solver, measured[solver][1] if solver in measured else temperature

    def gate(self, paths: TaskPaths, task: Task, start: TaskStart, head: str | None) -> dict[str, Any]:
        """Compare the scales of the merge that `after_merge` has left, see `pm_hf.measuring.gate`.

        The state of the scales is saved beside it, and the adapter that is deployed where that is not the merge itself.
        """
        if not self.settings.gate:
            return {}
        module, settings = str(head), self.settings
        assert self._after is not None
        after, before = {1.0: self._after[1]}, dict[float, list[Tensor]]()
        others = [scale for scale in GATE_SCALES if scale != 1]
        after |= self._features(paths.merged, task, module, others)
        if start.running is not None:
            before = {1.0: [self._features_before(start.running.path, task, module)]}
            drifting = [scale for scale in others if scale]  # at 0 there is nothing that could drift
            before |= self._features(start.running.path, task, module, drifting, held_out=False)
        line = {
            scale: LineFeatures(after[scale][0], after[scale][1], before[scale][0] if scale in before else None)
            for scale in GATE_SCALES
        }
        statistics = _load_statistics(start.statistics)
        gate = Gate() if start.gate is None else Gate.load(start.gate, statistics)
        judged, points = judge(
            gate.with_directions(self.directions),
            line,
            task.train.labels,
            task.eval.labels,
            ridge=settings.ridge,
            drift=settings.drift == "ridge",
            one_mean_per_task=settings.means == "task",
            seed=self.scorer.config.seed + start.index,
        )
        deployed, states = deployed_scale(points), dict[float, ScaleState]()
        for scale, state in judged.scales.items():
            statistics, _, rows = self._solved(state.statistics, after[scale], task)
            states[scale] = replace(state, statistics=statistics)
            if scale == deployed != 1:
                scale_adapter(paths.merged, paths.deployed, scale)
                replace_head(paths.deployed, module, *rows, statistics.labels)
        Gate(judged.tasks, states).save(paths.gate)
        return {"deployed": deployed, "scales": points}

    def _features(
        self, merged: Path, task: Task, head: str, scales: Sequence[float], *, held_out: bool = True
    ) -> dict[float, list[Tensor]]:
        """{scale of a merged adapter: features of the task's training rows (n, d), and of those held out (m, d) where
        the run asks for them itself}."""
        asked = held_out and (self.settings.gate or self.scorer.config.holds_out_rows)
        model, features = self.scorer.load(merged, head)[0], dict[float, list[Tensor]]()
        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        for scale in scales:
            with scaled_adapter(layers, LOADED_ADAPTER, scale):
                features[scale] = [
                    self.scorer.features_of(model, rows, task.own, head)
                    for rows in (task.train, *([task.eval] if asked else []))
                ]
        return features

    def _with_task(
        self, statistics: HeadStatistics, features: Tensor, rows: Rows, own: Sequence[str]
    ) -> tuple[HeadStatistics, float]:
        """(statistics with a task's own classes, their temperature); in strict mode frozen from the first task on."""
        own_mean, targets = self.settings.means == "task", _class_indices(rows, own)
        statistics = statistics.added(features, targets, list(own), one_mean_per_task=own_mean)
        temperature = statistics.temperature or merge_temperature(statistics, features, rows.labels)
        if self.settings.strict and statistics.temperature is None:
            statistics = statistics.frozen(temperature)
        return statistics, temperature

    def search(self, built: TaskModel, task: Task, start: TaskStart, rows: int) -> list[Point]:
        """J(α) against draws of the earlier classes, see `head_search`.

        Half of the rows, at most, are those held out of the training (`Task.eval`). The task adapter is scaled.
        """
        assert start.running is not None
        seed, settings = self.scorer.config.seed + start.index, self.settings
        features = dict[float, Tensor]()
        held_out = sample_classes(task.eval, rows // 2, seed)
        fitted = sample_classes(task.train, rows - len(held_out), seed)
        model, layers = built.model.to(self.scorer.device), adapted_layers(built.model, TASK_ADAPTER)
        for share in NODES:
            with scaled_adapter(list(layers.values()), TASK_ADAPTER, share):
                features[share] = self.scorer.features_of(model, fitted.with_rows(held_out), task.own, str(built.head))
        return head_search(
            _load_statistics(start.statistics),
            {share: values[: len(fitted)] for share, values in features.items()},
            fitted.labels,
            {share: values[len(fitted) :] for share, values in features.items()},
            held_out.labels,
            earlier=folded_tasks(start.running),
            ridge=settings.ridge,
            drift=settings.drift == "ridge",
            one_mean_per_task=settings.means == "task",
            seed=seed,
        )

    def _features_before(self, running: Path, task: Task, head: str) -> Tensor:
        """The task's features under the running merge, (n, d); the last ones are kept: a merge line has several merges
        of one task into one running merge."""
        key = running, task.name
        if self._kept is None or self._kept[0] != key:
            self._kept = key, self.scorer.features(running, task.train, task.own, head)
        return self._kept[1]


class AnalyticAnswers(AnalyticHead):
    """The same of a language model, which has no head and is not trained: its answers are the classes, the hidden state
    of a prompt's last token after one layer is the feature.

    The layer is the one whose discriminants do best on the first task's training rows, each left out in turn; it stays.
    """

    def check(self, built: TaskModel) -> None:
        """There is no head to check."""

    def after_merge(
        self, paths: TaskPaths, task: Task, start: TaskStart, head: str | None, *, trained: bool
    ) -> list[str]:
        """Choose the layer if the task is the first, and add the task's answers to the statistics beside the merge."""
        statistics, notes = _load_statistics(start.statistics, base=self._base), list[str]()
        scorer = self.scorer.language_scorer(self.scorer.load(paths.merged, None)[0])
        if statistics.layer is None:
            rows = sample(task.train, LAYER_ROWS, self.scorer.config.seed)
            states = scorer.prompt_states(rows)
            layer, accuracy = best_layer(states, _class_indices(rows, sorted(set(rows.labels))))
            statistics = replace(statistics, layer=layer)
            notes.append(
                f"answers are chosen by the hidden states after layer {layer} of {len(states)}: {accuracy:.3f} of "
                f"{len(rows)} training rows of {task.name} are right there, each left out in turn"
            )
        features = scorer.prompt_states(task.train, [int(statistics.layer or 0)])[0]
        self._with_task(statistics, features, task.train, task.own)[0].save(paths.statistics)
        return notes

    def answers(self, statistics: Path | None) -> HeadStatistics:
        """The statistics; InputError where there are none, or where they are a classifier's."""
        loaded = _load_statistics(statistics)
        if loaded.base != self._base:
            raise InputError(f"{statistics}: {base_misfit(loaded.base, self._base)}")
        if loaded.layer is None:
            raise InputError(
                f"head.kind lda chooses a language model's answers by the {STATISTICS_FILE} beside its adapter, found "
                f"{'none' if statistics is None else f'that of a classifier, {statistics}'}; use head.kind: none"
            )
        return loaded


def best_layer(states: Tensor, targets: Tensor) -> tuple[int, float]:
    """(layer, counted from 1, whose analytic head is right on most rows that it was made without; their share).

    states (layers, n, d), targets (n,): each row's class. Of several the one with the likeliest classes.
    """
    rated = []
    for layer, features in enumerate(states, start=1):
        logits = leave_one_out(features, targets)
        chances = logits.log_softmax(1)[torch.arange(len(targets)), targets]
        chance = float(chances[chances.isfinite()].mean())  # a class's only row has none, after whichever layer
        rated.append((float((logits.argmax(1) == targets).double().mean()), chance, layer))
    accuracy, _, layer = max(rated)
    return layer, accuracy


def head_policy(config: RunConfig, scorer: Scorer) -> HeadPolicy:
    """What the run does with the head."""
    if config.analytic_head:
        return (AnalyticHead if config.kind.has_head else AnalyticAnswers)(config.head, scorer)
    if not config.kind.has_head:
        return HeadPolicy()
    return LinearHead(in_curvature=config.shared_head and config.sums_curvature)


def gate_notes(gate: Mapping[str, Any]) -> list[str]:
    """What is to be said of the scale that the gate chose, where it is not 1."""
    if not gate or gate["deployed"] == 1:
        return []
    whole = next(point for point in gate["scales"] if point["scale"] == 1)
    gain = f"scale 1 gains {whole['gain']:.3f} ± {whole['error']:.3f} nats over it"
    if gate["deployed"] == 0:
        return [f"the gate held the deployed model at the control, the base with the analytic head: {gain}"]
    return [f"the gate deployed the merged adapter at scale {gate['deployed']:g} of the way from the control: {gain}"]


def _compete(linear: nn.Linear, weight: Tensor, bias: Tensor) -> RemovableHandle:
    """Let logits of fixed rows (R, d), (R,) follow those of a Linear until the handle is removed."""
    fixed, offset = (values.float().to(linear.weight.device) for values in (weight, bias))

    def against_all(_: nn.Module, args: tuple[Tensor], logits: Tensor) -> Tensor:
        """The task's logits, then those of the fixed rows."""
        device = args[0].device  # that of a replica, where there are several
        with torch.autocast(device.type, enabled=False):
            others = torch.nn.functional.linear(args[0].float(), fixed.to(device), offset.to(device))
        return torch.cat([logits.float(), others], dim=-1)

    return linear.register_forward_hook(against_all)


def _load_statistics(path: Path | None, directions: int = 0, base: str = FULL_PRECISION) -> HeadStatistics:
    """The statistics of a file, with so many directions of each class; without one those of nothing, which are to be of
    features on such a base."""
    return (HeadStatistics(base=base) if path is None else HeadStatistics.load(path)).with_directions(directions)


def _best_solver(losses: Mapping[str, float]) -> str:
    """That of the least loss; the discriminants where nothing was compared."""
    return min(losses, key=lambda solver: losses[solver], default="lda")


def _class_indices(rows: Rows, labels: Sequence[str]) -> Tensor:
    """Index in `labels` of every row's label, (n,)."""
    index = {label: i for i, label in enumerate(labels)}
    return torch.tensor([index[label] for label in rows.labels])
