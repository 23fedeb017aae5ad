import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from pm_hf.merging.coefficient import fixed_coefficient
from pm_hf.reports.card import loading_lines
from pm_hf.reports.run_charts import means_chart, plot_means
from pm_hf.reports.verdict import Group
from pm_hf.runs.records import Report, TaskRecord, read_coefficient

SCORES = [[0.9, None, None], [0.6, 0.8, None], [0.5, 0.7, 1.0]]
INSIDE = [[0.9, None, None], [0.8, 0.9, None], [0.7, 0.9, 1.0]]


ONE = {"class_incremental": [[0.9]], "task_incremental": [[0.9]]}


@pytest.fixture
def report(tmp_path):
    return Report(
        folder=tmp_path,
        method="pm",
        seed=3,
        scenario="class_incremental",
        tasks=["news", "a task with a long name", "mail"],
        metric="class_incremental",
        matrices={"class_incremental": SCORES, "task_incremental": INSIDE},
        test_rows=[100, 50, 50],
        alphas=[fixed_coefficient(1.0, 1), fixed_coefficient(0.4, 2), fixed_coefficient(0.25, 3)],
        seconds=12.5,
        notes=["task mail: the past has almost no weight"],
    )


def test_metrics_are_those_of_the_matrix(report):
    metrics = report.metrics
    assert metrics["ACC"] == pytest.approx((0.5 + 0.7 + 1.0) / 3)
    assert metrics["AAA"] == pytest.approx((0.9 + 0.7 + 2.2 / 3) / 3)
    assert metrics["BWT"] == pytest.approx((-0.4 - 0.1) / 2)
    assert metrics["forgetting"] == pytest.approx((0.4 + 0.1) / 2)
    assert metrics["task_incremental"]["ACC"] == pytest.approx((0.7 + 0.9 + 1.0) / 3)


def test_accuracy_pooled_over_test_rows_weights_the_tasks_by_their_size(report):
    assert report.metrics["ACC_samples"] == pytest.approx((50 + 35 + 50) / 200)


def test_one_task_has_no_forgetting(report):
    one = replace(report, tasks=["news"], matrices=ONE, test_rows=[100], alphas=[None])
    assert one.metrics["BWT"] is None
    assert one.metrics["forgetting"] is None
    assert one.metrics["ACC"] == one.metrics["AAA"] == one.metrics["ACC_samples"] == 0.9
    assert "BWT –" in one.table()


def test_table_shows_every_score_once_in_its_place(report):
    lines = report.table().splitlines()
    assert lines[0] == "pm, seed 3: accuracy on each task (row) after each task (column)"
    assert lines[1].split() == ["0", "1", "2"]
    assert lines[2].split() == ["news", "0.900", "0.600", "0.500"]
    assert lines[3].removeprefix("a task with a long name").split() == ["–", "0.800", "0.700"]
    assert lines[4].split() == ["mail", "–", "–", "1.000"]
    assert len({len(line) for line in lines[1:5]}) == 1  # the columns stand under each other


def test_table_shows_metrics_coefficients_and_notes(report):
    table = report.table()
    assert "ACC 0.733  AAA 0.778  BWT -0.250  forgetting 0.250" in table
    assert "inside each task's own classes: ACC 0.867" in table
    assert "coefficient used: 1.000 0.400 0.250" in table
    assert "1/t: 1.000 0.500 0.333" in table
    assert table.endswith("note: task mail: the past has almost no weight")


def test_table_without_coefficients_leaves_their_lines_out(report):
    assert "coefficient" not in replace(report, alphas=[None] * 3).table()


def test_report_file_holds_everything_but_the_folder(report, tmp_path):
    report.save()
    found = json.loads((tmp_path / "report.json").read_text())
    assert "folder" not in found
    assert found["scores"] == SCORES
    assert found["task_incremental"] == INSIDE
    assert [read_coefficient(alpha).used for alpha in found["coefficients"]] == [1.0, 0.4, 0.25]
    assert {alpha["source"] for alpha in found["coefficients"]} == {"given"}
    assert found["metrics"] == report.metrics
    assert (found["method"], found["seed"], found["seconds"]) == ("pm", 3, 12.5)
    assert found["scenario"] == "class_incremental"
    assert found["notes"] == report.notes
    assert set(found["versions"]) >= {"python", "torch", "transformers", "peft", "accelerate", "datasets"}
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_saving_twice_gives_the_same_bytes(report, tmp_path):
    report.save()
    before = (tmp_path / "report.json").read_bytes()
    report.save()
    assert (tmp_path / "report.json").read_bytes() == before


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_loading_lines_run_as_they_are_printed(tiny_base, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=3)
    config = LoraConfig(r=2, target_modules=["key"], task_type="SEQ_CLS")
    get_peft_model(base, config).save_pretrained(tmp_path / "merged")
    (tmp_path / "merged" / "labels.json").write_text(json.dumps({"classifier": ["a", "b", "c"]}))
    place = {"json": json, "PeftModel": PeftModel, "open": lambda path: io.StringIO(Path(path).read_text())}
    place["AutoModelForSequenceClassification"] = AutoModelForSequenceClassification
    exec(loading_lines(str(tiny_base), tmp_path / "merged", "classifier"), place)
    assert place["model"].config.id2label == {0: "a", 1: "b", 2: "c"}
    assert place["model"].base_model.model.classifier.modules_to_save["default"].weight.shape == (3, 32)


