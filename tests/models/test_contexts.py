"""Temporary states of a model: what holds inside the block, and that everything is as before after an error in it."""

import pytest
import torch
from helpers.models import OLD_NAME, batch, lora_bert, rows
from torch import nn

from pm_hf.models.contexts import autocast, evaluating, gradients_put_aside, seeded, without_lora

pytestmark = pytest.mark.filterwarnings(OLD_NAME)


class BrokenOffError(Exception):
    """Leaves a block."""


def break_off(context, work=lambda: None):
    """Do something inside a block, which then fails."""
    with context:
        work()
        raise BrokenOffError


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.fixture
def model():
    """In training, but for one layer that was put into eval mode by itself."""
    model = lora_bert("task", dropout=0.5)
    model.train()
    model.base_model.model.bert.encoder.layer[0].eval()
    return model


@pytest.mark.parametrize("context", [evaluating, without_lora])
def test_every_module_is_in_eval_mode_and_afterwards_in_its_own(model, context):
    before = modes(model)
    assert True in before
    assert False in before
    inside = []
    with pytest.raises(BrokenOffError):
        break_off(context(model), lambda: inside.extend(modes(model)))
    assert len(inside) == len(before)
    assert not any(inside)
    assert modes(model) == before


def test_without_lora_the_model_is_its_base(model):
    inputs = batch(rows(3))
    with without_lora(model), torch.no_grad():
        without = model(**inputs).logits
    with pytest.raises(BrokenOffError):
        break_off(without_lora(model))
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(**inputs).logits, without)
    with torch.no_grad():
        assert not torch.equal(model(**inputs).logits, without)


def test_gradients_are_none_inside_and_the_same_tensors_afterwards(model):
    model(**batch(rows(3))).loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.grad for parameter in trained]
    values = [gradient.clone() for gradient in before]

    def learn():
        assert all(parameter.grad is None for parameter in trained)
        model(**batch(rows(3, seed=5))).loss.backward()

    with pytest.raises(BrokenOffError):
        break_off(gradients_put_aside(model), learn)
    assert all(parameter.grad is gradient for parameter, gradient in zip(trained, before, strict=True))
    assert all(torch.equal(gradient, value) for gradient, value in zip(before, values, strict=True))


def test_seeded_numbers_are_the_seed_s_and_the_global_state_is_left():
    torch.manual_seed(3)
    expected, following = torch.rand(2), torch.rand(2)
    torch.manual_seed(4)
    state = torch.get_rng_state()
    with seeded(3):
        assert torch.equal(torch.rand(2), expected)
        assert torch.equal(torch.rand(2), following)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_autocast_to_a_dtype_or_to_nothing(dtype):
    with autocast(torch.device("cpu"), dtype):
        product = nn.Linear(2, 2)(torch.ones(1, 2))
    assert product.dtype == (dtype or torch.float32)
