"""Image classifiers of different architectures as backbones: heads, statistics, curvature, what a user loads."""

import pytest
import torch
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2ForImageClassification,
    LevitConfig,
    LevitForImageClassification,
    LevitForImageClassificationWithTeacher,
    MobileViTConfig,
    MobileViTForImageClassification,
    SwiftFormerConfig,
    SwiftFormerForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from pm_hf.adapters.folder import save_adapter
from pm_hf.config.schema import LoraSettings, ModelSettings
from pm_hf.errors import InputError
from pm_hf.measuring.curvature import estimate_curvature
from pm_hf.models.loading import load_merged
from pm_hf.models.lora import adapted_layers
from pm_hf.models.task_model import TASK_ADAPTER, build_task_model, task_tensors

KIND = "image-classification"
LABELS = ("cat", "dog", "owl")
PLAIN = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
LEVIT = {
    "image_size": 64,
    "hidden_sizes": [16, 24, 32],
    "num_attention_heads": [2, 2, 2],
    "depths": [1, 1, 1],
    "key_dim": [8, 8, 8],
}
MOBILE = {
    "image_size": 64,
    "hidden_sizes": [16, 24, 32],
    "neck_hidden_sizes": [4, 8, 8, 16, 16, 16, 32],
    "num_attention_heads": 2,
    "initializer_range": 0.2,  # else nothing comes through its many layers
}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 2], "window_size": 4}
CONV = {"image_size": 32, "patch_size": 2, "hidden_sizes": [16, 24], "depths": [1, 1], "num_stages": 2}
# architecture: (class, configuration, target modules, module name of the head's Linear)
ARCHITECTURES = {
    "vit": (ViTForImageClassification, ViTConfig(**PLAIN), ["k_proj", "v_proj"], "classifier"),
    "deit": (DeiTForImageClassification, DeiTConfig(**PLAIN), ["k_proj", "v_proj"], "classifier"),
    "beit": (BeitForImageClassification, BeitConfig(**PLAIN), ["k_proj", "v_proj"], "classifier"),
    "dinov2": (Dinov2ForImageClassification, Dinov2Config(**PLAIN, mlp_ratio=2), ["fc1", "fc2"], "classifier"),
    "swin": (SwinForImageClassification, SwinConfig(**SWIN), ["k_proj", "v_proj", "reduction"], "classifier"),
    "convnext": (ConvNextForImageClassification, ConvNextConfig(**CONV), ["pwconv1", "pwconv2"], "classifier"),
    "mobilevit": (MobileViTForImageClassification, MobileViTConfig(**MOBILE), ["value", "dense"], "classifier"),
    "levit": (LevitForImageClassification, LevitConfig(**LEVIT), r".*linear_up\.linear", "classifier.linear"),
}


def saved(folder, kind, config):
    torch.manual_seed(0)
    config.num_labels = 2
    model = kind(config)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
    model.save_pretrained(folder)
    return ModelSettings(base=str(folder))


def batches(size, count=4):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(count, 3, size, size, generator=generator)
    labels = torch.arange(count) % len(LABELS)
    return lambda n: [{"pixel_values": pixels[i : i + n], "labels": labels[i : i + n]} for i in range(0, count, n)]


def train(model, data):
    """A few steps in training mode, as the Trainer makes them."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    for batch in data * 3:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_trained_model_is_what_a_user_loads_and_its_fisher_is_per_example(name, tmp_path):
    kind, config, targets, head = ARCHITECTURES[name]
    settings, lora = saved(tmp_path / "base", kind, config), LoraSettings(r=2, alpha=4, target_modules=targets)
    built = build_task_model(settings, lora, LABELS, None, 0, 0, kind=KIND)
    assert built.head == head
    before = {key: value.clone() for key, value in built.model.named_buffers()}
    data = batches(config.image_size)
    train(built.model, data(4))
    assert all(torch.equal(value, before[key]) for key, value in built.model.named_buffers())

    together, apart = (estimate_curvature(built.model, data(n), adapter=TASK_ADAPTER, kind="fisher") for n in (4, 1))
    assert together.S.keys() == apart.S.keys()
    for module, found in together.S.items():
        assert float(apart.S[module].max()) > 0
        assert torch.allclose(found, apart.S[module], rtol=1e-3, atol=1e-5 * float(apart.S[module].max()))

    factors, rest, peft_config = task_tensors(built.model, KIND)
    save_adapter(tmp_path / "adapter", peft_config, factors, rest, {head: list(LABELS)})
    loaded = load_merged(settings, tmp_path / "adapter", LABELS, KIND)
    with torch.no_grad():
        wanted, found = (model(pixel_values=data(4)[0]["pixel_values"]).logits for model in (built.model, loaded))
    assert wanted.shape == (4, 3)
    assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "config", "targets", "message"),
    [
        (
            DeiTForImageClassificationWithTeacher,
            DeiTConfig(**PLAIN),
            ["k_proj"],
            "another head distillation_classifier; use a checkpoint without distillation",
        ),
        (
            LevitForImageClassificationWithTeacher,
            LevitConfig(**LEVIT),
            ["linear"],
            "another head classifier_distill; use a checkpoint without distillation",
        ),
        (
            SwiftFormerForImageClassification,
            SwiftFormerConfig(depths=[1, 1], embed_dims=[8, 16], downsamples=[True, True]),
            ["fc1"],
            "SwiftFormerForImageClassification has no head named classifier or score",
        ),
        (ViTForImageClassification, ViTConfig(**PLAIN), ["query"], "its linear layers are called q_proj, k_proj, v_"),
        (ViTForImageClassification, ViTConfig(**PLAIN), ["fc1", "query"], "query names no layer of ViT.*q_proj"),
    ],
)
def test_models_that_cannot_be_adapted_are_refused_clearly(tmp_path, kind, config, targets, message):
    settings = saved(tmp_path / "base", kind, config)
    with pytest.raises(InputError, match=message):
        build_task_model(settings, LoraSettings(target_modules=targets), LABELS, None, 0, 0, kind=KIND)


def test_without_target_modules_a_model_that_peft_does_not_know_is_adapted_in_every_linear_layer(tmp_path):
    settings = saved(tmp_path / "base", ViTForImageClassification, ViTConfig(**PLAIN))
    built = build_task_model(settings, LoraSettings(r=2, alpha=4), LABELS, None, 0, 0, kind=KIND)
    adapted = {name.rpartition(".")[2] for name in adapted_layers(built.model, TASK_ADAPTER)}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"}
