"""The analytic head in a stream: what it starts a task with, what it competes with, a mean for each domain."""

import shutil

import pytest
import torch
from helpers import refusal
from helpers.models import OLD_NAME
from helpers.streams import dense, domains, first, same_tensors, settings, steps, tensors, write_data
from helpers.streams import language_settings as language

import pm_hf.runs.head
import pm_hf.runs.learner
from pm_hf.adapters.folder import open_adapter
from pm_hf.adapters.merge import merge_adapters
from pm_hf.config.loading import load_config
from pm_hf.data.stream import load_stream, sample_classes
from pm_hf.measuring.analytic_head import SOLVERS, HeadStatistics, compared, merge_temperature, ridge_drift
from pm_hf.measuring.bound_head import DIRECTIONS
from pm_hf.measuring.gate import Gate
from pm_hf.measuring.head_search import interpolated
from pm_hf.measuring.line_search import COEFFICIENT_GRID, smallest_within_error
from pm_hf.models.lora import find_head
from pm_hf.runs.learner import Run, evaluate, learn

pytestmark = pytest.mark.filterwarnings(OLD_NAME)
HEAD = "classifier"
SHORT = {"training__num_train_epochs": 2, "curvature__samples": 8}


@pytest.fixture(scope="module")
def data(stream_data):
    return stream_data(24)


# a mean for each domain


@pytest.mark.parametrize(("means", "rows", "least"), [("class", 1, 0.5), ("task", 2, 0.8)])
def test_analytic_head_in_a_domain_stream_has_a_mean_a_class_or_a_class_and_domain(
    tiny_base, tmp_path, means, rows, least
):
    report = learn(domains(tiny_base, tmp_path, tmp_path / "run", method="best", head__means=means))
    statistics = HeadStatistics.load(tmp_path / "run" / "task-01-odd" / "head_statistics.safetensors")
    labels = ["apple", "bird", "car"] * rows
    assert statistics.labels == labels
    assert statistics.counts.tolist() == [48 / rows] * 3 * rows
    assert open_adapter(tmp_path / "run" / "merged").labels == {HEAD: labels}
    assert report.metrics["ACC"] > least
    found = evaluate(load_config(tmp_path / "run" / "config.yaml"), tmp_path / "run" / "merged")
    assert [scores["class_incremental"] for scores in found.values()] == report.scores[-1]


def test_a_domain_has_a_mean_of_its_own_unless_asked_otherwise(tiny_base, data, tmp_path):
    assert load_config(domains(tiny_base, tmp_path, tmp_path / "run", method="best")).head.means == "task"
    assert load_config(settings(tiny_base, data, tmp_path / "run", method="best")).head.means == "class"
    assert load_config(settings(tiny_base, data, tmp_path / "run", method="pm")).head.means is None


# analytic rows to start from and to compete with


def test_rows_start_analytic_and_compete_with_every_class_seen(tiny_base, data, tmp_path, monkeypatch):
    seen = []
    train = pm_hf.runs.learner.train

    def watched(built, examples, collate, *args, **kwargs):
        linear, inputs = find_head(built.model, HEAD), collate(examples[:6])
        built.model.eval()
        rows = torch.cat([linear.weight, linear.bias[:, None]], 1).detach().clone()
        seen.append((rows, built.model(**{k: v for k, v in inputs.items() if k != "labels"}).logits.detach()))
        found = train(built, examples, collate, *args, **kwargs)
        seen[-1] += (built.model(**{k: v for k, v in inputs.items() if k != "labels"}).logits.detach(),)
        return found

    measured = []
    estimate = pm_hf.runs.learner.estimate_curvature

    def counted(model, dataloader, **options):
        inputs = next(iter(dataloader))
        measured.append(model(**{k: v for k, v in inputs.items() if k != "labels"}).logits.shape[1])
        return estimate(model, dataloader, **options)

    monkeypatch.setattr(pm_hf.runs.learner, "train", watched)
    monkeypatch.setattr(pm_hf.runs.learner, "estimate_curvature", counted)
    learn(settings(tiny_base, data, tmp_path / "run", method="best", head__training="seen"))
    config = load_config(tmp_path / "run" / "config.yaml")
    stream = load_stream(config)
    run = Run(config, stream)
    for index, (rows, before, after) in enumerate(seen):
        assert before.shape[1] == after.shape[1] == 2 * (index + 1)
        task, folder = stream.tasks[index], run.folder.task(index - 1).folder
        if index == 0:
            continue
        known = HeadStatistics.load(folder / "head_statistics.safetensors")
        features = run.scorer.features(folder / "merged", task.train, task.own, HEAD)
        targets = torch.tensor([task.own.index(label) for label in task.train.labels])
        statistics = known.added(features, targets, list(task.own))
        weight, bias = statistics.solve()
        expected = torch.cat([weight, bias[:, None]], 1).float()
        scale = float(expected[-1].norm() / rows[-1].norm())  # the temperature
        assert scale >= 1
        torch.testing.assert_close(rows * scale, expected[-2:], rtol=1e-3, atol=1e-3)
    assert measured == [2, 2, 2]  # the Fisher is that of the task's own classes, with which P&M is published


