"""lora.use_rslora and lora.init_lora_weights: what PEFT computes; a task starts at the model it begins with."""

import math

import pytest
import torch
from helpers import refusal
from helpers.models import (
    OLD_NAME,
    Gradients,
    assert_close,
    batch,
    language_rows,
    lora_llama,
    multiplied_gradients,
    pin,
    quick_arguments,
    tiny_folder,
)
from helpers.streams import dense, settings, steps, tensors
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pm_hf import PMConfig, PMTrainer, estimate_curvature
from pm_hf.adapters.folder import open_adapter, save_adapter
from pm_hf.adapters.merge import merge_adapters
from pm_hf.config.loading import load_config
from pm_hf.config.schema import LoraSettings, ModelSettings
from pm_hf.models.export import export_model
from pm_hf.models.lora import adapted_layers, layer_product
from pm_hf.models.task_model import TASK_ADAPTER, build_task_model, task_tensors
from pm_hf.runs.learner import learn

pytestmark = pytest.mark.filterwarnings(OLD_NAME)
RANK, ALPHA = 4, 6
SCALING = ALPHA / math.sqrt(RANK)
RSLORA = LoraSettings(r=RANK, alpha=ALPHA, use_rslora=True, target_modules=["q_proj", "v_proj"])
KIND = {"kind": "causal-lm"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_folder("llama", tmp_path_factory.mktemp("base") / "llama")


def built(base, lora, merged=None, seed=0, **model):
    return build_task_model(ModelSettings(str(base), **model), lora, (), merged, seed, 0, **KIND).model


def filled(model, seed):
    """B as after a training."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f"lora_B.{TASK_ADAPTER}" in name:
            parameter.data.normal_(0, 0.2, generator=generator)
    return model


def saved(model, folder):
    factors, others, config = task_tensors(model, "causal-lm")
    save_adapter(folder, config, factors, others, {})
    return folder


@torch.no_grad()
def logits(model):
    return model.eval()(torch.arange(6, 30)[None]).logits


@torch.no_grad()
def with_products(base, *folders):
    """Logits of the base whose weights have alpha/√r·BA of each folder added, from the files' tensors alone."""
    model = AutoModelForCausalLM.from_pretrained(base)
    for folder in folders:
        values = tensors(folder)
        for name in (name for name in values if name.endswith("lora_A.weight")):
            module = name.removesuffix(".lora_A.weight")
            update = SCALING * values[f"{module}.lora_B.weight"] @ values[name]
            model.get_submodule(module).weight += update
    return logits(model)


def test_rslora_scales_everywhere_as_peft_does(base, tmp_path):
    """Task model, task adapter, a second task on the merge, the merge and the export."""
    first = filled(built(base, RSLORA), 1)
    one = saved(first, tmp_path / "one")
    assert open_adapter(one).config["use_rslora"] is True
    expected = with_products(base, one)
    torch.testing.assert_close(logits(first), expected)
    alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(one))
    torch.testing.assert_close(logits(alone), expected)
    assert (expected - with_products(base)).abs().max() > 0.1
    merge_adapters(one, tmp_path / "merged")
    merged = open_adapter(tmp_path / "merged")
    assert merged.config["use_rslora"] is False
    assert merged.config["lora_alpha"] == merged.config["r"]
    second = filled(built(base, RSLORA, merged), 2)
    two = saved(second, tmp_path / "two")
    torch.testing.assert_close(logits(second), with_products(base, one, two))
    for name, layer in adapted_layers(second, TASK_ADAPTER).items():
        assert layer.scaling[TASK_ADAPTER] == pytest.approx(SCALING)
        expected_product = sum(dense(folder)[name] for folder in (one, two))
        torch.testing.assert_close(
            layer_product(layer, layer.active_adapters).dense().double(), expected_product, rtol=1e-5, atol=1e-6
        )
    merge_adapters(two, tmp_path / "both", into=tmp_path / "merged", coefficient=1.0)
    both = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "both"))
    torch.testing.assert_close(logits(both), with_products(base, one, two))
    for folder, products in ((one, [one]), (tmp_path / "both", [one, two])):
        export_model(folder, tmp_path / f"whole {folder.name}")
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / f"whole {folder.name}")
        torch.testing.assert_close(logits(whole), with_products(base, *products))


def test_perturbed_step_and_curvature_take_the_same_scaling(tmp_path, monkeypatch):
    config = {"r": RANK, "lora_alpha": ALPHA, "use_rslora": True}
    pin(monkeypatch, 1.5)
    rows = language_rows(4)
    args = quick_arguments(tmp_path, PMConfig, max_steps=1, max_grad_norm=0.0, train_sampling_strategy="sequential")
    kept = Gradients()
    PMTrainer(model=lora_llama(**config), args=args, train_dataset=rows, callbacks=[kept]).train()
    assert_close(kept.found[0], multiplied_gradients(lora_llama(**config).train(), [batch(rows)], [1.5]), 1e-4)
    model = lora_llama(**config)
    curvature = estimate_curvature(model, [batch(rows)], adapter="default")
    for name, layer in adapted_layers(model, "default").items():
        A, B = (factor["default"].weight.detach() for factor in (layer.lora_A, layer.lora_B))
        assert curvature.delta_norm[name] == pytest.approx(float((SCALING * B @ A).norm()), rel=1e-5)


