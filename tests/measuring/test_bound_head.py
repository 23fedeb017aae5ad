"""The bound head against loops, draws and the rows that its statistics stand for."""

import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from pm_hf.errors import InputError
from pm_hf.measuring.analytic_head import HeadStatistics, class_logits, class_scores, compared, fit_temperature
from pm_hf.measuring.bound_head import bound_rows, class_directions, pooled_directions

D, CLASSES, K = 7, 5, 3


def class_rows(label: int, count: int, seed: int = 0) -> torch.Tensor:
    """Rows of a Gaussian class with a covariance of its own: wide in two directions that no other class has."""
    g = torch.Generator().manual_seed(100 * seed + label)
    center = 1.5 * torch.randn(D, generator=torch.Generator().manual_seed(label), dtype=torch.float64)
    wide = torch.ones(D, dtype=torch.float64)
    wide[[label % D, (label + 3) % D]] = 3
    return center + torch.randn(count, D, generator=g, dtype=torch.float64) * wide


def statistics(count: int = 40, classes: int = CLASSES, directions: int = K) -> HeadStatistics:
    rows = torch.cat([class_rows(label, count) for label in range(classes)])
    targets = torch.arange(classes).repeat_interleave(count)
    empty = HeadStatistics().with_directions(directions)
    return empty.added(rows, targets, [f"c{label}" for label in range(classes)])


def own_covariances(known: HeadStatistics, share: float) -> list[torch.Tensor]:
    shared = known.pooled_covariance()
    return [(1 - share) * shared + share * u.T @ u for u in known.directions.double()]


def slow_bound(weight, bias, known: HeadStatistics, share: float) -> torch.Tensor:
    """J of the docstring, term by term, without the penalty."""
    total, labels = torch.zeros(()), known.labels
    for c, covariance in enumerate(own_covariances(known, share)):
        terms = []
        for j in range(len(labels)):
            if j != c and labels[j] == labels[c]:
                continue
            gap = weight[j] - weight[c]
            terms.append(gap @ known.means[c] + bias[j] - bias[c] + gap @ covariance @ gap / 2)
        total = total + torch.stack(terms).logsumexp(0)
    return total / len(labels)


def solved(known: HeadStatistics, share: float = 0.3):
    return bound_rows(known.means, known.pooled_covariance(), known.directions, known.labels, share)


# directions


@pytest.mark.parametrize("count", [2, 4, 30])  # fewer rows than dimensions, and more
def test_directions_are_the_best_approximation_of_a_covariance(count):
    rows = class_rows(1, count)
    covariance = torch.cov(rows.T)
    found = class_directions(rows, D).double()
    assert found.shape == (D, D)
    torch.testing.assert_close(found.T @ found, covariance, rtol=1e-5, atol=1e-5)
    few = class_directions(rows, 2).double()
    values, vectors = torch.linalg.eigh(covariance)
    best = (vectors[:, -2:] * values[-2:]) @ vectors[:, -2:].T
    torch.testing.assert_close(few.T @ few, best, rtol=1e-5, atol=1e-5)


def test_one_row_has_no_direction():
    assert not class_directions(class_rows(0, 1), K).any()


def test_directions_of_parts_are_those_of_all_rows():
    parts = [class_rows(0, 9), class_rows(0, 4, seed=1) + 2, class_rows(0, 1, seed=2)]
    described = [(class_directions(part, D), part.mean(0), float(len(part))) for part in parts]
    found, wanted = pooled_directions(described, D).double(), class_directions(torch.cat(parts), D).double()
    torch.testing.assert_close(found.T @ found, wanted.T @ wanted, rtol=1e-4, atol=1e-4)
    unknown = (torch.zeros(D, D), parts[0].mean(0), 9.0)  # of an older version's file
    found, wanted = pooled_directions([unknown, described[1]], D).double(), described[1][0].double()
    torch.testing.assert_close(found.T @ found, wanted.T @ wanted, rtol=1e-4, atol=1e-4)