def test_training_against_every_class_seen_needs_the_merge_it_is_about(tiny_base, data, tmp_path):
    problem = "head.training: seen"
    linear = settings(tiny_base, data, tmp_path / "run", method="pm", head__training="seen")
    last = settings(tiny_base, data, tmp_path / "run", method="best", head__training="seen", merge__train_from="last")
    assert problem in refusal(learn, linear)
    assert problem in refusal(learn, last)


def test_replayed_classes_are_trained_and_no_rivals_of_themselves(tiny_base, data, tmp_path, monkeypatch):
    widths, starts = [], []
    train = pm_hf.runs.learner.train

    def watched(built, examples, collate, *args, **kwargs):
        inputs = collate(examples[:4])
        widths.append(built.model(**{k: v for k, v in inputs.items() if k != "labels"}).logits.shape[1])
        starts.append(find_head(built.model, HEAD).weight.detach().norm(dim=1))
        return train(built, examples, collate, *args, **kwargs)

    monkeypatch.setattr(pm_hf.runs.learner, "train", watched)
    learn(settings(tiny_base, data, tmp_path / "run", "best", strategy__replay_per_class=2, **SHORT))
    assert widths == [2, 4, 6]  # every class once
    assert all(start.min() > 0.1 * start.max() for start in starts)  # all of them from analytic rows


@pytest.mark.parametrize("rows", [1, 2])
def test_few_rows_a_class_are_enough(tiny_base, tmp_path, rows):
    few = write_data(tmp_path / "few", per_class=rows)
    config = settings(tiny_base, few, tmp_path / "run", "best", stream__train_per_class=rows, **SHORT)
    if rows == 1:
        assert "features that vary within a class" in refusal(learn, config)  # of which no covariance can be made
    else:
        assert learn(config).metrics["ACC"] > 0.2


def test_a_release_with_a_row_a_domain_goes_on_as_one(tiny_base, tmp_path):
    config = domains(tiny_base, tmp_path, tmp_path / "run", "best", **SHORT)
    learn(config)
    start = str(tmp_path / "run" / "merged")

    def again(method, **changes):
        folder = tmp_path / f"{method}-{len(changes)}"
        return domains(tiny_base, tmp_path, folder, method, **SHORT) | {"start_from": start} | changes

    assert "several rows of one label" in refusal(learn, again("average"))
    pooled = again("best")
    pooled["head"] = {"means": "class"}
    assert "several means a class" in refusal(learn, pooled)
    learn(again("best"))
    rows = open_adapter(tmp_path / "best-0" / "merged").labels[HEAD]
    assert rows == ["apple", "bird", "car"] * 4


