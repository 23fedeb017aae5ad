"""Bad input is one clear error before any training."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import main as accelerate_launch
from helpers import refusal
from helpers.processes import forked
from helpers.streams import contents, dense, settings, steps, write_yaml

import pm_hf.models.loading
from pm_hf.cli import main
from pm_hf.errors import InputError
from pm_hf.models.loading import NeedsWeightsError
from pm_hf.runs.learner import learn

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(stream_data):
    return stream_data(8)


@pytest.fixture
def refused(tiny_base, data, tmp_path, no_training):
    """refused(**changes) -> the message of the one error; nothing was trained or finished."""

    def run(base=tiny_base, **changes):
        config = settings(base, data, tmp_path / "run", **changes)
        message = refusal(learn, config)
        assert not list(tmp_path.glob("run/task-*/step.json"))
        return message

    return run


def headed(folder, config, tiny_base):
    """A tiny classifier of another architecture with the word tokenizer."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_base / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def tiny_llama(tiny_base, tmp_path_factory):
    """A classifier whose head `score` is a Linear without a bias."""
    from transformers import LlamaConfig

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=52, pad_token_id=0, max_position_embeddings=32, **sizes)
    return headed(tmp_path_factory.mktemp("llama"), config, tiny_base)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("/no/such/folder", "base model folder /no/such/folder does not exist"),
        ("package:no_such_package/model", "package no_such_package is not installed; pip install no-such-package"),
        ("package:pm_hf/no-such", "no-such does not exist"),
        ("no-such-org/no-such-model", "model.base no-such-org/no-such-model cannot be loaded"),
    ],
)
def test_missing_base_model_is_refused(refused, tmp_path, base, message):
    assert message in refused(base=base)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_base_model_without_whole_weights_is_refused(refused, tiny_base, tmp_path, damage):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    weights = base / "model.safetensors"
    whole = weights.read_bytes()
    weights.unlink()
    if damage == "truncated":
        weights.write_bytes(whole[:-100])
    assert f"model.base {base} cannot be loaded" in refused(base=base)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora__target_modules": ["no_such_layer"]}, "lora.target_modules ['no_such_layer']: "),
        ({"perturbation__scale": 1.0}, "perturbation.scale: must be in [0, 1), found 1.0"),
        ({"perturbation__scale": -0.1}, "perturbation.scale: must be in [0, 1), found -0.1"),
        ({"perturbation__probabilities": [0.2, 0.5, 0.3]}, "the probabilities of 1+ε and 1−ε must be equal"),
        ({"perturbation__probabilities": [0.5, 0.5]}, "probabilities must be three values >= 0 that sum to 1"),
        ({"curvature__samples": 0}, "curvature.samples: must be at least 1"),
        ({"training__learning_rte": 1}, "training: learning_rte are not fields of TrainingArguments"),
        ({"training__lr_scheduler_type": "no-such"}, "training.lr_scheduler_type: expected linear or cosine or "),
        ({"training__eval_strategy": "epoch"}, "eval_strategy"),
        ({"start_from": "/no/such/adapter"}, "adapter /no/such/adapter is not a folder"),
        ({"stream__label_column": "intent"}, "missing column intent; found text, label"),
        ({"stream__train": "none.csv"}, "none.csv does not exist"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_setting_is_refused_before_training(refused, changes, message):
    assert message in refused(**changes)


def test_mistake_found_late_does_not_lock_the_output_folder(refused, tiny_base, data, tmp_path):
    refused(lora__target_modules=["no_such_layer"])
    learn(settings(tiny_base, data, tmp_path / "run", method="frozen", groups=1))
    assert len(steps(tmp_path / "run")) == 1


@pytest.mark.parametrize("method", ["pm_gram_lda", "best", "frozen"])
def test_analytic_head_on_a_head_without_bias_is_refused(refused, tiny_llama, method):
    message = refused(base=tiny_llama, method=method, lora__target_modules=["k_proj", "v_proj"])
    assert message == "head.kind lda needs a head with a bias, score has none; use head.kind: linear"


def test_linear_head_without_bias_works(tiny_llama, data, tmp_path):
    config = settings(tiny_llama, data, tmp_path / "run", groups=2, lora__target_modules=["k_proj", "v_proj"])
    report = learn(config)
    assert [step["head"] for step in steps(tmp_path / "run")] == ["score", "score"]
    assert len(report.scores) == 2
    assert any(value.any() for value in dense(tmp_path / "run" / "merged").values())


def test_model_without_a_classification_head_of_a_known_name_is_refused(refused, tiny_base, tmp_path):
    from transformers import XLNetConfig

    sizes = {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24, "vocab_size": 52}
    base = headed(tmp_path / "xlnet", XLNetConfig(**sizes), tiny_base)
    assert "has no head named classifier or score; use a model for classification" in refused(
        base=base, lora__target_modules=["layer_1"]
    )


def test_non_empty_folder_without_a_config_is_refused(refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    message = refused()
    assert message == f"output_dir {tmp_path / 'run'} is not empty and holds no config.yaml; choose another folder"
    assert contents(tmp_path / "run") == {"thesis.txt": b"precious"}


def test_output_that_is_a_file_is_refused(refused, tmp_path):
    (tmp_path / "run").write_text("precious")
    assert str(tmp_path / "run") in refused()
    assert (tmp_path / "run").read_text() == "precious"


def test_folder_of_another_config_is_refused(tiny_base, data, tmp_path):
    learn(settings(tiny_base, data, tmp_path / "run", method="frozen", groups=1))
    before = contents(tmp_path / "run")
    with pytest.raises(InputError, match="holds another run; use its config or another output_dir: .*seed: 0 in the"):
        learn(settings(tiny_base, data, tmp_path / "run", method="frozen", groups=1, seed=1))
    assert contents(tmp_path / "run") == before


UNTRAINED = {"training__learning_rate": 0.0, "training__num_train_epochs": 1, "groups": 2}


def test_zero_curvature_is_one_clear_error_where_that_is_wanted(tiny_base, data, tmp_path):
    asked = UNTRAINED | {"merge__on_zero_curvature": "error"}
    message = refusal(learn, settings(tiny_base, data, tmp_path / "run", **asked))
    assert "the curvature is zero or not finite along the task vector (denominator 0)" in message
    assert "in 4 modules, first ['bert.encoder.layer.0.attention.self.key'" in message
    assert "on_zero_curvature: average" in message
    assert not list(tmp_path.glob("run/task-*/step.json"))
    assert not (tmp_path / "run" / "merged").exists()


@pytest.mark.parametrize("freedom", ["global", "module"])
def test_zero_curvature_averages_and_says_so(tiny_base, data, tmp_path, freedom):
    report = learn(settings(tiny_base, data, tmp_path / "run", **UNTRAINED, merge__freedom=freedom))
    coefficients = [step["coefficient"] for step in steps(tmp_path / "run")]
    assert [c["used"] for c in coefficients] == [1, 0.5]
    assert [c["note"] for c in coefficients] == ["zero curvature: averaged"] * 2
    said = [f"task {name}: zero curvature: averaged" for name in ("first", "second")]
    assert [note for note in report.notes if "zero curvature" in note] == said
    assert all(f"note: {note}" in report.table() for note in said)


def test_a_run_that_ended_for_a_zero_curvature_goes_on_by_averaging(tiny_base, data, tmp_path):
    wanted = {"groups": 2, "merge__on_zero_curvature": "error", "training__num_train_epochs": 1}
    half = settings(tiny_base, data, tmp_path / "run", **wanted, curvature__samples=8)
    half["stream"]["class_groups"] = {"first": ["apple", "bird"], "second": ["car"]}  # one class: its Fisher is zero
    with pytest.raises(InputError, match="the curvature is zero"):
        learn(half)
    half["merge"]["on_zero_curvature"] = "average"
    assert len(learn(half).tasks) == 2


def test_command_line_prints_bad_input_as_one_line(tiny_base, data, tmp_path, capsys):
    path = write_yaml(tmp_path / "c.yaml", settings(tiny_base, data, tmp_path / "run", typo=1, lora__r="two"))
    assert main(["train", "--config", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert err.startswith(f"pm-hf: config {path}: 2 problems: typo: unknown key")


def launch(*command):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )


def test_recipe_with_bad_input_exits_with_two_and_one_line(tiny_base, data, tmp_path):
    path = write_yaml(tmp_path / "bad.yaml", settings(tiny_base, data, tmp_path / "run", lora__r=0))
    done = launch("recipes/train.py", "--config", str(path))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"pm-hf: config {path}: lora.r: must be in [1, 8192], found 0\n"


@pytest.mark.slow
def test_recipe_runs_under_accelerate_launch(tiny_base, data, tmp_path, monkeypatch):
    config = settings(tiny_base, data, tmp_path / "unused", groups=2, training__num_train_epochs=1)
    path = write_yaml(tmp_path / "good.yaml", config)
    arguments = ["--num_processes", "1", "--cpu", "recipes/train.py", "--config", str(path)]
    arguments += [f"output_dir={tmp_path / 'run'}", "method=average"]
    monkeypatch.setattr(sys, "argv", ["accelerate launch", *arguments])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(ROOT)
    status, said = forked(accelerate_launch)  # the recipe itself is a new interpreter
    assert status == 0, said
    assert f"merged adapter: {tmp_path / 'run' / 'merged'}" in said
    assert "average, seed 0: accuracy on each task" in said
    assert [step["coefficient"]["used"] for step in steps(tmp_path / "run")] == [1, 0.5]
    assert not (tmp_path / "unused").exists()


def test_a_config_file_of_the_user_is_not_overwritten(stream_config):
    folder = Path(stream_config["output_dir"])
    folder.mkdir()
    text = f"# mine\n{yaml.safe_dump(stream_config)}"
    (folder / "config.yaml").write_text(text)
    with pytest.raises(InputError, match="is a file of yours; choose another output_dir"):
        learn(stream_config)
    assert (folder / "config.yaml").read_text() == text


def test_strict_and_other_heads_are_not_mixed(stream_config, tmp_path):
    learn(stream_config, method="best", **{"stream.class_groups": {"x": ["apple", "bird"]}})
    changes = {"output_dir": str(tmp_path / "next"), "stream.class_groups": {"y": ["car", "dog"]}}
    changes |= {"head.strict": True, "start_from": str(Path(stream_config["output_dir"]) / "merged")}
    with pytest.raises(InputError, match="its head was made with head.strict: False, the config says True"):
        learn(stream_config, method="best", **changes)


def test_a_model_that_needs_its_weights_is_checked_when_the_first_task_begins(tiny_base, data, tmp_path, monkeypatch):
    def none(*_):  # as for GGUF, and for code of its own
        raise NeedsWeightsError

    monkeypatch.setattr(pm_hf.models.loading, "_skeleton", none)
    config = settings(tiny_base, data, tmp_path / "run", groups=2, curvature__max_gib=1e-6)
    assert "curvature.max_gib is 1e-06" in refusal(learn, config)
    assert not list((tmp_path / "run").glob("task-*/adapter"))
