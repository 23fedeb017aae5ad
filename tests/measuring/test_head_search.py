"""The search of a classifier's coefficient against rows that were really kept, and against the definition."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from pm_hf.measuring.analytic_head import HeadStatistics, drift_residuals, fit_temperature, ridge_drift
from pm_hf.measuring.head_search import NODES, DrawnRows, head_search, interpolated
from pm_hf.measuring.line_search import COEFFICIENT_GRID, smallest_within_error

D, RIDGE = 5, 0.05
FORM = {"ridge": RIDGE, "drift": True, "one_mean_per_task": False, "seed": 3}


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CENTRES = 1.2 * normal(4, D, seed=1)


def rows_of(classes, each, seed):
    """(features (n, D) around the centres of the classes, their labels)."""
    labels = [f"c{c}" for c in classes for _ in range(each)]
    return CENTRES[[int(label[1]) for label in labels]] + normal(len(labels), D, seed=seed), labels


def statistics(features, labels):
    names = sorted(set(labels))
    return HeadStatistics().added(features, torch.tensor([names.index(label) for label in labels]), names)


class Line:
    """A backbone whose features move by α(x Mᵀ + s + noise·e): features of rows at any α."""

    def __init__(self, drift=0.3, shift=0.0, noise=0.3):
        self.M, self.shift, self.noise = drift * normal(D, D, seed=2), shift, noise

    def at(self, features, alpha, seed):
        moved = features @ self.M.T + self.shift + self.noise * normal(*features.shape, seed=seed)
        return features + alpha * moved

    def nodes(self, features, seed):
        return {alpha: self.at(features, alpha, seed) for alpha in NODES}


def test_what_is_drawn_has_the_moments_of_the_definition_and_is_the_same_at_every_alpha():
    features, labels = rows_of((0, 1), 200, seed=4)
    known, residuals, W = statistics(features, labels), 0.5 * normal(40, D, seed=5) + 0.2, normal(D, D, seed=6)
    drawn = DrawnRows(known, 40, seed=0, count=40_000)
    moved = drawn.at(W, residuals)
    own = moved[[label == "c1" for label in drawn.labels]]
    assert len(own) == 20_000
    covariance = W @ known.pooled_covariance() @ W.T + sum(torch.outer(r, r) for r in residuals) / 40
    torch.testing.assert_close(own.mean(0), W @ known.means[1], atol=0.1, rtol=0)
    torch.testing.assert_close(own.T.cov(), covariance, atol=0.4, rtol=0.05)
    assert torch.equal(drawn.at(W, residuals), moved)
    assert torch.equal(DrawnRows(known, 40, seed=0, count=40_000).at(W, residuals), moved)
    assert not torch.equal(DrawnRows(known, 40, seed=1, count=40_000).at(W, residuals), moved)
    many = HeadStatistics([f"c{i}" for i in range(900)], torch.ones(900), normal(900, D, seed=1), torch.eye(D).double())
    assert len(DrawnRows(many, 40, seed=0).labels) == 4 * 900


def test_residuals_are_those_of_rows_that_the_regression_did_not_see():
    before, after = normal(12, D, seed=7), normal(12, D, seed=8)
    found = drift_residuals(before, after, ridge_drift(before, after, RIDGE), RIDGE)
    damping = RIDGE * float((before**2).sum()) / D * torch.eye(D).double()
    for row in range(12):
        old, new = (torch.cat([x[:row], x[row + 1 :]]) for x in (before, after))
        W = (new.T @ old + damping) @ torch.linalg.inv(old.T @ old + damping)
        torch.testing.assert_close(found[row], after[row] - W @ before[row], rtol=1e-8, atol=1e-10)


def test_features_between_the_nodes_are_those_of_the_parabola_through_them():
    a, b, c = normal(3, 4, D, seed=9)
    nodes = {alpha: a + alpha * b + alpha**2 * c for alpha in NODES}
    for alpha in (0.0, 0.1, 0.5, 0.7, 1.0):
        torch.testing.assert_close(interpolated(nodes, alpha), a + alpha * b + alpha**2 * c, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("drift", [True, False])
def test_points_are_those_of_the_definition_with_draws_of_its_own(drift):
    line, (old, old_labels) = Line(), rows_of((0, 1), 40, seed=10)
    known = statistics(old, old_labels)
    (new, labels), (held, held_labels) = rows_of((2, 3), 30, seed=11), rows_of((2, 3), 20, seed=12)
    fitted, held_out = line.nodes(new, 13), line.nodes(held, 14)
    points = head_search(known, fitted, labels, held_out, held_labels, earlier=3, **FORM | {"drift": drift})
    assert [point["coefficient"] for point in points] == list(COEFFICIENT_GRID)
    names = ["c0", "c1", "c2", "c3"]
    for point in points[::5]:
        alpha = point["coefficient"]
        moved = line.at(new, alpha, 13)
        W = ridge_drift(new, moved, RIDGE)
        r = drift_residuals(new, moved, W, RIDGE)
        head = (known.moved(W) if drift else known).added(moved, torch.arange(2).repeat_interleave(30), ["c2", "c3"])
        weight, bias = head.solve()
        truth = torch.tensor([names.index(label) for label in held_labels])
        logits = line.at(held, alpha, 14) @ weight.T + bias
        covariance, drawn = W @ known.pooled_covariance() @ W.T + r.T @ r / len(r), []
        for c in (0, 1):
            torch.manual_seed(c)
            drawn.append(torch.distributions.MultivariateNormal(W @ known.means[c], covariance).sample((40_000,)))
        old, answers = torch.cat(drawn) @ weight.T + bias, torch.arange(2).repeat_interleave(40_000)
        grid = torch.logspace(0, 1.5, 400, dtype=torch.float64).tolist()
        J = [(float(cross_entropy(logits / T, truth)), float(cross_entropy(old / T, answers))) for T in grid]
        expected = min(J, key=lambda pair: pair[0] + 3 * pair[1])  # the temperature fits both
        assert point["old"] == pytest.approx(expected[1], rel=0.2, abs=0.01)
        assert point["new"] == pytest.approx(expected[0], rel=0.1, abs=0.01)
        assert point["objective"] == pytest.approx(point["new"] + 3 * point["old"])
    assert points[0]["old"] > 0


def test_the_draws_lose_what_kept_rows_of_the_old_classes_lose():
    """Along a line that separates the new classes and drifts, the curve of the draws is that of 400 kept rows."""
    line, (old, old_labels) = Line(drift=0.4, noise=0.8), rows_of((0, 1), 200, seed=20)
    known, names = statistics(old, old_labels), ["c0", "c1", "c2", "c3"]
    (new, labels), (held, held_labels) = rows_of((2, 3), 100, seed=21), rows_of((2, 3), 50, seed=22)
    points = head_search(known, line.nodes(new, 23), labels, line.nodes(held, 24), held_labels, earlier=1, **FORM)
    real = []
    for alpha in COEFFICIENT_GRID:
        moved = line.at(new, alpha, 23)
        head = known.moved(ridge_drift(new, moved, RIDGE))
        weight, bias = head.added(moved, torch.arange(2).repeat_interleave(100), ["c2", "c3"]).solve()
        truth = torch.tensor([names.index(label) for label in held_labels])
        kept, answers = line.at(old, alpha, 25) @ weight.T + bias, torch.tensor([names.index(c) for c in old_labels])
        T = fit_temperature(line.at(held, alpha, 24) @ weight.T + bias, truth, (1.0, kept, answers))
        real.append(float(cross_entropy(kept / T, answers)))
    drawn = [point["old"] for point in points]
    assert max(abs(a - b) for a, b in zip(real, drawn, strict=True)) < 0.3 * max(real)
    assert drawn[-1] > 1.5 * drawn[0]


def test_a_line_without_noise_is_taken_whole_and_one_that_only_disturbs_is_not():
    (old, old_labels), (new, labels) = rows_of((0, 1), 60, seed=30), rows_of((2, 3), 60, seed=31)
    known, (held, held_labels) = statistics(old, old_labels), rows_of((2, 3), 60, seed=32)
    apart = torch.where(torch.tensor([label == "c2" for label in labels])[:, None], 1.0, -1.0).double()
    held_apart = torch.where(torch.tensor([label == "c2" for label in held_labels])[:, None], 1.0, -1.0).double()
    direction = torch.linalg.svd(CENTRES)[2][-1]
    better = {a: new + a * apart * direction for a in NODES}, {a: held + a * held_apart * direction for a in NODES}
    noisy = Line(drift=0.0, noise=3.0)
    worse = noisy.nodes(new, 33), noisy.nodes(held, 34)
    chosen = []
    for fitted, held_out in (better, worse):
        points = head_search(known, fitted, labels, held_out, held_labels, earlier=1, **FORM)
        chosen.append(smallest_within_error(points))
    assert chosen[0] > 0.5
    assert chosen[1] == 0


def test_a_class_with_a_mean_for_each_domain_is_right_where_one_of_them_says_so():
    (first, labels), (second, _) = rows_of((0, 1), 60, seed=40), rows_of((0, 1), 60, seed=41)
    known = statistics(first, labels)
    form = FORM | {"one_mean_per_task": True, "ridge": 1.0}
    swapped = dict.fromkeys(NODES, second + 6.0)  # the second domain stands elsewhere, and nothing moves
    points = head_search(known, swapped, labels, swapped, labels, earlier=1, **form)
    assert {round(point["objective"], 9) for point in points} == {round(points[0]["objective"], 9)}
    assert points[0]["new"] < 0.2
    assert points[0]["old"] < 0.2
    pooled = head_search(known, swapped, labels, swapped, labels, earlier=1, **form | {"one_mean_per_task": False})
    assert pooled[0]["objective"] > points[0]["objective"]