def test_a_release_whose_statistics_are_of_other_labels_is_refused(tiny_base, data, tmp_path):
    learn(settings(tiny_base, data, tmp_path / "one", "best", groups=1, **SHORT))
    learn(settings(tiny_base, data, tmp_path / "two", "best", groups=2, **SHORT))
    for name in ("head_statistics.safetensors", "curvature.safetensors"):
        shutil.copy(next((tmp_path / "one").glob(f"task-*/{name}")), tmp_path / "two" / "merged" / name)
    start = {"start_from": str(tmp_path / "two" / "merged")}
    assert "its labels are not those of" in refusal(learn, settings(tiny_base, data, tmp_path / "x", "best") | start)


def test_best_without_an_analytic_head_has_nothing_to_start_from(tiny_base, data, language_data, tmp_path):
    linear = load_config(settings(tiny_base, data, tmp_path / "run", "best", head__kind="linear"))
    assert (linear.head.kind, linear.head.training) == ("linear", "task")
    model = load_config(language(language_data, tmp_path / "run", method="best"))
    assert (model.head.kind, model.head.training) == ("none", "task")
    learn(settings(tiny_base, data, tmp_path / "run", "best", groups=2, head__kind="linear", **SHORT))
    assert len(steps(tmp_path / "run")) == 2
    assert tensors(tmp_path / "run" / "merged")[f"{HEAD}.weight"].shape[0] == 4


# the coefficient searched against draws of the earlier classes

SEARCHED = {"merge__coefficient": "search", **SHORT}


def check_search(folder):
    """Every task but the first took the smallest α within the error of eleven, and its points follow the definition."""
    first, *others = steps(folder)
    assert "search" not in first
    assert first["coefficient"]["used"] == 1
    for earlier, step in enumerate(others, start=1):
        points = step["search"]
        assert [point["coefficient"] for point in points] == list(COEFFICIENT_GRID)
        assert step["coefficient"]["used"] == smallest_within_error(points)
        assert (step["coefficient"]["source"], step["coefficient"]["note"]) == ("line_search", None)
        for point in points:
            assert point["objective"] == pytest.approx(point["new"] + earlier * point["old"])
    return [step["search"] for step in others]


def test_the_coefficient_is_searched_against_draws_of_the_earlier_classes(tiny_base, data, tmp_path, monkeypatch):
    searched = []
    search = pm_hf.runs.head.head_search

    def watched(known, fitted, labels, held_out, held_labels, **options):
        searched.append((known, fitted, labels, held_out, held_labels, options))
        return search(known, fitted, labels, held_out, held_labels, **options)

    monkeypatch.setattr(pm_hf.runs.head, "head_search", watched)
    learn(settings(tiny_base, data, tmp_path / "run", method="best", **SEARCHED))
    assert len(check_search(tmp_path / "run")) == 2
    config = load_config(tmp_path / "run" / "config.yaml")
    stream = load_stream(config)
    run = Run(config, stream)
    for index, (known, fitted, labels, _, held_labels, options) in enumerate(searched, start=1):
        task, before = stream.tasks[index], run.folder.task(index - 1)
        assert sorted(held_labels) == sorted(task.eval.labels)
        assert sorted(labels) == sorted(task.train.labels)  # 44 of at least 64 rows
        assert options["earlier"] == index
        assert torch.equal(known.means, HeadStatistics.load(before.statistics).means)
        own = sample_classes(task.train, 64, options["seed"])
        found = run.scorer.features(before.merged, own, task.own, HEAD)
        torch.testing.assert_close(fitted[0.0], found, rtol=1e-4, atol=1e-5)
        for alpha in (0.25, 1.0):  # the parabola, and the line's end
            merge_adapters(
                run.folder.task(index).adapter, tmp_path / "at", into=before.merged, coefficient=alpha, overwrite=True
            )
            found = run.scorer.features(tmp_path / "at", own, task.own, HEAD)
            moved = (found - fitted[0.0]).norm()
            assert moved > 0.1
            assert (interpolated(fitted, alpha) - found).norm() < (0.1 if alpha < 1 else 1e-3) * moved


