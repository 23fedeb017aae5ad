import json

import numpy as np
import pytest
import torch
from helpers.streams import CLASSES, settings, write_data

from pm_hf.config.loading import load_config
from pm_hf.data.encoders import make_encoder
from pm_hf.data.stream import load_stream
from pm_hf.measuring.scores import IncrementalAccuracy, Scorer
from pm_hf.models.loading import load_base
from pm_hf.runs.right_rows import RightRows

LOGITS = np.array([[3, 1, 2, 0], [0, 1, 2, 3], [0, 5, 1, 2], [9, 0, 2, 1]], dtype=np.float32)


@pytest.fixture(scope="module")
def metric():
    return IncrementalAccuracy(keep_in_memory=True)


def test_class_incremental_accuracy_takes_the_best_of_all_classes(metric):
    found = metric.compute(predictions=LOGITS, references=[0, 3, 2, 0], own=[0, 1, 2, 3])
    assert found == {"class_incremental": 0.75, "task_incremental": 0.75}


def test_task_incremental_accuracy_takes_the_best_inside_the_task_s_classes(metric):
    found = metric.compute(predictions=LOGITS, references=[2, 3, 3, 2], own=[2, 3])
    assert found == {"class_incremental": 0.25, "task_incremental": 1.0}


def test_order_of_own_classes_does_not_matter(metric):
    assert metric.compute(predictions=LOGITS, references=[2, 3, 3, 2], own=[3, 2])["task_incremental"] == 1.0


def test_of_several_rows_of_a_label_the_largest_logit_counts(tiny_base, tmp_path):
    config = load_config(settings(tiny_base, write_data(tmp_path), tmp_path / "out"))
    task, labels = load_stream(config).tasks[1], [*CLASSES, *CLASSES[::-1]]
    model, _ = load_base(config.model, labels, seed=0)
    scorer = Scorer(config, make_encoder(config), 5, None)
    found, truth = scorer.logits(model.eval(), task, labels, "classifier")
    rows = scorer._forward(model, scorer.encoder.examples(task.test, CLASSES), "classifier")[1]
    assert torch.equal(found, torch.maximum(rows[:, : len(CLASSES)], rows[:, len(CLASSES) :].flip(1)))
    assert [CLASSES[index] for index in truth] == task.test.labels


def test_second_use_does_not_remember_the_first(metric):
    metric.compute(predictions=LOGITS, references=[0, 3, 1, 0], own=[0, 1, 2, 3])
    assert metric.compute(predictions=LOGITS[:1], references=[1], own=[0, 1])["class_incremental"] == 0.0


def test_scores_equal_a_loop_over_random_logits(metric):
    rng = np.random.default_rng(0)
    logits, own = rng.normal(size=(50, 7)).astype(np.float32), [5, 1, 4]
    truth = rng.choice(own, size=50)
    everywhere = sum(max(range(7), key=lambda c: row[c]) == t for row, t in zip(logits, truth, strict=True)) / 50
    inside = sum(max(own, key=lambda c: row[c]) == t for row, t in zip(logits, truth, strict=True)) / 50
    found = metric.compute(predictions=logits, references=truth, own=own)
    assert found == pytest.approx({"class_incremental": everywhere, "task_incremental": inside})


def test_logits_come_in_the_order_of_the_rows_whatever_the_batch_size(tiny_base, tmp_path):
    config = load_config(settings(tiny_base, write_data(tmp_path), tmp_path / "out"))
    task, encoder = load_stream(config).tasks[1], make_encoder(config)
    model, _ = load_base(config.model, CLASSES, seed=0)
    model.eval()
    logits, truth = Scorer(config, encoder, 5, None).logits(model, task, CLASSES, "classifier")
    assert [CLASSES[index] for index in truth] == task.test.labels
    rows = encoder.examples(task.test, CLASSES)
    assert len({len(row["input_ids"]) for row in rows}) > 1
    with torch.no_grad():
        alone = torch.cat([model(input_ids=torch.tensor([row["input_ids"]])).logits for row in rows])
    assert torch.allclose(logits, alone, atol=1e-5)


def test_confusions_are_the_wrong_test_rows_by_class(finished_run):
    run = finished_run(24, method="sequential")
    records = [json.loads(path.read_text()) for path in sorted(run.glob("task-*/step.json"))]
    assert any("confusions" in record for record in records)
    for seen, record in enumerate(records, start=1):
        wrong = sum(round((1 - score) * 16) for score in record["scores"]["class_incremental"])  # 2 classes of 8 rows
        shares = [sum(RightRows(**rows).mask()) / rows["count"] for rows in record["right"].values()]
        assert shares == record["scores"]["class_incremental"]
        pairs = record.get("confusions", [])
        assert len(pairs) < 20
        assert sum(count for *_, count, _ in pairs) == wrong
        assert {rows for *_, rows in pairs} <= {8}
        assert all(label != taken and {label, taken} <= set(CLASSES[: 2 * seen]) for label, taken, *_ in pairs)
        assert [count for *_, count, _ in pairs] == sorted((count for *_, count, _ in pairs), reverse=True)
