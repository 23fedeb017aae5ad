"""The base model with Σ λᵢτᵢ on top, differentiable in λ: task vectors as forward hooks, saved tensors in place."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pm_hf.errors import InputError
from pm_hf.layouts import Layout
from pm_hf.merging.elementwise import row_blocks, smallest_kept
from pm_hf.merging.lowrank import LowRank, Matrix, compact_svd
from pm_hf.plan import Plan

TEMPERATURE, MASK_START = 10.0, 0.1  # T and the first m of AdaRank; m > 0 keeps a singular value


@dataclass(frozen=True)
class Terms:
    """Σᵢ wᵢτᵢ of one matrix as a function of its input.

    tensors: A (R, in) and B (out, R) of all adapters side by side, or the dense task vectors (N, out, in). owner: the
    adapter of each weight, (R,) or (N,): one weight for each direction of the factors, or for each dense τᵢ.
    """

    name: str
    tensors: tuple[Tensor, ...]
    owner: Tensor

    def __call__(self, x: Tensor, weights: Tensor) -> Tensor:
        """(…, in) to (…, out), in the dtype of the tensors: float32, or float64 in a model of float64."""
        first, *second = self.tensors
        x, weights = x.to(first.dtype), weights.to(first)
        if not second:
            return F.linear(x, torch.tensordot(weights, first, 1))
        return F.linear(F.linear(x, first) * weights, second[0])


class Coefficients:
    """λ (matrices, N), or (1, N) if `shared`, and with `masks` the logits m of every direction; all float64."""

    def __init__(self, terms: Sequence[Terms], count: int, start: float, *, shared: bool, masks: bool) -> None:
        settings: dict[str, Any] = {"dtype": torch.float64, "device": terms[0].owner.device, "requires_grad": True}
        self.terms, self.count = terms, count
        self.row = {term.name: 0 if shared else i for i, term in enumerate(terms)}
        self.scales = torch.full((1 if shared else len(terms), count), start, **settings)
        self.logits = {term.name: torch.full(term.owner.shape, MASK_START, **settings) for term in terms if masks}

    def parameters(self) -> list[Tensor]:
        """What is learned."""
        return [self.scales, *self.logits.values()]

    def weights(self, term: Terms) -> Tensor:
        """λ of each direction's adapter, times [sigmoid(m/T) > 1/2] with the sigmoid's gradient (straight-through)."""
        weights = self.scales[self.row[term.name]][term.owner.to(self.scales.device)]
        if not self.logits:
            return weights
        soft = (self.logits[term.name] / TEMPERATURE).sigmoid()
        return weights * (soft + ((soft > 0.5).to(soft.dtype) - soft).detach())

    def values(self) -> dict[str, dict[str, list]]:
        """{matrix: {"coefficients": [λ of each adapter], "masks": [[0 or 1] of each adapter]}}."""
        return {term.name: self._values(term) for term in self.terms}

    def _values(self, term: Terms) -> dict[str, list]:
        found = {"coefficients": self.scales[self.row[term.name]].tolist()}
        if self.logits:
            kept, owner = (self.logits[term.name] > 0).int().cpu(), term.owner.cpu()
            found["masks"] = [kept[owner == i].tolist() for i in range(self.count)]
        return found


def find_layers(model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """{module that the adapters adapt: the model's layer}; InputError for what it lacks or what is not linear."""
    there = dict(model.named_modules(remove_duplicate=False))
    problems = [found for name in plan.modules if (found := _misfit(name, there.get(name), plan.layout(name)))]
    if problems:
        raise InputError(
            f"{len(problems)} of {len(plan.modules)} adapted modules do not fit the model ({type(model).__name__}), "
            f"first: {problems[0]}"
        )
    return {name: there[name] for name in plan.modules}


def make_terms(matrix: Matrix, like: Tensor, method: str, options: Mapping[str, Any]) -> Terms:
    """The task vectors of one matrix on the device of `like`.

    adamerging: as factors. adarank: as U√s and √sVᵀ, inside the numerical rank. adamerging++: dense, trimmed to the
    share `density` of the entries.
    """
    owner = torch.arange(len(matrix.terms))
    if method == "adamerging++":
        tensors = [torch.stack([_trimmed(term, options["density"]) for term in matrix.terms])]
    else:
        factors = [_singular(term) if method == "adarank" else term for term in matrix.terms]
        owner = owner.repeat_interleave(torch.tensor([term.rank for term in factors]))
        tensors = [torch.cat([term.A for term in factors]), torch.cat([term.B for term in factors], dim=1)]
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return Terms(matrix.name, tuple(tensor.to(like.device, dtype) for tensor in tensors), owner.to(like.device))


@contextmanager
def merged_model(
    model: nn.Module,
    saved: Mapping[str, Tensor],
    labels: Mapping[str, Sequence[str]],
    terms: Mapping[str, Sequence[Terms]],
    coefficients: Coefficients,
) -> Iterator[set[str]]:
    """The model in eval mode, frozen, `saved` in place of its own tensors, Σ λᵢτᵢx added in the layers of `terms`.

    The second of a layer's terms is its LoRA bias, (out, 1). Yields the names of the layers that have not run yet.
    Afterwards, also after an error, the model is as it was, bit for bit. InputError where `saved` does not fit.
    """
    modes = {module: module.training for module in model.modules()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    targets = {name: _target(model, name, value, labels) for name, value in saved.items()}
    before = [(target, target.data) for target in targets.values()]
    waiting, handles = set(terms), []
    try:
        model.eval().requires_grad_(False)
        for name, target in targets.items():
            target.data = saved[name].to(target)
        for name, own in terms.items():
            hook = _hook(name, own, coefficients, waiting)
            handles.append(model.get_submodule(name).register_forward_hook(hook))
        yield waiting
    finally:
        for handle in handles:
            handle.remove()
        for target, data in before:
            target.data = data
        for parameter in trainable:
            parameter.requires_grad_()
        for module, mode in modes.items():
            module.training = mode


def _hook(name: str, terms: Sequence[Terms], coefficients: Coefficients, waiting: set[str]) -> Callable:
    def add(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        waiting.discard(name)
        inputs = (args[0], args[0].new_ones(1))
        updates = [term(x, coefficients.weights(term)) for term, x in zip(terms, inputs, strict=False)]
        return sum(updates, output).to(output.dtype)

    return add


def _target(model: nn.Module, name: str, value: Tensor, labels: Mapping[str, Sequence[str]]) -> Tensor:
    """The model's own tensor for a saved one; InputError when it has none of that shape."""
    owner, _, last = name.replace(".base_layer.", ".").rpartition(".")
    layer = dict(model.named_modules(remove_duplicate=False)).get(owner)
    target = getattr(layer, last, None)
    if not isinstance(target, Tensor):
        raise InputError(
            f"the model ({type(model).__name__}) lacks {name}, which the adapters save; load it with the class that "
            "they were trained on"
        )
    if target.shape != value.shape:
        size = f"num_labels={len(labels[owner])}" if owner in labels else "the sizes that the adapters have"
        raise InputError(
            f"{name} is {tuple(target.shape)} in the model, {tuple(value.shape)} in the merged adapters; load the base "
            f"with {size}"
        )
    return target


def _misfit(name: str, layer: nn.Module | None, layout: Layout) -> str | None:
    """Why an update cannot act on the layer by a hook."""
    way_out = "merge with a method that learns nothing, such as method='task_arithmetic'"
    if layout.kind != "linear":
        return f"{name} has LoRA of kind {layout.kind!r}, expected LoRA on Linear or Conv1D; {way_out}"
    if layer is None:
        return f"it lacks {name}; load it with the class that the adapters were trained on"
    if not isinstance(layer, nn.Linear | Conv1D):
        return f"{name} is a {type(layer).__name__}, expected Linear or Conv1D; {way_out}"
    shape = (layer.nf, layer.nx) if isinstance(layer, Conv1D) else (layer.out_features, layer.in_features)
    if shape != layout.shape:
        return f"{name} is {shape} in the model, {layout.shape} in the adapters; load the base of the adapters"
    return None


def _trimmed(term: LowRank, density: float) -> Tensor:
    """τ without its small entries, by the blocks and the threshold of the merge: both keep the same entries."""
    tau = torch.cat([block for _, block in row_blocks(term)])
    return tau * (tau.abs() >= smallest_kept(term, density))


def _singular(term: LowRank) -> LowRank:
    """One direction for each singular value."""
    U, s, Vh = compact_svd(term)
    return LowRank(U * s.sqrt(), s.sqrt()[:, None] * Vh)
