"""Interrupted runs, best models and checkpoints: the trained adapter is restored by name, the frozen one stays."""

from pathlib import Path

import pytest
import torch
from helpers.models import (
    OLD_NAME,
    assert_equal_states,
    batch,
    logged,
    lora_bert,
    quick_arguments,
    rows,
    trained_state,
)
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import Trainer, TrainerCallback

from pm_hf import InputError, PMConfig, PMTrainer
from pm_hf.adapters.folder import open_adapter, save_adapter
from pm_hf.config.schema import LoraSettings, ModelSettings
from pm_hf.models.task_model import build_task_model, task_tensors
from pm_hf.training.trainer import perturbation_factor

pytestmark = pytest.mark.filterwarnings(OLD_NAME)
STEPS, CUT, SEED = 9, 4, 22


@pytest.fixture(scope="module")
def merged(tiny_base, tmp_path_factory) -> Path:
    """Adapter folder of an earlier task with a head of two other classes."""
    built = build_task_model(ModelSettings(str(tiny_base)), LORA, ["x", "y"], None, 0, 0)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in built.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3, generator=generator)
    factors, saved, config = task_tensors(built.model)
    folder = tmp_path_factory.mktemp("past") / "merged"
    save_adapter(folder, config, factors, saved, {"classifier": ["x", "y"]})
    return folder


LORA = LoraSettings(r=2, alpha=4, dropout=0.1, target_modules=["key", "value"])


def stream_model(tiny_base, merged) -> nn.Module:
    """Frozen `merged`, trainable `task` and its own head."""
    model = build_task_model(
        ModelSettings(str(tiny_base)), LORA, ["a", "b", "c"], open_adapter(merged), seed=0, task=1
    ).model
    for name, parameter in model.named_parameters():
        if "lora_B.task" in name:
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(8))
    return model


@pytest.fixture(params=["frozen merged, task and head", "single default"])
def build(request, tiny_base, merged):
    """A function that builds one of the two kinds of model, always the same weights."""
    if request.param == "single default":
        return lambda: lora_bert(dropout=0.1)
    return lambda: stream_model(tiny_base, merged)


class Interrupt(TrainerCallback):
    """Raise in the middle of an optimizer step, after some micro-steps."""

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == CUT + 1:
            raise KeyboardInterrupt


def make_trainer(folder, model, callbacks=None, **settings) -> PMTrainer:
    settings = {
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": 2,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "head_learning_rate": 3e-2,
        "weight_decay": 0.1,
        "task_index": 1,
    } | settings
    args = quick_arguments(folder, PMConfig, **settings)
    return PMTrainer(model=model, args=args, train_dataset=rows(20), eval_dataset=rows(20), callbacks=callbacks)


