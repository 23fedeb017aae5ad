"""The merge line of a finished run: points against merges and losses computed by hand, regrets, what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.records import finished_run, page_of
from helpers.streams import at, dense, settings, steps, tensors, write_data
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification

from pm_hf.cli import main
from pm_hf.config.loading import load_config
from pm_hf.data.encoders import make_encoder
from pm_hf.data.stream import load_stream
from pm_hf.errors import InputError
from pm_hf.merging.curvature import Curvature
from pm_hf.runs import merge_line as module
from pm_hf.runs.learner import learn
from pm_hf.runs.merge_line import merge_line
from pm_hf.runs.records import TaskRecord, read_runs

QUICK = {"training__num_train_epochs": 3, "stream__train_per_class": 12}
SHORT = (0.0, 0.6, 1.0)


@pytest.fixture(scope="module")
def short():
    """A grid of three."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "COEFFICIENT_GRID", SHORT)
        yield


@pytest.fixture(scope="module")
def data(stream_data):
    return stream_data(24)


@pytest.fixture(scope="module")
def config(tiny_base, data, tmp_path_factory):
    return settings(tiny_base, data, tmp_path_factory.mktemp("line") / "run", **QUICK)


@pytest.fixture(scope="module")
def run(config):
    """A finished run of three tasks, one for all tests that change nothing in it."""
    learn(config)
    return load_config(config).output_dir


@pytest.fixture(scope="module")
def found(run, short):
    return merge_line(run)


def folders(run):
    return sorted(Path(run).glob("task-*"))


def by_hand(config, run, index, alpha):
    """(losses inside the own classes, accuracies over all classes) of each task seen: dense weights, row by row."""
    before, task = folders(run)[index - 1] / "merged", folders(run)[index] / "adapter"
    settings = load_config(config)
    stream, encoder = load_stream(settings), make_encoder(settings)
    labels = [label for one in stream.tasks[: index + 1] for label in one.labels]
    model = AutoModelForSequenceClassification.from_pretrained(settings.model.base, num_labels=len(labels)).eval()
    heads, past, delta = [tensors(before), tensors(task)], dense(before), dense(task)
    with torch.no_grad():
        for name, change in delta.items():
            model.get_submodule(name).weight += (past[name] + alpha * change).float()
        for part in ("weight", "bias"):
            rows = torch.cat([head[f"classifier.{part}"] for head in heads])
            getattr(model.classifier, part).copy_(rows)
    losses, scores = [], []
    for one in stream.tasks[: index + 1]:
        own = [labels.index(label) for label in one.labels]
        loss, right = [], []
        for example in encoder.examples(one.test, labels):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0]
            inside = torch.tensor(own.index(example["labels"]))
            loss.append(float(cross_entropy(logits[own], inside)))
            right.append(int(logits.argmax()) == example["labels"])
        losses.append(sum(loss) / len(loss))
        scores.append(sum(right) / len(right))
    return losses, scores


