"""What an adapter folder holds, in the model that trains on top of it: the same function as PEFT's, for every kind."""

import pytest
import torch
from helpers import refusal
from helpers.models import OLD_NAME, SIZE
from helpers.started import (
    BASES,
    BOTH,
    KINDS,
    PEFT_WARNINGS,
    Kind,
    attention,
    load_alone,
    save_base,
    save_start,
    saving,
)
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from pm_hf import InputError
from pm_hf.adapters.folder import open_adapter
from pm_hf.config.schema import LoraSettings, ModelSettings
from pm_hf.models.loading import load_merged
from pm_hf.models.task_model import build_task_model

pytestmark = [pytest.mark.filterwarnings(OLD_NAME), *map(pytest.mark.filterwarnings, PEFT_WARNINGS)]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    for name in BASES:
        save_base(name, folder / name)
    return folder


def logits(model, kind):
    inputs = {"input_ids": torch.randint(4, SIZE, (3, 9), generator=torch.Generator().manual_seed(0))}
    if kind.base == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :4]
    with torch.no_grad():
        return model.eval()(**inputs).logits


def build(kind, bases, start, *, targets=None, skeleton=False, merged=True):
    lora = LoraSettings(r=2, target_modules=targets or attention(kind.base)["target_modules"])
    adapter, settings = open_adapter(start), ModelSettings(str(bases / kind.base))
    frozen = adapter if merged else None
    kept = {"kind": kind.stream, "saved_from": adapter, "skeleton": skeleton}
    return build_task_model(settings, lora, (), frozen, 0, 0, **kept).model


# the others are made of the same parts
RARE = ("rslora", "some layers", "an expression", "saved input embeddings", "saved output embeddings", "LoRA on both")
RARE += ("resized and saved", "tied, both saved", "tied, LoRA on the embeddings", "tied, resized and both saved")
RARE += ("Conv1D", "saved positions", "LoRA on wte and wpe", "T5", "T5, output saved", "T5, norm saved")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in RARE else []) for n in KINDS])
def test_the_model_that_trains_is_the_folder_as_peft_loads_it(bases, tmp_path, name):
    kind = KINDS[name]
    start = save_start(kind, bases / kind.base, tmp_path / "start")
    expected = logits(load_alone(kind, bases / kind.base, start), kind)
    assert torch.allclose(logits(build(kind, bases, start), kind), expected, atol=1e-5)
    released = load_merged(ModelSettings(str(bases / kind.base)), start, (), kind.stream)
    assert torch.equal(logits(released, kind), expected)
    build(kind, bases, start, skeleton=True)


def test_only_the_values_that_are_held_whole_go_on_where_the_merge_is_not_in_place(bases, tmp_path):
    """As for a method that trains from the base."""
    kind = KINDS["saved embeddings"]
    start = save_start(kind, bases / kind.base, tmp_path / "start")
    expected = load_alone(kind, bases / kind.base, start)
    with expected.disable_adapter():
        bare = logits(expected, kind)
    built = logits(build(kind, bases, start, merged=False), kind)
    assert not torch.allclose(built, bare, atol=1e-2)  # PEFT leaves the saved modules out as well
    for layer in expected.modules():
        if isinstance(layer, LoraLayer):
            layer.scaling["default"] = 0.0
    assert torch.allclose(built, logits(expected, kind), atol=1e-5)


REFUSED = {
    "tied, resized, only one saved": (
        Kind("tied", saving("tied", "embed_tokens"), SIZE + 2, {"save_embedding_layers": False}),
        "it holds no lm_head.weight: the rows of the new tokens are lost",
    ),
    "resized, LoRA alone": (
        Kind("llama", attention("llama", "embed_tokens"), SIZE + 2, {"save_embedding_layers": False}),
        "it holds no model.embed_tokens.weight: the rows of the new tokens are lost",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("skeleton", [True, False])
def test_rows_of_new_tokens_that_the_folder_lacks_are_not_made_up(bases, tmp_path, name, skeleton):
    kind, message = REFUSED[name]
    start = save_start(kind, bases / kind.base, tmp_path / "start")
    with pytest.raises(InputError, match=message):
        build(kind, bases, start, skeleton=skeleton)
    with pytest.raises(InputError, match=message):
        load_merged(ModelSettings(str(bases / kind.base)), start, (), kind.stream)


@pytest.mark.parametrize("skeleton", [True, False])
def test_what_finds_no_place_in_the_base_is_named(bases, tmp_path, skeleton):
    kind = KINDS["saved norms"]
    start = save_start(kind, bases / kind.base, tmp_path / "start")
    tensors = load_file(start / WEIGHTS)
    tensors["base_model.model.model.layers.7.input_layernorm.weight"] = torch.ones(32)
    tensors["base_model.model.model.norm.weight"] = torch.ones(31)
    save_file(tensors, start / WEIGHTS)
    said = refusal(build, kind, bases, start, skeleton=skeleton)
    assert "holds model.layers.7.input_layernorm.weight, which the base does not have" in said
    assert "holds model.norm.weight of shape (31,), the base's is (32,)" in said
    with pytest.raises(InputError, match="does not fit"):
        load_merged(ModelSettings(str(bases / kind.base)), start, (), kind.stream)


def test_factors_of_layers_that_the_base_lacks_are_named(bases, tmp_path):
    kind = KINDS["plain"]
    start = save_start(kind, bases / kind.base, tmp_path / "start")
    renamed = {name.replace("layers.1", "layers.5"): value for name, value in load_file(start / WEIGHTS).items()}
    save_file(renamed, start / WEIGHTS)
    for use in (
        lambda: build(kind, bases, start),
        lambda: build(kind, bases, start, skeleton=True),
        lambda: load_merged(ModelSettings(str(bases / kind.base)), start, (), kind.stream),
    ):
        with pytest.raises(InputError, match=r"4 tensors have no place in it, first model\.layers\.5"):
            use()


def test_a_module_that_is_held_whole_gets_no_lora_besides(bases, tmp_path):
    kind = KINDS["a saved linear layer"]
    start = save_start(kind, bases / kind.base, tmp_path / "start")
    with pytest.raises(InputError, match=r"holds model\.layers\.0\.mlp\.down_proj whole, which cannot be adapted"):
        build(kind, bases, start, targets=["q_proj", "down_proj"], skeleton=True)
    kind = KINDS["resized with LoRA on both"]  # a copy below a LoRA of its own is none
    start = save_start(kind, bases / kind.base, tmp_path / "both")
    expected = logits(load_alone(kind, bases / kind.base, start), kind)
    assert torch.allclose(logits(build(kind, bases, start, targets=["q_proj", BOTH[1]]), kind), expected, atol=1e-5)


def test_a_skeleton_has_no_weights_and_draws_no_random_numbers(bases, tmp_path):
    kind = KINDS["plain"]
    start = save_start(kind, bases / kind.base, tmp_path / "start")
    before = torch.random.get_rng_state()
    model = build(kind, bases, start, skeleton=True)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(value.is_meta for name, value in model.named_parameters() if "lora_" not in name)
