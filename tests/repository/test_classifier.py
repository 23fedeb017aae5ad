"""The control of the language streams that is a classifier on the same rows."""

import json

import pytest
import torch
import transformers
from helpers.models import OLD_NAME
from helpers.streams import language_settings as settings
from repository.test_benchmarks import ROOT, load
from safetensors.torch import load_file

from pm_hf.config.loading import load_config
from pm_hf.data.encoders import make_encoder
from pm_hf.data.stream import load_stream
from pm_hf.runs.learner import learn

pytestmark = pytest.mark.filterwarnings(OLD_NAME)


@pytest.fixture(scope="module")
def classifier():
    return load(ROOT / "benchmarks" / "streams" / "classifier.py")


@pytest.fixture
def registered(classifier, monkeypatch):
    """What `register` did is undone afterwards."""
    mapping = transformers.AutoModelForSequenceClassification._model_mapping
    monkeypatch.setitem(mapping._extra_content, transformers.LlamaConfig, classifier.PooledLlama)
    classifier.register()


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_its_rows_are_those_that_the_language_model_is_shown(classifier, language_data, tmp_path):
    config = load_config(settings(language_data, tmp_path / "run", "llama", "average", stream__max_length=7))
    made = classifier.as_classes(config, tmp_path / "rows")
    tasks, encoder = load_stream(config).tasks, make_encoder(config)
    assert [task["name"] for task in made["stream"]["tasks"]] == [task.name for task in tasks]
    for task in tasks:
        shown = encoder.prompts(task.train)
        assert encoder.cut > 0
        classes = lines(tmp_path / "rows" / f"{task.name}-train.jsonl")
        assert [encoder.tokenizer(row["text"])["input_ids"] for row in classes] == shown
        assert [f" {row['label']}" for row in classes] == task.train.labels
        assert len(lines(tmp_path / "rows" / f"{task.name}-test.jsonl")) == len(task.test)


def test_it_is_trained_with_best_on_a_pooled_head_with_a_bias(classifier, registered, language_data, tmp_path):
    config = load_config(settings(language_data, tmp_path / "run", "llama", "average"))
    report = learn(classifier.as_classes(config, tmp_path / "rows"))
    assert (report.method, report.metric, report.tasks) == ("best", "class_incremental", ["first", "second"])
    assert report.metrics["ACC"] > 0.5  # 0.25 by chance
    merged = load_file(tmp_path / "run" / "merged" / "adapter_model.safetensors")
    (weight, bias) = (next(v for name, v in merged.items() if name.endswith(f"score.{p}")) for p in ("weight", "bias"))
    assert (len(weight), len(bias)) == (4, 4)


def test_it_classifies_by_the_last_token_of_each_row(classifier):
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, num_labels=3
    )
    model = classifier.PooledLlama(config).eval()
    ids = torch.tensor([[3, 4, 5, 0], [6, 7, 8, 9]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    out = model(input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 2]))
    alone = torch.cat([model(input_ids=ids[:1, :3], attention_mask=mask[:1, :3]).logits] + [out.logits[1:]])
    torch.testing.assert_close(out.logits, alone, rtol=1e-5, atol=1e-6)
    plain = transformers.LlamaForSequenceClassification(config).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    plain.config.pad_token_id = 0
    expected = plain(input_ids=ids, attention_mask=mask).logits + model.score.bias
    torch.testing.assert_close(out.logits, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(expected, torch.tensor([0, 2])))
