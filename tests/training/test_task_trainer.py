"""The trainer that adds penalties: the same gradient whatever the batching, diverged runs, SFA and SLAO by hand."""

import copy
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.models import (
    OLD_NAME,
    SIZE,
    OutOfMemory,
    Watch,
    activate_all,
    assert_equal_states,
    batch,
    lora_bert,
    quick_arguments,
    rows,
    tiny_model,
    trained_state,
)
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from pm_hf.adapters.folder import open_adapter
from pm_hf.errors import InputError
from pm_hf.files import read_json
from pm_hf.merging.curvature import Curvature, CurvatureSpec
from pm_hf.models.lora import adapted_layers, find_head, orthonormal_start
from pm_hf.training.callbacks import SequentialAveraging, StepTimes
from pm_hf.training.checkpoints import WHOLE_FILE
from pm_hf.training.penalties import BaseDivergence, ElasticWeights, OrthogonalSubspaces
from pm_hf.training.task_trainer import DivergedError, TaskTrainer, step_loss
from pm_hf.training.trainer import PMConfig

pytestmark = pytest.mark.filterwarnings(OLD_NAME)
HEAD = "classifier"


def two_adapters():
    """BERT with a frozen running merge and a task adapter, both active."""
    return activate_all(lora_bert("merged", "task"), "task")


def elastic(model, weight=0.05):
    """The EWC penalty of a random curvature, the same at every call."""
    generator, S, M = torch.Generator().manual_seed(5), {}, {}
    for name, layer in adapted_layers(model, "task").items():
        shape = (layer.out_features, layer.in_features)
        S[name] = torch.randn(shape, generator=generator).square()
        M[name] = torch.randn(shape, generator=generator)
    flat = dict.fromkeys(S, 1.0)
    return ElasticWeights(model, "task", Curvature(CurvatureSpec(), S, M, flat, flat, [1]), weight)


def orthogonal(model):
    return OrthogonalSubspaces(model, "task", "merged", 0.05)


def to_base(model):
    return BaseDivergence(3.0, "js")


def make_trainer(folder, model, examples, penalties=(), **settings):
    defaults = {"perturbation_scale": 0.0, "perturbation_adapter": "task", "learning_rate": 1e-2}
    arguments = quick_arguments(folder, PMConfig, **defaults | settings)
    return TaskTrainer(model=model, args=arguments, train_dataset=examples, penalties=penalties)


def gradients(folder, make_model, examples, make_penalties, size, steps, *, own_loss=True, **settings):
    """{name: gradient} of one optimizer step of `steps` micro-steps of `size` rows.

    own_loss: the loss is that of step_loss, else the model's own.
    """
    model, found = make_model(), {}
    trainer = make_trainer(
        *(folder, model, examples, [make(model) for make in make_penalties]),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=steps,
        max_steps=1,
        max_grad_norm=0.0,
        **settings,
    )
    trainer.model_accepts_loss_kwargs = own_loss or examples[0]["labels"].ndim > 0  # else micro-steps are averaged
    if own_loss:
        trainer.compute_loss_func = step_loss(trainer.args.label_smoothing_factor)
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    trainer.add_callback(Watch(lambda _: found.update({name: p.grad.clone() for name, p in names.items()})))
    trainer.train()
    return found