def test_a_stream_with_rslora_merges_what_it_trained(tiny_base, stream_data, tmp_path):
    lora = {"r": RANK, "use_rslora": True, "target_modules": ["key", "value"]}
    changes = {"groups": 2, "training__num_train_epochs": 1, "lora": lora}
    learn(settings(tiny_base, stream_data(12), tmp_path / "run", "average", **changes))
    one, two = (step / "adapter" for step in sorted((tmp_path / "run").glob("task-*")))
    assert open_adapter(one).config["lora_alpha"] == 6  # where the YAML is silent
    parts = [{name: value.double() for name, value in tensors(folder).items()} for folder in (one, two)]
    for module, value in dense(tmp_path / "run" / "merged").items():
        products = [SCALING * p[f"{module}.lora_B.weight"] @ p[f"{module}.lora_A.weight"] for p in parts]
        torch.testing.assert_close(value, products[0] + 0.5 * products[1], rtol=1e-5, atol=1e-7)
    assert steps(tmp_path / "run")[1]["coefficient"]["used"] == 0.5


@pytest.mark.parametrize(
    ("lora", "alpha"), [({}, 16), ({"r": 4}, 8), ({"use_rslora": True}, 6), ({"r": 64, "use_rslora": True}, 6)]
)
def test_default_alpha_keeps_the_scaling_of_rank_8(tmp_path, lora, alpha):
    config = {"output_dir": "out", "model": {"base": "tiny"}, "stream": {"class_groups": 2}, "lora": lora}
    assert load_config(config).lora.alpha == alpha


@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal"])
def test_every_start_is_the_model_that_the_task_begins_with(base, tmp_path, start):
    earlier = saved(filled(built(base, RSLORA), 1), tmp_path / "earlier")
    merge_adapters(earlier, tmp_path / "merged")
    lora = LoraSettings(r=RANK, alpha=8, init_lora_weights=start, target_modules=["q_proj", "down_proj"])
    for merged, expected in ((None, with_products(base)), (tmp_path / "merged", with_products(base, earlier))):
        model = built(base, lora, None if merged is None else open_adapter(merged))
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
        factors = task_tensors(model, "causal-lm")[0]
        B = torch.cat([value.flatten() for name, value in factors.items() if "lora_B" in name])
        assert bool(B.any()) == (start == "orthogonal")
        again = task_tensors(built(base, lora, None if merged is None else open_adapter(merged)), "causal-lm")[0]
        assert all(torch.equal(value, again[name]) for name, value in factors.items())  # of the seed alone
    plain = task_tensors(built(base, LoraSettings(r=RANK, alpha=8, target_modules=["q_proj", "down_proj"])), **KIND)[0]
    assert all(torch.equal(plain[name], factors[name]) for name in plain) == (start is True)
    other = saved(filled(model, 3), tmp_path / "task")
    merge_adapters(other, tmp_path / "next", into=tmp_path / "merged", coefficient=0.5)  # it is a plain LoRA


def test_a_stream_trains_from_an_orthogonal_start(tiny_base, stream_data, tmp_path):
    changes = {"groups": 2, "training__num_train_epochs": 1, "lora__init_lora_weights": "orthogonal"}
    learn(settings(tiny_base, stream_data(12), tmp_path / "run", "pm", **changes))
    assert open_adapter(tmp_path / "run" / "merged").config["init_lora_weights"] is True
    assert all(value.isfinite().all() and value.norm() > 0 for value in dense(tmp_path / "run" / "merged").values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({"lora__init_lora_weights": start}, f"found {start}, which rewrites the base's weights: ")
            for start in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")
        ),
        ({"lora__init_lora_weights": "eva"}, "found eva, which looks at data first"),
        ({"lora__init_lora_weights": "mica"}, "found mica, which freezes B"),
        ({"lora__init_lora_weights": False}, "found false, which starts from a random product"),
        ({"lora__init_lora_weights": "zebra"}, "expected true or gaussian or orthogonal, found zebra"),
        ({"lora__init_lora_weights": "orthogonal", "lora__r": 3}, "orthogonal needs an even lora.r, found 3"),
        ({"lora__init_lora_weights": "orthogonal", "model__dtype": "bfloat16"}, "found bfloat16; use gaussian"),
        ({"lora__init_lora_weights": "orthogonal", "model__quantization": "nf4"}, "found nf4; use gaussian"),
        ({"lora__use_rslora": "yes"}, "lora.use_rslora: expected bool, found 'yes'"),
    ],
    ids=str,
)
def test_starts_that_are_not_exact_are_refused_with_the_reason(tmp_path, changes, message):
    assert message in refusal(load_config, settings(tmp_path / "base", tmp_path, tmp_path / "run", **changes))
