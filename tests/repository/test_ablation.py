"""The heads that benchmarks/streams/ablation.py computes from the features of a finished run."""

import pytest
import torch
from helpers.models import OLD_NAME
from helpers.streams import domains, settings
from repository.test_benchmarks import ROOT, load

from pm_hf.config.loading import load_config
from pm_hf.data.stream import load_stream
from pm_hf.measuring.analytic_head import HeadStatistics
from pm_hf.runs.learner import Run, learn

pytestmark = pytest.mark.filterwarnings(OLD_NAME)


@pytest.fixture(scope="module")
def ablation():
    return load(ROOT / "benchmarks" / "streams" / "ablation.py")


@pytest.fixture(scope="module")
def data(stream_data):
    return stream_data(24)


@pytest.fixture(scope="module")
def run(tiny_base, data, tmp_path_factory):
    """run(method, **changes): (report, the finished run of three tasks)."""

    def make(method, **changes):
        folder = tmp_path_factory.mktemp("run")
        config = settings(tiny_base, data, folder, method, training__num_train_epochs=3, **changes)
        config = load_config(config, (), {"output_dir": str(folder)})
        return learn(config), Run(config, load_stream(config))

    return make


@pytest.mark.slow
def test_heads_of_a_run_are_those_that_training_with_them_gives(ablation, run):
    _, linear = run("merge_only")
    accuracies = ablation.heads(ablation.Features(linear), "fisher")
    for drift in ("ridge", "none"):
        report, _ = run("best", head__drift=drift, head__training="task")
        assert accuracies[f"lda, {drift}"] == pytest.approx(report.metrics["ACC"])
    assert set(accuracies) == set(ablation.HEADS) - {"linear", "lda, one mean a class", "RanPAC"}
    assert all(0 < value <= 1 for value in accuracies.values())


@pytest.mark.slow
def test_domains_have_a_mean_each_and_the_largest_row_decides(ablation, tiny_base, tmp_path):
    config = load_config(domains(tiny_base, tmp_path, tmp_path / "run", "best"))
    report = learn(config)
    accuracies = ablation.heads(ablation.Features(Run(config, load_stream(config))), "fisher-seen")
    assert accuracies["lda, ridge"] == pytest.approx(report.metrics["ACC"])
    assert 0.5 < accuracies["lda, one mean a class"] <= 1


@pytest.mark.slow
def test_controls_have_the_features_of_their_own_backbone(ablation, run):
    report, frozen = run("frozen")
    assert ablation.heads(ablation.Features(frozen), "frozen")["lda, none"] == pytest.approx(report.metrics["ACC"])
    _, once = run("best", head__strict=True)
    first = ablation.heads(ablation.Features(once), ablation.FIRST)
    assert set(first) == {"lda, none", "bound", "joint head", "RanPAC"}
    whole, joint = run("joint", head__kind="lda")
    assert ablation.heads(ablation.Features(joint), "joint")["lda, none"] == pytest.approx(whole.metrics["ACC"])


@pytest.mark.slow
def test_mean_shift_moves_old_means_by_what_the_new_rows_move(ablation, run):
    _, linear = run("average")
    features = ablation.Features(linear)
    (moved, _), (still, _) = (
        ablation._followed(features, drift, one_mean_per_task=False) for drift in ("mean shift", "none")
    )
    first = len(linear.stream.tasks[0].own)
    shift = sum((features.of(t, t) - features.of(t - 1, t)).mean(0) for t in (1, 2))
    assert torch.allclose(moved.means[:first], still.means[:first] + shift)
    assert torch.equal(moved.scatter, still.scatter)


def test_random_projection_separates_what_no_linear_head_can(ablation):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(400, 2, generator=generator, dtype=torch.float64)
    truth = (rows[:, 0] * rows[:, 1] > 0).long()
    project = ablation._random_projection(rows, truth, 2)
    assert (project(rows).argmax(1) == truth).double().mean() > 0.95
    linear = HeadStatistics().added(rows, truth, ["same", "other"])
    assert (ablation._linear(linear)(rows).argmax(1) == truth).double().mean() < 0.7


def test_settings_are_chosen_on_training_rows_alone(ablation):
    source = ROOT / "configs" / "text" / "ten-sets.yaml"
    settings = ablation.held_out(source, {})
    assert settings["stream.test_share"] == ablation.SHARE
    assert all(task["test"] is None and task["train"] for task in settings["stream.tasks"])
    assert "stream.tasks" not in ablation.held_out(ROOT / "configs" / "image" / "pacs.yaml", {})


def test_committed_table_is_that_of_the_committed_results(ablation):
    text = (ROOT / "results" / "ablation" / "table.md").read_text(encoding="utf-8")
    assert text == ablation.table()
    assert all(title in text for title in ablation.TITLES.values())


def test_every_cell_has_a_file_of_its_own(ablation, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "ROOT", tmp_path)
    assert len({ablation.result_path("pacs", cell, 0) for cell in ablation.CELLS}) == len(ablation.CELLS)
    assert ablation.table() == ""