def by_hand(model, loss):
    """{name: gradient} of a loss."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_close(left, right):
    assert left.keys() == right.keys()
    assert left
    for name, value in left.items():
        assert torch.allclose(value, right[name], rtol=1e-4, atol=1e-6), name


ALL = [elastic, orthogonal, to_base]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("own_loss", [True, False], ids=["num_items_in_batch", "mean of micro-steps"])
def test_gradient_is_that_of_the_whole_batch_however_it_is_cut(tmp_path, own_loss, smoothing):
    model, examples = two_adapters().train(), rows(8)
    tokens = batch(examples)
    logits = model(**tokens).logits
    loss = F.cross_entropy(logits, tokens["labels"], label_smoothing=smoothing)
    expected = by_hand(model, loss + sum(make(model)(model, tokens, logits) for make in ALL))
    plain = by_hand(model, F.cross_entropy(model(**tokens).logits, tokens["labels"], label_smoothing=smoothing))
    assert any(not torch.allclose(plain[name], expected[name], rtol=0.1) for name in plain)
    for size, steps in ((8, 1), (1, 8), (2, 4)):
        settings = {"own_loss": own_loss, "label_smoothing_factor": smoothing}
        assert_close(gradients(tmp_path, two_adapters, examples, ALL, size, steps, **settings), expected)


def test_gradient_is_right_for_micro_steps_of_unlike_size(tmp_path):
    model, examples = two_adapters().train(), rows(7)  # an epoch of 3 + 3 + 1 rows
    tokens = batch(examples)
    logits = model(**tokens).logits
    loss = F.cross_entropy(logits, tokens["labels"]) + sum(make(model)(model, tokens, logits) for make in ALL)
    assert_close(gradients(tmp_path, two_adapters, examples, ALL, 3, 3), by_hand(model, loss))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_is_the_same_under_activation_checkpointing(tmp_path, use_reentrant):
    settings = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    plain = gradients(tmp_path, two_adapters, rows(4), ALL, 4, 1, perturbation_scale=0.5)
    assert_close(gradients(tmp_path, two_adapters, rows(4), ALL, 4, 1, perturbation_scale=0.5, **settings), plain)


def language_rows(count):
    """Rows of equal length with 1 to `count` target tokens."""
    ids = torch.randint(6, SIZE, (count, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    for row in range(count):
        labels[row, : 8 - row] = -100
    return [
        {"input_ids": i, "attention_mask": torch.ones_like(i), "labels": y} for i, y in zip(ids, labels, strict=True)
    ]


def language_model(kind):
    torch.manual_seed(2)
    targets = {"llama": ["q_proj"], "t5": ["q"]}[kind]
    model = get_peft_model(tiny_model(kind), LoraConfig(r=2, target_modules=targets), adapter_name="task")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_loss_and_divergence_of_a_language_model_are_means_over_all_target_tokens_of_a_step(tmp_path, kind, smoothing):
    model, examples = language_model(kind).train(), language_rows(8)
    tokens = batch(examples)
    logits, labels = model(**tokens).logits, tokens["labels"]
    aims = (logits, labels) if kind == "t5" else (logits[:, :-1], labels[:, 1:])
    loss = F.cross_entropy(*(part.flatten(0, 1) for part in aims), label_smoothing=smoothing)
    expected = by_hand(model, loss + to_base(model)(model, tokens, logits))
    for size, steps in ((8, 1), (1, 8), (2, 4)):
        settings = {"label_smoothing_factor": smoothing, "own_loss": kind == "t5"}
        found = gradients(tmp_path, lambda: language_model(kind), examples, [to_base], size, steps, **settings)
        assert_close(found, expected)


def test_penalties_stay_out_of_the_evaluation(tmp_path):
    model = two_adapters()
    trainer = make_trainer(tmp_path, model, rows(4), [lambda *_: torch.tensor(1e6)])
    loss = model.eval()(**batch(rows(4))).loss
    assert trainer.evaluate(rows(4))["eval_loss"] == pytest.approx(float(loss.detach()), rel=1e-5)


# diverged


class Poison:
    """A penalty that is NaN, or whose gradient is infinite, at one micro-step."""

    per_target = False

    def __init__(self, model, at, kind):
        self.left, self.kind = at, kind
        self.weight = next(iter(adapted_layers(model, "task").values())).lora_B["task"].weight

    def __call__(self, model, batch, logits):
        self.left -= 1
        if self.left != 0:
            return logits.sum() * 0
        if self.kind == "loss":
            return logits.sum() * float("nan")
        zero = (self.weight - self.weight.detach()).abs()[0, 0]
        return (zero * 1e-30).sqrt()  # 0, and its derivative at 0 is infinite


class States(TrainerCallback):
    """The trained weights before every step."""

    def __init__(self):
        self.found = []

    def on_step_begin(self, args, state, control, model=None, **_):
        self.found.append(trained_state(model))


@pytest.mark.parametrize("clipped", [0.0, 1.0], ids=["unclipped", "clipped"])
@pytest.mark.parametrize(
    ("kind", "message"),
    [("loss", "the training loss is nan at step 3 of the task"), ("gradient", "the gradient is not finite at step 3")],
)
def test_diverged_run_ends_before_any_weight_changes_and_its_checkpoint_continues(tmp_path, kind, message, clipped):
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_grad_norm": clipped}
    settings |= {"save_strategy": "steps", "save_steps": 1, "logging_nan_inf_filter": False}
    model, states = two_adapters(), States()
    trainer = make_trainer(tmp_path / "run", model, rows(16), [Poison(model, 5, kind)], **settings)
    trainer.add_callback(states)
    with pytest.raises(DivergedError, match=message):
        trainer.train()
    assert len(states.found) == 3
    assert_equal_states(trained_state(model), states.found[-1])
    folders = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert folders == ["checkpoint-1", "checkpoint-2"]
    again, whole = two_adapters(), two_adapters()
    make_trainer(tmp_path / "run", again, rows(16), **settings).train(resume_from_checkpoint=True)
    make_trainer(tmp_path / "whole", whole, rows(16), **settings).train()
    assert_equal_states(trained_state(again), trained_state(whole))


def test_a_second_training_of_one_trainer_forgets_the_losses_of_the_first(tmp_path):
    model = two_adapters()
    trainer = make_trainer(tmp_path, model, rows(8), [Poison(model, 2, "loss")])
    with pytest.raises(DivergedError):
        trainer.train()
    trainer.train()
    assert all(value.isfinite().all() for value in trained_state(model).values())


@pytest.mark.parametrize("step", [1, 3], ids=["in the first step", "later"])
def test_a_smaller_batch_found_by_itself_leaves_the_record_of_the_training_that_had_it(tmp_path, step):
    """What the broken off one has counted is no part of step.json, nor of what is kept beside a checkpoint."""
    common = {"gradient_accumulation_steps": 2, "max_steps": 4, "perturbation_scale": 0.5}
    asked = make_trainer(tmp_path, lora_bert("task"), rows(40), per_device_train_batch_size=4, **common)
    found = make_trainer(
        *(tmp_path, lora_bert("task"), rows(40)), per_device_train_batch_size=5, auto_find_batch_size=True, **common
    )
    times = StepTimes()
    for callback in (OutOfMemory(found, step), times):
        found.add_callback(callback)
    for trainer in (asked, found):
        trainer.continue_from(None)
        trainer.train()
    assert found._train_batch_size == 4
    record, expected = found.progress(), asked.progress()
    assert record.factors == expected.factors
    assert [point[0] for point in record.log] == [1, 2, 3, 4]
    if step == 1:
        assert record == expected
    assert record.losses == pytest.approx([sum(loss for _, loss, _ in record.log)])
    assert len(times.seconds) == 4


def test_a_training_counts_on_from_its_checkpoint_before_and_after_it_begins(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "perturbation_scale": 0.5}
    whole = make_trainer(tmp_path / "whole", lora_bert("task"), rows(24), **settings)
    whole.train()
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    kept = read_json(Path(checkpoint) / WHOLE_FILE)
    continued = make_trainer(tmp_path / "continued", lora_bert("task"), rows(24), **settings)
    continued.continue_from(checkpoint)
    before = asdict(continued.progress())
    assert before == {key: kept[key] for key in before}
    continued.train(resume_from_checkpoint=checkpoint)
    assert continued.progress() == whole.progress()


# sequential fine-tuning with averaging


def shared_head_model():
    """BERT with a task adapter that starts at zero and a head that it saves."""
    model = lora_bert("task", modules_to_save=[HEAD])
    for layer in adapted_layers(model, "task").values():
        torch.nn.init.zeros_(layer.lora_B["task"].weight)
    return model


def products(model):
    return {
        name: layer.scaling["task"] * layer.lora_B["task"].weight @ layer.lora_A["task"].weight
        for name, layer in adapted_layers(model, "task").items()
    }


@pytest.mark.parametrize(("period", "averaged"), [(0.25, [2, 4, 6, 7]), (0.5, [4, 7]), (1.0, [7]), (0.01, range(1, 8))])
def test_averaging_is_that_of_a_loop_by_hand(tmp_path, period, averaged):
    examples, rate, weight = rows(8), 0.5, 0.7
    model = shared_head_model()
    settings = {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": rate, "max_grad_norm": 0.0}
    trainer = make_trainer(tmp_path, model, examples, per_device_train_batch_size=8, max_steps=7, **settings)
    trainer.add_callback(SequentialAveraging(model, "task", find_head(model, HEAD), period, weight))
    twin = shared_head_model().train()
    before, tokens = copy.deepcopy(twin), batch(examples)
    for step in range(1, 8):
        for name, gradient in by_hand(twin, twin(**tokens).loss).items():
            twin.get_parameter(name).data -= rate * gradient
        if step in averaged:
            wanted = {name: weight * now.detach() for name, now in products(twin).items()}  # Δ = 0 before the task
            for layer in adapted_layers(twin, "task").values():
                layer.lora_B["task"].weight.data *= weight
            assert all(torch.allclose(now, wanted[name]) for name, now in products(twin).items())
            for now, old in zip(find_head(twin, HEAD).parameters(), find_head(before, HEAD).parameters(), strict=True):
                now.data = weight * now.data + (1 - weight) * old.data
    trainer.train()
    assert_close(trained_state(model), trained_state(twin))


def test_head_of_its_own_is_not_averaged(tmp_path):
    model, other = shared_head_model(), shared_head_model()
    averaging = SequentialAveraging(model, "task", None, 1.0, 0.5)
    for made, callbacks in ((model, [averaging]), (other, [])):
        trainer = make_trainer(tmp_path, made, rows(8), per_device_train_batch_size=8, max_steps=1)
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.train()
    assert torch.equal(find_head(model, HEAD).weight, find_head(other, HEAD).weight)
    assert all(torch.allclose(value, 0.5 * products(other)[name]) for name, value in products(model).items())


class Break(TrainerCallback):
    """Breaks off at a step."""

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 5:
            raise KeyboardInterrupt


def test_averaging_that_was_broken_off_and_continued_equals_an_uninterrupted_one(tmp_path):
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    final = []
    for name, interruptions in (("whole", []), ("broken", [Break()]), ("broken", [])):
        model = shared_head_model()
        trainer = make_trainer(tmp_path / name, model, rows(16), **settings)
        for callback in (SequentialAveraging(model, "task", find_head(model, HEAD), 0.25, 0.5), *interruptions):
            trainer.add_callback(callback)
        if interruptions:
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
            continue
        trainer.train(resume_from_checkpoint=name == "broken")
        final.append(trained_state(model))
    assert_equal_states(*final)


# a single LoRA by orthogonal starts


def test_orthonormal_start_keeps_the_span_of_a_and_b_itself(tmp_path):
    last, model = lora_bert("default"), lora_bert("task", lora_alpha=8)
    last.save_pretrained(tmp_path)
    orthonormal_start(model, "task", open_adapter(tmp_path))
    old = adapted_layers(last, "default")
    for name, layer in adapted_layers(model, "task").items():
        A, A_old = layer.lora_A["task"].weight, old[name].lora_A["default"].weight
        assert torch.allclose(A @ A.T, torch.eye(2), atol=1e-6)
        onto = torch.linalg.pinv(A_old) @ A_old  # the projection onto the rows of the old A
        assert torch.allclose(A.T @ A, onto, atol=1e-5)
        assert (A @ A_old.T).diagonal().min() > 0
        s, s_old = layer.scaling["task"], old[name].scaling["default"]
        assert (s, s_old) == (4, 2)
        assert torch.allclose(s * layer.lora_B["task"].weight, s_old * old[name].lora_B["default"].weight)
        assert A.requires_grad


def test_orthonormal_start_leaves_orthonormal_rows_as_they_are(tmp_path):
    model = lora_bert("default")
    model.save_pretrained(tmp_path / "one")
    orthonormal_start(model, "default", open_adapter(tmp_path / "one"))
    before = trained_state(model)
    model.save_pretrained(tmp_path / "two")
    orthonormal_start(model, "default", open_adapter(tmp_path / "two"))
    for name, value in trained_state(model).items():
        assert torch.allclose(value, before[name], atol=1e-6)


def test_orthonormal_start_refuses_another_rank_or_other_modules(tmp_path):
    lora_bert("default", r=3).save_pretrained(tmp_path / "rank")
    with pytest.raises(InputError, match=r"lora_A of .* has shape \(3, 16\), the new task's \(2, 16\); use one lora.r"):
        orthonormal_start(lora_bert("task"), "task", open_adapter(tmp_path / "rank"))
    lora_bert("default", target_modules=["key"]).save_pretrained(tmp_path / "modules")
    with pytest.raises(InputError, match="has no factors of .*value"):
        orthonormal_start(lora_bert("task"), "task", open_adapter(tmp_path / "modules"))
