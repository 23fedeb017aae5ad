"""A stream on two processes: the same result as on one, and one end for all."""

import os
import shutil
import sys

import pytest
import torch
from helpers.models import batch, lora_bert, quick_arguments, rows, trained_state
from helpers.processes import ODD, PLAIN, SHORT, close, run, stopped
from helpers.streams import contents, dense, domains, same_tensors, settings, steps, write_yaml
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

import pm_hf.runs.learner
from pm_hf.cli import main
from pm_hf.files import locked
from pm_hf.merging.curvature import Curvature
from pm_hf.models.contexts import scaled_adapter
from pm_hf.runs.learner import learn
from pm_hf.training.task_trainer import TaskTrainer, step_loss
from pm_hf.training.trainer import PMConfig, PMTrainer, perturbation_factor

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
STREAMS = {
    "merge_only": ODD,
    "pm_gram": ODD | {"perturbation__scale": 0.0},
    "pm_gram_lda": {"perturbation__scale": 0.0},
    "average": {},
    "ewc": ODD,
    "base_kl": {},
    "merge_only, shared head": ODD,
    "merge_only, accumulated": {},
}


@pytest.fixture(scope="module")
def data(stream_data):
    return stream_data(8)


def configured(base, data, folder, name, size):
    """The stream `name` with `size` rows a step in each process."""
    method, _, rest = name.partition(", ")
    if rest == "accumulated" and size < 8:
        size, more = size // 2, {"training__gradient_accumulation_steps": 2}
    else:
        more = {}
    changes = PLAIN | SHORT | STREAMS[name] | more | {"training__per_device_train_batch_size": size}
    if rest == "shared head":
        changes.pop("groups")
        return domains(base, data / "domains", folder / name, method, **changes)
    return settings(base, data, folder / name, method, **changes)


