"""LoRA layers and heads of a live model: their products, their shapes, what trains."""

from collections.abc import Iterable

import torch
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor, nn

from pm_hf.adapters.folder import Adapter, join_bias
from pm_hf.errors import InputError
from pm_hf.merging.curvature import CurvatureKind
from pm_hf.merging.lowrank import LowRank, add
from pm_hf.models.sharded import plain_name


def curvature_bytes(model: nn.Module, adapter: str, kind: CurvatureKind) -> int:
    """Size of the sums S and M in float32, without a shared head; for the Gram at most, as layers may share inputs."""
    total = 0
    for layer in adapted_layers(model, adapter).values():
        rows, columns = layer.lora_B[adapter].weight.shape[0], layer.lora_A[adapter].weight.shape[1]
        entries = {"fisher": 2 * rows * columns, "gram": columns * (rows + columns), "factored": rows + columns}
        total += 4 * entries[kind]
    return total


def adapted_layers(model: nn.Module, adapter: str) -> dict[str, LoraLayer]:
    """{module name as in the adapter's file: layer} of the layers that carry `adapter`."""
    layers = {
        plain_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.scaling
    }
    if not layers:
        raise InputError(f"the model has no LoRA adapter {adapter!r}")
    odd = [name for name, layer in layers.items() if not _is_plain(layer, adapter)]
    if odd:
        raise InputError(
            f"curvature is measured on Linear layers without lora_bias, {odd[0]} is {type(layers[odd[0]]).__name__}"
        )
    idle = [name for name, layer in layers.items() if adapter not in layer.active_adapters or layer.disable_adapters]
    if idle:
        raise InputError(f"adapter {adapter!r} is not active in {len(idle)} layers, first {idle[0]}; activate it first")
    return layers


def _is_plain(layer: LoraLayer, adapter: str) -> bool:
    """Whether s·BA, (out, in), is all that the adapter adds to a layer that maps vectors to vectors."""
    if adapter not in layer.lora_A or isinstance(layer, ParamWrapper):  # embeddings keep theirs elsewhere
        return False
    return isinstance(layer.lora_A[adapter], nn.Linear) and not layer.lora_bias.get(adapter)


def lora_factors(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """(B (out, r), A (r, in)) of one adapter of a layer, float32, with their graph."""
    return layer.lora_B[adapter].weight.float(), layer.lora_A[adapter].weight.float()


def layer_product(layer: LoraLayer, adapters: Iterable[str]) -> LowRank:
    """Sum of s·BA over the adapters of one layer, (out, in), float32, detached."""
    products = []
    for name in adapters:
        if name in layer.scaling:
            B, A = (factor.detach().cpu() for factor in lora_factors(layer, name))
            products.append(LowRank(B * layer.scaling[name], A))
    return add(*products)


def head_matrix(linear: nn.Linear) -> LowRank:
    """[weight | bias] of a Linear, (rows, in + 1), or the weight alone without a bias; float32, detached."""
    matrix = join_bias(linear.weight, linear.bias).detach().cpu()
    return LowRank(matrix, torch.eye(matrix.shape[1]))


def trainable_lora_adapters(model: torch.nn.Module) -> list[str]:
    """Names of the adapters that have a trainable LoRA weight, sorted."""
    names = set()
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for factors in (layer.lora_A, layer.lora_B, layer.lora_embedding_A):
                names |= {name for name, factor in factors.items() if _trains(factor)}
    return sorted(names)


def _trains(factor: torch.nn.Module | torch.nn.Parameter) -> bool:
    parameters = [factor] if isinstance(factor, torch.nn.Parameter) else factor.parameters()
    return any(parameter.requires_grad for parameter in parameters)


@torch.no_grad()
def orthonormal_start(model: nn.Module, adapter: str, previous: Adapter) -> None:
    """A starts as the orthonormal basis of the rows of the last task's A, B as its B (SLAO, arXiv 2512.23017).

    The basis is Q of Aᵀ = QR with R's diagonal positive, so rows that are orthonormal already stay as they are.
    A scaling that differs from the last task's goes into B. Raises InputError when the ranks or modules differ.
    """
    layers = adapted_layers(model, adapter)
    odd = [name for name, layout in previous.layouts.items() if layout.bias or layout.kind != "linear"]
    if lost := sorted({*odd, *(name for name in previous.layouts if name not in layers)}):
        raise InputError(
            f"{previous.path} has factors of {lost[0]} that the new task cannot start with; name the same linear "
            "layers in lora.target_modules, or use another method"
        )
    for name, layer in layers.items():
        if name not in previous.layouts:
            raise InputError(f"{previous.path} has no factors of {name}, from which training was to start")
        A, B = (previous.tensor(f"{name}.lora_{factor}.weight").float() for factor in "AB")
        Q, R = torch.linalg.qr(A.T)
        start = {"A": (Q * _positive_signs(R.diagonal())).T, "B": B * (previous.scaling[name] / layer.scaling[adapter])}
        for factor, value in start.items():
            weight = getattr(layer, f"lora_{factor}")[adapter].weight
            if weight.shape != value.shape:
                raise InputError(
                    f"{previous.path}: lora_{factor} of {name} has shape {tuple(value.shape)}, the new task's "
                    f"{tuple(weight.shape)}; use one lora.r for all tasks"
                )
            weight.copy_(value)


def _positive_signs(values: Tensor) -> Tensor:
    return torch.where(values < 0, -1.0, 1.0)


class LoraDelta:
    """s·BA of one layer's adapter with its graph, (out, in) float32, at the scaling it had when this was made."""

    def __init__(self, layer: LoraLayer, adapter: str) -> None:
        self.layer, self.adapter, self.scaling = layer, adapter, layer.scaling[adapter]

    def __call__(self) -> Tensor:
        """The product now."""
        B, A = lora_factors(self.layer, self.adapter)
        return self.scaling * (B @ A)


class HeadDelta:
    """[weight | bias] of a Linear with its graph, (out, in + 1) float32, less what it was when this was made."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear, self.before = linear, head_matrix(linear).B.clone()

    def __call__(self) -> Tensor:
        """The difference now."""
        now = join_bias(self.linear.weight, self.linear.bias)
        self.before = self.before.to(now.device)
        return now - self.before


def find_head(model: nn.Module, name: str) -> nn.Linear:
    """The Linear that `name` stands for, its trained copy where PEFT wrapped it."""
    for full, module in model.named_modules():
        if isinstance(module, nn.Linear) and plain_name(full) == name:
            return module
    raise InputError(f"the model has no linear head {name!r}")
