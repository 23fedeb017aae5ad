"""The coefficient of a classifier with an analytic head, searched where no row of the earlier tasks is kept: their rows
are drawn from the Gaussians of their classes, moved as the features of the new task's rows move."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pm_hf.measuring.analytic_head import (
    HeadStatistics,
    class_scores,
    drift_residuals,
    fit_temperature,
    ridge_drift,
    square_root,
)
from pm_hf.measuring.line_search import COEFFICIENT_GRID, Point, search_points

NODES = (0.0, 0.5, 1.0)  # α at which features are measured; between them they are interpolated
DRAWS = 2048  # of the earlier classes together
LEAST_DRAWS = 4  # of each of their means


class DrawnRows:
    """Rows of the earlier classes, drawn once: z_α = Wz + ε with z ~ N(μ_c, Σ) and ε of covariance R_α.

    Then z_α ~ N(Wμ_c, WΣWᵀ + R_α), Σ the pooled covariance of the statistics. What is drawn is the same for every α, so
    that differences between them are paired. count: draws of all means together, at least `LEAST_DRAWS` of each.
    """

    def __init__(self, known: HeadStatistics, rows: int, seed: int, count: int = DRAWS) -> None:
        """rows: number n of the residuals that R_α is the covariance of."""
        each, generator = max(LEAST_DRAWS, count // len(known.labels)), torch.Generator().manual_seed(seed)
        means = known.means.repeat_interleave(each, 0)
        self.labels = [label for label in known.labels for _ in range(each)]
        normal = torch.randn(means.shape, generator=generator, dtype=torch.float64)
        self._start = means + normal @ square_root(known.pooled_covariance())
        self._mix = torch.randn(len(means), rows, generator=generator, dtype=torch.float64) / rows**0.5

    def at(self, drift: Tensor, residuals: Tensor) -> Tensor:
        """The rows, (m, d), under a drift W (d, d) with residuals (n, d), R = rᵀr/n: about zero, so that a shift that
        all rows have in common counts too."""
        return self._start @ drift.T + self._mix @ residuals


def interpolated(nodes: Mapping[float, Tensor], alpha: float) -> Tensor:
    """Features (n, d) at α: the polynomial through those at the nodes, float64."""
    total = torch.zeros(())
    for node, features in nodes.items():
        others = [other for other in nodes if other != node]
        weight = 1.0
        for other in others:
            weight *= (alpha - other) / (node - other)
        total = total + weight * features.double()
    return total


def head_search(
    known: HeadStatistics,
    fitted: Mapping[float, Tensor],
    fitted_labels: Sequence[str],
    held_out: Mapping[float, Tensor],
    held_out_labels: Sequence[str],
    *,
    earlier: int,
    ridge: float,
    drift: bool,
    one_mean_per_task: bool,
    seed: int,
) -> list[Point]:
    """J(α) = mean NLL of held-out rows of the new task + earlier·mean NLL of draws of the earlier classes, at each α of
    0, .1, …, 1: see `search_points`.

    known: the statistics of the earlier tasks, at α = 0. fitted, held_out: {α of NODES: features (n, d) and (m, d) of
    rows of the task, those that the new classes and W_α are computed of, and others}, with their labels. drift: whether
    the head's statistics follow the backbone by W_α (see `ridge_drift`); the draws do in any case. The head at α is the
    analytic one of the moved statistics and the new classes, its temperature the one that minimises J(α); the
    residuals are those of rows left out of the regression (see `drift_residuals`). seed: of the draws.
    """
    labels = list(dict.fromkeys(fitted_labels))
    targets = torch.tensor([labels.index(label) for label in fitted_labels])
    before, drawn, losses = fitted[0.0].double(), DrawnRows(known, len(fitted_labels), seed), {}
    for alpha in COEFFICIENT_GRID:
        features = interpolated(fitted, alpha)
        W = ridge_drift(before, features, ridge)
        statistics = (known.moved(W) if drift else known).added(
            features, targets, labels, one_mean_per_task=one_mean_per_task
        )
        new, answers = class_scores(statistics, interpolated(held_out, alpha), held_out_labels)
        old_rows = drawn.at(W, drift_residuals(before, features, W, ridge))
        old, old_answers = class_scores(statistics, old_rows, drawn.labels)
        temperature = fit_temperature(new, answers, (earlier, old, old_answers))
        losses[alpha] = (
            cross_entropy(new / temperature, answers, reduction="none"),
            cross_entropy(old / temperature, old_answers, reduction="none"),
        )
    return search_points(losses, earlier)