def test_a_search_in_a_domain_stream_ends_the_same_after_it_was_killed(tiny_base, tmp_path, monkeypatch):
    config = domains(tiny_base, tmp_path, tmp_path / "run", "best", **SEARCHED)
    learn(config)
    check_search(tmp_path / "run")
    again = config | {"output_dir": str(tmp_path / "again")}
    search = pm_hf.runs.head.head_search

    def killed(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(pm_hf.runs.head, "head_search", killed)
    with pytest.raises(KeyboardInterrupt):
        learn(again)
    monkeypatch.setattr(pm_hf.runs.head, "head_search", search)
    learn(again)
    assert [step.get("search") for step in steps(tmp_path / "again")] == [
        step.get("search") for step in steps(tmp_path / "run")
    ]
    assert same_tensors(tmp_path / "again" / "merged", tmp_path / "run" / "merged")


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("average", {}, "set head.kind: lda, or give a number"),
        ("best", {"head__strict": True}, "search needs several tasks that train the backbone"),
        ("best", {"trains": False}, "search needs several tasks that train the backbone"),
        ("joint", {"head__kind": "lda"}, "search needs several tasks that train the backbone"),
        ("best", {"merge__train_from": "last", "head__training": "task"}, "search needs steps from the running merge"),
    ],
)
def test_a_search_with_nothing_to_search_is_refused(tiny_base, data, tmp_path, method, changes, message):
    asked = settings(tiny_base, data, tmp_path / "run", method, **{"merge__coefficient": "search"} | changes)
    assert message in refusal(load_config, asked)


# the gate against the frozen control


def record_of_gate(folder):
    """(scale that was deployed, {scale: (gain, error)}) of each task; the state and the folders are as they say."""
    found = []
    for path, step in zip(sorted(folder.glob("task-*/step.json")), steps(folder), strict=True):
        gate = step["gate"]
        points = {point["scale"]: (point["gain"], point["error"]) for point in gate["scales"]}
        assert list(points) == [0, 0.5, 1]
        assert points[0] == (0, 0)
        assert gate["deployed"] == max([s for s, (gain, error) in points.items() if gain > error], default=0)
        assert (path.parent / "deployed").is_dir() == (gate["deployed"] != 1)
        found.append((gate["deployed"], points))
    return found


GATED = {"head__gate": True, "stream__eval_share": 0.2, **SHORT}


def force(monkeypatch, scale):
    """Let the gate choose this scale."""
    monkeypatch.setattr(pm_hf.runs.head, "deployed_scale", lambda points: scale)


def test_a_gate_that_holds_deploys_the_control_bit_for_bit_and_training_goes_on_as_without_it(
    tiny_base, data, tmp_path, monkeypatch
):
    shared = {"stream__eval_share": 0.2, **SHORT}
    frozen = learn(settings(tiny_base, data, tmp_path / "frozen", "frozen", **shared))
    plain = learn(settings(tiny_base, data, tmp_path / "plain", "best", **shared))
    force(monkeypatch, 0.0)
    gated = learn(settings(tiny_base, data, tmp_path / "gated", "best", **GATED))
    assert gated.matrices == frozen.matrices != plain.matrices
    ours, theirs = tensors(tmp_path / "gated" / "merged"), tensors(tmp_path / "frozen" / "merged")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs if name.startswith(HEAD))
    assert all(not value.any() for name, value in ours.items() if "lora_B" in name)
    for one, two in zip(
        sorted((tmp_path / "gated").glob("task-*")), sorted((tmp_path / "plain").glob("task-*")), strict=True
    ):
        assert same_tensors(one / "merged", two / "merged")
        assert same_tensors(one / "adapter", two / "adapter")
        assert same_tensors(one / "deployed", tmp_path / "gated" / "merged") == (one.name == "task-02-third")
    notes = [note for note in gated.notes if "the gate held the deployed model at the control" in note]
    assert len(notes) == 3
    config = load_config(tmp_path / "gated" / "config.yaml")
    again = evaluate(config, tmp_path / "gated" / "merged")
    assert [scores["class_incremental"] for scores in again.values()] == gated.scores[-1]


