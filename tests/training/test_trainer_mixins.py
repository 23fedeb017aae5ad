"""Each of the four changes of PerturbationMixin alone, before a plain Trainer."""

import pytest
import torch
from helpers.models import OLD_NAME, assert_equal_states, lora_bert, quick_arguments, rows, trained_state
from transformers import Trainer

from pm_hf import PMConfig
from pm_hf.training.trainer import (
    AccumulatedLossMixin,
    AdapterLoadingMixin,
    HeadLearningRateMixin,
    PerturbationMixin,
    PerturbedStepMixin,
)

pytestmark = pytest.mark.filterwarnings(OLD_NAME)
MIXINS = (AccumulatedLossMixin, PerturbedStepMixin, HeadLearningRateMixin, AdapterLoadingMixin)


def trained(folder, *mixins, adapters=(), **settings):
    """The trainer after three steps of a class made of these mixins and Trainer; last adapter and head train."""
    args = quick_arguments(folder, PMConfig, **{"max_steps": 3} | settings)
    model = lora_bert(*adapters, modules_to_save=["classifier"])
    trainer = type("Mixed", (*mixins, Trainer), {})(model=model, args=args, train_dataset=rows(24))
    trainer.train()
    return trainer


def test_the_public_mixin_is_the_four_and_adds_nothing():
    assert PerturbationMixin.__bases__ == MIXINS
    assert not {name for name in vars(PerturbationMixin) if not name.startswith("__")}


@pytest.mark.parametrize("mixin", MIXINS)
def test_with_nothing_to_change_each_one_trains_as_trainer_does(tmp_path, mixin):
    ours = trained(tmp_path / "ours", mixin, perturbation_scale=0.0)
    assert_equal_states(trained_state(ours.model), trained_state(trained(tmp_path / "theirs").model))


def test_the_perturbed_step_alone_is_the_whole_mixin_s(tmp_path):
    alone, whole = (trained(tmp_path / mixin.__name__, mixin) for mixin in (PerturbedStepMixin, PerturbationMixin))
    assert sum(alone.perturbation_counts.values()) == 3
    assert alone.perturbation_counts == whole.perturbation_counts
    assert_equal_states(trained_state(alone.model), trained_state(whole.model))
    assert any("perturbation_factor" in line for line in alone.state.log_history)


def test_the_head_s_learning_rate_alone_makes_its_group(tmp_path):
    trainer = trained(tmp_path, HeadLearningRateMixin, head_learning_rate=0.5)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    rates = {
        "lora" if "lora_" in names[id(parameter)] else "head": group["initial_lr"]
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
    }
    assert rates == {"lora": trainer.args.learning_rate, "head": 0.5}


def test_the_loss_of_accumulated_batches_alone_is_their_mean(tmp_path):
    settings = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2, "max_steps": 1, "learning_rate": 0}
    losses = [
        trained(tmp_path / name, *mixins, **settings).state.log_history[0]["loss"]
        for name, mixins in (("mean", [AccumulatedLossMixin]), ("sum", []))
    ]
    assert losses[1] == pytest.approx(4 * losses[0], rel=1e-5)


def test_the_trained_adapter_alone_is_restored_by_its_name(tmp_path):
    saving = {"adapters": ("merged", "task"), "save_strategy": "steps", "save_steps": 3}
    trainer = trained(tmp_path, AdapterLoadingMixin, **saving)
    expected = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    assert any(".merged." in name for name in expected)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-3"))
    assert_equal_states(dict(trainer.model.named_parameters()), expected)