def everything(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def activity(model: nn.Module) -> list:
    kinds = (LoraLayer, ModulesToSaveWrapper)
    return [list(m.active_adapters) for m in model.modules() if isinstance(m, kinds)]


def interrupted(folder, model) -> None:
    with pytest.raises(KeyboardInterrupt):
        make_trainer(folder, model, [Interrupt()]).train()
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, build):
    whole = make_trainer(tmp_path / "whole", build())
    before = everything(whole.model)
    names, active = trainable(whole.model), activity(whole.model)
    whole.train()

    interrupted(tmp_path / "cut", build())
    resumed = make_trainer(tmp_path / "cut", build())
    resumed.train(resume_from_checkpoint=True)

    assert_equal_states(trained_state(whole.model), trained_state(resumed.model))
    for key in ("loss", "grad_norm", "learning_rate", "perturbation_factor"):
        assert logged(whole, key) == logged(resumed, key)
        assert len(logged(resumed, key)) == STEPS
    after = everything(resumed.model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == names  # every trained weight moved, the frozen adapter and the base did not
    assert trainable(resumed.model) == names
    assert activity(resumed.model) == active
    assert sum(resumed.perturbation_counts.values()) == 2 * (STEPS - CUT)


def test_the_plain_trainer_would_lose_the_frozen_adapter_on_resuming(tmp_path, tiny_base, merged):
    """The defect that the override exists for; when this fails, Transformers has repaired it."""
    interrupted(tmp_path, stream_model(tiny_base, merged))
    model = stream_model(tiny_base, merged)
    before = activity(model)
    Trainer._load_from_checkpoint(make_trainer(tmp_path, model), str(tmp_path / "checkpoint-4"))
    assert activity(model) != before


def test_one_trainer_can_resume_after_its_own_interruption(tmp_path):
    def factor(step: int, micro: int) -> float:
        return perturbation_factor(0.5, (1 / 3,) * 3, seed=SEED, task=1, step=step, micro_step=micro, rank=0)

    broken = [factor(CUT + 1, micro) for micro in range(3)]
    assert broken == [1.5, 0.5, 0.5]  # counting on from the broken step, or logging it too, would show
    whole = make_trainer(tmp_path / "whole", lora_bert(dropout=0.1), seed=SEED)
    whole.train()

    again = make_trainer(tmp_path / "cut", lora_bert(dropout=0.1), [Interrupt()], save_steps=1, seed=SEED)
    with pytest.raises(KeyboardInterrupt):
        again.train()
    again.remove_callback(Interrupt)
    again.train(resume_from_checkpoint=True)  # from step 5, the step that broke off

    expected = [(factor(step, 0) + factor(step, 1)) / 2 for step in range(STEPS)]
    assert logged(whole, "perturbation_factor") == expected
    assert logged(again, "perturbation_factor") == expected
    assert_equal_states(trained_state(whole.model), trained_state(again.model))


def test_resuming_keeps_the_head_learning_rate(tmp_path, tiny_base, merged):
    interrupted(tmp_path, stream_model(tiny_base, merged))
    resumed = make_trainer(tmp_path, stream_model(tiny_base, merged), lr_scheduler_type="constant")
    resumed.train(resume_from_checkpoint=True)
    names = {id(p): name for name, p in resumed.model.named_parameters()}
    groups = resumed.optimizer.param_groups
    rates = {names[id(p)]: (group["initial_lr"], group["lr"]) for group in groups for p in group["params"]}
    assert len(rates) == 10
    assert {name for name, rate in rates.items() if rate == (3e-2, 3e-2)} == {
        f"base_model.model.classifier.modules_to_save.task.{kind}" for kind in ("weight", "bias")
    }
    assert {rate for name, rate in rates.items() if "lora_" in name} == {(1e-2, 1e-2)}


@pytest.mark.parametrize("adapter", ["default", "task", "frozen merged, task and head"])
def test_the_best_model_is_loaded_at_the_end(tmp_path, tiny_base, merged, adapter):
    model = stream_model(tiny_base, merged) if " " in adapter else lora_bert(adapter)
    kept, names = {}, trainable(model)

    class Ruin(TrainerCallback):
        """Remember the weights of step 4, the best by construction, and make the later ones worse."""

        def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
            metrics["eval_quality"] = -abs(state.global_step - 4)
            if state.global_step == 4:
                kept.update(trained_state(model))

    class Judged(PMTrainer):
        def _determine_best_metric(self, metrics, trial):
            return super()._determine_best_metric(metrics | {"eval_quality": -abs(self.state.global_step - 4)}, trial)

    args = quick_arguments(
        tmp_path,
        PMConfig,
        max_steps=8,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="quality",
        greater_is_better=True,
    )
    trainer = Judged(model=model, args=args, train_dataset=rows(20), eval_dataset=rows(8), callbacks=[Ruin()])
    frozen = {name: value for name, value in everything(model).items() if name not in names}
    trainer.train()
    assert trainer.state.best_global_step == 4
    assert trainer.state.global_step == 8
    assert_equal_states(kept, trained_state(model))
    assert_equal_states(frozen, {name: p for name, p in everything(model).items() if name not in names})
    assert trainable(model) == names


def test_a_checkpoint_of_another_adapter_is_refused(tmp_path):
    make_trainer(tmp_path, lora_bert("first")).train()
    trainer = make_trainer(tmp_path, lora_bert("second"))
    with pytest.raises(InputError, match=r"checkpoint-9 holds no adapter 'second': .*second/adapter_model.safetensors"):
        trainer.train(resume_from_checkpoint=True)


def test_a_checkpoint_with_other_modules_is_refused(tmp_path):
    make_trainer(tmp_path, lora_bert("task")).train()
    missing = make_trainer(tmp_path, lora_bert("task", target_modules=["key", "value", "query"]))
    with pytest.raises(InputError, match=r"does not fit the model: missing \[.*query.lora_A"):
        missing.train(resume_from_checkpoint=True)
    unexpected = make_trainer(tmp_path, lora_bert("task", target_modules=["key"]))
    with pytest.raises(InputError, match=r"does not fit the model: missing \[\], unexpected \[.*value.lora_A"):
        unexpected.train(resume_from_checkpoint=True)


def test_an_adapter_may_have_the_name_of_a_module(tmp_path):
    make_trainer(tmp_path, lora_bert("encoder")).train()
    saved = trained_state(make_trainer(tmp_path, lora_bert("encoder")).model)
    trainer = make_trainer(tmp_path, lora_bert("encoder"))
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-9"))
    assert all(not torch.equal(saved[name], value) for name, value in trained_state(trainer.model).items())


def test_a_checkpoint_without_the_head_is_refused(tmp_path):
    lora_bert("task").save_pretrained(tmp_path / "checkpoint-1")
    trainer = make_trainer(tmp_path, lora_bert("task", modules_to_save=["classifier"]))
    with pytest.raises(InputError, match="does not fit the model: missing .*classifier"):
        trainer._load_from_checkpoint(str(tmp_path / "checkpoint-1"))


def test_a_checkpoint_holds_the_head_and_its_merged_part_does_not(tmp_path, tiny_base, merged):
    model = stream_model(tiny_base, merged)
    make_trainer(tmp_path, model).train()
    task, past = (open_adapter(tmp_path / "checkpoint-9" / name) for name in ("task", "merged"))
    assert task.saved == ("classifier.bias", "classifier.weight")
    assert past.saved == ()
    head = model.base_model.model.classifier.modules_to_save["task"]
    assert torch.equal(task.tensor("classifier.weight"), head.weight)
    original = open_adapter(merged)
    for module in original.scaling:
        assert torch.equal(past.product(module).dense(), original.product(module).dense())


def test_resuming_gives_the_loss_of_the_checkpoint(tmp_path, tiny_base, merged):
    first = stream_model(tiny_base, merged)
    make_trainer(tmp_path, first).train()
    second, examples = stream_model(tiny_base, merged), batch(rows(8))
    trainer = make_trainer(tmp_path, second)
    fresh = second.eval()(**examples).logits
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-9"))
    assert torch.equal(second.eval()(**examples).logits, first.eval()(**examples).logits)
    assert not torch.allclose(fresh, second(**examples).logits)
