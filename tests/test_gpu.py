"""On a CUDA GPU: what the CPU gives. Run by hand on such a machine: PM_HF_TEST_GPU=1 pytest tests/test_gpu.py"""

import json

import helpers.per_example as slow
import pytest
import torch
from conftest import GPU
from helpers.models import OLD_NAME
from helpers.per_example import batches, examples
from helpers.streams import dense, first, merged_accuracy, settings, steps, trained_adapter
from helpers.streams import language_settings as language

from pm_hf import estimate_curvature, learn_coefficients, merge_adapters
from pm_hf.config.loading import load_config
from pm_hf.config.schema import ModelSettings
from pm_hf.data.stream import load_stream
from pm_hf.models.loading import load_base
from pm_hf.runs.learner import evaluate, learn

pytestmark = [
    pytest.mark.skipif(not GPU, reason="needs a CUDA GPU and PM_HF_TEST_GPU=1"),
    pytest.mark.filterwarnings(OLD_NAME),
]


@pytest.fixture(scope="module")
def data(stream_data):
    return stream_data(24)


@pytest.mark.parametrize("kind", ["fisher", "gram", "factored"])
def test_curvature_is_that_of_the_cpu(tiny_base, kind):
    model, rows = slow.task_model(tiny_base), batches(examples(11), 4)
    here = estimate_curvature(model, rows, adapter="task", kind=kind)
    there = estimate_curvature(model.to("cuda"), rows, adapter="task", kind=kind)
    for name in here.modules:
        assert torch.allclose(here.sum_of(name), there.sum_of(name), rtol=1e-3, atol=1e-6 * here.sum_of(name).max())
        assert there.sum_of(name).device.type == "cpu"


@pytest.mark.parametrize("method", ["pm", "best", "ewc", "olora", "sfa", "slao", "base_kl", "pm_gram_lda", "magmax"])
def test_streams_train_on_the_gpu_with_the_factors_of_the_cpu(tiny_base, data, tmp_path, method):
    reports = {}
    for device in ("cpu", "cuda"):
        config = settings(tiny_base, data, tmp_path / device, method, groups=2, training__use_cpu=device == "cpu")
        reports[device] = learn(config)
    factors = [[point[2] for step in steps(tmp_path / device) for point in step["log"]] for device in reports]
    assert factors[0] == factors[1]
    here, there = (reports[device].metrics["ACC"] for device in reports)
    assert there > here - 0.2  # dropout draws other numbers there
    again = load_config(tmp_path / "cuda" / "config.yaml", (), {"training.use_cpu": True})
    found = evaluate(again, tmp_path / "cuda" / "merged")  # what was trained there is read here
    assert {name: scores["class_incremental"] for name, scores in found.items()} == pytest.approx(
        dict(zip(first(2), reports["cuda"].scores[-1], strict=True)), abs=0.1
    )


@pytest.mark.parametrize("model", ["llama", "t5"])
def test_language_streams_are_scored_as_on_the_cpu(language_data, tmp_path, model):
    learn(language(language_data, tmp_path / "run", model))
    for name, value in dense(tmp_path / "run" / "merged").items():
        assert value.isfinite().all(), name
    config = load_config(tmp_path / "run" / "config.yaml")
    here, there = (
        evaluate(load_config(config, (), {"training.use_cpu": cpu}), tmp_path / "run" / "merged")
        for cpu in (True, False)
    )
    for name, scores in here.items():
        assert there[name]["loss"] == pytest.approx(scores["loss"], rel=1e-3)
        assert there[name]["exact_match"] == pytest.approx(scores["exact_match"], abs=0.2)


def test_coefficients_are_learned_on_the_gpu(stream_config, tiny_base, tmp_path):
    tasks = load_stream(load_config(stream_config)).tasks
    adapters, inputs = zip(
        *(trained_adapter(t, i, tiny_base, tmp_path / t.name) for i, t in enumerate(tasks)), strict=True
    )
    base, _ = load_base(ModelSettings(base=str(tiny_base)), [label for task in tasks for label in task.labels], 0)
    base.config.hidden_dropout_prob = 0.0
    found = [
        learn_coefficients(model, list(inputs), adapters, per="task", steps=20, learning_rate=0.01)
        for model in (base, base.to("cuda"))
    ]
    assert found[0].history == pytest.approx(found[1].history, rel=1e-2)
    merge_adapters(adapters, tmp_path / "learned", method="adamerging", learned=found[1])
    assert merged_accuracy(tasks, tiny_base, tmp_path / "learned") > 0.4
    assert json.loads((tmp_path / "learned" / "merge_report.json").read_text())["method"] == "adamerging"