def test_a_gate_deploys_the_scale_that_it_measures_and_ends_the_same_after_it_was_killed(
    tiny_base, tmp_path, monkeypatch
):
    config = domains(tiny_base, tmp_path, tmp_path / "run", "best", head__gate=True, **SHORT)
    learn(config)
    record_of_gate(tmp_path / "run")
    force(monkeypatch, 0.5)
    half = config | {"output_dir": str(tmp_path / "half")}
    save = Gate.save

    def killed(self, folder):
        save(self, folder)
        if folder.parent.name.startswith("task-01"):
            raise KeyboardInterrupt

    monkeypatch.setattr(Gate, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        learn(half)
    monkeypatch.setattr(Gate, "save", save)
    report = learn(half)
    assert [step["gate"]["scales"] for step in steps(tmp_path / "half")] == [
        step["gate"]["scales"] for step in steps(tmp_path / "run")
    ]
    merged, deployed = (tmp_path / "half" / "task-01-odd" / name for name in ("merged", "deployed"))
    assert same_tensors(tmp_path / "half" / "merged", deployed)
    ours, whole = dense(deployed), dense(merged)
    assert all(torch.equal(ours[name], whole[name] / 2) for name in whole)
    statistics = HeadStatistics.load(tmp_path / "half" / "task-01-odd" / "gate" / "0.5.safetensors")
    assert statistics.counts.sum() == 2 * 72  # every training row of both domains, held out or not
    assert open_adapter(deployed).labels == {HEAD: statistics.labels}
    run_config = load_config(tmp_path / "half" / "config.yaml")
    stream = load_stream(run_config)
    run = Run(run_config, stream)
    features = run.scorer.features(deployed, stream.tasks[1].train, stream.tasks[1].own, HEAD)
    own = torch.stack(
        [features[[y == label for y in stream.tasks[1].train.labels]].mean(0) for label in statistics.labels[3:]]
    )
    assert (
        statistics.means[3:] - own
    ).norm() < 0.2 * own.norm()  # those of its own backbone, a tenth of the rows apart
    assert any("deployed the merged adapter at scale 0.5" in note for note in report.notes)


def test_a_run_goes_on_from_the_merge_that_a_gate_deployed_a_scale_of(tiny_base, data, tmp_path, monkeypatch):
    force(monkeypatch, 0.5)
    learn(settings(tiny_base, data, tmp_path / "two", "best", groups=2, **GATED))
    start = {"start_from": str(tmp_path / "two" / "merged")}
    third = {"stream__class_groups": {"third": ["egg", "fog"]}}
    learn(settings(tiny_base, data, tmp_path / "on", "best", **GATED, **third) | start)
    whole = learn(settings(tiny_base, data, tmp_path / "three", "best", **GATED))
    (gate,) = [step["gate"] for step in steps(tmp_path / "on")]
    assert len(gate["scales"]) == 3
    assert open_adapter(tmp_path / "on" / "merged").labels[HEAD] == [
        *first(2)["first"],
        *first(2)["second"],
        "egg",
        "fog",
    ]
    state = Gate.load(
        tmp_path / "on" / "task-00-third" / "gate",
        HeadStatistics.load(tmp_path / "on" / "task-00-third" / "head_statistics.safetensors"),
    )
    assert state.tasks == len(whole.tasks) == 3
    plain = settings(tiny_base, data, tmp_path / "plain", "best", groups=2, **SHORT)
    learn(plain)
    from_plain = {"start_from": str(tmp_path / "plain" / "merged")}
    refused = settings(tiny_base, data, tmp_path / "no", "best", **GATED, **third) | from_plain
    assert "head.gate needs gate beside it" in refusal(learn, refused)


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("pm", {}, "head.gate: belongs to a classifier's head.kind: lda"),
        ("frozen", {}, "head.gate: compares with a backbone that is not trained"),
        ("best", {"head__strict": True}, "head.gate: compares with a backbone that is not trained"),
    ],
)
def test_a_gate_with_nothing_to_compare_is_refused(tiny_base, data, tmp_path, method, changes, message):
    asked = settings(tiny_base, data, tmp_path / "run", method, head__gate=True, **changes)
    assert message in refusal(load_config, asked)


