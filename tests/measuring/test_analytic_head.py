"""The analytic head against plain batch computations."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from pm_hf.errors import InputError
from pm_hf.measuring.analytic_head import (
    HeadStatistics,
    class_logits,
    fit_temperature,
    held_out_temperature,
    leave_one_out,
    merge_temperature,
    ridge_drift,
)

D = 6
CENTRES = torch.randn(5, D, generator=torch.Generator().manual_seed(99), dtype=torch.float64) * 2


def draw(classes, per_class: int, seed: int) -> tuple[Tensor, Tensor]:
    """(features, targets) of correlated Gaussians around the class centres; targets number the classes given."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(D, D, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    noise = torch.randn(len(classes) * per_class, D, generator=g, dtype=torch.float64) @ mix
    targets = torch.arange(len(classes)).repeat_interleave(per_class)
    order = torch.randperm(len(targets), generator=g)
    return (CENTRES[list(classes)][targets] + noise)[order], targets[order]


def batch_statistics(features: Tensor, targets: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """(counts, means, within-class scatter), the obvious way."""
    means = torch.stack([features[targets == c].mean(0) for c in range(classes)])
    centred = features - means[targets]
    return torch.bincount(targets).double(), means, sum(torch.outer(row, row) for row in centred)


def assert_statistics(found: HeadStatistics, counts: Tensor, means: Tensor, scatter: Tensor) -> None:
    assert torch.equal(found.counts, counts)
    torch.testing.assert_close(found.means, means, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.scatter, scatter, rtol=1e-10, atol=1e-9)


def names(statistics: HeadStatistics, targets: Tensor) -> list[str]:
    """Labels of targets that number them."""
    return [statistics.labels[target] for target in targets]


def two_tasks() -> tuple[HeadStatistics, Tensor, Tensor]:
    """Statistics of two tasks with two and three classes, and their data pooled."""
    (x1, y1), (x2, y2) = draw((0, 1), 20, seed=1), draw((2, 3, 4), 9, seed=2)
    found = HeadStatistics().added(x1, y1, ["a", "b"]).added(x2, y2, ["c", "d", "e"])
    return found, torch.cat([x1, x2]), torch.cat([y1, y2 + 2])


def test_a_class_that_comes_again_may_have_a_mean_for_each_task():
    (x1, y1), (x2, y2) = draw((0, 1), 20, 1), draw((1, 2), 5, 2)
    found = (
        HeadStatistics()
        .added(x1, y1, ["a", "b"], one_mean_per_task=True)
        .added(x2 + 9, y2, ["b", "c"], one_mean_per_task=True)
    )
    assert found.labels == ["a", "b", "b", "c"]
    assert_statistics(found, *batch_statistics(torch.cat([x1, x2 + 9]), torch.cat([y1, y2 + 2]), 4))
    weight, bias = found.solve()
    rows = (torch.cat([x1, x2 + 9]) @ weight.T + bias).argmax(1)
    classes = torch.tensor([0, 1, 1, 2])[rows]
    assert (classes == torch.cat([y1, y2 + 1])).double().mean() > 0.9
    again = found.added(x1[y1 == 0], torch.zeros(20), ["a", "b"], one_mean_per_task=True)
    assert again.labels == ["a", "b", "b", "c", "a"]  # a known class without rows gets no mean


def test_streaming_over_tasks_equals_one_batch():
    found, features, targets = two_tasks()
    assert found.labels == ["a", "b", "c", "d", "e"]
    assert_statistics(found, *batch_statistics(features, targets, 5))


def test_a_class_that_comes_again_is_pooled_by_counts():
    (x1, y1), (x2, y2), (x3, y3) = draw((0, 1), 20, 1), draw((1, 2), 5, 2), draw((0,), 3, 3)
    found = HeadStatistics().added(x1, y1, ["a", "b"]).added(x2 + 1.5, y2, ["b", "c"]).added(x3, y3, ["a"])
    assert found.labels == ["a", "b", "c"]
    assert_statistics(found, *batch_statistics(torch.cat([x1, x2 + 1.5, x3]), torch.cat([y1, y2 + 1, y3]), 3))


def test_statistics_far_from_zero_keep_their_precision():
    features, targets = draw((0, 1, 2), 30, seed=4)
    first, second = slice(0, 40), slice(40, None)
    labels = ["a", "b", "c"]
    found = HeadStatistics().added(features[first] + 1e6, targets[first], labels)
    found = found.added(features[second] + 1e6, targets[second], labels)
    _, _, scatter = batch_statistics(features, targets, 3)
    torch.testing.assert_close(found.scatter, scatter, rtol=1e-6, atol=1e-5)


def test_adding_leaves_the_old_statistics_alone_and_a_known_class_may_be_absent():
    features, targets = draw((0, 1), 8, seed=1)
    old = HeadStatistics().added(features, targets, ["a", "b"])
    before = [old.counts.clone(), old.means.clone(), old.scatter.clone()]
    new = old.added(features[targets == 0], targets[targets == 0], ["a", "b"])
    assert all(torch.equal(x, y) for x, y in zip((old.counts, old.means, old.scatter), before, strict=True))
    assert new.counts.tolist() == [16, 8]
    assert torch.equal(new.means[1], old.means[1])


def test_a_new_class_without_a_row_is_an_input_error():
    features, targets = draw((0,), 8, seed=1)
    with pytest.raises(InputError, match="class 'b' has no training row"):
        HeadStatistics().added(features, targets, ["a", "b"])


def shrunk_covariance(scatter: Tensor, freedom: float) -> tuple[Tensor, float]:
    """Chen, Wiesel, Eldar and Hero 2010, eq. 23, term by term."""
    S, p, n = scatter / freedom, len(scatter), freedom
    trace, trace_of_square = float(torch.trace(S)), float(torch.trace(S @ S))
    rho = ((1 - 2 / p) * trace_of_square + trace**2) / ((n + 1 - 2 / p) * (trace_of_square - trace**2 / p))
    return (1 - min(rho, 1)) * S + min(rho, 1) * trace / p * torch.eye(p).double(), rho


@pytest.mark.parametrize(("per_class", "clamped"), [(40, False), (3, False), (2, True)])
def test_covariance_is_shrunk_by_the_published_formula(per_class, clamped):
    classes = (0, 1)
    features, targets = draw(classes, per_class, seed=3)
    if clamped:  # nearly isotropic and few rows: ρ above 1
        features = torch.cat([torch.eye(D), -torch.eye(D)]).double()
        targets = torch.zeros(2 * D, dtype=torch.long)
        features[0] *= 1.01
        classes = (0,)
    found = HeadStatistics().added(features, targets, [str(c) for c in classes])
    _, _, scatter = batch_statistics(features, targets, len(classes))
    expected, rho = shrunk_covariance(scatter, len(features) - len(classes))
    assert (rho > 1) == clamped
    torch.testing.assert_close(found.pooled_covariance(), expected, rtol=1e-9, atol=1e-9)


def test_covariance_agrees_with_scikit_learn():
    covariance = pytest.importorskip("sklearn.covariance")
    d, n = 60, 200  # scikit-learn leaves the 2/p of eq. 23 out, so wide features are needed to compare
    g = torch.Generator().manual_seed(0)
    features = torch.randn(n, d, generator=g, dtype=torch.float64) * torch.linspace(0.5, 2, d, dtype=torch.float64)
    scatter = (features - features.mean(0)).T @ (features - features.mean(0))
    found = HeadStatistics(["a"], torch.tensor([n + 1.0]).double(), features.mean(0)[None], scatter)
    theirs = covariance.OAS().fit(features.numpy()).covariance_
    assert float((found.pooled_covariance() - torch.tensor(theirs)).norm()) < 0.002 * float(torch.tensor(theirs).norm())


def test_a_single_feature_has_its_plain_variance():
    features = torch.tensor([[1.0], [2.0], [4.0], [9.0]], dtype=torch.float64)
    found = HeadStatistics().added(features, torch.zeros(4, dtype=torch.long), ["a"])
    torch.testing.assert_close(found.pooled_covariance(), features.var(0)[None])


def test_rows_are_the_linear_discriminant_of_the_class_means():
    found, features, targets = two_tasks()
    _, means, scatter = batch_statistics(features, targets, 5)
    covariance, _ = shrunk_covariance(scatter, len(features) - 5)
    inverse = torch.linalg.inv(covariance)
    weight, bias = found.solve()
    center = features.mean(0)  # subtracted from every class alike
    torch.testing.assert_close(weight, (means - center) @ inverse, rtol=1e-8, atol=1e-8)
    # the linear scores rank classes as the Mahalanobis distances to the means do
    scores = features @ weight.T + bias
    gap = features[:, None] - means
    distance = torch.einsum("ncd,de,nce->nc", gap, inverse, gap)
    torch.testing.assert_close(scores - scores[:, :1], -0.5 * (distance - distance[:, :1]), rtol=1e-8, atol=1e-8)


def test_order_of_tasks_changes_no_prediction():
    (x1, y1), (x2, y2) = draw((0, 1), 20, seed=1), draw((2, 3, 4), 9, seed=2)
    forward = HeadStatistics().added(x1, y1, ["a", "b"]).added(x2, y2, ["c", "d", "e"])
    backward = HeadStatistics().added(x2, y2, ["c", "d", "e"]).added(x1, y1, ["a", "b"])
    rows = [backward.labels.index(label) for label in forward.labels]
    for ours, theirs in zip(forward.solve(), backward.solve(), strict=True):
        torch.testing.assert_close(ours, theirs[rows], rtol=1e-9, atol=1e-9)


def test_features_that_never_vary_are_an_input_error():
    found = HeadStatistics().added(torch.ones(4, 3), torch.tensor([0, 0, 1, 1]), ["a", "b"])
    with pytest.raises(InputError, match="needs features that vary within a class"):
        found.solve()


def test_in_strict_mode_old_rows_do_not_change_by_a_bit():
    (x1, y1), (x2, y2), (x3, y3) = draw((0, 1), 20, 1), draw((2, 3), 9, 2), draw((4,), 5, 3)
    first = HeadStatistics().added(x1, y1, ["a", "b"]).frozen(temperature=1.7)
    second = first.added(x2, y2, ["c", "d"])
    third = second.added(x3, y3, ["e"])
    for old, new in ((first, second), (second, third)):
        for ours, theirs in zip(old.solve(), new.solve(), strict=True):
            assert len(theirs) > len(ours)
            assert torch.equal(ours, theirs[: len(ours)])
    free = HeadStatistics().added(x1, y1, ["a", "b"]).added(x2, y2, ["c", "d"])
    assert not torch.allclose(free.solve()[0][:2] / 1.7, first.solve()[0], rtol=1e-3), "not frozen, rows do move"


def test_strict_mode_survives_the_file_to_the_bit(tmp_path):
    (x1, y1), (x2, y2) = draw((0, 1), 20, 1), draw((2, 3), 9, 2)
    first = HeadStatistics().added(x1, y1, ["a", "b"]).frozen(temperature=1.7)
    first.save(tmp_path / "h.safetensors")
    resumed = HeadStatistics.load(tmp_path / "h.safetensors").added(x2, y2, ["c", "d"])
    for ours, theirs in zip(first.added(x2, y2, ["c", "d"]).solve(), resumed.solve(), strict=True):
        assert torch.equal(ours, theirs)


def test_drift_recovers_a_linear_map():
    g = torch.Generator().manual_seed(0)
    truth = torch.eye(D).double() + 0.3 * torch.randn(D, D, generator=g, dtype=torch.float64)
    before = torch.randn(80, D, generator=g, dtype=torch.float64)
    torch.testing.assert_close(ridge_drift(before, before @ truth.T, 1e-10), truth, rtol=1e-6, atol=1e-6)


def test_drift_is_ridge_regression_towards_the_identity():
    g = torch.Generator().manual_seed(0)
    before = torch.randn(15, D, generator=g, dtype=torch.float64)
    after = before + 0.5 * torch.randn(15, D, generator=g, dtype=torch.float64)
    damping = 0.2 * float((before**2).sum()) / D
    # minimise ‖W F_oᵀ − F_nᵀ‖² + λ‖W − I‖² as one least-squares problem
    rows = torch.cat([before, math.sqrt(damping) * torch.eye(D).double()])
    goals = torch.cat([after, math.sqrt(damping) * torch.eye(D).double()])
    expected = torch.linalg.lstsq(rows, goals).solution.T
    torch.testing.assert_close(ridge_drift(before, after, 0.2), expected, rtol=1e-9, atol=1e-9)


def test_drift_is_the_identity_where_there_is_no_data():
    g = torch.Generator().manual_seed(0)
    before, after = torch.randn(2, 2, D, generator=g, dtype=torch.float64)
    W = ridge_drift(before, after, 0.01)
    _, _, Vh = torch.linalg.svd(before)
    unseen = Vh[2:]  # directions that neither of the two examples has
    torch.testing.assert_close(unseen @ W.T, unseen, rtol=1e-9, atol=1e-9)
    distances = [float((ridge_drift(before, after, ridge) - torch.eye(D)).norm()) for ridge in (0.01, 1, 100, 1e6)]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-4
    torch.testing.assert_close(ridge_drift(before, before, 0.01), torch.eye(D).double(), rtol=1e-9, atol=1e-9)


def test_moved_statistics_are_those_of_the_moved_features():
    found, features, targets = two_tasks()
    W = torch.randn(D, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert_statistics(found.moved(W), *batch_statistics(features @ W.T, targets, 5))


@pytest.mark.parametrize("truth", [1.0, 2.5, 35.0])
def test_temperature_undoes_a_scale_that_was_put_on_calibrated_logits(truth):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(20000, 4, generator=g, dtype=torch.float64)
    targets = torch.multinomial(logits.softmax(-1), 1, generator=g)[:, 0]
    assert fit_temperature(logits * truth, targets) == pytest.approx(truth, rel=0.05)


def test_temperature_is_never_below_one():
    logits = torch.eye(3, dtype=torch.float64).repeat(5, 1)  # separated: the loss falls for ever as T goes to 0
    assert fit_temperature(logits, torch.arange(3).repeat(5)) == 1.0


def test_temperature_has_the_lowest_loss_of_a_fine_grid():
    features, targets = draw((0, 1, 2), 30, seed=5)
    logits = 20 * features @ CENTRES[:3].T
    found = fit_temperature(logits, targets)
    losses = [float(cross_entropy(logits / 10**t, targets)) for t in torch.linspace(0, 3, 2001).tolist()]
    assert float(cross_entropy(logits / found, targets)) <= min(losses) + 1e-6


def test_temperature_keeps_the_argmax():
    plain, features, targets = two_tasks()
    temperature = merge_temperature(plain, features, names(plain, targets))
    tempered = plain.frozen(2.5)
    scores = [features @ weight.T + bias for weight, bias in (plain.solve(), tempered.solve())]
    torch.testing.assert_close(scores[1], scores[0] / 2.5)
    assert torch.equal(scores[0].argmax(1), scores[1].argmax(1))
    assert merge_temperature(tempered, features, names(tempered, targets)) == temperature, (
        "a temperature is never fitted twice"
    )


def test_a_saved_file_comes_back_bit_for_bit(tmp_path):
    for number, saved in enumerate((two_tasks()[0], two_tasks()[0].frozen(2.5))):
        saved.save(tmp_path / f"{number}.safetensors")
        loaded = HeadStatistics.load(tmp_path / f"{number}.safetensors")
        assert (loaded.labels, loaded.temperature) == (saved.labels, saved.temperature)
        for key in ("counts", "means", "scatter"):
            assert torch.equal(getattr(loaded, key), getattr(saved, key))
        assert (loaded.covariance is None) == (saved.covariance is None)
    assert torch.equal(loaded.covariance, saved.covariance)
    assert len(list(tmp_path.iterdir())) == 2, "no temporary file stays"


def test_missing_broken_and_foreign_files_are_input_errors(tmp_path):
    path = tmp_path / "h.safetensors"
    with pytest.raises(InputError, match="cannot be read"):
        HeadStatistics.load(path)
    two_tasks()[0].save(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="cannot be read"):
        HeadStatistics.load(path)
    save_file({"means": torch.ones(2, 2)}, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match="holds no head statistics: expected format"):
        HeadStatistics.load(path)


def test_held_out_temperature_is_that_of_rows_that_the_head_does_not_know():
    features, targets = draw((0, 1, 2), 3, seed=5)  # fewer rows than dimensions in a class
    truth = ["abc"[target] for target in targets]
    found = held_out_temperature(HeadStatistics(), features, truth, folds=3)
    scores, answers = [], []
    seen = dict.fromkeys("abc", 0)
    turn = []
    for label in truth:
        turn.append(seen[label] % 3)
        seen[label] += 1
    names = list(dict.fromkeys(truth))
    for fold in range(3):
        kept = torch.tensor([t != fold for t in turn])
        numbers = torch.tensor([names.index(label) for label in truth])
        weight, bias = HeadStatistics().added(features[kept], numbers[kept], names).solve()
        scores.append(features[~kept] @ weight.T + bias)
        answers.append(numbers[~kept])
    assert found == pytest.approx(fit_temperature(torch.cat(scores), torch.cat(answers)))
    whole = HeadStatistics().added(features, targets, ["a", "b", "c"])
    assert found > 2 * merge_temperature(whole, features, truth)


def test_held_out_temperature_counts_the_classes_known_before_and_single_rows():
    (x1, y1), (x2, _) = draw((0, 1), 20, seed=1), draw((2,), 4, seed=2)
    known = HeadStatistics().added(x1, y1, ["a", "b"])
    features, truth = torch.cat([x2, CENTRES[3:4]]), ["c"] * 4 + ["d"]
    alone, among = (held_out_temperature(start, features, truth) for start in (HeadStatistics(), known))
    assert 1 <= alone < 1000
    assert 1 <= among < 1000
    assert held_out_temperature(known, CENTRES[3:5], ["d", "e"]) == 1.0  # nothing can be held out


def test_of_the_rows_of_a_class_the_largest_counts():
    rows = torch.tensor([[1.0, 5.0, 3.0, 0.0], [2.0, 0.0, -1.0, 4.0]])
    found, classes = class_logits(rows, ["a", "b", "a", "c"])
    assert classes == ["a", "b", "c"]
    assert found.tolist() == [[3.0, 5.0, 0.0], [2.0, 0.0, 4.0]]
    assert class_logits(rows, ["a", "b", "c", "d"])[0] is rows


@pytest.mark.parametrize(("width", "counts"), [(D, (9, 7, 12)), (40, (4, 3, 5)), (40, (1, 2, 6)), (D, (30, 1))])
def test_leaving_each_row_out_is_a_head_of_all_others(width, counts):
    g = torch.Generator().manual_seed(width + len(counts))
    targets = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    targets = targets[torch.randperm(len(targets), generator=g)]
    scale = torch.logspace(-1, 1, width, dtype=torch.float64)
    features = torch.randn(len(targets), width, generator=g, dtype=torch.float64) * scale + 5 + targets[:, None]
    found = leave_one_out(features, targets)
    for row in range(len(targets)):
        rest = torch.arange(len(targets)) != row
        names = [str(c) for c in range(len(counts)) if bool((targets[rest] == c).any())]
        indices = torch.tensor([names.index(str(int(c))) for c in targets[rest]])
        weight, bias = HeadStatistics().added(features[rest], indices, names).solve()
        expected, ours = weight @ features[row] + bias, found[row, list(map(int, names))]
        torch.testing.assert_close(ours - ours.mean(), expected - expected.mean(), rtol=1e-9, atol=1e-9)
        assert (found[row] == -torch.inf).sum() == len(counts) - len(names)


def test_leaving_rows_out_tells_nothing_where_no_feature_varies():
    assert not leave_one_out(torch.ones(6, 4), torch.tensor([0, 1, 0, 1, 0, 1])).any()


def test_statistics_of_a_language_model_remember_their_layer(tmp_path):
    two_tasks()[0].save(tmp_path / "classifier")
    replace(two_tasks()[0], layer=3).save(tmp_path / "language")
    assert HeadStatistics.load(tmp_path / "classifier").layer is None
    assert HeadStatistics.load(tmp_path / "language").layer == 3