@pytest.mark.parametrize("index", [1, 2])
def test_a_point_is_the_dense_merge_scored_row_by_row(config, run, found, index):
    losses, scores = by_hand(config, run, index, 0.6)
    point = at(found["tasks"][index - 1], 0.6)
    assert point["losses"] == pytest.approx(losses, abs=1e-5)
    assert point["scores"] == pytest.approx(scores)
    assert point["loss_sum"] == pytest.approx(sum(losses), abs=1e-5)
    assert point["loss_mean"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert point["score"] == pytest.approx(sum(scores) / len(scores))


def test_the_ends_of_the_line_and_the_chosen_point_are_what_the_run_measured(run, found):
    for step, before, line in zip(steps(run)[1:], steps(run)[:-1], found["tasks"], strict=True):
        assert line["task"] == step["task"]
        assert line["chosen"] == step["coefficient"]["used"]
        chosen, start = at(line, line["chosen"]), at(line, 0.0)
        assert chosen["scores"] == step["scores"]["class_incremental"]
        assert chosen["task_incremental"] == step["scores"]["task_incremental"]
        assert line["notes"] == []
        assert start["task_incremental"][:-1] == before["scores"]["task_incremental"]
    first, second = found["tasks"]
    assert at(second, 0.0)["losses"][:-1] == pytest.approx(at(first, first["chosen"])["losses"], abs=1e-6)


def test_the_prediction_is_the_objective_of_the_sums_and_its_minimum_the_raw_coefficient(run, found):
    line, folder = found["tasks"][-1], folders(run)[-1]
    sums = Curvature.load(folder / "curvature.safetensors")
    past, delta = dense(folders(run)[-2] / "merged"), dense(folder / "adapter")

    def objective(alpha):
        """½ Σᵢ (θ − θ*ᵢ)ᵀ Hᵢ (θ − θ*ᵢ) up to a constant: ½θᵀSθ − θᵀM, from dense matrices."""
        total = 0.0
        for name, change in delta.items():
            theta, S, M = past[name] + alpha * change, sums.sum_of(name).double(), sums.M[name].double()
            total += float((S * theta**2 / 2 - theta * M).sum())
        return total

    for point in line["points"]:
        expected = objective(point["coefficient"]) - objective(0.0)
        assert point["predicted"] == pytest.approx(expected, rel=1e-3, abs=1e-9)
    a, b = (at(line, alpha)["predicted"] / alpha for alpha in (0.6, 1.0))  # dα/2 − n at two α
    half = (b - a) / 0.4
    assert (half - b) / (2 * half) == pytest.approx(line["raw"], rel=1e-6)
    assert found["predicted_unit"] == "nats"


def test_regret_is_what_is_lost_to_the_best_of_the_line(found):
    for line in found["tasks"]:
        points = {point["coefficient"]: point for point in line["points"]}
        assert sorted(points) == sorted({*SHORT, line["chosen"], line["one_over_t"]})
        assert [point["coefficient"] for point in line["points"]] == sorted(points)
        top, low = max(p["score"] for p in points.values()), min(p["loss_mean"] for p in points.values())
        assert points[line["best_score"]]["score"] == top
        assert points[line["best_loss"]]["loss_mean"] == low
        equal = [alpha for alpha, point in points.items() if point["score"] == top]
        assert abs(line["best_score"] - line["chosen"]) == min(abs(alpha - line["chosen"]) for alpha in equal)
        for name in ("chosen", "one_over_t", "best_loss"):
            point, regret = points[line[name]], line["regret"][name]
            assert regret["score"] == pytest.approx(100 * (top - point["score"]))
            assert regret["loss"] == pytest.approx(point["loss_mean"] - low)
            assert min(regret.values()) >= 0
    mean = found["mean_regret"]["one_over_t"]["score"]
    assert mean == pytest.approx(sum(line["regret"]["one_over_t"]["score"] for line in found["tasks"]) / 2)
    assert found["regret_unit"] == "points"


def test_what_was_computed_before_is_taken_from_the_file(run, found, tmp_path, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    monkeypatch.setattr(module, "_point", lambda *_: pytest.fail("computed again"))
    assert merge_line(copy) == found
    partly = json.loads((copy / "coefficient.json").read_text())
    del partly["tasks"][1]
    (copy / "coefficient.json").write_text(json.dumps(partly))
    done = []
    monkeypatch.setattr(module, "_task", lambda work, index, *_: done.append(index) or dict(found["tasks"][index - 1]))
    assert merge_line(copy)["tasks"] == found["tasks"]
    assert done == [2]
    monkeypatch.setattr(module, "COEFFICIENT_GRID", (0.0, 1.0))
    merge_line(copy)
    assert done == [2, 1, 2]


def test_a_finished_task_is_on_disk_before_the_next_one(run, found, tmp_path, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "coefficient.json").unlink()

    def interrupted(work, index, *_):
        if index == 2:
            raise KeyboardInterrupt
        return dict(found["tasks"][0])

    monkeypatch.setattr(module, "_task", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge_line(copy)
    assert json.loads((copy / "coefficient.json").read_text())["tasks"] == found["tasks"][:1]


def test_the_command_prints_the_table_and_writes_the_page(run, found, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("pm_hf.reports.page.importlib.util.find_spec", lambda name: None)  # no PNG, which takes seconds
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    assert main(["inspect", "--coefficient", str(copy)]) == 0
    printed = capsys.readouterr().out
    for line in found["tasks"]:
        assert f"task {line['t']} {line['task']}: α chosen {line['chosen']:.3f} (raw {line['raw']:.3f})" in printed
        (row,) = [
            text for text in printed.splitlines() if text.startswith(f"  {line['chosen']:.3f}") and "chosen" in text
        ]
        point = at(line, line["chosen"])
        assert f"{point['loss_mean']:.4f}" in row
        assert f"{point['score']:.4f}" in row
    assert f"mean over 2 task(s): regret: chosen {found['mean_regret']['chosen']['score']:.2f} points" in printed
    assert "Loss along the merge line" in (copy / "report.html").read_text()
    names = {path.name for path in (copy / "plots").iterdir()}
    assert {f"coefficient-{t}{kind}.svg" for t in (2, 3) for kind in ("", "-score")} <= names
    assert main(["inspect", "--coefficient", str(copy), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((copy / "coefficient.json").read_text()) == found


def test_the_page_shows_every_line_of_every_run(run, found, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    text = page_of(read_runs([run, other]))
    for place in (1, 2):
        for t in (2, 3):
            assert text.count(f'id="chart-coefficient-{place}-{t}-t"') == 1
            assert text.count(f'id="chart-coefficient-{place}-{t}-score-t"') == 1
    line = found["tasks"][0]
    regrets = [line["regret"][name] for name in ("chosen", "one_over_t", "best_loss")]
    numbers = [f"{line[key]:.3f}" for key in ("chosen", "one_over_t", "best_loss", "best_score")]
    numbers += [text for one in regrets for text in (f"{one['score']:.2f}", f"{one['loss']:.4f}")]
    assert f'<th scope="row">2 second</th>{"".join(f"<td>{number}</td>" for number in numbers)}' in text
    (other / "coefficient.json").unlink()
    assert 'id="chart-coefficient-2-2-t"' not in page_of(read_runs([run, other]))


def test_data_that_moved_is_named_by_a_setting_and_other_data_are_refused(
    run, found, data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("pm_hf.reports.page.importlib.util.find_spec", lambda name: None)
    copy, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(run, copy)
    shutil.copytree(data, moved)
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace(str(data), str(tmp_path / "gone")))
    assert main(["inspect", "--coefficient", str(copy)]) == 2
    assert "gone" in capsys.readouterr().err
    assert main(["inspect", "--coefficient", str(copy), f"data_dir={moved}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"] == found["tasks"]
    write_data(moved, per_class=13)
    assert main(["inspect", "--coefficient", str(copy), f"data_dir={moved}"]) == 2
    printed = capsys.readouterr().err.splitlines()[-1]
    assert "labels or rows of first, second, third are not those that it was trained on; use data_dir=FOLDER" in printed


def test_tasks_without_a_line_are_left_out_with_the_reason(run, found, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for folder, change in zip(folders(copy)[1:], ({"coefficient": None}, {"train_from": "last"}), strict=True):
        step = json.loads((folder / "step.json").read_text())
        (folder / "step.json").write_text(json.dumps(step | change))
    (copy / "coefficient.json").unlink()
    left = merge_line(copy)
    assert left["tasks"] == []
    assert left["skipped"] == [
        {"task": "second", "reason": "it has no coefficient"},
        {"task": "third", "reason": "it was trained from last, so its Δ does not start at the merge before it"},
    ]
    assert "task second left out: it has no coefficient" in module.merge_line_table(left)
    shutil.rmtree(folders(copy)[2])
    shutil.rmtree(folders(copy)[1])
    with pytest.raises(InputError, match="no task was folded into another, 1 finished; a merge line needs two"):
        merge_line(copy)


OFF_THE_LINE = {
    "free": ({"method": "pm_gram"}, "merge.freedom free solves for the whole matrix"),
    "module": ({"merge": {"freedom": "module"}}, "merge.freedom module has a coefficient for each module"),
    "kernel": ({"method": "magmax"}, "the result of merge.method magmax is no step along Δ"),
    "joint": ({"method": "joint"}, "strategy.joint trains all tasks at once"),
    "individual": ({"method": "individual"}, "strategy.individual merges nothing"),
    "frozen": ({"method": "frozen"}, "trains: false leaves the backbone as it is"),
    "strict": ({"method": "best", "head": {"strict": True}}, "head.strict freezes the backbone after the first task"),
}


@pytest.mark.parametrize(("changes", "message"), OFF_THE_LINE.values(), ids=OFF_THE_LINE)
def test_runs_that_are_not_merged_along_a_line_are_refused(tmp_path, capsys, changes, message):
    folder = finished_run(tmp_path / "run", **changes)
    assert main(["inspect", "--coefficient", str(folder)]) == 2
    assert capsys.readouterr().err == f"pm-hf: {folder} has no merge line θ + αΔ: {message}\n"
    assert not (folder / "coefficient.json").exists()


def test_what_is_no_run_is_refused(tmp_path, capsys):
    folder = finished_run(tmp_path / "run")
    for argument, message in (
        (tmp_path, "holds no report.json: expected the output_dir of a run with a finished task"),
        (folder / "report.json", "report.json is a file: expected the output_dir of a run"),
    ):
        assert main(["inspect", "--coefficient", str(argument)]) == 2
        assert message in capsys.readouterr().err
    assert main(["inspect", "--coefficient", str(folder), "other"]) == 2
    assert "override 'other': expected key=value" in capsys.readouterr().err
    (folder / "coefficient.json").write_text("{}")
    assert read_runs([folder])[0].line is None
    (folder / "coefficient.json").write_text('{"mine": 1}')
    with pytest.raises(InputError, match=r"coefficient.json: it lacks metric, .*; move it away"):
        read_runs([folder])


def test_a_chosen_point_that_is_not_what_the_run_measured_is_noted(run, found):
    record = TaskRecord.load(folders(run)[1] / "step.json")
    record.scores["class_incremental"][0] += 0.25
    (note,) = module._notes(record, found["tasks"][0]["points"], "class_incremental")
    assert note.startswith("scores at the chosen coefficient differ by up to 0.25 from those in step.json")