# rows that are no discriminants


def replayed_solvers(run, tasks):
    """(losses and directions as the files of each task have them, the rows of each merge)."""
    files = [HeadStatistics.load(run / task / "head_statistics.safetensors") for task in tasks]
    rows = [tensors(run / task / "merged") for task in tasks]
    return files, [{name.rpartition(".")[2]: value for name, value in part.items() if HEAD in name} for part in rows]


@pytest.mark.parametrize(("method", "solver"), [("best", "bound"), ("frozen", "search")])
def test_rows_are_those_of_the_solver_at_the_temperature_of_rows_held_out(tiny_base, data, tmp_path, method, solver):
    learn(settings(tiny_base, data, tmp_path / "run", method, head__solver=solver, **SHORT))
    config = load_config(tmp_path / "run" / "config.yaml")
    run = Run(config, load_stream(config))
    names, losses = [folder.name for folder in sorted((tmp_path / "run").glob("task-*"))], dict[str, float]()
    files, rows = replayed_solvers(tmp_path / "run", names)
    known = HeadStatistics().with_directions(DIRECTIONS)
    for index, (task, statistics, merged) in enumerate(zip(run.stream.tasks, files, rows, strict=True)):
        features = run.scorer.features(run.folder.task(index).merged, task.train, task.own, HEAD)
        if index and method == "best":
            before = run.scorer.features(run.folder.task(index - 1).merged, task.train, task.own, HEAD)
            known = known.moved(ridge_drift(before, features, 1.0))
        asked = ("bound",) if solver == "bound" else ("lda", "bound")
        found = compared(known, features, task.train.labels, asked)
        losses = {name: losses.get(name, 0.0) + nats for name, (nats, _) in found.items()}
        assert statistics.losses == pytest.approx(losses, rel=1e-3, abs=1e-3)
        targets = torch.tensor([task.own.index(label) for label in task.train.labels])
        known = known.added(features, targets, list(task.own))
        torch.testing.assert_close(statistics.directions, known.directions, rtol=1e-2, atol=1e-3)
        best = min(losses, key=losses.get)
        weight, bias = SOLVERS[best](statistics)
        temperature = found[best][1] if best == "bound" else merge_temperature(known, features, task.train.labels)
        torch.testing.assert_close(merged["weight"] * temperature, weight.float(), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(merged["bias"] * temperature, bias.float(), rtol=1e-3, atol=1e-3)
        known = statistics
    assert known.kept == DIRECTIONS


def test_a_run_says_from_which_task_on_its_rows_are_others(tiny_base, data, tmp_path, monkeypatch):
    nats = iter([(1.0, 2.0), (3.0, 1.0), (0.0, 0.5)])  # of lda and bound on the rows of each task

    def given(known, features, truth, solvers, **_):
        return dict(zip(solvers, ((value, 1.0) for value in next(nats)), strict=True))

    monkeypatch.setattr(pm_hf.runs.head, "compared", given)
    report = learn(settings(tiny_base, data, tmp_path / "run", "frozen", head__solver="search", **SHORT))
    said = [[note for note in step["notes"] if "solver" in note] for step in steps(tmp_path / "run")]
    assert said == [[], ["head.solver: bound from second on"], []]
    assert any("head.solver: bound from second on" in note for note in report.notes)


def test_a_solver_is_refused_where_it_has_no_place(tiny_base, data, tmp_path, language_data):
    problem = "head.solver: bound"
    asked = {"head__solver": "bound"}
    assert problem in refusal(learn, settings(tiny_base, data, tmp_path / "run", "pm", **asked))
    strict = refusal(learn, settings(tiny_base, data, tmp_path / "run", "best", head__strict=True, **asked))
    assert "which head.strict excludes; use lda" in strict
    assert problem in refusal(learn, language(language_data, tmp_path / "run", "llama", method="frozen", **asked))
