"""A dry run: what it says is what the run then does, and nothing is left behind."""

import json
from pathlib import Path

import pytest
from helpers import refusal
from helpers.rehearsal import settings as language_settings
from helpers.streams import settings, write_data

from pm_hf.cli import main
from pm_hf.runs.learner import learn
from pm_hf.runs.preview import preview


def steps(folder):
    return [json.loads(path.read_text()) for path in sorted(Path(folder).glob("task-*/step.json"))]


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "pm", "training__per_device_train_batch_size": 5},
        {"method": "best", "training__gradient_accumulation_steps": 3},
        {"method": "pm", "stream__max_length": 4, "training__dataloader_drop_last": True},
        {"method": "joint", "training__max_steps": 7},
        {"method": "frozen"},
    ],
    ids=str,
)
def test_rows_steps_and_sizes_are_those_of_the_run(changes, tiny_base, stream_data, tmp_path):
    config = settings(tiny_base, stream_data(12), tmp_path / "run", **changes)
    said = preview(config)
    assert not (tmp_path / "run").exists()
    learn(config)
    done = steps(tmp_path / "run")
    assert [task.name for task in said.tasks] == [step["task"] for step in done]
    assert [task.steps for task in said.tasks] == [step.get("optimizer_steps", 0) for step in done]
    assert [task.test for task in said.tasks] == [step["test_rows"] for step in done]
    if "stream__max_length" in changes:
        assert any(task.cut for task in said.tasks)
        assert all(task.cut >= step["cut_rows"] for task, step in zip(said.tasks, done, strict=True))
    again = preview(config)
    assert again.done == len(done)
    assert f"{len(done)} of {len(done)} tasks are finished there" in str(again)


@pytest.mark.parametrize("samples", [0, 3])
def test_rehearsed_rows_count_as_steps(samples, language_data, tmp_path):
    config = language_settings(
        language_data, tmp_path / "run", strategy__base_samples=samples, training__num_train_epochs=1
    )
    config["stream"]["tasks"] = config["stream"]["tasks"][:2]
    said = preview(config)
    learn(config)
    assert [task.steps for task in said.tasks] == [step["optimizer_steps"] for step in steps(tmp_path / "run")]
    assert ("3 samples of the base" in str(said)) == (samples > 0)
    assert "at most 12 written rows" in str(said)


def test_it_prints_the_tasks_and_what_is_trained(tiny_base, tmp_path, capsys, no_training):
    config = settings(tiny_base, write_data(tmp_path / "data"), tmp_path / "run", "best")
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    assert main(["train", "--config", str(tmp_path / "c.yaml"), "--dry-run", "lora.r=3"]) == 0
    printed = capsys.readouterr().out
    assert "nothing is trained or written" in printed
    assert "trained: LoRA of rank 3 in" in printed
    assert "trained against: all classes seen so far" in printed
    assert [line.split()[0] for line in printed.splitlines() if line[:1].isdigit()] == ["1", "2", "3"]
    assert printed.splitlines()[-1] == f"would write to {tmp_path / 'run'}"
    assert not (tmp_path / "run").exists()


def test_parameters_are_those_of_the_adapter(tiny_base, tmp_path):
    from safetensors.torch import load_file

    config = settings(tiny_base, write_data(tmp_path / "data"), tmp_path / "run", training__max_steps=1)
    said = preview(config)
    learn(config)
    saved = load_file(next((tmp_path / "run").glob("task-00-*/adapter/adapter_model.safetensors")))
    factors = {name: value.numel() for name, value in saved.items() if ".lora_" in name}
    assert said.parameters == sum(factors.values())
    assert said.modules == len(factors) // 2
    assert said.head == sum(value.numel() for name, value in saved.items() if ".lora_" not in name)


def test_timed_steps_leave_nothing(tiny_base, tmp_path, capsys):
    config = settings(tiny_base, write_data(tmp_path / "data"), tmp_path / "run")
    said = preview(config, timed=2)
    assert said.seconds is not None
    assert 0 < said.seconds < 60
    assert f"time: {said.seconds:.3g} s a step here" in str(said)
    assert not (tmp_path / "run").exists()


def test_what_a_run_refuses_a_dry_run_refuses(tiny_base, tmp_path, capsys):
    config = settings(tiny_base, write_data(tmp_path / "data"), tmp_path / "run", lora__target_modules=["nowhere"])
    assert refusal(preview, config) == refusal(learn, config)
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    assert main(["train", "--config", str(tmp_path / "c.yaml"), "--timed", "3"]) == 2
    assert "--timed takes a number of steps beside --dry-run, found 3" in capsys.readouterr().err
