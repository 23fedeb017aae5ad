"""The gate on the line from the base to the merge: at which scale of the merged adapter the model is deployed.

At scale 0 the backbone is the base's and nothing ever drifts: that is the control, a frozen backbone with the analytic
head. Another scale has to be better than it, by what all tasks' held-out rows and draws of their classes say.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import cross_entropy

from pm_hf.errors import InputError
from pm_hf.files import as_record, save_tensors
from pm_hf.measuring.analytic_head import (
    HeadStatistics,
    class_scores,
    drift_residuals,
    fit_temperature,
    ridge_drift,
    square_root,
)
from pm_hf.measuring.head_search import DRAWS, LEAST_DRAWS
from pm_hf.measuring.line_search import mean_variance

GATE_SCALES = (0.0, 0.5, 1.0)  # of the whole merged adapter
GATE_FORMAT, SUMS_FILE = "pm_hf.gate.v1", "sums.safetensors"


@dataclass(frozen=True)
class LineFeatures:
    """Features of one task's rows at one scale. fitted (n, d): training rows under the new merge; held_out (m, d): rows
    that it was not trained on; before (n, d): the training rows under the merge before, None for the first task."""

    fitted: Tensor
    held_out: Tensor
    before: Tensor | None = None


@dataclass(frozen=True)
class ScaleState:
    """What is kept of one scale, constant in the number of tasks.

    statistics: of the analytic head. noise (d, d), float64: covariance of what the drift maps missed, by which features
    of earlier classes may be off their means. Sums over the tasks, in nats, of the gain over scale 0: gained, the mean
    over a task's held-out rows when it was learned, variance, that of this mean, and drawn, the mean over draws of the
    task's own classes then.
    """

    statistics: HeadStatistics = field(default_factory=HeadStatistics)
    noise: Tensor | None = None
    gained: float = 0.0
    variance: float = 0.0
    drawn: float = 0.0

    def moved(self, features: LineFeatures, *, ridge: float, drift: bool) -> "ScaleState":
        """After a task's drift from `before` to `fitted`, see `ridge_drift`; drift: whether the statistics follow."""
        if features.before is None or not self.statistics.labels:
            return self
        W = ridge_drift(features.before, features.fitted, ridge)
        residuals = drift_residuals(features.before, features.fitted, W, ridge)
        new = residuals.T @ residuals / len(residuals)
        noise = new if self.noise is None else W @ self.noise @ W.T + new
        return replace(self, statistics=self.statistics.moved(W) if drift else self.statistics, noise=noise)


@dataclass(frozen=True)
class Gate:
    """What the gate keeps of the tasks so far: their number, and the state of each scale."""

    tasks: int = 0
    scales: Mapping[float, ScaleState] = field(default_factory=lambda: dict.fromkeys(GATE_SCALES, ScaleState()))

    def with_directions(self, count: int) -> "Gate":
        """The same with `count` directions of each class, see `HeadStatistics.with_directions`."""
        scales = {
            scale: replace(state, statistics=state.statistics.with_directions(count))
            for scale, state in self.scales.items()
        }
        return replace(self, scales=scales)

    def save(self, folder: Path) -> None:
        """Write a folder: the statistics of each scale but 1, which the head has itself, and the sums."""
        folder.mkdir(exist_ok=True)
        noises = {f"{scale}": state.noise for scale, state in self.scales.items() if state.noise is not None}
        sums = {
            f"{scale}": {"gained": state.gained, "variance": state.variance, "drawn": state.drawn}
            for scale, state in self.scales.items()
        }
        for scale, state in self.scales.items():
            if scale != 1:
                state.statistics.save(folder / f"{scale}.safetensors")
        header = json.dumps({"tasks": self.tasks, "scales": sums})
        save_tensors(noises, folder / SUMS_FILE, {"format": GATE_FORMAT, "gate": header})

    @classmethod
    def load(cls, folder: Path, statistics: HeadStatistics) -> "Gate":
        """Read what `save` wrote; statistics: those of scale 1. InputError where it is missing or something else."""
        path, way_out = folder / SUMS_FILE, "use the folder that was saved with the adapter"
        try:
            with safe_open(path, "pt") as handle:
                metadata = handle.metadata() or {}
                noises = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} cannot be read ({error}); {way_out}") from error
        if metadata.get("format") != GATE_FORMAT:
            raise InputError(f"{path} is no state of a gate: expected format {GATE_FORMAT}; {way_out}")
        try:
            content = json.loads(metadata.get("gate", ""))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: the header is no JSON ({error}); {way_out}") from error
        header = as_record(content, _Header, str(path), way_out)
        if set(header.scales) != set(map(str, GATE_SCALES)):
            raise InputError(f"{path}: expected the scales {GATE_SCALES}, found {sorted(header.scales)}; {way_out}")
        states = {}
        for scale in GATE_SCALES:
            own = statistics if scale == 1 else HeadStatistics.load(folder / f"{scale}.safetensors")
            noise, expected = noises.get(f"{scale}"), own.scatter.shape
            if own.labels != statistics.labels or (noise is not None and noise.shape != expected):
                raise InputError(f"{folder}: scale {scale} is of other classes or features than the head; {way_out}")
            states[scale] = ScaleState(own, noise, **vars(header.scales[f"{scale}"]))
        return cls(header.tasks, states)


