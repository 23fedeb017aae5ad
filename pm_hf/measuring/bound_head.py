"""The bound head: the rows that minimise an upper bound of the expected cross-entropy of Gaussian classes, each with a
covariance of its own in a few directions."""

from collections.abc import Sequence

import torch
from torch import Tensor

DIRECTIONS = 16  # k, kept of each class
OWN_SHARE = 0.3  # β, of a class's own covariance
PENALTY = 1e-4  # of the mean squared weight
START = 0.5  # of the discriminants: of two classes with one covariance this is the minimum
ITERATIONS = 60  # of L-BFGS; 345 classes need 20
SMALLEST_CHANGE = 1e-6  # of the bound, in nats, after which no further step is taken


def class_directions(rows: Tensor, count: int = DIRECTIONS) -> Tensor:
    """U (count, d) float32 of one class's features (n, d): the largest singular rows of the centred features over
    √(n − 1), so that UᵀU is the best approximation of rank `count` to their covariance; zeros where there are fewer."""
    centred = rows.double() - rows.double().mean(0)
    return _largest(centred, count, max(len(rows) - 1, 1))


def pooled_directions(parts: Sequence[tuple[Tensor, Tensor, float]], count: int) -> Tensor:
    """U (count, d) of a class whose rows come in parts, each (U (k, d), mean (d,), number of rows): that of the scatter
    Σ (n − 1)UᵀU + n(μ_part − μ)(μ_part − μ)ᵀ of all rows. A part of several rows whose directions are unknown (zeros)
    is left out."""
    known = [part for part in parts if part[2] <= 1 or bool(part[0].any())] or list(parts)
    total = sum(number for _, _, number in known)
    mean = torch.stack([number * center for _, center, number in known]).sum(0) / total
    rows = [(number - 1) ** 0.5 * directions.double() for directions, _, number in known]
    rows += [(number**0.5 * (center - mean))[None] for _, center, number in known]
    return _largest(torch.cat(rows), count, max(total - 1, 1))


def _largest(rows: Tensor, count: int, freedom: float) -> Tensor:
    """The `count` largest singular rows of a matrix, times their singular values, over √freedom; padded with zeros."""
    if len(rows) <= rows.shape[1]:
        axes = torch.linalg.eigh(rows @ rows.T).eigenvectors.flip(1)[:, :count]
        largest = axes.T @ rows
    else:
        values, axes = torch.linalg.eigh(rows.T @ rows)
        largest = (axes * values.clamp(min=0).sqrt()).T.flip(0)[:count]
    return torch.nn.functional.pad(largest / freedom**0.5, (0, 0, 0, count - len(largest))).float()


def bound_rows(
    means: Tensor, covariance: Tensor, directions: Tensor, labels: Sequence[str], own_share: float = OWN_SHARE
) -> tuple[Tensor, Tensor]:
    """(weight (R, d), bias (R,)) that minimise

    J(W, b) = mean_c log Σ_j exp((w_j − w_c)ᵀμ_c + b_j − b_c + ½(w_j − w_c)ᵀΣ_c(w_j − w_c)) + 1e-4·mean(W²)

    with Σ_c = (1 − β)Σ + βU_cᵀU_c: by Jensen's inequality no less than the expected cross-entropy of rows drawn from
    N(μ_c, Σ_c), convex in (W, b), closed (ISDA, arXiv 1909.12220; for class-incremental learning IL2A, NeurIPS 2021).

    means μ (R, d) and covariance Σ (d, d), float64; directions U (R, k, d), β = 0 for a class of which they are zeros;
    labels: of several rows of one label none is a rival of the others; own_share: β. L-BFGS in float32 from half of the
    discriminants, in coordinates in which Σ is the identity.
    """
    center = means.mean(0)
    root = torch.linalg.cholesky(covariance)
    inverse = torch.linalg.inv(root)
    points = ((means - center) @ inverse.T).float()  # (R, d)
    own = (directions.double() @ inverse.T).float()  # (R, k, d)
    share = own_share * directions.flatten(1).any(1).float()[:, None]  # (R, 1)
    ridge = (inverse @ inverse.T).float()
    names = list(dict.fromkeys(labels))
    index = torch.tensor([names.index(label) for label in labels])
    allies = (index[:, None] == index) & ~torch.eye(len(index), dtype=torch.bool)
    weight = (START * points).requires_grad_()
    bias = (-START / 2 * (points**2).sum(1)).requires_grad_()
    optimiser = torch.optim.LBFGS(
        [weight, bias],
        max_iter=ITERATIONS,
        history_size=10,
        tolerance_change=SMALLEST_CHANGE,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimiser.zero_grad()
        loss = _bound(weight, bias, points, own, share, allies) + PENALTY * ((weight @ ridge) * weight).mean()
        loss.backward()
        return loss

    optimiser.step(objective)
    solved = weight.detach().double() @ inverse
    return solved, bias.detach().double() - solved @ center


def _bound(weight: Tensor, bias: Tensor, means: Tensor, directions: Tensor, share: Tensor, allies: Tensor) -> Tensor:
    """J without the penalty, where Σ is the identity; share (R, 1): β of each class; allies (R, R): who is no rival."""
    logits, gram = means @ weight.T + bias, weight @ weight.T
    spread = gram.diagonal()[:, None] - 2 * gram + gram.diagonal()
    projected = directions @ weight.T  # (R, k, R)
    own = ((projected - projected.diagonal(dim1=0, dim2=2).T[:, :, None]) ** 2).sum(1)
    exponent = logits - logits.diagonal()[:, None] + ((1 - share) * spread + share * own) / 2
    return exponent.masked_fill(allies, -torch.inf).logsumexp(1).mean()
