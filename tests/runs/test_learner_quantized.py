"""Streams on a base in 4 or 8 bits: what is trained, measured, merged, written and scored is beside quantized weights,
and what is published is a plain adapter of the base."""

import shutil
from importlib.metadata import version

import pytest
import torch
import transformers
from helpers import refusal
from helpers.models import OLD_NAME, log_probabilities
from helpers.processes import run as in_processes
from helpers.rehearsal import settings as rehearsing
from helpers.streams import LANGUAGE_TASKS, contents, dense, loaded, same_tensors, settings, steps
from helpers.streams import language_settings as language
from peft import PeftModel
from transformers import BitsAndBytesConfig

import pm_hf.runs.rehearsal
from pm_hf.adapters.folder import open_adapter
from pm_hf.config.loading import load_config
from pm_hf.data.encoders import make_encoder
from pm_hf.data.pool import Pool
from pm_hf.data.stream import load_stream
from pm_hf.measuring.analytic_head import HeadStatistics
from pm_hf.merging.curvature import Curvature
from pm_hf.models.contexts import keep_differentiable
from pm_hf.models.export import export_model
from pm_hf.runs.learner import evaluate, learn

pytestmark = pytest.mark.filterwarnings(OLD_NAME)
BITS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "int8": {"load_in_8bit": True},
}
QUICK = {"training__num_train_epochs": 3, "perturbation__scale": 0.3}


