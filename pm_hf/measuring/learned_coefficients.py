"""AdaMerging and AdaRank: coefficients of task vectors, learned from unlabelled inputs through the model."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from pm_hf.adapters.download import adapter_folder
from pm_hf.adapters.folder import open_adapter
from pm_hf.adapters.layout import Layout
from pm_hf.adapters.plan import Plan, make_plan, make_request
from pm_hf.adapters.saved_modules import merge_saved
from pm_hf.environment import versions
from pm_hf.errors import InputError, raise_all
from pm_hf.files import write_json
from pm_hf.merging.lowrank import LowRank, balanced, compact_svd
from pm_hf.merging.methods import METHODS, read_options
from pm_hf.merging.methods.base import Matrix, row_blocks, smallest_kept
from pm_hf.merging.methods.linear import AVERAGE
from pm_hf.models.contexts import evaluating, seeded

Batch = Mapping[str, Any]


Predict = Callable[[nn.Module, Batch], Tensor]


LEARNED_METHODS = tuple(name for name, method in METHODS.items() if method.learned)


@dataclass(frozen=True)
class LearnedCoefficients(Mapping[str, Any]):
    """What was learned and from what. It, or the file that `save` writes, is the `learned=` of merge_adapters.

    method, options: what to merge with. settings: those of `learn_coefficients`. inputs: the adapters. digests: of
    their weights files, which merge_adapters compares. matrices:
    {matrix name: {"coefficients": [λ of each adapter], "masks": [[0 or 1 for each singular value, the largest first]
    of each adapter]}}, masks for adarank only; the λ of an adapter that leaves the matrix alone stays at its start.
    history: the objective before each step, in nats.
    """

    method: str
    options: dict[str, Any]
    settings: dict[str, Any]
    inputs: list[str]
    digests: list[str]
    matrices: dict[str, dict[str, list]]
    history: list[float]
    versions: dict[str, str] = field(default_factory=versions)

    def save(self, path: str | os.PathLike) -> None:
        """Write the JSON file, whole or not at all."""
        write_json(Path(path), self)

    def __getitem__(self, name: str) -> Any:
        if name not in list(self):
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(field.name for field in fields(self))

    def __len__(self) -> int:
        return len(fields(self))


def learn_coefficients(
    model: nn.Module,
    dataloader: Iterable[Batch] | Sequence[Iterable[Batch]],
    adapters: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    method: str = "adamerging",
    per: Literal["module", "task"] = "module",
    steps: int = 500,
    learning_rate: float = 1e-3,
    start: float = 0.3,
    options: Mapping[str, Any] | None = None,
    predict: Predict | None = None,
    seed: int = 0,
) -> LearnedCoefficients:
    """λ of the merge Σᵢ λᵢτᵢ that minimise the mean entropy of the model's predictions on unlabelled inputs.

    Objective: −Σ_c p_c log p_c with p the softmax over the last dimension of the logits, in float32, mean over the
    examples of a batch; for logits (N, T, C) over the positions whose attention_mask is not 0. A step takes one batch,
    or one of each task's loader and sums their means. Adam with `learning_rate`; every λ begins at `start` and is not
    confined to [0, 1]. per="task": one λᵢ for each adapter; "module": one for each adapter and matrix, a LoRA bias
    being a matrix of its own (AdaMerging, arXiv 2310.02575, task-wise and layer-wise). "adamerging++" trims each τᵢ
    first, as TIES does (option `density`). "adarank" also learns which singular values each τᵢ keeps,
    Uᵢ diag(hᵢ∘sᵢ) Vᵢᵀ with h = [sigmoid(m/10) > 1/2] and the gradient of the sigmoid, every m from 0.1: all kept
    (arXiv 2503.22178).

    model: the base, not wrapped in PEFT. It runs in eval mode with the adapters' saved tensors (heads merged by
    label, rows in the order of merge_adapters) in place of its own; afterwards it is as it was, also after an error.
    dataloader: batches, dicts of tensors (`labels` is taken out), from the beginning again when they are exhausted;
    or a list of such loaders, one a task. adapters: as for merge_adapters, with LoRA on Linear or Conv1D layers.
    predict(model, batch): logits (N, C) or (N, T, C), by default `model(**batch).logits`. seed: of the random state
    during the learning (a shuffling loader draws from it); the global one is left alone.

    The entropy also falls when predictions collapse onto few classes, as a high learning rate makes them: check the
    accuracy where there are labels. λ and m are float64; the task vectors act in float32 (float64 in such a base), as
    factors Σᵢ λᵢ(xAᵢᵀ)Bᵢᵀ, dense for "adamerging++". Cost: `steps` forward and backward passes of every loader's batch.

    Raises InputError: settings, adapters or model that do not fit, a layer that the forward pass does not reach, no
    batches, an entropy that is not finite.
    """
    raise_all(_problems(model, method, per, steps, learning_rate, start), "learn_coefficients")
    chosen = read_options(method, options)
    paths = [adapters] if isinstance(adapters, str | os.PathLike) else list(adapters)
    plan = _open(paths)
    terms = {
        name: [make_terms(matrix, layer.get_parameter("weight"), method, chosen) for matrix in plan.matrices(name)]
        for name, layer in find_layers(model, plan).items()
    }
    every = [term for of_layer in terms.values() for term in of_layer]
    masks = "masks" in METHODS[method].learned
    coefficients = Coefficients(every, len(paths), start, shared=per == "task", masks=masks)
    saved = merge_saved(plan)
    labels = {head: rows for head, rows in saved.labels.items() if rows is not None}
    device = next(model.parameters()).device
    sources = [_endless(loader, device) for loader in _loaders(dataloader)]
    with seeded(seed), torch.enable_grad(), merged_model(model, saved.tensors, labels, terms, coefficients) as waiting:
        objective = _objective(model, sources, predict or _logits, waiting)
        history = _minimise(objective, coefficients.parameters(), steps, learning_rate)
    used = {"per": per, "steps": steps, "learning_rate": learning_rate, "start": start, "seed": seed}
    digests = [adapter.digest() for adapter in plan.adapters]
    return LearnedCoefficients(
        method, chosen, used, [str(path) for path in paths], digests, coefficients.values(), history
    )


def _problems(model: nn.Module, method: str, per: str, steps: int, learning_rate: float, start: float) -> list[str]:
    problems = []
    if method not in LEARNED_METHODS:
        problems.append(f"method must be one of {', '.join(LEARNED_METHODS)}, found {method!r}")
    if per not in ("module", "task"):
        problems.append(f"per must be module or task, found {per!r}")
    if not isinstance(steps, int) or steps < 1:
        problems.append(f"steps must be an integer from 1, found {steps}")
    if not (learning_rate > 0 and math.isfinite(learning_rate)):
        problems.append(f"learning_rate must be above 0 and finite, found {learning_rate}")
    if not math.isfinite(start):
        problems.append(f"start must be finite, found {start}")
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        problems.append("the model is wrapped in PEFT, expected the base alone; load the base again")
    return problems


def _open(paths: Sequence[str | os.PathLike]) -> Plan:
    """The adapters, checked to belong together, with the weights that their heads have in the merge."""
    if not paths:
        raise InputError("learn_coefficients: no adapter given")
    mean = make_request(AVERAGE.name, weights=[1 / len(paths)] * len(paths))
    return make_plan(mean, [open_adapter(adapter_folder(path)) for path in paths], None)


def _loaders(dataloader: Any) -> list[Iterable[Batch]]:
    """A loader for each task; a list of batches is one loader."""
    several = isinstance(dataloader, list | tuple) and not any(isinstance(item, Mapping) for item in dataloader)
    return list(dataloader) if several and dataloader else [dataloader]


def _endless(loader: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on the device, without labels, from the beginning again when they are exhausted."""
    while True:
        empty = True
        for batch in loader:
            if not isinstance(batch, Mapping):
                raise InputError(f"dataloader: expected batches as dicts of tensors, found a {type(batch).__name__}")
            empty = False
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            yield {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
        if empty:
            raise InputError(
                "dataloader: no batches; expected at least one whenever it is iterated (a DataLoader or a list, "
                "which a generator is not)"
            )


def _objective(
    model: nn.Module, sources: Sequence[Iterator[Batch]], predict: Predict, waiting: set[str]
) -> Callable[[], float]:
    """The sum of the sources' mean entropies on their next batches; its gradient is added to the parameters'."""

    def objective() -> float:
        """One evaluation, on the next batch of every source."""
        total = 0.0
        for source in sources:
            batch = next(source)
            entropy = _entropy(predict(model, batch), batch)
            entropy.backward()
            total += float(entropy.detach())
        if waiting:
            raise InputError(
                f"the forward pass does not reach {len(waiting)} adapted layers, first {min(waiting)}; give inputs, or "
                "predict=, that reach them"
            )
        return total

    return objective


def _minimise(
    objective: Callable[[], float], parameters: list[Tensor], steps: int, learning_rate: float
) -> list[float]:
    """The objective before each step of Adam."""
    optimizer, history = torch.optim.Adam(parameters, lr=learning_rate), []
    for step in tqdm(range(steps), desc="learning coefficients", unit="step", leave=False, disable=None):
        optimizer.zero_grad()
        history.append(objective())
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not (math.isfinite(history[-1]) and all(bool(gradient.isfinite().all()) for gradient in gradients)):
            raise InputError(
                f"step {step}: expected an entropy and a gradient that are finite, found entropy {history[-1]}; check "
                f"the inputs, load the base in float32, or lower learning_rate ({learning_rate:g})"
            )
        optimizer.step()
    return history


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    logits = getattr(model(**batch), "logits", None)
    if logits is None:
        raise InputError(f"{type(model).__name__} returns no logits; give predict=, a function of model and batch")
    return logits


def _entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Mean Shannon entropy in nats over examples, or over the positions that are not padding."""
    if logits.ndim < 2 or logits.shape[-1] < 2:
        raise InputError(f"expected logits (examples, …, classes) of 2 classes or more, found {tuple(logits.shape)}")
    if not logits.requires_grad:
        raise InputError("the logits do not depend on the adapted layers; predict= must not run under torch.no_grad")
    logs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    entropy, mask = -(logs.exp() * logs).sum(-1), batch.get("attention_mask")
    if entropy.ndim == 1 or mask is None:
        return entropy.mean()
    if mask.shape != entropy.shape:
        raise InputError(
            f"the logits have positions {tuple(entropy.shape)}, the attention_mask {tuple(mask.shape)}; give predict= "
            "that returns logits (N, C)"
        )
    return entropy[mask != 0].mean()


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
        values = {"coefficients": self.scales[self.row[term.name]].tolist()}
        if self.logits:
            mask, owner = (self.logits[term.name] > 0).int().cpu(), term.owner.cpu()
            values["masks"] = [mask[owner == i].tolist() for i in range(self.count)]
        return values


def find_layers(model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """{module that the adapters adapt: the model's layer}; InputError for what it lacks or what is not linear."""
    modules = dict(model.named_modules(remove_duplicate=False))
    misfits = [_misfit(name, modules.get(name), plan.layout(name)) for name in plan.modules]
    problems = [misfit for misfit in misfits if misfit]
    if problems:
        raise InputError(
            f"{len(problems)} of {len(plan.modules)} adapted modules do not fit the model ({type(model).__name__}), "
            f"first: {problems[0]}"
        )
    return {name: modules[name] for name in plan.modules}


def make_terms(matrix: Matrix, like: Tensor, method: str, options: Mapping[str, Any]) -> Terms:
    """The task vectors of one matrix on the device of `like`.

    adamerging: as factors. adarank: as U√s and √sVᵀ, inside the numerical rank. adamerging++: dense, trimmed to the
    share `density` of the entries.
    """
    owner = torch.arange(len(matrix.terms))
    if METHODS[method].dense:
        tensors = [torch.stack([_trimmed(term, options["density"]) for term in matrix.terms])]
    else:
        factors = [_singular(term) if "masks" in METHODS[method].learned else term for term in matrix.terms]
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
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    targets = {name: _target(model, name, value, labels) for name, value in saved.items()}
    before = [(target, target.data) for target in targets.values()]
    waiting, handles = set(terms), []
    try:
        model.requires_grad_(False)
        for name, target in targets.items():
            target.data = saved[name].to(target)
        for name, of_layer in terms.items():
            hook = _hook(name, of_layer, coefficients, waiting)
            handles.append(model.get_submodule(name).register_forward_hook(hook))
        with evaluating(model):
            yield waiting
    finally:
        for handle in handles:
            handle.remove()
        for target, data in before:
            target.data = data
        for parameter in trainable:
            parameter.requires_grad_()


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
    return balanced(*compact_svd(term))
