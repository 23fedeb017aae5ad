"""What else Trainer users switch on: precision, smoothing, dropout, noise, clipping, optimizers, workers, compiling."""

import pytest
import torch
from helpers.models import (
    OLD_NAME,
    Gradients,
    OutOfMemory,
    Watch,
    assert_close,
    assert_equal_states,
    batch,
    logged,
    lora_bert,
    multiplied_gradients,
    pin,
    quick_arguments,
    rows,
    trained_state,
)
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from pm_hf import PMConfig, PMTrainer
from pm_hf.training.trainer import perturbation_factor

pytestmark = pytest.mark.filterwarnings(OLD_NAME)


def make_trainer(folder, model, data, callbacks=(), **settings) -> PMTrainer:
    settings = {"train_sampling_strategy": "sequential", "max_grad_norm": 0.0} | settings
    args = quick_arguments(folder, PMConfig, **settings)
    return PMTrainer(model=model, args=args, train_dataset=data, callbacks=[*callbacks])


def gradients(folder, model, data, **settings) -> list[dict[str, torch.Tensor]]:
    """Those of every optimizer step."""
    kept = Gradients()
    make_trainer(folder, model, data, [kept], **settings).train()
    return kept.found


def scalings(model) -> list[float]:
    return [layer.scaling["default"] for layer in model.modules() if isinstance(layer, LoraLayer)]


# ---- half precision


class Half(PMTrainer):
    """The forward under float16; on a CPU Accelerate leaves `fp16` out without a word."""

    def autocast_smart_context_manager(self, cache_enabled=True):
        return torch.autocast("cpu", torch.float16)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_under_autocast_the_gradients_are_those_of_float32_up_to_its_rounding(tmp_path, monkeypatch, kind, precision):
    pin(monkeypatch, 1.5)
    build, make = kind
    model, dtypes = build(), set()
    layer = next(m for m in model.modules() if isinstance(m, LoraLayer))
    layer.register_forward_hook(lambda _, __, output: dtypes.add(output.dtype))
    args = quick_arguments(tmp_path, PMConfig, max_steps=1, max_grad_norm=0.0, bf16=precision == "bf16")
    trainer_class = PMTrainer if precision == "bf16" else Half
    trainer_class(model=model, args=args, train_dataset=make(4), callbacks=[kept := Gradients()]).train()
    (found,) = kept.found
    expected = multiplied_gradients(build(), [batch(make(4))], [1.5])
    assert dtypes == {torch.bfloat16 if precision == "bf16" else torch.float16}
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert_close(found, expected, 0.05 if precision == "bf16" else 0.01)
    with pytest.raises(AssertionError):
        assert_close(found, expected, 1e-5)  # it was half precision


def test_scaling_does_not_drift_in_a_bf16_model(tmp_path):
    model = lora_bert(use_rslora=True).bfloat16()  # scaling 4/√2 is no binary fraction
    before, frozen = scalings(model), {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    trainer = make_trainer(tmp_path, model, rows(24), max_steps=100, bf16=True, logging_strategy="no")
    trainer.train()
    assert set(trainer.perturbation_counts) == {0.5, 1.0, 1.5}
    assert scalings(model) == before
    assert_equal_states(frozen, {n: p for n, p in model.named_parameters() if not p.requires_grad})


# ---- the loss and what is random in it


def test_label_smoothing_is_the_smoothed_loss_of_a_model_whose_product_was_multiplied(tmp_path, monkeypatch, kind):
    factors = [1.5, 0.5]
    pin(monkeypatch, *factors)
    build, make = kind
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "label_smoothing_factor": 0.2}
    (found,) = gradients(tmp_path, build(), make(4), max_steps=1, **settings)
    parts = [batch(make(4)[:2]), batch(make(4)[2:])]
    assert_close(found, multiplied_gradients(build(), parts, factors, smoothing=0.2))
    with pytest.raises(AssertionError):
        assert_close(found, multiplied_gradients(build(), parts, factors), 0.02)