@pytest.fixture(scope="module", params=["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def run(request, language_data, tmp_path_factory):
    """(bits, settings, folder) of a finished run of two tasks by `pm`, begun with one of them and then extended."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    config = language(language_data, folder, model__quantization=request.param, **QUICK)
    learn(config | {"stream": config["stream"] | {"tasks": config["stream"]["tasks"][:1]}})
    learn(config)
    return request.param, config, folder


def quantized(config, adapter, bits):
    """The adapter on the quantized base, by transformers and peft alone."""
    how = {"quantization_config": BitsAndBytesConfig(**BITS[bits]), "device_map": "cpu"}
    base = transformers.AutoModelForCausalLM.from_pretrained(config["model"]["base"], **how)
    keep_differentiable(base)  # bitsandbytes' layout for inference on some CPUs fails for layers as small as these
    return PeftModel.from_pretrained(base, str(adapter)).eval()


def losses(model, config):
    """The mean loss of each task's test rows, a row at a time."""
    encoder, means = make_encoder(load_config(config)), []
    for task in load_stream(load_config(config)).tasks:
        pairs = zip(task.test.inputs, task.test.labels, strict=True)
        rows = [log_probabilities(model, encoder.prompt(p), encoder.completion(p, a))[0] for p, a in pairs]
        means.append(-float(torch.cat(rows).mean()))
    return means


def test_the_merge_is_a_plain_adapter_that_has_the_scores_on_the_quantized_base(run):
    bits, config, folder = run
    merged = open_adapter(folder / "merged")
    assert merged.config["base_model_name_or_path"] == config["model"]["base"]
    assert not any("quant" in key for key, value in merged.config.items() if value)
    reported = steps(folder)[1]["scores"]["loss"]
    # 8 bits choose the columns that they keep whole from all rows of a batch
    assert losses(quantized(config, folder / "merged", bits), config) == pytest.approx(
        reported, rel=1e-4 if bits == "nf4" else 2e-2
    )
    whole = losses(loaded(config, folder / "merged"), config)
    assert whole == pytest.approx(reported, rel=0.3)
    assert whole != pytest.approx(reported, rel=1e-4)


def test_the_merge_is_exactly_that_of_the_task_adapters(run):
    _, _, folder = run
    alphas = [step["coefficient"]["used"] for step in steps(folder)]
    assert alphas[0] == pytest.approx(1, abs=1e-6)
    assert 0 < alphas[1] < 1
    first, second = (dense(folder / f"task-0{at}-{name}" / "adapter") for at, name in enumerate(LANGUAGE_TASKS))
    assert {step["factors"] and len(step["factors"]) for step in steps(folder)} <= {2, 3}  # perturbed
    for module, value in dense(folder / "merged").items():
        torch.testing.assert_close(value, first[module] + alphas[1] * second[module], rtol=1e-5, atol=1e-6)


def test_a_run_that_was_extended_is_the_run_that_had_both_tasks_at_once(run, tmp_path):
    bits, config, folder = run
    learn(config | {"output_dir": str(tmp_path / "run")})
    assert same_tensors(tmp_path / "run" / "merged", folder / "merged")
    for name in ("scores", "coefficient", "training_loss"):
        assert [s[name] for s in steps(tmp_path / "run")] == [s[name] for s in steps(folder)]


def test_what_was_measured_says_on_which_base_and_the_report_too(run, language_data, tmp_path):
    bits, config, folder = run
    assert Curvature.load(folder / "task-01-second" / "curvature.safetensors").settings.base == bits
    assert load_config(folder / "config.yaml").model.quantization == bits
    assert all(step["versions"]["bitsandbytes"] == version("bitsandbytes") for step in steps(folder))
    again = learn(config)
    assert any(note.startswith(f"model.quantization was {bits}: ") for note in again.notes)
    other = language(language_data, tmp_path / "other", start_from=str(folder / "merged"), **QUICK)
    message = refusal(learn, other)
    assert f"'{bits}')" in message
    assert "'full')" in message
    assert "sums are never mixed" in message
    assert not (tmp_path / "other").exists()


def test_the_adapter_is_evaluated_on_either_base_and_exported_on_the_whole_one(run, tmp_path):
    bits, config, folder = run
    here = evaluate(load_config(config), folder / "merged")
    there = evaluate(load_config(config, ["model.quantization=null"]), folder / "merged")
    assert [here[name]["loss"] for name in LANGUAGE_TASKS] == steps(folder)[1]["scores"]["loss"]
    assert [there[name]["loss"] for name in LANGUAGE_TASKS] == pytest.approx(
        losses(loaded(config, folder / "merged"), config), rel=1e-4
    )
    export_model(folder / "merged", tmp_path / "whole")
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    assert losses(exported, config) == pytest.approx([there[name]["loss"] for name in LANGUAGE_TASKS], rel=1e-4)


@pytest.mark.parametrize("method", ["best", pytest.param("pm_gram_lda", marks=pytest.mark.slow)])
def test_the_analytic_head_is_that_of_features_on_the_quantized_base(tiny_base, stream_data, tmp_path, method):
    changes = {"groups": 2, "training__num_train_epochs": 1, "model__quantization": "nf4"}
    config = settings(tiny_base, stream_data(24), tmp_path / "run", method, **changes)
    report = learn(config)
    assert min(report.scores[-1]) > 0.8
    statistics = HeadStatistics.load(next((tmp_path / "run").glob("task-01-*/head_statistics.safetensors")))
    assert statistics.base == "nf4"
    begun = {"start_from": str(tmp_path / "run" / "merged"), "model__quantization": None}
    other = settings(tiny_base, stream_data(24), tmp_path / "other", method, **changes | begun)
    message = refusal(learn, other)
    assert "its features were measured on the base in nf4, model.quantization has it in full precision" in message


def test_analytic_answers_are_of_one_base(language_data, tmp_path):
    config = language(language_data, tmp_path / "run", method="frozen", model__quantization="nf4")
    learn(config)
    found = evaluate(load_config(config), tmp_path / "run" / "merged")
    assert min(scores["class_incremental"] for scores in found.values()) > 0.5
    other = load_config(config, ["model.quantization=null"])
    assert "measured on the base in nf4" in refusal(evaluate, other, tmp_path / "run" / "merged")


@pytest.mark.slow
def test_written_rows_are_those_of_a_writer_beside_quantized_weights(language_data, tmp_path, monkeypatch):
    """Kept writers write again what the pool has, so that the adapter on disk is the writer that was trained."""
    changes = {"tasks": list(LANGUAGE_TASKS), "model__quantization": "nf4", "training__num_train_epochs": 1}
    changes |= {"merge__coefficient": 0.5, "strategy__pool_rows": 8, "strategy__base_samples": 2}
    seen, rehearsed = [], pm_hf.runs.rehearsal.Rehearsal.rehearsed

    def watched(self, *args):
        seen.append(rehearsed(self, *args).pool)
        return pm_hf.runs.rehearsal.Rehearsed(seen[-1])

    monkeypatch.setattr(pm_hf.runs.rehearsal.Rehearsal, "rehearsed", watched)
    learn(rehearsing(language_data, tmp_path / "pool", **changes))
    learn(rehearsing(language_data, tmp_path / "writers", strategy__replay_pool=False, **changes))
    pool = Pool.load(next((tmp_path / "pool").glob("task-00-*/pool.jsonl")))
    assert len(pool.of_tasks.rows) > 0
    assert [bool(found.of_tasks.rows) for found in seen] == [False, True, False, True]
    assert seen[1].of_tasks == seen[3].of_tasks == pool.of_tasks
    assert seen[1].of_base == seen[3].of_base
    assert len(seen[1].of_base.rows) == 2
    assert same_tensors(tmp_path / "pool" / "merged", tmp_path / "writers" / "merged")


@pytest.mark.slow
def test_two_processes_train_beside_one_quantized_base_each(language_data, tmp_path):
    changes = {"model__quantization": "nf4", "training__max_steps": 3, "training__per_device_train_batch_size": 4}
    config = language(language_data, tmp_path / "run", method="pm", **changes)
    ended = in_processes(lambda rank: learn(config).scores, tmp_path / "logs")
    assert [process.error for process in ended] == [None, None]
    assert ended[0].value == ended[1].value
    assert len(steps(tmp_path / "run")) == 2


def test_nothing_of_the_run_holds_the_base(run, tmp_path):
    _, _, folder = run
    shutil.copytree(folder, tmp_path / "copy")
    assert max(map(len, contents(tmp_path / "copy").values())) < 300_000
