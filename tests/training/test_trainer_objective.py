"""What the perturbation adds to the objective: ½ε²(p₊ + p₋)·ΔᵀHΔ, and the flatter optimum that follows."""

import pytest
import torch
import torch.nn.functional as F
from helpers.models import OLD_NAME, Watch, pin, quick_arguments
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import TrainerCallback

from pm_hf import PMConfig, PMTrainer

pytestmark = pytest.mark.filterwarnings(OLD_NAME)


class Regression(nn.Module):
    """y ≈ Wx with the mean over examples of the squared distance as its loss."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.linear(x) - labels).square().sum(-1).mean()}


class Classifier(nn.Module):
    """Two layers with a tanh between them."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.outer(torch.tanh(self.inner(x))), labels)}


def adapted(model: nn.Module, targets: list[str], rank: int) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))


def run(folder, model, data, callback, **settings) -> None:
    count = len(data)
    args = quick_arguments(
        folder,
        PMConfig,
        per_device_train_batch_size=count,
        max_grad_norm=0.0,
        remove_unused_columns=False,
        logging_strategy="no",
        **settings,
    )
    PMTrainer(model=model, args=args, train_dataset=data, callbacks=[callback]).train()


@pytest.mark.parametrize(
    ("scale", "probabilities"), [(0.5, (1 / 3, 1 / 3, 1 / 3)), (0.2, (0.5, 0.25, 0.25)), (0.9, (0.0, 0.5, 0.5))]
)
def test_the_expected_gradient_is_that_of_the_loss_plus_the_curvature_term(tmp_path, monkeypatch, scale, probabilities):
    torch.manual_seed(0)
    model = adapted(Regression(), ["linear"], rank=2).double()
    x, y = torch.randn(20, 5).double(), torch.randn(20, 3).double()
    layer = model.base_model.model.linear
    nn.init.normal_(layer.lora_B["default"].weight)
    W, s = layer.base_layer.weight.detach().clone(), layer.scaling["default"]
    A, B = (factor["default"].weight.detach().clone() for factor in (layer.lora_A, layer.lora_B))

    found = []

    def collect(model):
        found.append([factors["default"].weight.grad.clone() for factors in (layer.lora_A, layer.lora_B)])
        model.zero_grad()  # no update: every factor sees the same weights

    for factor in (1.0, 1 + scale, 1 - scale):
        pin(monkeypatch, factor)
        data = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
        run(tmp_path, model, data, Watch(collect), max_steps=1, weight_decay=0.0)
    expected_A, expected_B = (
        sum(p * gradient for p, gradient in zip(probabilities, gradients, strict=True))
        for gradients in zip(*found, strict=True)
    )

    delta = s * B @ A
    second_moment = x.T @ x / len(x)  # L has the Hessian 2·(XᵀX/n) in every row of W
    slope = 2 * ((x @ (W + delta).T - y).T @ x) / len(x)
    curvature_slope = 2 * delta @ (2 * second_moment)  # of ΔᵀHΔ with respect to Δ
    weight = 0.5 * scale**2 * (probabilities[1] + probabilities[2])
    if scale == 0.5:
        assert weight == pytest.approx(scale**2 / 3)
    total = slope + weight * curvature_slope
    torch.testing.assert_close(expected_A, s * B.T @ total, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(expected_B, s * total @ A.T, rtol=1e-6, atol=1e-9)
    assert (s * B.T @ slope - expected_A).norm() > 1e-2 * expected_A.norm()  # the term is there to be seen


TARGET = 0.1


class StopAt(TrainerCallback):
    """Stop when the unperturbed loss over all data has reached the target."""

    def __init__(self, batch: dict[str, Tensor], target: float):
        self.batch, self.target, self.loss = batch, target, float("inf")

    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.loss = model(**self.batch)["loss"].item()
        control.should_training_stop = self.loss <= self.target


def quadratic_form(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    """ΔᵀHΔ of the mean loss at W + Δ: the second derivative at f = 1 of f ↦ L(W + fΔ)."""
    f = torch.ones((), dtype=torch.float64, requires_grad=True)
    hidden = x.double()
    for layer, activation in ((model.inner, torch.tanh), (model.outer, nn.Identity())):
        delta = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        weight = layer.base_layer.weight.double() + f * delta.detach().double()
        hidden = activation(hidden @ weight.T + layer.base_layer.bias.double())
    (slope,) = torch.autograd.grad(F.cross_entropy(hidden, labels), f, create_graph=True)
    return torch.autograd.grad(slope, f)[0].item()


def flatness(folder, seed: int, scale: float) -> tuple[float, float]:
    """(loss, ΔᵀHΔ) after training to the same target."""
    torch.manual_seed(seed)
    model = adapted(Classifier(), ["inner", "outer"], rank=4)
    x = torch.randn(48, 6)
    labels = (x @ torch.randn(6, 3) + 0.5 * torch.randn(48, 3)).argmax(-1)
    stop = StopAt({"x": x, "labels": labels}, target=TARGET)
    data = [{"x": a, "labels": b} for a, b in zip(x, labels, strict=True)]
    run(
        folder,
        model,
        data,
        stop,
        max_steps=400,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        perturbation_scale=scale,
        seed=seed,
    )
    return stop.loss, quadratic_form(model.base_model.model, x, labels)


def test_the_trained_quadratic_form_is_lower_at_equal_training_loss_for_every_seed(tmp_path):
    ratios = []
    for seed in range(5):
        (plain_loss, plain), (loss, perturbed) = (flatness(tmp_path, seed, scale) for scale in (0.0, 0.5))
        assert plain_loss == pytest.approx(TARGET, rel=0.04)
        assert loss == pytest.approx(TARGET, rel=0.04)
        ratios.append(perturbed / plain)
    assert max(ratios) < 0.95, ratios  # every seed
    assert sum(ratios) / 5 < 0.9, ratios