def test_with_dropout_in_lora_the_same_mask_gives_the_multiplied_models_gradient(tmp_path, monkeypatch, kind):
    pin(monkeypatch, 1.5)
    build, make = kind
    trainer = make_trainer(tmp_path, build(lora_dropout=0.4), make(4), [kept := Gradients()], max_steps=1)
    state = {}
    layer = next(m for m in trainer.model.modules() if isinstance(m, LoraLayer))
    layer.register_forward_pre_hook(lambda *_: state.update(random=state.get("random", torch.get_rng_state())))
    trainer.train()
    by_hand = build(lora_dropout=0.4).train()
    torch.set_rng_state(state["random"])
    assert_close(kept.found[0], multiplied_gradients(by_hand, [batch(make(4))], [1.5]))
    with pytest.raises(AssertionError):
        assert_close(kept.found[0], multiplied_gradients(by_hand.eval(), [batch(make(4))], [1.5]), 0.02)


def test_neftune_noise_is_the_plain_trainers_and_is_gone_afterwards(tmp_path, kind):
    build, make = kind
    states = []
    for trainer_class, config, settings in (
        (Trainer, TrainingArguments, {}),
        (PMTrainer, PMConfig, {"perturbation_scale": 0.0}),
        (PMTrainer, PMConfig, {"perturbation_scale": 0.0, "neftune_noise_alpha": None}),
    ):
        args = quick_arguments(tmp_path, config, **{"neftune_noise_alpha": 5.0} | settings)
        trainer = trainer_class(model=build(), args=args, train_dataset=make(24))
        trainer.train()
        states.append(trained_state(trainer.model))
        assert not trainer.model.get_input_embeddings()._forward_hooks
    assert_equal_states(states[0], states[1])
    with pytest.raises(AssertionError):
        assert_close(states[1], states[2], 1e-3)


# ---- the optimizer


def by_hand(model, data, factors, optimizer, schedule, max_norm=None) -> list[float]:
    """Train `model` on batches of 4 in order, one for each factor; the gradient norms before clipping."""
    trained, norms = {n: p for n, p in model.named_parameters() if p.requires_grad}, []
    for step, factor in enumerate(factors):
        start = 4 * step % len(data)
        for name, gradient in multiplied_gradients(model, [batch(data[start : start + 4])], [factor]).items():
            trained[name].grad = gradient
        if max_norm is not None:
            norms.append(torch.nn.utils.clip_grad_norm_(trained.values(), max_norm).item())
        optimizer.step()
        schedule.step()
    return norms


def drawn(steps: int) -> list[float]:
    """The factors of the first steps."""
    return [
        perturbation_factor(0.5, (1 / 3,) * 3, seed=3, task=0, step=step, micro_step=0, rank=0) for step in range(steps)
    ]