def test_plot_writes_a_picture(report, tmp_path):
    pytest.importorskip("matplotlib")
    short = replace(report, method="sequential", tasks=["news"], matrices=ONE)
    plot_means([report, short], tmp_path / "plot.png")
    content = (tmp_path / "plot.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 5000


def test_plot_draws_the_mean_accuracy_of_the_tasks_seen(report, tmp_path):
    (series,) = means_chart([Group("pm", [report])]).series
    assert series.name == "pm (0.733)"
    assert series.y == pytest.approx([0.9, 0.7, 2.2 / 3])
    plot_means([report], tmp_path / "plot.svg")
    (heights,) = re.findall(r'<path class="c0" d="(M.*?)"', (tmp_path / "plot.svg").read_text())[:1]
    first, second, third = (float(point.split()[1]) for point in heights[1:].split("L"))
    assert (second - third) / (second - first) == pytest.approx((2.2 / 3 - 0.7) / 0.2, abs=0.01)


def test_errors_of_the_merges_are_told_where_there_are_any(report):
    assert "relative error" not in replace(report, merge_errors=[0.0, 0.0, 0.0]).table()
    found = replace(report, merge_errors=[0.0, 0.0123, 0.5])
    assert "relative error of each merge: 0.0e+00 1.2e-02 5.0e-01" in found.table()
    assert found.to_dict()["merge_errors"] == [0.0, 0.0123, 0.5]


STEP = {
    "task": "news",
    "labels": ["a", "b"],
    "coefficient": {"raw": 0.4, "used": 0.4, "numerator": None, "past": None, "current": None, "one_over_t": 0.5}
    | {"modules": None, "note": "given"},
    "scores": {"class_incremental": [0.5, None]},
    "training_loss": 0.25,
    "best_step": 3,
    "best_loss": 0.2,
    "optimizer_steps": 12,
    "factors": {"1": 12},
    "log": [[1, 0.5, 1.0]],
    "threads": 2,
    "notes": ["a note"],
    "of a later version": 1,
}


def test_a_task_s_record_keeps_what_its_file_says(tmp_path):
    path = tmp_path / "step.json"
    path.write_text(json.dumps(STEP))
    record = TaskRecord.load(path)
    record.save(path)
    again = json.loads(path.read_text())
    known = {key: value for key, value in STEP.items() if key not in ("coefficient", "of a later version")}
    assert {key: again[key] for key in known} == known
    assert again["coefficient"] == STEP["coefficient"] | {"source": "given"}
    assert TaskRecord.load(path).to_dict().keys() == record.to_dict().keys()
    assert (record.optimizer_steps, record.training.best) == (12, {"best_step": 3, "best_loss": 0.2})
    assert record.test_fingerprint is None  # of before it existed


def test_a_record_without_training_has_no_keys_of_one(tmp_path):
    path = tmp_path / "step.json"
    path.write_text(json.dumps({"task": "news"}))
    record = TaskRecord.load(path)
    assert record.training is None
    assert record.optimizer_steps == 0
    assert not {"training_loss", "log", "factors", "cut_rows"} & record.to_dict().keys()


@pytest.mark.parametrize(
    ("content", "source"),
    [
        ({"numerator": 1.0, "note": None}, "closed_form"),
        ({"numerator": None, "note": "given"}, "given"),
        ({"numerator": None, "note": None}, "average"),
        ({"numerator": None, "note": None, "source": "line_search"}, "line_search"),
    ],
)
def test_who_decided_a_coefficient_is_told_of_older_files_too(content, source):
    assert read_coefficient({"raw": 0.5, "used": 0.5, "one_over_t": 0.5, **content}).source == source


def test_a_task_named_by_a_number_is_shown_with_its_classes(report, tmp_path):
    tasks = ["classes-00", "classes-01", "mail"]
    classes = {"classes-00": ["ant", "bee"], "classes-01": ["cat", "cow", "dog", "eel"]}
    numbered = replace(report, tasks=tasks, classes=classes)
    lines = numbered.table().splitlines()
    assert lines[2].startswith("classes-00 (ant, bee)  ")
    assert lines[3].startswith("classes-01 (cat, cow, …, 4 classes)  ")
    assert lines[4].startswith("mail  ")
    assert len({len(line) for line in lines[1:5]}) == 1
    numbered.save()
    assert Report.load(tmp_path / "report.json").titles == numbered.titles
    assert "classes" not in report.to_dict()
