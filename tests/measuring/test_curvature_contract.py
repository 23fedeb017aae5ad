"""What estimate_curvature leaves as it was, and what it refuses."""

import helpers.per_example as slow
import pytest
import torch
from helpers.per_example import batches, distance, examples, lora_layers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
)

from pm_hf import InputError, estimate_curvature
from pm_hf.models.lora import find_head, head_matrix

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
ROWS = examples(6)
TINY = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
    "num_labels": 3,
    "initializer_range": 0.3,
}


@pytest.fixture
def model(tiny_base):
    return slow.task_model(tiny_base)


def adapted(base: nn.Module, targets: list[str]) -> nn.Module:
    torch.manual_seed(4)
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights="gaussian")
    model = get_peft_model(base, config, adapter_name="task")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def measure(model, data=None, **settings):
    return estimate_curvature(model, batches(ROWS, 3) if data is None else data, **{"adapter": "task"} | settings)


# ---- left as it was


def test_dropout_and_the_mode_of_the_model_do_not_matter(model):
    drops = [m for m in model.modules() if isinstance(m, nn.Dropout) and m.p]
    assert len(drops) > 4
    assert distance(measure(model.train()).S, measure(model.eval()).S) == 0


@pytest.mark.parametrize("kind", ["fisher", "gram", "factored"])
@pytest.mark.parametrize("mode", [True, False])
def test_mode_gradients_scaling_hooks_and_weights_are_left_as_they_were(model, kind, mode):
    model.train(mode)
    for at, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        parameter.grad = None if at == 0 else torch.full_like(parameter, at)
    before = {n: (p.grad, None if p.grad is None else p.grad.clone()) for n, p in model.named_parameters()}
    weights = {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    scaling = {n: dict(layer.scaling) for n, layer in lora_layers(model).items()}
    measure(model, kind=kind)
    for name, parameter in model.named_parameters():
        gradient, copy = before[name]
        assert parameter.grad is gradient
        assert gradient is None or torch.equal(gradient, copy)
        assert torch.equal(parameter, weights[name][0])
        assert parameter.requires_grad == weights[name][1]
    assert {n: dict(layer.scaling) for n, layer in lora_layers(model).items()} == scaling
    assert all(module.training == mode for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_mode_and_hooks_are_restored_after_an_error(model):
    model.train()
    with pytest.raises(IndexError):
        measure(model, [{"input_ids": torch.full((2, 4), 10_000), "labels": torch.zeros(2, dtype=torch.long)}])
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_a_part_that_was_in_eval_mode_stays_there(model):
    model.train()
    model.base_model.model.bert.embeddings.eval()
    measure(model)
    assert not model.base_model.model.bert.embeddings.training
    assert model.training


def test_it_works_where_gradients_are_switched_off(model):
    with torch.no_grad():
        found = measure(model)
        assert not torch.is_grad_enabled()
    assert distance(found.S, measure(model).S) == 0


def test_a_frozen_adapter_has_the_same_curvature(model):
    """As loaded by PeftModel.from_pretrained, for a merge after the fact."""
    expected = measure(model)
    model.requires_grad_(False)
    assert distance(measure(model).S, expected.S) < 1e-6


# ---- refused


@pytest.mark.parametrize("samples", [0, -1])
def test_samples_must_be_positive(model, samples):
    with pytest.raises(InputError, match=f"samples must be at least 1, found {samples}; leave it out to use every"):
        measure(model, samples=samples)


@pytest.mark.parametrize("kind", ["fisher", "gram", "factored"])
def test_no_data_is_an_error(model, kind):
    with pytest.raises(InputError, match="needs at least one example, found none"):
        measure(model, [], kind=kind)


def test_an_unknown_adapter_is_an_error(model):
    with pytest.raises(InputError, match="the model has no LoRA adapter 'other'"):
        measure(model, adapter="other")


def test_an_adapter_that_is_not_active_is_an_error(model):
    for layer in lora_layers(model).values():
        layer.set_adapter(["merged"])
    with pytest.raises(InputError, match="adapter 'task' is not active"):
        measure(model)


@pytest.mark.parametrize("rho", [-0.1, 1.0])
def test_shrinkage_outside_zero_to_one_is_an_error(model, rho):
    with pytest.raises(InputError, match=rf"shrinkage must be in \[0, 1\), found {rho}"):
        measure(model, kind="gram", shrinkage=rho)


def test_shrinkage_of_a_diagonal_is_an_error(model):
    with pytest.raises(InputError, match="shrinkage belongs to kind='gram'"):
        measure(model, shrinkage=0.1)


@pytest.mark.parametrize(("setting", "value"), [("kind", "fischer"), ("labels", "model")])
def test_unknown_settings_list_the_valid_ones(model, setting, value):
    valid = {"kind": "fisher.*gram.*factored", "labels": "empirical.*mc"}[setting]
    with pytest.raises(InputError, match=f"{setting}.*{valid}.*{value}"):
        measure(model, **{setting: value})


@pytest.mark.parametrize("kind", ["fisher", "gram", "factored"])
def test_a_module_that_the_forward_does_not_reach_is_an_error(kind):
    base = BertForSequenceClassification(BertConfig(**TINY))
    base.bert.unused = nn.Linear(16, 16)
    with pytest.raises(InputError, match=r"1 adapted modules were not reached by the forward pass, first bert\.unused"):
        measure(adapted(base, ["key", "unused"]), kind=kind)


def test_a_module_that_is_reached_but_not_by_the_gradient_is_an_error():
    class Half(BertForSequenceClassification):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            self.bert.side(output.logits.new_zeros(len(output.logits), 1, 16))
            return output

    base = Half(BertConfig(**TINY))
    base.bert.side = nn.Linear(16, 16)
    with pytest.raises(InputError, match=r"1 adapted modules were not reached .*first bert\.side"):
        measure(adapted(base, ["key", "side"]))


@pytest.mark.parametrize("kind", ["fisher", "gram", "factored"])
def test_a_module_that_the_forward_uses_twice_is_an_error(kind):
    """ALBERT's layers share their weights: x of one use and δ of another are no gradient."""
    base = AlbertForSequenceClassification(AlbertConfig(**TINY | {"embedding_size": 8, "num_hidden_groups": 1}))
    with pytest.raises(InputError, match="key.* more than once"):
        measure(adapted(base, ["key"]), kind=kind)


def test_logits_of_another_shape_are_an_error():
    model = adapted(BertForTokenClassification(BertConfig(**TINY)), ["key"])
    with pytest.raises(InputError, match=r"expected logits of shape \(examples, classes\), found \(3, \d, 3\)"):
        measure(model)


def test_an_unknown_head_is_an_error(model):
    before = head_matrix(find_head(model, "classifier"))
    with pytest.raises(InputError, match="the model has no linear head 'score'"):
        measure(model, heads={"score": before})


def test_a_mask_of_another_width_is_an_error(model):
    class Longer(BertForSequenceClassification):
        def forward(self, input_ids, attention_mask):
            return super().forward(input_ids=input_ids)

    wrong = [batch | {"attention_mask": torch.ones(3, 2)} for batch in batches(ROWS, 3, length=9)]
    with pytest.raises(InputError, match=r"key sees 9 positions, the attention mask has shape \(3, 2\)"):
        measure(adapted(Longer(BertConfig(**TINY)), ["key"]), wrong)


def test_sums_of_other_settings_or_modules_are_never_mixed(model):
    past = measure(model)
    with pytest.raises(InputError, match="sums are never mixed"):
        measure(model, previous=past, labels="mc")
    del past.S["bert.encoder.layer.0.attention.self.key"]
    with pytest.raises(InputError, match="does not fit this adapter: modules or shapes differ"):
        measure(model, previous=past)