def linear(optimizer):
    """The Trainer's default schedule over 6 steps."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 6)


def test_clipping_sees_the_perturbed_gradient(tmp_path, kind):
    build, make = kind
    trainer = make_trainer(tmp_path, build(), make(24), optim="sgd", learning_rate=1.0, max_grad_norm=0.2)
    trainer.train()
    model = build()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    norms = by_hand(model, make(24), drawn(6), optimizer, linear(optimizer), max_norm=0.2)
    assert logged(trainer, "grad_norm") == pytest.approx(norms, rel=1e-4)
    assert max(norms) > 0.2
    assert_close(trained_state(trainer.model), trained_state(model), 1e-4)


@pytest.mark.parametrize("name", ["sgd", "adagrad", "adamw_torch", "adafactor"])
def test_any_optimizer_gets_the_perturbed_gradients(tmp_path, name):
    trainer = make_trainer(tmp_path, lora_bert(), rows(24), optim=name)
    trainer.train()
    model = lora_bert()
    trained = [p for p in model.parameters() if p.requires_grad]
    if name == "adafactor":
        from transformers.optimization import Adafactor

        optimizer = Adafactor(trained, lr=1e-2, scale_parameter=False, relative_step=False)
    else:
        kinds = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "adamw_torch": torch.optim.AdamW}
        optimizer = kinds[name](trained, lr=1e-2, weight_decay=0.0)
    by_hand(model, rows(24), drawn(6), optimizer, linear(optimizer))
    assert_close(trained_state(trainer.model), trained_state(model), 1e-4)
    with pytest.raises(AssertionError):
        assert_close(trained_state(lora_bert()), trained_state(model), 1e-3)


@pytest.mark.parametrize(
    ("scheduler", "kwargs", "shares"),
    [
        ("cosine", {}, [1.0, 0.933013, 0.75, 0.5, 0.25, 0.066987]),
        ("constant_with_warmup", {}, [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
        ("cosine_with_min_lr", {"min_lr_rate": 0.5}, [1.0, 0.966506, 0.875, 0.75, 0.625, 0.533494]),
    ],
)
def test_the_heads_rate_follows_any_schedule_and_moves_the_head_only(tmp_path, scheduler, kwargs, shares):
    def build():
        lora = LoraConfig(r=2, target_modules=["key"], modules_to_save=["classifier"])
        return get_peft_model(lora_bert().unload(), lora)

    seen, warmup = [], 2 if "warmup" in scheduler else 0
    trainer = make_trainer(
        *(tmp_path, build(), rows(24)),
        [Watch(lambda _: seen.append([group["lr"] for group in trainer.optimizer.param_groups if group["params"]]))],
        optim="sgd",
        learning_rate=0.1,
        head_learning_rate=0.5,
        lr_scheduler_type=scheduler,
        lr_scheduler_kwargs=kwargs,
        warmup_steps=warmup,
    )
    trainer.train()
    assert seen == [[pytest.approx(rate * share, abs=1e-6) for rate in (0.1, 0.5, 0.5)] for share in shares]
    model = build()
    heads = [p for n, p in model.named_parameters() if p.requires_grad and "classifier" in n]
    factors = [p for n, p in model.named_parameters() if p.requires_grad and "lora_" in n]
    optimizer = torch.optim.SGD([{"params": factors, "lr": 0.1}, {"params": heads, "lr": 0.5}])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [*shares, 0][step])
    by_hand(model, rows(24), drawn(6), optimizer, schedule)
    assert_close(trained_state(trainer.model), trained_state(model), 1e-4)


# ---- data


def test_worker_processes_change_nothing(tmp_path):
    states = []
    for workers in (0, 1):
        trainer = make_trainer(tmp_path, lora_bert(dropout=0.1), rows(24), dataloader_num_workers=workers, max_steps=3)
        trainer.train()
        states.append((trained_state(trainer.model), logged(trainer, "perturbation_factor")))
    assert_equal_states(states[0][0], states[1][0])
    assert states[0][1] == states[1][1]


def test_a_smaller_batch_found_by_itself_trains_as_if_it_had_been_asked_for(tmp_path):
    common = {"gradient_accumulation_steps": 2, "max_steps": 4, "seed": 22}
    asked = make_trainer(tmp_path, lora_bert(), rows(40), per_device_train_batch_size=4, **common)
    asked.train()
    found = make_trainer(
        *(tmp_path, lora_bert(), rows(40)), per_device_train_batch_size=5, auto_find_batch_size=True, **common
    )
    found.add_callback(OutOfMemory(found))
    found.train()
    assert found._train_batch_size == 4
    assert logged(found, "perturbation_factor") == logged(asked, "perturbation_factor")
    assert found.perturbation_counts == asked.perturbation_counts
    assert_equal_states(trained_state(found.model), trained_state(asked.model))


# ---- compilation


def check_the_compiled_model(folder, monkeypatch, backend) -> PMTrainer:
    """It has the eager one's gradients, with 2 graphs for the three factors."""
    factors = [1.0, 1.5, 0.5, 1.5, 1.0, 0.5]
    monkeypatch.setattr("pm_hf.training.trainer.perturbation_factor", lambda *_, step, **__: factors[step])
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    settings = {"torch_compile": True, "torch_compile_backend": backend, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(folder, lora_bert("task"), rows(24), [kept := Gradients()], **settings)
    trainer.train()
    eager = gradients(folder, lora_bert("task"), rows(24))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert len(kept.found) == 6
    for found, expected in zip(kept.found, eager, strict=True):
        assert_close(found, expected, 1e-4)
    return trainer


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # the compiler's own
def test_the_compiled_model_has_the_eager_ones_gradients(tmp_path, monkeypatch):
    check_the_compiled_model(tmp_path, monkeypatch, "inductor")


def test_a_traced_model_has_the_eager_ones_gradients_and_saves_plain_names_to_resume_from(tmp_path, monkeypatch):
    whole = check_the_compiled_model(tmp_path, monkeypatch, "eager")
    whole.save_model(str(tmp_path / "saved"))
    stored = load_file(tmp_path / "saved" / "task" / "adapter_model.safetensors")
    assert len(stored) == 8
    assert all(name.startswith("base_model.model.bert.encoder") for name in stored)
    resumed = make_trainer(tmp_path, lora_bert("task"), rows(24))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal_states(trained_state(whole.model), trained_state(resumed.model))
