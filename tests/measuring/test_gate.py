"""The gate against scales whose worth is known, and against the definition of its sums."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from pm_hf.errors import InputError
from pm_hf.measuring.analytic_head import HeadStatistics, drift_residuals, fit_temperature, ridge_drift
from pm_hf.measuring.gate import GATE_SCALES, Gate, LineFeatures, deployed_scale, judge

D, CLASSES = 6, 8
FORM = {"ridge": 0.05, "drift": True, "one_mean_per_task": False}


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CENTRES = 0.9 * normal(CLASSES, D, seed=1)


class World:
    """A backbone at some scale after each of four tasks of two classes: classes stand `better` times as far apart, and
    rows of a task that has been learned move with every task after it by noise of their own, `forgotten` large."""

    def __init__(self, better=0.0, forgotten=0.0):
        self.better, self.forgotten = better, forgotten

    def rows(self, task, seed, each=40):
        """(noise that makes the rows, their classes, task, seed)."""
        labels = [2 * task] * each + [2 * task + 1] * each
        return normal(2 * each, D, seed=seed), labels, task, seed

    def features(self, rows, scale, after):
        """Of the same rows after a task; before their own one they are off by noise too."""
        noise, labels, task, seed = rows
        values = noise + (1 + scale * self.better) * CENTRES[labels]
        for moved in range(task + 1, after + 1) if after >= task else [task]:
            values = values + scale * self.forgotten * normal(*noise.shape, seed=1000 * moved + seed)
        return values

    def learn(self, tasks=4, **form):
        """(gate, points) after each task, its class statistics in it."""
        gate, found = Gate(), []
        for task in range(tasks):
            rows, held = self.rows(task, 10 + task), self.rows(task, 50 + task, each=30)
            line = {
                scale: LineFeatures(
                    self.features(rows, scale, task),
                    self.features(held, scale, task),
                    self.features(rows, scale, task - 1) if task and scale else None,
                )
                for scale in GATE_SCALES
            }
            names = [[f"c{label}" for label in each[1]] for each in (rows, held)]
            gate, points = judge(gate, line, *names, seed=task, **FORM | form)
            gate = with_classes(gate, line, names[0])
            found.append((gate, points))
        return found


def with_classes(gate, line, labels):
    """The gate with a task's rows in its statistics, as a run adds them."""
    own = sorted(set(labels))
    targets = torch.tensor([own.index(label) for label in labels])
    added = {
        scale: replace(state, statistics=state.statistics.added(line[scale].fitted, targets, own))
        for scale, state in gate.scales.items()
    }
    return Gate(gate.tasks, added)


def gains(points):
    return [(point["gain"], point["error"]) for point in points]


def test_features_that_are_better_for_all_are_deployed_and_those_that_gain_nothing_are_not():
    better = World(better=0.8).learn()
    assert [deployed_scale(points) for _, points in better] == [1.0] * 4
    same = World().learn()
    for _, points in same:
        for numbers in gains(points):
            assert numbers == pytest.approx((0, 0), abs=1e-9)


def test_a_gain_on_new_rows_that_is_lost_again_does_not_open_the_gate():
    """Each task's held-out rows are better off than at scale 0 when it is learned; the classes before it are not."""
    found = World(better=0.5, forgotten=1.5).learn()
    assert deployed_scale(found[0][1]) == 1
    assert deployed_scale(found[-1][1]) == 0
    gate, points = found[-1]
    assert points[2]["gain"] < 0
    assert gate.scales[1.0].drawn > points[2]["gain"] * 4


def test_the_gain_is_that_of_rows_of_all_classes_that_were_kept():
    world = World(better=0.5, forgotten=0.5)
    gate, points = world.learn()[-1]
    losses = {}
    for scale in (0.0, 1.0):
        weight, bias = gate.scales[scale].statistics.solve()
        logits, truth = [], []
        for task in range(4):
            rows = world.rows(task, 90 + task, each=300)
            logits.append(world.features(rows, scale, 3) @ weight.T + bias)
            truth += rows[1]
        logits, truth = torch.cat(logits), torch.tensor(truth)
        losses[scale] = float(cross_entropy(logits / fit_temperature(logits, truth), truth))
    found = points[2]
    assert found["scale"] == 1
    assert found["gain"] > found["error"]
    assert abs(found["gain"] - (losses[0.0] - losses[1.0])) < 0.2


