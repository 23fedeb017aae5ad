"""Evaluations inside a stream's tasks: rows held out for them, the best checkpoint, early stopping, resuming."""

import json
import random
import shutil

import pytest
import torch
import transformers
from helpers import refusal
from helpers.models import OLD_NAME, TARGETS, WORDS, tiny_folder
from helpers.streams import same_tensors, settings, steps
from peft import PeftModel

from pm_hf.config.kinds import STREAM_KINDS
from pm_hf.config.loading import load_config
from pm_hf.data.encoders import make_encoder
from pm_hf.data.stream import load_stream
from pm_hf.errors import InputError
from pm_hf.runs.learner import learn
from pm_hf.training.trainer import PMTrainer

pytestmark = pytest.mark.filterwarnings(OLD_NAME)
BEST = {"eval_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "loss"}
CHANGES = {
    "stream__eval_share": 0.25,
    "early_stopping_patience": 2,
    "lora__dropout": 0.1,  # so that the random state has to come back as well
    **{f"training__{key}": value for key, value in BEST.items()},
    "training__learning_rate": 0.1,  # too high: it overfits
    "training__head_learning_rate": 0.3,
    "training__num_train_epochs": 30,
}


@pytest.fixture(scope="module")
def data(stream_data):
    return stream_data(12)


# ---- the rows


def test_a_share_of_each_class_is_held_out_and_the_rest_is_trained_on(tiny_base, data, tmp_path):
    plain = load_stream(load_config(settings(tiny_base, data, tmp_path)))
    held = load_stream(load_config(settings(tiny_base, data, tmp_path, stream__eval_share=0.25)))
    again = load_stream(load_config(settings(tiny_base, data, tmp_path, stream__eval_share=0.25)))
    other = load_stream(load_config(settings(tiny_base, data, tmp_path, stream__eval_share=0.25, seed=1)))
    for before, task, same, different in zip(plain.tasks, held.tasks, again.tasks, other.tasks, strict=True):
        assert not len(before.eval)
        assert sorted(task.eval.labels) == sorted([*task.labels] * 3)
        assert sorted(task.train.inputs + task.eval.inputs) == sorted(before.train.inputs)
        assert task.test == before.test
        assert same.eval == task.eval != different.eval
        assert before.fingerprint() != task.fingerprint() == same.fingerprint() != different.fingerprint()


def test_a_joint_task_evaluates_on_the_rows_of_all(tiny_base, data, tmp_path):
    config = load_config(settings(tiny_base, data, tmp_path, "joint", stream__eval_share=0.5))
    (joint,) = load_stream(config).tasks
    assert len(joint.eval) == len(joint.train) == 36
    assert set(joint.eval.labels) == set(joint.labels)


def test_a_class_with_one_row_is_trained_on_and_a_task_of_such_classes_is_refused(tiny_base, data, tmp_path):
    few = settings(tiny_base, data, tmp_path, stream__eval_share=0.25, stream__train_per_class=1)
    with pytest.raises(InputError, match="task 'first': too few training rows for eval_share to hold one out"):
        load_stream(load_config(few))


# ---- what is refused


def test_without_rows_to_evaluate_on_evaluation_is_refused_with_the_way_out(tiny_base, data, tmp_path):
    message = "eval_strategy and load_best_model_at_end need rows to evaluate on; set stream.eval_share"
    for key, value in BEST.items():
        if key != "metric_for_best_model":
            assert message in refusal(load_config, settings(tiny_base, data, tmp_path, **{f"training__{key}": value}))
    assert message in refusal(load_config, settings(tiny_base, data, tmp_path, early_stopping_patience=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stream__eval_share": 1.0}, r"stream.eval_share: must be in (0, 1)"),
        ({"stream__eval_share": 0.0}, r"stream.eval_share: must be in (0, 1)"),
        ({"early_stopping_patience": 0}, "early_stopping_patience: must be at least 1"),
        ({"training__load_best_model_at_end": False}, "early_stopping_patience: needs training.load_best_model_at_end"),
        ({"training__metric_for_best_model": "f1"}, "text-classification has loss and accuracy, found f1"),
    ],
)
def test_impossible_values_are_refused(tiny_base, data, tmp_path, changes, message):
    assert message in refusal(load_config, settings(tiny_base, data, tmp_path, **CHANGES | changes))


def test_evaluation_and_saving_at_different_times_are_refused_before_anything_runs(tiny_base, data, tmp_path):
    changes = CHANGES | {"training__save_strategy": "steps"}
    with pytest.raises(InputError, match="training: .*requires the save and eval strategy to match"):
        learn(settings(tiny_base, data, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


# ---- what is learnt


@pytest.fixture(scope="module")
def whole(tiny_base, data, tmp_path_factory):
    """(folder of a run that nothing disturbed, {task index: [(epoch, eval loss), …]} as it was evaluated)."""
    return watched_run(tiny_base, data, tmp_path_factory.mktemp("whole") / "run", CHANGES)


def watched_run(base, data, folder, changes):
    losses, log = {}, PMTrainer.log

    def keep(self, logs, *args, **kwargs):
        if "eval_loss" in logs:
            losses.setdefault(self.args.task_index, []).append(logs["eval_loss"])
        log(self, logs, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PMTrainer, "log", keep)
        learn(settings(base, data, folder, groups=2, **changes))
    return folder, losses


def test_every_task_ends_early_with_its_best_epoch(whole):
    folder, losses = whole
    assert sorted(losses) == [0, 1]
    for index, step in enumerate(steps(folder)):
        best = losses[index].index(min(losses[index]))
        assert len(losses[index]) == best + 3 < 30  # two evaluations were not better
        assert step["best_loss"] == min(losses[index])
        assert step["best_step"] * len(losses[index]) == step["optimizer_steps"] * (best + 1)
    assert min(step["best_step"] for step in steps(folder)) > 0


def test_the_adapter_is_that_of_a_run_that_ended_with_the_best_epoch(whole, tiny_base, data, tmp_path):
    """The schedule is constant, so that a shorter run takes the same steps."""
    constant = {"training__lr_scheduler_type": "constant"}
    folder, losses = watched_run(tiny_base, data, tmp_path / "long", CHANGES | constant)
    best = losses[0].index(min(losses[0])) + 1
    shorter = {key: value for key, value in CHANGES.items() if "best" not in key and "patience" not in key}
    shorter |= constant | {"training__num_train_epochs": best}
    learn(settings(tiny_base, data, tmp_path / "short", groups=1, **shorter))
    assert same_tensors(folder / "task-00-first" / "adapter", tmp_path / "short" / "task-00-first" / "adapter")


class Interrupt(Exception):
    pass


@pytest.mark.parametrize(("left", "moved"), [(1, False), (0, True)])
def test_an_interrupted_run_ends_as_the_uninterrupted_one(whole, tiny_base, data, tmp_path, monkeypatch, left, moved):
    """With `left` epochs to go before early stopping; none: it was over, only the best was not loaded yet."""
    folder, losses = whole
    cut, run = tmp_path / "cut", tmp_path / ("moved" if moved else "cut")
    epochs, seen = len(losses[1]) - left, []

    def stop(self, args, state, control, **_):
        seen.append(state.global_step)
        if args.task_index == 1 and state.epoch == epochs:
            raise Interrupt

    with monkeypatch.context() as patch:
        patch.setattr("pm_hf.training.callbacks.StepTimes.on_save", stop, raising=False)
        with pytest.raises(Interrupt):
            learn(settings(tiny_base, data, cut, groups=2, **CHANGES))
    assert [path.name for path in cut.glob("task-01*/step.json")] == []
    if moved:
        shutil.move(cut, run)
    _, resumed = watched_run(tiny_base, data, run, CHANGES)
    assert len(resumed.get(1, [])) == left
    for task in ("task-00-first", "task-01-second"):
        for adapter in ("adapter", "merged"):
            assert same_tensors(run / task / adapter, folder / task / adapter)
    for mine, theirs in zip(steps(run), steps(folder), strict=True):
        same = "scores", "coefficient", "fingerprint", "optimizer_steps", "best_step", "best_loss", "factors", "log"
        for key in same:
            assert mine[key] == theirs[key], key


def test_accuracy_may_choose_the_best(tiny_base, data, tmp_path):
    changes = CHANGES | {"training__metric_for_best_model": "accuracy", "training__num_train_epochs": 3}
    learn(settings(tiny_base, data, tmp_path / "run", groups=1, **changes))
    (step,) = steps(tmp_path / "run")
    assert 0 < step["best_accuracy"] <= 1
    assert (step["best_accuracy"] * 6) == round(step["best_accuracy"] * 6)  # of 6 rows


# ---- language models


def language_settings(folder, output, kind, *, plain, **changes):
    """A causal-lm or seq2seq-lm stream of one task, of plain text or of prompts with four answers."""
    rng, folder = random.Random(0), folder / f"{kind}-{plain}"
    if not folder.is_dir():
        tiny_folder(kind, folder)
        for split in ("train", "test"):
            rows = [{"text": f"{word}0 {rng.choice(WORDS)}", "label": word} for word in ANSWERS for _ in range(4)]
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = [{"name": "one", "train": "train.jsonl", "test": "test.jsonl"}]
    prompt = {} if plain else {"stream__prompt_template": "Text: {text} Answer:"}
    config = settings(folder, folder, output, **CHANGES | prompt | changes | {"training__learning_rate": 3e-2})
    config["stream"] = {
        **{key: value for key, value in config["stream"].items() if key not in ("train", "test", "class_groups")},
        "kind": "seq2seq-lm" if kind == "t5" else "causal-lm",
        "tasks": tasks,
    }
    config["training"] = {k: v for k, v in config["training"].items() if k != "head_learning_rate"}
    return config | {"lora": {"r": 4, "alpha": 8, "target_modules": TARGETS[kind]}}


ANSWERS = ("red", "blue", "green", "gold")


@pytest.mark.parametrize(("kind", "plain"), [("llama", True), ("llama", False), ("t5", False)])
def test_a_language_model_ends_with_its_lowest_loss(tmp_path, kind, plain):
    config = language_settings(tmp_path, tmp_path / "run", kind, plain=plain)
    task = load_stream(load_config(config)).tasks[0]
    assert len(task.eval) == 4
    assert plain or sorted(task.eval.labels) == sorted(f" {word}" for word in ANSWERS)  # one of each answer's four
    learn(config)
    loaded = getattr(transformers, STREAM_KINDS[config["stream"]["kind"]].auto_model).from_pretrained(
        tmp_path / f"{kind}-{plain}"
    )
    model = PeftModel.from_pretrained(loaded, str(tmp_path / "run" / "task-00-one" / "adapter"))
    encoder = make_encoder(load_config(config))
    inputs = encoder.collate(encoder.examples(task.eval, task.labels))
    with torch.no_grad():
        loss = model.eval()(**inputs).loss.item()
    step = steps(tmp_path / "run")[0]
    assert step["best_loss"] == pytest.approx(loss, rel=1e-5)
    assert step["best_step"] < step["optimizer_steps"]


def test_a_language_model_s_accuracy_is_no_metric(tmp_path):
    with pytest.raises(InputError, match="causal-lm has loss, found accuracy"):
        load_config(language_settings(tmp_path, "run", "llama", plain=True, training__metric_for_best_model="accuracy"))


def test_free_text_is_held_out_by_rows_and_answers_by_kind(tmp_path):
    """As eval rows and as test rows: no two texts are of one class."""
    for plain in (True, False):
        config = language_settings(tmp_path, tmp_path / "run", "llama", plain=plain)
        config["stream"] |= {"test_share": 0.25, "tasks": [{"name": "one", "train": "train.jsonl"}]}
        (task,) = load_stream(load_config(config)).tasks
        assert [len(rows) for rows in (task.train, task.eval, task.test)] == ([9, 3, 4] if plain else [8, 4, 4])
