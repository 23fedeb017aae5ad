"""A base model is known to fit before its weights are read and before any folder is made."""

import json
import shutil

import pytest
import torch
from helpers.streams import settings, write_yaml

from pm_hf.cli import main
from pm_hf.config.schema import LoraSettings, ModelSettings
from pm_hf.errors import InputError
from pm_hf.models.loading import load_base
from pm_hf.models.task_model import build_task_model


def outline(base, kind="text-classification", **lora):
    """The model of a first task, from the base's configuration alone."""
    settings = ModelSettings(str(base)), LoraSettings(**lora)
    return build_task_model(*settings, ["a", "b"], None, 0, 0, kind=kind, skeleton=True).model


def test_the_skeleton_has_the_layers_of_the_model_and_no_weights(tiny_base):
    skeleton, (model, _) = (
        load_base(ModelSettings(str(tiny_base)), "ab", 0, skeleton=True)[0],
        load_base(ModelSettings(str(tiny_base)), "ab", 0),
    )
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert {name: tuple(p.shape) for name, p in skeleton.named_parameters()} == shapes


def test_the_check_reads_no_weights_and_draws_no_number(tiny_base, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "model.safetensors").unlink()
    before = torch.get_rng_state()
    assert outline(base, target_modules=["key", "value"]).config.max_position_embeddings == 32
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("targets", [None, "all-linear", ["query"], r".*layer\.\d+\.attention\.self\.(key|value)"])
def test_layers_that_are_there_are_found(tiny_base, targets):
    assert [name for name, _ in outline(tiny_base, target_modules=targets).named_parameters() if "lora_A" in name]


@pytest.mark.parametrize(
    "targets", [["no_such_layer"], ["keyy", "value"], "no_such_layer", r"layer\.9.*", ["key", "word_embeddings"]]
)
def test_layers_that_are_not_there_or_not_linear_are_refused(tiny_base, targets):
    with pytest.raises(InputError, match="lora.target_modules"):
        outline(tiny_base, target_modules=targets)


@pytest.mark.parametrize("kind", ["seq2seq-lm", "image-classification"])
def test_a_base_of_another_kind_is_refused(tiny_base, kind):
    with pytest.raises(InputError, match=f"model.base {tiny_base} cannot be loaded: Unrecognized configuration class"):
        outline(tiny_base, kind)


def test_a_wrong_value_in_its_configuration_is_told_with_its_name(tiny_base, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    values = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(values | {"hidden_size": "wide"}))
    with pytest.raises(InputError, match="field 'hidden_size': .*expected int, got str") as caught:
        outline(base)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora__target_modules": ["no_such_layer"]}, "lora.target_modules ['no_such_layer']: "),
        ({"stream__max_length": 33}, "stream.max_length 33 is more than the 32 positions"),
        (
            {"training__dataloader_drop_last": True, "training__per_device_train_batch_size": 17},
            "training.dataloader_drop_last: the smallest task has 16 training rows, less than one batch of 17",
        ),
        ({"training__learning_rate": float("nan")}, "training.learning_rate: expected a finite number"),
        ({"training__save_strategy": "best"}, "training.save_strategy: best needs training.metric_for_best_model"),
        ({"training__optim_args": "a"}, "training.optim_args: expected key=value"),
        ({"training__dataloader_persistent_workers": True}, "no data loader can be made"),
        ({"seed": 2**32}, "seed: must be in [0, 4294967296)"),
        ({"output_dir": "~nosuchuser/run"}, "output_dir: '~nosuchuser/run': there is no user"),
        ({"start_from": "~nosuchuser/run"}, "start_from: '~nosuchuser/run': there is no user"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_wrong_setting_leaves_no_folder(tiny_base, stream_data, tmp_path, capsys, changes, message):
    config = settings(tiny_base, stream_data(8), tmp_path / "run", **changes)
    assert main(["train", "--config", str(write_yaml(tmp_path / "c.yaml", config))]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert message in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["~nosuchuser/x", "a\0b", "x" * 300])
@pytest.mark.parametrize("command", ["report", "report to", "push"])
def test_a_path_that_can_be_none_is_one_line_of_any_command(tmp_path, finished_run, capsys, command, name):
    run = str(finished_run(8, method="frozen", groups=1))
    arguments = {
        "report": ["report", name],
        "report to": ["report", run, "--output", name],
        "push": ["push", name, "a/b", "--dry-run"],
    }[command]
    capsys.readouterr()
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "Traceback" not in err