def test_sums_are_those_of_the_definition_over_two_tasks():
    world = World(better=0.5, forgotten=0.4)
    (first, one), (second, two) = world.learn(tasks=2)
    assert (first.tasks, second.tasks) == (1, 2)
    for scale in (0.5, 1.0):
        rows, held = world.rows(1, 11), world.rows(1, 51, each=30)
        labels, held_labels = rows[1], held[1]
        found = {}
        for s in (0.0, scale):
            before, after = (world.features(rows, s, t) for t in (0, 1))
            known, noise = first.scales[s].statistics, torch.zeros(D, D, dtype=torch.float64)
            if s:
                W = ridge_drift(before, after, FORM["ridge"])
                residuals = drift_residuals(before, after, W, FORM["ridge"])
                known, noise = known.moved(W), residuals.T @ residuals / len(residuals)
            head = known.added(after, torch.tensor([label - 2 for label in labels]), ["c2", "c3"])
            weight, bias = head.solve()
            logits = world.features(held, s, 1) @ weight.T + bias
            truth, answers, drawn = torch.tensor(held_labels), torch.arange(2).repeat_interleave(40_000), []
            for c in (0, 1):
                torch.manual_seed(c)
                gaussian = torch.distributions.MultivariateNormal(head.means[c], head.pooled_covariance() + noise)
                drawn.append(gaussian.sample((40_000,)))
            old = torch.cat(drawn) @ weight.T + bias
            T = fit_temperature(logits, truth, (1.0, old, answers))
            found[s] = cross_entropy(logits / T, truth, reduction="none"), float(cross_entropy(old / T, answers))
        gained = found[0.0][0] - found[scale][0]
        state = second.scales[scale]
        assert state.gained == pytest.approx(first.scales[scale].gained + float(gained.mean()), abs=0.01)
        variance = first.scales[scale].variance + float(gained.var()) / len(gained)
        assert state.variance == pytest.approx(variance, rel=0.1)
        (point,) = [point for point in two if point["scale"] == scale]
        since = found[0.0][1] - found[scale][1]
        expected = (state.gained + since - first.scales[scale].drawn) / 2
        assert point["gain"] == pytest.approx(expected, abs=0.03)
        assert point["error"] > state.variance**0.5 / 2
    assert all(one[0][key] == two[0][key] == 0 for key in ("scale", "gain", "error"))


def test_noise_of_the_drift_adds_up_and_moves_with_it():
    world = World(better=0.2, forgotten=0.6)
    states = [gate.scales[1.0] for gate, _ in world.learn(tasks=3)]
    assert states[0].noise is None
    sizes = [float(state.noise.trace()) for state in states[1:]]
    assert sizes[1] > 1.3 * sizes[0] > 0
    assert all(gate.scales[0.0].noise is None for gate, _ in world.learn(tasks=3))
    still = world.learn(tasks=3, drift=False)[-1][0].scales[1.0].statistics
    first = world.learn(tasks=1)[0][0].scales[1.0].statistics
    assert torch.equal(still.means[:2], first.means)  # means that do not follow


def test_the_largest_scale_that_beats_the_control_is_deployed():
    def points(half, whole):
        return [
            {"scale": s, "gain": g, "error": 0.1 * (s > 0)}
            for s, g in zip(GATE_SCALES, (0.0, half, whole), strict=True)
        ]

    assert deployed_scale(points(0.5, 0.2)) == 1
    assert deployed_scale(points(0.5, 0.1)) == 0.5
    assert deployed_scale(points(0.1, 0.05)) == 0
    assert deployed_scale(points(-1, 0.3)) == 1


def test_what_is_kept_comes_back_bit_for_bit_and_goes_on_the_same(tmp_path):
    gate = World(better=0.3, forgotten=0.5).learn(tasks=3)[-1][0]
    gate.save(tmp_path / "gate")
    again = Gate.load(tmp_path / "gate", gate.scales[1.0].statistics)
    assert again.tasks == 3
    for scale, state in gate.scales.items():
        other = again.scales[scale]
        assert (state.gained, state.variance, state.drawn) == (other.gained, other.variance, other.drawn)
        assert torch.equal(state.statistics.means, other.statistics.means)
        assert (state.noise is None) == (other.noise is None) == (scale == 0)
        assert state.noise is None or torch.equal(state.noise, other.noise)
    sizes = []
    for tasks in (2, 4):  # but for the classes' own means, nothing grows
        World(better=0.3).learn(tasks=tasks)[-1][0].save(tmp_path / f"{tasks}")
        sizes.append(sum(file.stat().st_size for file in (tmp_path / f"{tasks}").iterdir()))
    assert sizes[1] - sizes[0] < 2 * (4 * (8 + 8 * D) + 200)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "sums.safetensors").unlink(), "cannot be read"),
        (lambda folder: (folder / "0.5.safetensors").unlink(), "cannot be read"),
        (lambda folder: (folder / "sums.safetensors").write_bytes(b"none"), "cannot be read"),
        (lambda folder: _with_header(folder, format="other"), "is no state of a gate"),
        (lambda folder: _with_header(folder, gate="{"), "the header is no JSON"),
        (lambda folder: _with_header(folder, gate=json.dumps({"tasks": 1, "scales": {}})), "expected the scales"),
        (lambda folder: _with_header(folder, gate=json.dumps({"tasks": "1", "scales": {}})), "tasks"),
    ],
)
def test_a_damaged_state_is_an_input_error(tmp_path, change, message):
    gate = World(better=0.3).learn(tasks=2)[-1][0]
    gate.save(tmp_path / "gate")
    change(tmp_path / "gate")
    with pytest.raises(InputError, match=message):
        Gate.load(tmp_path / "gate", gate.scales[1.0].statistics)


def test_a_state_of_other_classes_is_an_input_error(tmp_path):
    gate = World(better=0.3).learn(tasks=2)[-1][0]
    gate.save(tmp_path / "gate")
    statistics = gate.scales[1.0].statistics
    other = HeadStatistics(statistics.labels[::-1], statistics.counts, statistics.means, statistics.scatter)
    with pytest.raises(InputError, match="is of other classes or features than the head"):
        Gate.load(tmp_path / "gate", other)


def _with_header(folder, **values):
    path = folder / "sums.safetensors"
    tensors = load_file(path)
    save_file(tensors, path, {"format": "pm_hf.gate.v1", "gate": "{}"} | values)