def test_statistics_keep_the_directions_of_every_class_through_tasks_and_drift():
    labels, drift = ["a", "b", "c"], torch.randn(D, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    first, second, again = class_rows(0, 12), class_rows(1, 9), class_rows(0, 5, seed=3)
    known = HeadStatistics().with_directions(D)
    known = known.added(torch.cat([first, second]), torch.tensor([0] * 12 + [1] * 9), labels[:2])
    known = known.moved(drift).added(
        torch.cat([again, class_rows(2, 4)]), torch.tensor([0] * 5 + [2] * 4), labels
    )  # the class a comes again
    wanted = [torch.cat([first @ drift.T, again]), second @ drift.T, class_rows(2, 4)]
    for directions, rows in zip(known.directions.double(), wanted, strict=True):
        torch.testing.assert_close(directions.T @ directions, torch.cov(rows.T), rtol=1e-4, atol=1e-4)
    apart = known.added(class_rows(1, 6), torch.zeros(6), ["b"], one_mean_per_task=True)
    assert apart.directions.shape == (4, D, D)
    assert torch.equal(apart.directions[:3], known.directions)
    assert not known.with_directions(0).kept
    assert torch.equal(known.with_directions(2).directions, known.directions[:, :2])


# the bound


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_it_bounds_the_expected_cross_entropy_of_draws(share):
    known, g = statistics(), torch.Generator().manual_seed(1)
    for weight, bias in (known.solve(), solved(known, share), (torch.randn(CLASSES, D, generator=g).double() / 3,) * 2):
        bias = bias if bias.ndim == 1 else bias[:, 0]
        losses = []
        for c, covariance in enumerate(own_covariances(known, share)):
            values, vectors = torch.linalg.eigh(covariance)
            root = vectors * values.clamp(min=0).sqrt()
            rows = known.means[c] + torch.randn(20_000, D, generator=g, dtype=torch.float64) @ root.T
            losses.append(cross_entropy(rows @ weight.T + bias, torch.full((20_000,), c)))
        assert float(slow_bound(weight, bias, known, share)) > float(torch.stack(losses).mean()) - 0.005


@pytest.mark.parametrize("labels", [[f"c{c}" for c in range(CLASSES)], ["a", "b", "a", "c", "b"]])
def test_the_rows_minimise_it(labels):
    known = statistics()
    known.labels = labels
    found = [part.requires_grad_() for part in solved(known)]

    def loss(weight, bias):
        return slow_bound(weight, bias, known, 0.3) + 1e-4 * (weight**2).mean()

    value = loss(*found)
    gradients = torch.autograd.grad(value, found)
    assert all(gradient.abs().max() < 2e-3 for gradient in gradients)
    slow = [part.detach().clone().requires_grad_() for part in known.solve()]
    optimiser = torch.optim.LBFGS(slow, max_iter=500, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        value = loss(*slow)
        value.backward()
        return value

    optimiser.step(closure)
    assert value.item() == pytest.approx(loss(*slow).item(), abs=1e-4)
    assert value.item() < loss(*known.solve()).item() - 0.05


def test_of_two_classes_with_one_covariance_it_has_half_the_discriminants():
    known = statistics(classes=2)
    weight, bias = solved(known, share := 0.0)
    wanted, offset = known.solve()
    torch.testing.assert_close(weight[1] - weight[0], (wanted[1] - wanted[0]) / 2, rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(bias[1] - bias[0], (offset[1] - offset[0]) / 2, rtol=5e-3, atol=5e-3)
    assert float(slow_bound(weight, bias, known, share)) < math.log(2)


def test_without_directions_its_rows_are_the_discriminants():
    known = statistics(directions=0)
    assert all(torch.equal(found, wanted) for found, wanted in zip(known.bound(), known.solve(), strict=True))


def test_the_same_statistics_give_the_same_rows():
    first, second = statistics().bound(), statistics().bound()
    assert all(torch.equal(found, wanted) for found, wanted in zip(first, second, strict=True))


def test_classes_with_covariances_of_their_own_are_told_apart_better():
    known = statistics(count=400, directions=2)
    rows = torch.cat([class_rows(label, 2000, seed=7) for label in range(CLASSES)])
    truth = torch.arange(CLASSES).repeat_interleave(2000)
    accuracies = [
        float(((rows @ weight.T + bias).argmax(1) == truth).double().mean())
        for weight, bias in (known.solve(), known.bound())
    ]
    assert accuracies[1] > accuracies[0] + 0.005


# the choice


def test_the_losses_compared_are_those_of_rows_held_out():
    known, names = statistics(classes=3), ["x", "y"]
    rows = torch.cat([class_rows(3, 10), class_rows(4, 10)])
    truth = [name for name in names for _ in range(10)]
    found = compared(known, rows, truth, ("lda", "bound"))
    for solver, (nats, temperature) in found.items():
        logits, answers = [], []
        for fold in range(2):
            held = torch.arange(20) % 10 % 5 == fold
            part = known.added(rows[~held], torch.tensor([0] * 10 + [1] * 10)[~held], names)
            weight, bias = part.solve() if solver == "lda" else part.bound()
            logits.append(rows[held] @ weight.T + bias)
            answers.append(torch.tensor([3] * 2 + [4] * 2))
        wanted, truths = torch.cat(logits), torch.cat(answers)
        assert temperature == fit_temperature(wanted, truths, least=0.5 if solver == "bound" else 1.0)
        assert nats == pytest.approx(float(cross_entropy(wanted / temperature, truths, reduction="sum")))
    assert compared(HeadStatistics().with_directions(K), rows[:2], names, ("lda",)) == {}


def test_a_temperature_may_be_as_low_as_it_is_let():
    logits = 0.2 * torch.eye(4, dtype=torch.float64)
    assert fit_temperature(logits, torch.arange(4)) == 1
    assert fit_temperature(logits, torch.arange(4), least=0.5) == pytest.approx(0.5)


def test_scores_are_those_of_the_solver():
    known = statistics()
    known.labels = ["a", "b", "a", "c", "b"]
    rows = class_rows(0, 6)
    logits, answers = class_scores(known, rows, ["b"] * 6, "bound")
    weight, bias = known.bound()
    assert torch.equal(logits, class_logits(rows @ weight.T + bias, known.labels)[0])
    assert answers.tolist() == [1] * 6


# the file


def test_directions_and_losses_are_kept_in_the_file(tmp_path):
    path = tmp_path / "head.safetensors"
    known = statistics()
    known.losses = {"lda": 3.5, "bound": 2.0}
    known.save(path)
    again = HeadStatistics.load(path)
    assert torch.equal(again.directions, known.directions)
    assert again.losses == known.losses
    assert all(torch.equal(found, wanted) for found, wanted in zip(again.bound(), known.bound(), strict=True))
    statistics(directions=0).save(path)  # as an older version wrote it
    with safe_open(path, "pt") as handle:
        assert set(handle.keys()) == {"counts", "means", "scatter"}
    old = HeadStatistics.load(path).with_directions(K)
    assert old.directions.shape == (CLASSES, K, D)
    grown = old.added(class_rows(6, 9), torch.zeros(9), ["new"])
    assert grown.directions[-1].any()
    weight, _ = grown.bound()
    assert weight.isfinite().all()


def test_a_file_with_odd_directions_is_refused(tmp_path):
    path = tmp_path / "head.safetensors"
    statistics().save(path)
    tensors = load_file(path)
    with safe_open(path, "pt") as handle:
        metadata = handle.metadata()
    for odd in (tensors["directions"].double(), tensors["directions"][1:], torch.full((CLASSES, K, D), math.nan)):
        save_file(tensors | {"directions": odd.contiguous()}, path, metadata)
        with pytest.raises(InputError, match="directions: expected"):
            HeadStatistics.load(path)
