"""Trainings whose weights are spread over the processes, the launcher, and what is refused there."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from helpers import refusal
from helpers.models import OLD_NAME, lora_bert
from helpers.processes import ODD, PLAIN, SHORT, close, run, stopped
from helpers.streams import contents, dense, same_tensors, settings, steps, write_yaml
from torch import nn

import pm_hf.runs.learner
from pm_hf.adapters.folder import save_adapter
from pm_hf.models.sharded import is_sharded, plain_name, put_weights, trained_weights
from pm_hf.models.task_model import task_tensors
from pm_hf.runs.learner import learn

pytestmark = pytest.mark.filterwarnings(OLD_NAME)
ROOT = Path(__file__).parents[2]
# accelerate 1.15 shards BERT's embeddings twice unless the layer is named
SPREAD = {"training__fsdp": True, "training__fsdp_config": {"transformer_layer_cls_to_wrap": ["BertLayer"]}}


@pytest.fixture(scope="module")
def data(stream_data):
    return stream_data(8)


class Wrapped(nn.Module):
    """What torch.compile leaves where a module was."""

    def __init__(self, module):
        super().__init__()
        self._orig_mod = module


def test_wrappers_leave_no_trace_in_a_saved_adapter():
    model = lora_bert("task")
    before = task_tensors(model)[0]
    layers = model.base_model.model.bert.encoder.layer
    layers[0] = Wrapped(layers[0])
    assert any("_orig_mod" in name for name, _ in model.named_parameters())
    after = task_tensors(model)[0]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    wrapped = "module.base.layer._checkpoint_wrapped_module.key.module.weight"
    assert plain_name(wrapped) == "base.layer.key.module.weight"
    assert plain_name("_orig_mod.base_model.model.head.modules_to_save.task.out.bias") == "head.out.bias"


def test_an_adapter_without_entries_is_not_saved(tmp_path):
    factors, saved, config = task_tensors(lora_bert("task"))
    first = sorted(factors)[0]
    with pytest.raises(RuntimeError, match=f"1 of {len(factors)} tensors are empty, first {first}; .* gather them"):
        save_adapter(tmp_path / "adapter", config, factors | {first: torch.empty(0)}, saved, {})
    assert list(tmp_path.iterdir()) == []


def test_gathered_weights_are_put_back_by_name():
    trained, fresh = lora_bert(), lora_bert()
    for parameter in trained.parameters():
        parameter.data += 1
    weights = trained_weights(trained)
    assert not is_sharded(trained)
    assert len(weights) == 8
    put_weights(fresh, weights)
    for (name, one), two in zip(trained.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, two) == (plain_name(name) in weights)
    name, value = weights.popitem()
    for wrong in (weights, weights | {name: value[:1]}, weights | {name: value, "other": value}):
        with pytest.raises(RuntimeError, match="the gathered weights do not fit the model"):
            put_weights(fresh, wrong)


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"fsdp": True}, ["fsdp spreads the weights over processes and there is one"]),
        (
            {"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}},
            ["there is one", "state_dict_type: must be FULL_STATE_DICT: a checkpoint has the whole adapter"],
        ),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, ["training: ", "deepspeed"]),
    ],
    ids=str,
)
def test_spreading_that_cannot_be_is_refused(base, data, tmp_path, changes, messages):
    config = settings(base, data, tmp_path / "run", "merge_only")
    config["training"] |= changes
    found = refusal(learn, config)
    for message in messages:
        assert message in found
    assert not (tmp_path / "run").exists()


def test_penalties_that_read_whole_weights_are_refused_where_they_are_spread(base, data, tmp_path):
    config = settings(base, data, tmp_path / "run", "olora", **SPREAD)
    first, second = run(lambda _: learn(config), tmp_path / "processes")
    expected = "training: strategy.olora_weight reads whole weights at every step, FSDP and ZeRO-3 spread them"
    assert first.error == second.error == f"InputError: {expected}"


def test_every_launch_file_is_read_by_accelerate():
    files = sorted((ROOT / "configs" / "launch").glob("*.yaml"))
    assert [path.name for path in files] == ["fsdp2.yaml", "zero2.yaml", "zero3.yaml"]
    for path in files:
        found = load_config_from_file(str(path))
        assert found.num_processes == 2
        assert str(found.distributed_type.value) == ("FSDP" if path.stem == "fsdp2" else "DEEPSPEED")
        header = path.read_text().split("compute_environment")[0]
        assert "Run here: " in header
        assert "ot run" in header


@pytest.mark.slow
def test_fsdp2_learns_what_one_process_does(base, data, tmp_path):
    methods = {"merge_only": {}, "pm_gram": {"perturbation__scale": 0.0}, "base_kl": {}}

    def configured(place, method, size, **more):
        changes = PLAIN | SHORT | ODD | methods[method] | {"training__per_device_train_batch_size": size} | more
        return settings(base, data, tmp_path / place / method, method, **changes)

    def work(_):
        spread, look = [], pm_hf.runs.learner.is_sharded
        pm_hf.runs.learner.is_sharded = lambda model: spread.append(look(model)) or spread[-1]
        for method in methods:
            learn(configured("two", method, 4, **SPREAD))
        return spread

    ended = run(work, tmp_path / "processes")
    assert [end.value for end in ended] == [[True] * 6] * 2, [end.stderr for end in ended]
    for method in methods:
        learn(configured("one", method, 8))
        one, two = (tmp_path / place / method for place in ("one", "two"))
        assert contents(one).keys() == contents(two).keys()
        for left, right in zip(steps(one), steps(two), strict=True):
            assert right["coefficient"]["used"] == pytest.approx(left["coefficient"]["used"], rel=1e-4)
        for task in sorted(path.name for path in one.glob("task-*")):
            assert close(dense(one / task / "adapter"), dense(two / task / "adapter"))
            assert close(dense(one / task / "merged"), dense(two / task / "merged"))


@pytest.mark.slow
def test_a_stopped_fsdp2_training_goes_on_to_the_same_adapter(base, data, tmp_path):
    config = settings(base, data, tmp_path / "run", "pm", **SHORT, **SPREAD, training__per_device_train_batch_size=4)
    ended = stopped(write_yaml(tmp_path / "c.yaml", config), tmp_path / "stopped")
    assert [end.value for end in ended] == [1, 1], [end.stderr for end in ended]
    assert (tmp_path / "run" / "task-01-second" / "checkpoints" / "checkpoint-2").is_dir()
    for folder in ("run", "whole"):
        ended = run(
            lambda _, to=folder: learn(config, output_dir=str(tmp_path / to)) and None, tmp_path / f"p-{folder}"
        )
        assert [end.code for end in ended] == [0, 0], [end.stderr for end in ended]
    assert same_tensors(tmp_path / "run" / "merged", tmp_path / "whole" / "merged")


@pytest.mark.parametrize(
    ("command", "environment", "count"),
    [
        ("accelerate launch --num_processes 2 --cpu recipes/train.py", {}, 2),
        ("accelerate launch --cpu --num-processes=3 recipes/train.py", {}, 3),
        ("accelerate launch --cpu recipes/train.py", {}, 1),
        ("accelerate launch --num_processes 2 recipes/train.py", {"ACCELERATE_USE_CPU": "False"}, 1),
        ("accelerate launch --num_processes 2 --cpu recipes/train.py", {"LOCAL_RANK": "0"}, 1),
        ("bash", {}, 1),
    ],
)
def test_the_recipe_reads_how_many_processes_were_asked_for(monkeypatch, command, environment, count):
    recipe = runpy.run_path(str(ROOT / "recipes" / "train.py"))
    for name in recipe["STARTED"]:
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"ACCELERATE_USE_CPU": "True"} | environment).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(recipe["asked_for"].__globals__, "parents_command", command.split)
    assert recipe["asked_for"]() == count
    monkeypatch.undo()
    assert recipe["parents_command"]()


@pytest.mark.slow
def test_accelerate_launch_starts_both_processes_on_the_cpu(base, data, tmp_path):
    config = settings(base, data, tmp_path / "run", "merge_only", **SHORT, training__per_device_train_batch_size=4)
    path = write_yaml(tmp_path / "c.yaml", config)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu", "recipes/train.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--config", str(path)], capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "accelerate has started one process on the CPU; torchrun starts 2" in done.stderr
    assert done.stdout.count("merged adapter: ") == 1
    assert [step["processes"] for step in steps(tmp_path / "run")] == [2, 2]
    assert json.loads((tmp_path / "run" / "report.json").read_text())["method"] == "merge_only"