@dataclass
class _Sums:
    gained: float
    variance: float
    drawn: float


@dataclass
class _Header:
    """What the file of sums says beside its tensors."""

    tasks: int
    scales: dict[str, _Sums]


@dataclass(frozen=True)
class _Losses:
    """Losses in nats at one scale: of held-out rows (m,), of draws of earlier classes and of the task's own (k,)."""

    held_out: Tensor
    earlier: Tensor
    own: Tensor


def judge(
    gate: Gate,
    line: Mapping[float, LineFeatures],
    fitted_labels: Sequence[str],
    held_out_labels: Sequence[str],
    *,
    ridge: float,
    drift: bool,
    one_mean_per_task: bool,
    seed: int,
) -> tuple[Gate, list[dict[str, float]]]:
    """(gate after the task, without the task's classes in its statistics; a point for each scale: `gain`, `error`).

    gain: estimate, in nats and as a mean over the t tasks, of how much smaller the loss over all classes seen is than
    at scale 0, G_t(s) = [Σ_{i≤t} aᵢ + Σ_{i<t}(b_{i,t} − b_{i,i})]/t. aᵢ: mean gain on rows held out of task i when it
    was learned. b_{i,τ}: mean gain, after task τ, on draws of task i's classes from N(μ_c, Σ + noise), so that the
    second sum is what became of it since: drift that the statistics do not follow, and rivals. error: standard error of
    gain from the paired differences of rows, and of draws. Temperatures are those that fit the held-out rows and the
    draws of earlier classes, weighted by tasks.
    """
    t, own = gate.tasks + 1, list(dict.fromkeys(fitted_labels))
    targets = torch.tensor([own.index(label) for label in fitted_labels])
    moved = {scale: gate.scales[scale].moved(line[scale], ridge=ridge, drift=drift) for scale in GATE_SCALES}
    losses = {}
    for scale, state in moved.items():
        known = state.statistics
        statistics = known.added(line[scale].fitted, targets, own, one_mean_per_task=one_mean_per_task)
        logits, answers = class_scores(statistics, line[scale].held_out, held_out_labels)
        earlier = torch.arange(len(statistics.labels)) < len(known.labels)
        mine = ~earlier
        if not one_mean_per_task:  # a class that comes again has one mean for both
            mine = mine | torch.tensor([label in own for label in statistics.labels])
        drawn, names = _draws(statistics, state.noise, earlier, seed)
        rows, truth = class_scores(statistics, drawn.flatten(0, 1), names)
        old = earlier.repeat_interleave(drawn.shape[1])
        past = [(float(gate.tasks), rows[old], truth[old])] if gate.tasks else []
        temperature = fit_temperature(logits, answers, *past)
        each = cross_entropy(rows / temperature, truth, reduction="none").view(len(statistics.labels), -1)
        held_out = cross_entropy(logits / temperature, answers, reduction="none")
        losses[scale] = _Losses(held_out, each[earlier].flatten(), each[mine].flatten())
    control, points, scales = losses[0.0], [], {}
    for scale, of_scale in losses.items():
        state, gains = moved[scale], control.held_out - of_scale.held_out
        total, variance = state.gained + float(gains.mean()), state.variance + mean_variance(gains)
        error = variance
        if gate.tasks:
            since = control.earlier - of_scale.earlier
            total += gate.tasks * float(since.mean()) - state.drawn
            error += gate.tasks**2 * mean_variance(since)
        points.append({"scale": scale, "gain": total / t, "error": error**0.5 / t})
        scales[scale] = replace(
            state,
            gained=state.gained + float(gains.mean()),
            variance=variance,
            drawn=state.drawn + float((control.own - of_scale.own).mean()),
        )
    return Gate(t, scales), points


def deployed_scale(points: Sequence[Mapping[str, Any]]) -> float:
    """The largest scale whose gain is more than one standard error above 0; else 0, the control."""
    return float(max((point["scale"] for point in points if point["gain"] > point["error"]), default=0.0))


def _draws(statistics: HeadStatistics, noise: Tensor | None, earlier: Tensor, seed: int) -> tuple[Tensor, list[str]]:
    """(rows of N(μ_c, Σ), for `earlier` means (R,) of N(μ_c, Σ + noise), (R, k, d); the label of each of the R·k).

    The standard normal numbers that they are made of are the same at every scale.
    """
    count, d = statistics.means.shape
    each = max(LEAST_DRAWS, DRAWS // count)
    normal = torch.randn(count, each, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    covariance = statistics.pooled_covariance()
    rows = statistics.means[:, None] + normal @ square_root(covariance)
    if noise is not None and bool(earlier.any()):
        rows[earlier] = statistics.means[earlier][:, None] + normal[earlier] @ square_root(covariance + noise)
    return rows, [label for label in statistics.labels for _ in range(each)]