@pytest.fixture(scope="module")
def streams(base, data, tmp_path_factory):
    """Folders of the streams on one process and on two, with the same global batch."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    for name in STREAMS:
        learn(configured(base, data, one, name, 8))
    configs = [configured(base, data, two, name, 4) for name in STREAMS]

    def work(_):
        for config in configs:
            learn(config)

    ended = run(work, two / "processes")
    assert [end.code for end in ended] == [0, 0], [end.stderr for end in ended]
    assert [end.stderr.count("task 1/2") for end in ended] == [len(STREAMS), 0]
    return one, two


@pytest.mark.parametrize("name", STREAMS)
def test_two_processes_learn_what_one_does(streams, name):
    one, two = (folder / name for folder in streams)
    assert contents(one).keys() == contents(two).keys()
    alone, shared = steps(one), steps(two)
    assert [step["processes"] for step in alone + shared] == [1, 1, 2, 2]
    for left, right in zip(alone, shared, strict=True):
        assert right["training_loss"] == pytest.approx(left["training_loss"], rel=1e-5)
        assert right["optimizer_steps"] == left["optimizer_steps"]
        assert right["scores"] == left["scores"]
        if left["coefficient"] is not None:
            assert right["coefficient"]["used"] == pytest.approx(left["coefficient"]["used"], rel=1e-4)
    for task in sorted(path.name for path in one.glob("task-*")):
        assert close(dense(one / task / "adapter"), dense(two / task / "adapter"))
        assert close(dense(one / task / "merged"), dense(two / task / "merged"))


@pytest.mark.parametrize("name", [name for name in STREAMS if STREAMS[name].get("curvature__samples")])
def test_two_processes_measure_every_row_once(streams, name):
    one, two = (folder / name / "task-01-second" / "curvature.safetensors" for folder in streams)
    if name.endswith("shared head"):
        one, two = (path.parents[1] / "task-01-odd" / path.name for path in (one, two))
    assert Curvature.load(one).examples == Curvature.load(two).examples == [7, 7]
    assert close(load_file(one), load_file(two))


def test_the_processes_of_a_gradient_step_draw_their_own_factors(tmp_path):
    examples, rate = rows(8), 0.5

    def arguments():
        plain = {"max_steps": 1, "optim": "sgd", "learning_rate": rate, "max_grad_norm": 0, "seed": 4}
        plain |= {"train_sampling_strategy": "sequential", "lr_scheduler_type": "constant"}
        return quick_arguments(tmp_path, PMConfig, **plain, ddp_find_unused_parameters=False)

    def work(_):
        model = lora_bert()
        trainer = PMTrainer(model=model, args=arguments(), train_dataset=examples, compute_loss_func=step_loss())
        trainer.train()
        return list(trainer.perturbation_counts), {n: v.numpy() for n, v in trained_state(model).items()}

    ended = run(work, tmp_path / "processes")
    assert [end.code for end in ended] == [0, 0], [end.stderr for end in ended]
    (first, weights), (second, others) = (end.value for end in ended)
    drawn = [perturbation_factor(0.5, (1 / 3,) * 3, seed=4, task=0, step=0, micro_step=0, rank=r) for r in (0, 1)]
    assert [first, second] == [[factor] for factor in drawn]
    assert drawn[0] != drawn[1]

    model = lora_bert().eval()
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for factor, share in zip(drawn, (examples[:4], examples[4:]), strict=True):
        with scaled_adapter(layers, "default", factor):
            (model(**batch(share)).loss / 2).backward()  # the mean over the processes
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected = (parameter - rate * parameter.grad).detach()
            torch.testing.assert_close(torch.from_numpy(weights[name]), expected)
            assert (weights[name] == others[name]).all()


def test_step_json_counts_the_factors_of_all_processes(base, data, tmp_path):
    config = settings(base, data, tmp_path / "run", "pm", **SHORT, training__per_device_train_batch_size=2)
    run(lambda _: learn(config) and None, tmp_path / "processes")
    for task, step in enumerate(steps(tmp_path / "run")):
        drawn = [
            perturbation_factor(0.5, (1 / 3,) * 3, seed=0, task=task, step=s, micro_step=0, rank=rank)
            for rank in (0, 1)
            for s in range(8)  # 2 epochs of 16 rows, 4 a step
        ]
        assert step["optimizer_steps"] == 8
        assert step["factors"] == {f"{f:g}": drawn.count(f) for f in (0.5, 1.0, 1.5) if f in drawn}


def raising(error):
    """A function that raises, whatever it is given."""

    def function(*_, **__):
        raise error

    return function


@pytest.fixture(scope="module")
def refused(base, data, tmp_path_factory):
    """{scenario: [(exit code, stderr) of each process]} of runs that cannot be."""
    place = tmp_path_factory.mktemp("refused")
    held = place / "held"
    held.mkdir()
    changes = {
        "unknown key": {"lora__rank": 4},
        "no column": {"stream__label_column": "intent"},
        "no base": {"model__base": "/no/such/base"},
        "held": {},
        "few rows": {"curvature__samples": 1},
        "no module in 1": {},
        "disk full in 0": {},
    }
    paths = {}
    for name, change in changes.items():
        folder = held if name == "held" else place / name
        paths[name] = write_yaml(place / f"{name}.yaml", settings(base, data, folder, "merge_only", **SHORT, **change))
    broken = {  # (rank, what of the learner fails there, how)
        "no module in 1": (1, "build_task_model", pm_hf.runs.learner.InputError("no module here")),
        "disk full in 0": (0, "merge_adapters", OSError("no space left")),
    }

    def work(rank):
        codes, ends = [], []
        for name, path in paths.items():
            where, what, error = broken.get(name, (None, "learn", None))
            before = getattr(pm_hf.runs.learner, what)
            if rank == where:
                setattr(pm_hf.runs.learner, what, raising(error))
            codes.append(main(["train", "--config", str(path)]))
            setattr(pm_hf.runs.learner, what, before)
            sys.stderr.flush()
            ends.append(os.lseek(2, 0, os.SEEK_CUR))
        return codes, ends

    with locked(held):
        ended = run(work, place / "processes")
    assert [end.code for end in ended] == [0, 0], [end.stderr for end in ended]
    found = {}
    for index, name in enumerate(paths):
        found[name] = []
        for end in ended:
            codes, ends = end.value
            text = end.stderr.encode()[([0, *ends])[index] : ends[index]].decode()
            found[name].append((codes[index], [line for line in text.splitlines() if line.startswith("pm-hf: ")]))
    return place, found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unknown key", "lora.rank: unknown key"),
        ("no column", "missing column intent"),
        ("no base", "base model folder /no/such/base does not exist"),
        ("held", "is in use by process"),
        ("few rows", "each of 2 processes needs one to measure the curvature; launch fewer processes"),
    ],
)
def test_bad_input_ends_both_with_code_2_and_one_line(refused, name, message):
    (code, lines), other = refused[1][name]
    assert (code, len(lines), other) == (2, 1, (2, []))
    assert message in lines[0]


def test_an_error_in_the_second_process_ends_the_first_which_leaves_the_message_to_it(refused):
    assert refused[1]["no module in 1"] == [(2, []), (2, ["pm-hf: no module here"])]


def test_an_error_of_the_process_that_writes_ends_the_one_that_waits(refused):
    place, found = refused
    assert found["disk full in 0"] == [(1, ["pm-hf: no space left"]), (1, [])]
    assert steps(place / "disk full in 0") == []
    assert not (place / "disk full in 0" / ".lock").exists()


def test_an_error_in_a_training_step_of_one_process_leaves_none_waiting(base, data, tmp_path):
    config = settings(base, data, tmp_path / "run", "merge_only", **SHORT)

    def work(rank):
        if rank == 1:
            TaskTrainer.compute_loss = raising(RuntimeError("broken here"))
        learn(config)

    first, second = run(work, tmp_path / "processes")
    assert (first.code, second.code) == (1, 1)
    assert second.error == "RuntimeError: broken here"
    assert steps(tmp_path / "run") == []


def test_sigterm_to_one_process_stops_both_and_they_go_on_from_there(tiny_base, data, tmp_path):
    changes = SHORT | {"lora__dropout": 0.1, "training__per_device_train_batch_size": 4}
    config = settings(tiny_base, data, tmp_path / "run", "pm", **changes)
    ended = stopped(write_yaml(tmp_path / "c.yaml", config), tmp_path / "stopped")
    assert [end.value for end in ended] == [1, 1], [end.stderr for end in ended]
    said = [line for end in ended for line in end.stderr.splitlines() if line.startswith("pm-hf")]
    assert said == ["pm-hf: stopped by SIGTERM; the same command continues from here"]
    checkpoint = tmp_path / "run" / "task-01-second" / "checkpoints" / "checkpoint-2"
    assert {"rng_state_0.pth", "rng_state_1.pth", "trainer_state.json"} <= {path.name for path in checkpoint.iterdir()}
    alone = shutil.copytree(tmp_path / "run", tmp_path / "alone")

    run(lambda _: learn(config) and None, tmp_path / "again")
    run(lambda _: learn(config, output_dir=str(tmp_path / "whole")) and None, tmp_path / "straight")
    assert same_tensors(tmp_path / "run" / "merged", tmp_path / "whole" / "merged")
    assert contents(tmp_path / "run").keys() == contents(tmp_path / "whole").keys()

    report = learn(config, output_dir=str(alone))
    assert "task second: continued with processes 1 instead of 2: the global batch is another" in report.notes
