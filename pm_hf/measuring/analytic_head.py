"""The analytic head: linear discriminant analysis from class means and one scatter matrix."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import cross_entropy

from pm_hf.errors import InputError, raise_all
from pm_hf.files import as_record, save_tensors
from pm_hf.measuring.bound_head import START, bound_rows, class_directions, pooled_directions
from pm_hf.merging.curvature import FULL_PRECISION

HEAD_FORMAT = "pm_hf.head.v1"


@dataclass
class HeadStatistics:
    """What the analytic head keeps of every class seen: no examples, and one d×d matrix for all of them.

    labels: C names in row order; a class with several means (see `added`) has as many rows of its name.
    counts (C,), means (C, d), scatter (d, d) = Σ_x (x − μ_c)(x − μ_c)ᵀ, float64.
    covariance, center, temperature: set once the head is frozen (strict mode), None before.
    layer: of a language model, whose hidden states the features are; None of a classifier.
    directions: (C, k, d) float32, of each class's own covariance (see `bound_head`); k = 0 where none are kept.
    losses: {solver: nats of all tasks' rows that it was compared on, see `compared`}, {} where there is no choice.
    base: what the frozen weights beneath the features were: "full", or quantized (nf4, int8).
    """

    labels: list[str] = field(default_factory=list)
    counts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    means: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))
    scatter: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))
    covariance: Tensor | None = None
    center: Tensor | None = None
    temperature: float | None = None
    layer: int | None = None
    directions: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 0))
    losses: dict[str, float] = field(default_factory=dict)
    base: str = FULL_PRECISION

    @property
    def kept(self) -> int:
        """k, the number of directions of each class."""
        return self.directions.shape[1]

    def with_directions(self, count: int) -> "HeadStatistics":
        """The statistics with `count` directions a class: the largest ones, or zeros where they are not known."""
        directions = torch.zeros(len(self.labels), count, self.means.shape[1])
        if self.kept:
            directions[:, : self.kept] = self.directions[:, :count]
        return replace(self, directions=directions)

    def moved(self, drift: Tensor) -> "HeadStatistics":
        """The statistics as seen through a feature drift W (d, d): μ ← Wμ, scatter ← W·scatter·Wᵀ, U ← UWᵀ."""
        means, scatter = self.means @ drift.T, drift @ self.scatter @ drift.T
        moved = replace(self, means=means, scatter=scatter)
        return replace(moved, directions=(self.directions.double() @ drift.T).float()) if self.kept else moved

    def added(
        self, features: Tensor, targets: Tensor, labels: list[str], *, one_mean_per_task: bool = False
    ) -> "HeadStatistics":
        """Pool in one task's features (n, d); targets (n,) index `labels`.

        A known class is pooled by counts, or with `one_mean_per_task` gets a further mean of its own, the classes being
        mixtures of one Gaussian a task (Σ shared by all). Each class gets as many directions as the known ones have,
        see `with_directions`.
        """
        features = features.double()
        d = features.shape[1]
        before = list(self.labels)
        present = [(i, label) for i, label in enumerate(labels) if label not in before or bool((targets == i).any())]
        names = [*before, *(label for _, label in present if one_mean_per_task or label not in before)]
        counts, means = torch.zeros(len(names), dtype=torch.float64), torch.zeros(len(names), d, dtype=torch.float64)
        scatter = self.scatter.clone() if len(self.labels) else torch.zeros(d, d, dtype=torch.float64)
        counts[: len(self.labels)] = self.counts
        directions = torch.zeros(len(names), self.kept, d)
        if len(self.labels):
            means[: len(self.labels)] = self.means
        if len(self.labels) and self.kept:
            directions[: len(self.labels)] = self.directions
        for place, (index, label) in enumerate(present):
            rows = features[targets == index]
            if not len(rows):
                raise InputError(f"class {label!r} has no training row; the analytic head needs at least one")
            at, mean = len(before) + place if one_mean_per_task else names.index(label), rows.mean(0)
            gap, old = mean - means[at], counts[at].clone()
            total = old + len(rows)
            if self.kept:
                parts = [(directions[at], means[at].clone(), float(old))] * bool(old)
                parts.append((class_directions(rows, self.kept), mean, len(rows)))
                directions[at] = pooled_directions(parts, self.kept) if old else parts[0][0]
            scatter += (rows - mean).T @ (rows - mean) + torch.outer(gap, gap) * (old * len(rows) / total)
            means[at] += gap * (len(rows) / total)
            counts[at] = total
        made = replace(self, labels=names, counts=counts, means=means, scatter=scatter)
        return replace(made, directions=directions) if self.kept else made

    def frozen(self, temperature: float) -> "HeadStatistics":
        """Fix covariance, center and temperature: a new class then only appends a row (a known one changes its own)."""
        return replace(self, covariance=self.pooled_covariance(), center=self.grand_mean(), temperature=temperature)

    def grand_mean(self) -> Tensor:
        """Mean feature of all examples seen, (d,)."""
        return (self.counts @ self.means) / self.counts.sum()

    def pooled_covariance(self) -> Tensor:
        """Σ = (1−ρ)·scatter/(N−C) + ρ·tr(·)/d·I with ρ of oracle approximating shrinkage (Chen et al. 2010, eq. 23)."""
        freedom = max(float(self.counts.sum()) - len(self.labels), 1.0)
        sample, d = self.scatter / freedom, self.scatter.shape[0]
        trace = sample.trace()
        rho = float(_shrinkage(trace, (sample**2).sum(), freedom, d))
        return (1 - rho) * sample + rho * trace / d * torch.eye(d, dtype=torch.float64)

    def solve(self) -> tuple[Tensor, Tensor]:
        """(weight (C, d), bias (C,)): the discriminants Σ⁻¹μ_c, −½μ_cᵀΣ⁻¹μ_c with equal priors, less their value at
        the grand mean m, which changes no argmax and keeps logits small:
        w_c = Σ⁻¹(μ_c − m), b_c = −½(μ_c − m)ᵀΣ⁻¹(μ_c + m).

        In strict mode the frozen Σ, m and temperature are used, so rows of old classes do not change by a bit.
        """
        covariance = self.pooled_covariance() if self.covariance is None else self.covariance
        if not float(covariance.trace()) > 0:
            raise InputError("the analytic head needs features that vary within a class; found none")
        inverse = torch.linalg.inv(covariance)
        center = self.grand_mean() if self.center is None else self.center
        # row by row: old rows stay bit-identical
        weight = torch.stack([inverse @ (mean - center) for mean in self.means])
        bias = torch.stack([-0.5 * ((mean + center) @ row) for mean, row in zip(self.means, weight, strict=True)])
        scale = self.temperature or 1.0
        return weight / scale, bias / scale

    def bound(self) -> tuple[Tensor, Tensor]:
        """(weight (C, d), bias (C,)) of the bound head, see `bound_rows`; without directions the discriminants."""
        if not bool(self.directions.any()):
            return self.solve()
        return bound_rows(self.means, self.pooled_covariance(), self.directions, self.labels)

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, atomically and synced; an OSError that names it where that fails."""
        tensors = {"counts": self.counts, "means": self.means, "scatter": self.scatter}
        if self.covariance is not None and self.center is not None:
            tensors |= {"covariance": self.covariance, "center": self.center}
        header: dict[str, object] = {"labels": self.labels, "temperature": self.temperature}
        header |= {} if self.layer is None else {"layer": self.layer}
        header |= {} if self.base == FULL_PRECISION else {"base": self.base}
        if self.kept:
            tensors |= {"directions": self.directions}
        header |= {"losses": self.losses} if self.losses else {}
        save_tensors(tensors, Path(path), {"format": HEAD_FORMAT, "head": json.dumps(header)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "HeadStatistics":
        """Read a file that `save` wrote; InputError when it is missing, truncated or something else."""
        try:
            with safe_open(path, "pt") as handle:
                metadata = handle.metadata() or {}
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(f"head statistics {path} cannot be read ({error})") from error
        if metadata.get("format") != HEAD_FORMAT:
            raise InputError(f"{path} holds no head statistics: expected format {HEAD_FORMAT}")
        subject, way_out = f"head statistics {path}", "use the file that was saved with the adapter"
        try:
            content = json.loads(metadata.get("head", ""))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{subject}: the header is no JSON ({error}); {way_out}") from error
        header = as_record(content, _Header, subject, way_out)
        problem = _shape_problem(len(header.labels), tensors)
        raise_all([f"{problem}; {way_out}"] * bool(problem), subject)
        return cls(**vars(header), **tensors)


@dataclass
class _Header:
    """What a file of statistics says beside its tensors."""

    labels: list[str]
    temperature: float | None = None
    layer: int | None = None
    losses: dict[str, float] = field(default_factory=dict)
    base: str = FULL_PRECISION


def _shape_problem(count: int, tensors: Mapping[str, Tensor]) -> str | None:
    """What is wrong with the tensors of a file: C = `count` means of a width d of their own."""
    needed = {"counts", "means", "scatter"}
    if not needed <= tensors.keys() <= needed | {"covariance", "center", "directions"}:
        return f"expected the tensors {sorted(needed)}, found {sorted(tensors)}"
    d = tensors["means"].shape[-1] if tensors["means"].ndim == 2 else -1
    shapes = {"counts": (count,), "means": (count, d), "scatter": (d, d), "covariance": (d, d), "center": (d,)}
    kept = tensors["directions"].shape[1] if "directions" in tensors and tensors["directions"].ndim == 3 else -1
    shapes["directions"] = (count, kept, d)
    for name, tensor in tensors.items():
        dtype = torch.float32 if name == "directions" else torch.float64
        if tuple(tensor.shape) != shapes[name] or tensor.dtype != dtype:
            return f"{name}: expected {str(dtype)[6:]} {shapes[name]}, found {tensor.dtype} {tuple(tensor.shape)}"
        if not bool(tensor.isfinite().all()):
            return f"{name}: expected finite numbers"
    return None


def _shrinkage(trace: Tensor, square: Tensor, freedom: float | Tensor, d: int) -> Tensor:
    """ρ in [0, 1] of oracle approximating shrinkage (Chen et al. 2010, eq. 23) of sample covariances (d, d) with these
    traces and sums of squared entries."""
    rho = ((1 - 2 / d) * square + trace**2) / ((freedom + 1 - 2 / d) * (square - trace**2 / d))
    return rho.clamp(0.0, 1.0).nan_to_num(1.0)


def leave_one_out(features: Tensor, targets: Tensor) -> Tensor:
    """Logits of each row under the analytic head of all other rows, (n, C) float64, up to a constant of the row.

    features (n, d); targets (n,): each row's class of 0 … C − 1. Without its only row a class cannot be chosen: −inf
    there. All zeros where no feature varies within a class.

    Closed form, and so n heads for about the price of one: without row x of class c, r = x − μ_c and n_c rows,
    μ_c ← μ_c − r/(n_c − 1), scatter ← scatter − n_c/(n_c − 1)·r rᵀ, which is of rank one, and ρ follows from the trace
    and the squares of the new scatter. All in the eigenbasis of the scatter, in the span of the rows.
    """
    features = features.double()
    d, classes = features.shape[1], int(targets.max()) + 1
    rows = features - features.mean(0)
    if len(rows) < d:
        rows = torch.linalg.qr(rows.T, mode="r").R.T  # coordinates in their span, (n, n)
    one_hot = torch.nn.functional.one_hot(targets, classes).double()
    sizes = one_hot.sum(0)[targets]
    means = (one_hot.T @ rows) / one_hot.sum(0)[:, None]
    residuals = rows - means[targets]
    values, axes = torch.linalg.eigh(residuals.T @ residuals)
    if not float(values.sum()) > 0:
        return torch.zeros(len(rows), classes, dtype=torch.float64)
    values = values.clamp(min=0.0)
    rows, means, residuals = rows @ axes, means @ axes, residuals @ axes
    alone = sizes < 2
    others = (sizes - 1).clamp(min=1.0)
    weight = torch.where(alone, 0.0, sizes / others)  # of r rᵀ, which is 0 where a row is alone
    lengths = (residuals**2).sum(1)
    freedom = (len(rows) - 1 - (classes - alone.double())).clamp(min=1.0)
    trace = (values.sum() - weight * lengths) / freedom
    square = (values**2).sum() - 2 * weight * (residuals**2 @ values) + weight**2 * lengths**2
    rho = _shrinkage(trace, square / freedom**2, freedom, d)
    scale = (1 - rho) / freedom
    inverse = 1 / (scale[:, None] * values + (rho * trace / d)[:, None])  # D⁻¹ of each row, Σ = D − scale·weight·r rᵀ
    rr, rx = (residuals**2 * inverse).sum(1), (residuals * rows * inverse).sum(1)
    gain = scale * weight / (1 - scale * weight * rr)  # Σ⁻¹v = D⁻¹v + gain·(rᵀD⁻¹v)·D⁻¹r (Sherman and Morrison)
    mr = (residuals * inverse) @ means.T
    products = (rows * inverse) @ means.T + (gain * rx)[:, None] * mr  # μᵀΣ⁻¹x, (n, C)
    norms = inverse @ (means**2).T + gain[:, None] * mr**2  # μᵀΣ⁻¹μ
    own = torch.arange(len(rows)), targets
    step, more = 1 / others, 1 + gain * rr
    norms[own] += -2 * step * more * mr[own] + step**2 * more * rr
    products[own] -= step * more * rx
    logits = products - norms / 2
    logits[own] = logits[own].where(~alone, -torch.inf)
    return logits


def ridge_drift(before: Tensor, after: Tensor, ridge: float) -> Tensor:
    """W (d, d) that maps old features to new ones, from the same n examples under both models (n, d).

    W = (FₙᵀFₒ + λI)(FₒᵀFₒ + λI)⁻¹ with λ = ridge·tr(FₒᵀFₒ)/d: ridge regression towards the identity.
    """
    old, new = before.double(), after.double()
    gram, damping = _damped(old, ridge)
    return torch.linalg.solve(gram, (new.T @ old + damping).T).T


def drift_residuals(before: Tensor, after: Tensor, drift: Tensor, ridge: float) -> Tensor:
    """What W = `drift` of `ridge_drift` misses of each row when that row is left out of the regression, (n, d).

    (F_n − W F_o)ᵢ/(1 − hᵢ), hᵢ = fᵢᵀ(FₒᵀFₒ + λI)⁻¹fᵢ, λ as with all rows (leave-one-out of ridge regression): the
    residuals of the fitted rows themselves shrink to nothing where there are no more rows than features.
    """
    old, new = before.double(), after.double()
    leverage = (torch.linalg.solve(_damped(old, ridge)[0], old.T).T * old).sum(1, keepdim=True)
    return (new - old @ drift.T) / (1 - leverage)


def square_root(covariance: Tensor) -> Tensor:
    """The symmetric root of a positive semidefinite matrix (d, d)."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _damped(old: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """(FₒᵀFₒ + λI, λI)."""
    gram, d = old.T @ old, old.shape[1]
    damping = ridge * gram.trace() / d * torch.eye(d, dtype=torch.float64)
    return gram + damping, damping


def fit_temperature(
    logits: Tensor, targets: Tensor, *others: tuple[float, Tensor, Tensor], least: float = 1.0
) -> float:
    """T ≥ `least` that minimises the mean cross-entropy of logits / T, (n, C) and (n,), on log-spaced grids.

    others: (weight, logits, targets) of further rows, whose mean cross-entropies are added with their weights.
    Never below 1 for discriminants: on data that the head separates perfectly the optimum is 0, which says nothing
    about new data.
    """
    parts = [(1.0, logits, targets), *others]
    lowest = math.log10(least)
    low, high = lowest, 3.0
    for _ in range(3):
        grid = torch.linspace(low, high, 41, dtype=torch.float64)
        at = [[w * cross_entropy(x.double() / 10**t, y) for w, x, y in parts] for t in grid]
        losses = torch.stack([sum(terms, torch.zeros_like(terms[0])) for terms in at])
        best = float(grid[int(losses.argmin())])
        step = (high - low) / 40
        low, high = max(best - step, lowest), best + step
    return float(10**best)


def class_logits(logits: Tensor, labels: Sequence[str]) -> tuple[Tensor, list[str]]:
    """(logits (n, C) of the distinct labels, these labels): of several rows of one label the largest logit (n, R)."""
    classes = list(dict.fromkeys(labels))
    if len(classes) == len(labels):
        return logits, classes
    rows = torch.tensor([classes.index(label) for label in labels], device=logits.device)
    lowest = logits.new_full((len(logits), len(classes)), -torch.inf)
    return lowest.scatter_reduce(1, rows.expand(len(logits), -1), logits, "amax"), classes


def merge_temperature(statistics: HeadStatistics, features: Tensor, truth: Sequence[str]) -> float:
    """Temperature of the untempered head on features (n, d) with labels `truth` (n,)."""
    return fit_temperature(*class_scores(statistics, features, truth))


def held_out_temperature(
    known: HeadStatistics, features: Tensor, truth: Sequence[str], *, one_mean_per_task: bool = False, folds: int = 5
) -> float:
    """Temperature of the untempered head of `known` and a new task, on rows that the head was not made of.

    features (n, d) and truth (n,): the task's rows and labels, see `_held_out`. On its own rows a head of few rows in
    many dimensions knows no doubt, whatever it does on others. 1 where the rows are too few for that.
    """
    scores = [
        class_scores(part, rows, labels)
        for part, rows, labels in _held_out(known, features, truth, one_mean_per_task, folds)
    ]
    return fit_temperature(*_joined(scores)) if scores else 1.0


def compared(
    known: HeadStatistics,
    features: Tensor,
    truth: Sequence[str],
    solvers: Sequence[str],
    *,
    one_mean_per_task: bool = False,
    turns: int = 2,
) -> dict[str, tuple[float, float]]:
    """{solver: (nats of the rows held out, the temperature that fits them)} of the heads of `known` and a new task.

    features (n, d) and truth (n,): the task's rows and labels, see `_held_out`; `turns` of five folds are taken, as the
    bound takes seconds with many classes. The nats are summed over rows. {} where the rows are too few.
    """
    parts = list(islice(_held_out(known, features, truth, one_mean_per_task, 5), turns))
    nats: dict[str, tuple[float, float]] = {}
    for solver in solvers if parts else ():
        logits, answers = _joined([class_scores(*part, solver) for part in parts])
        temperature = fit_temperature(logits, answers, least=LEAST_TEMPERATURE[solver])
        nats[solver] = float(cross_entropy(logits / temperature, answers, reduction="sum")), temperature
    return nats


def _held_out(
    known: HeadStatistics, features: Tensor, truth: Sequence[str], one_mean_per_task: bool, folds: int
) -> Iterator[tuple[HeadStatistics, Tensor, list[str]]]:
    """(statistics of `known` and the other folds of a new task, features (m, d) and labels of this one), fold by fold.

    Each class's rows are dealt out in turn; a class with one row is in all of the statistics. Nothing for a fold
    without rows, or without features that vary.
    """
    labels = list(dict.fromkeys(truth))
    targets = torch.tensor([labels.index(label) for label in truth])
    turn = torch.zeros(len(truth), dtype=torch.long)
    for index in range(len(labels)):
        rows = (targets == index).nonzero()[:, 0]
        turn[rows] = torch.arange(len(rows)) % folds if len(rows) > 1 else -1
    for fold in range(folds):
        held = turn == fold
        part = known.added(features[~held], targets[~held], labels, one_mean_per_task=one_mean_per_task)
        if held.any() and float(part.scatter.trace()) > 0:
            yield part, features[held], [truth[row] for row in held.nonzero()[:, 0].tolist()]


def _joined(scores: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    logits, answers = zip(*scores, strict=True)
    return torch.cat(logits), torch.cat(answers)


def class_scores(
    statistics: HeadStatistics, features: Tensor, truth: Sequence[str], solver: str = "lda"
) -> tuple[Tensor, Tensor]:
    """(untempered logits (n, C) of the classes, index of each row's class (n,)) for features (n, d), labels (n,)."""
    weight, bias = SOLVERS[solver](replace(statistics, temperature=None))
    logits, classes = class_logits(features.double() @ weight.T + bias, statistics.labels)
    return logits, torch.tensor([classes.index(label) for label in truth])


# what makes rows (weight (R, d), bias (R,)) of statistics, and the least temperature that their logits are given
SOLVERS: dict[str, Callable[[HeadStatistics], tuple[Tensor, Tensor]]] = {
    "lda": HeadStatistics.solve,
    "bound": HeadStatistics.bound,
}
LEAST_TEMPERATURE = {"lda": 1.0, "bound": START}
