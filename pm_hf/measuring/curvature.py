"""Per-example curvature of the adapted weights, measured by hooks in batches."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pm_hf.distributed import gather, on_all_processes, process_count, process_index, sum_over_processes
from pm_hf.errors import InputError
from pm_hf.merging.curvature import (
    FULL_PRECISION,
    NORMALISATIONS,
    Curvature,
    CurvatureKind,
    CurvatureSpec,
    accumulate,
)
from pm_hf.merging.lowrank import LowRank, add
from pm_hf.models.contexts import autocast as autocast_to
from pm_hf.models.contexts import evaluating, gradients_put_aside, keep_differentiable, scaled_adapter
from pm_hf.models.language_model import IGNORED, has_token_targets, target_logits
from pm_hf.models.lora import adapted_layers, find_head, head_matrix, layer_product
from pm_hf.models.sharded import transformer_of, unwrapped

CURVATURE_KINDS, FISHER_LABELS, LOSS_REDUCTIONS = ("fisher", "gram", "factored"), ("empirical", "mc"), ("mean", "sum")
# where it is measured: {name: share of Δ_t that the model has at each of its points}
CURVATURE_POINTS = {"optimum": (1.0,), "both": (0.0, 1.0)}
SHRINKAGE = 0.1  # ρ of the Gram: without it a Gram of fewer tokens than inputs is singular
CHUNK_BYTES = 128 * 2**20  # per-example gradients of one module are formed for this many bytes at a time

Batch = Mapping[str, Tensor]


def estimate_curvature(
    model: nn.Module,
    dataloader: Iterable[Batch],
    *,
    adapter: str,
    kind: CurvatureKind = "fisher",
    labels: Literal["empirical", "mc"] = "empirical",
    loss_reduction: Literal["mean", "sum"] = "mean",
    samples: int | None = None,
    shrinkage: float | None = None,
    normalisation: Literal["examples", "trace"] = "examples",
    at: Literal["optimum", "both"] = "optimum",
    base: str = FULL_PRECISION,
    previous: Curvature | None = None,
    heads: Mapping[str, LowRank] | None = None,
    merged: Mapping[str, LowRank] | None = None,
    seed: int = 0,
    autocast: torch.dtype | None = None,
) -> Curvature:
    """Curvature of the task's loss at its optimum, added to the sums of the earlier tasks.

    kind="fisher": mean over examples of G∘G, G = Σ_tokens δxᵀ the gradient of one example's loss with respect to
    the dense weight (out, in); with labels="mc" the labels are drawn from the model, otherwise they are the
    data's (empirical Fisher, as published). kind="gram": mean over examples of Σ_tokens xxᵀ (in, in), then
    (1−ρ)G + ρ·diag(G) with ρ = `shrinkage` (None: 0.1); no backward pass. kind="factored": the means of F over its
    columns and over its rows, (out + in,), without F; H ≈ rcᵀ/mean(r). Padding (attention_mask 0) is excluded.
    Runs in eval mode, unperturbed; x and δ are cast to float32 before the product (`autocast` is the dtype of the
    forward). Sums, factors and results are on the CPU.

    model: a PeftModel, `adapter` the task's adapter among the active ones. A classifier has `labels` (N,); a language
    model has token ids (N, T), -100 where nothing is predicted, and an example's loss is the mean over its own target
    tokens (`loss_reduction="sum"`: their sum; stored with the sums, never mixed); with "mc" every target token is
    drawn given the given prefix. In several processes each one passes its own share of the examples, and all get the
    sums over all of them; what is drawn is what one process draws when process r of P has the rows r, r + P, r + 2P, …
    samples: number of examples used at most in a process (None: all). previous: sums of the earlier tasks.
    normalisation: "trace" divides each task's diagonal Fisher by the mean of its entries over all modules before it is
    summed: tasks weigh alike, where the size of a Fisher says mostly how far its task is from fitted.
    at: "optimum" measures at θ*_t, as published; "both" takes H_t = ½(H(θ̂_{t−1}) + H(θ*_t)), the first without
    `adapter`'s product and with the head as trained, in twice the time. Stored with the sums, never mixed.
    base: what the frozen weights are, e.g. "nf4" where they are quantized. Stored with the sums, never mixed.
    heads: {module: its weight before the task, [weight | bias]} of linear heads shared by all tasks, to be inside the
    curvature. merged: {module: θ̂_{t−1} − θ0, (out, in)} where the task was not trained from the running merge: Δ is
    then all that the model adds to the base less this, and not `adapter`'s product. The model's mode and gradients are
    left as they were.
    Raises InputError when samples < 1, when a module was not reached, or when there is no data.
    """
    spec = replace(_curvature_spec(kind, labels, loss_reduction, shrinkage, normalisation, at), base=base)
    if at != "optimum" and merged is not None:
        raise InputError(f"at={at!r} needs a task that was trained from the running merge; leave `merged` out")
    if samples is not None and samples < 1:
        raise InputError(f"samples must be at least 1, found {samples}; leave it out to use every example")
    model = unwrapped(model)
    keep_differentiable(model)
    layers = adapted_layers(model, adapter)
    linears = {name: find_head(model, name) for name in heads or {}}
    sums = _Accumulator(spec, seed)
    points = [partial(scaled_adapter, list(layers.values()), adapter, share) for share in CURVATURE_POINTS[at]]
    with evaluating(model), gradients_put_aside(model):
        counted = on_all_processes(lambda: _run(model, points, layers | linears, dataloader, samples, sums, autocast))
    examples = sum(gather(counted))
    sum_over_processes(sums.tensors)
    measured = {name: total.div_(examples * len(points)).cpu() for name, total in sums.tensors.items()}
    delta = {name: layer_product(layer, [adapter]) for name, layer in layers.items()}
    optimum = {name: layer_product(layer, layer.active_adapters) for name, layer in layers.items()}
    if merged is not None:
        delta = {name: add(product, merged[name].scale(-1.0)) for name, product in optimum.items()}
    for name, before in (heads or {}).items():
        optimum[name] = head_matrix(linears[name])
        delta[name] = LowRank(optimum[name].B - before.B, before.A)
    return on_all_processes(
        lambda: accumulate(measured, optimum, delta, spec, examples, owner=sums.owner, previous=previous)
    )


def _curvature_spec(
    kind: CurvatureKind, labels: str, loss_reduction: str, shrinkage: float | None, normalisation: str, at: str
) -> CurvatureSpec:
    """The settings as the sums keep them; InputError for what is unknown or does not fit the kind."""
    choices = (
        ("kind", kind, CURVATURE_KINDS),
        ("labels", labels, FISHER_LABELS),
        ("loss_reduction", loss_reduction, LOSS_REDUCTIONS),
        ("at", at, tuple(CURVATURE_POINTS)),
    )
    for name, value, valid in choices:
        if value not in valid:
            raise InputError(f"{name} must be one of {', '.join(valid)}, found {value!r}")
    if shrinkage is not None and kind != "gram":
        raise InputError("shrinkage belongs to kind='gram'; the diagonal Fisher has nothing off its diagonal")
    if normalisation not in NORMALISATIONS or (normalisation == "trace" and kind != "fisher"):
        raise InputError(f"normalisation must be examples, or trace with kind='fisher', found {normalisation!r}")
    rho = SHRINKAGE if shrinkage is None else shrinkage
    if not 0 <= rho < 1:
        raise InputError(f"shrinkage must be in [0, 1), found {shrinkage}")
    if kind == "gram":
        return CurvatureSpec(kind, "none", rho, at=at)
    normalised = NORMALISATIONS[normalisation]
    return CurvatureSpec(kind, labels, normalisation=normalised, loss_reduction=loss_reduction, at=at)


@dataclass
class _Accumulator:
    """Running sums over examples, {module: tensor}, of one pass over the data."""

    spec: CurvatureSpec
    seed: int
    examples: int = 0  # before the present batch
    tensors: dict[str, Tensor] = field(default_factory=dict)
    owner: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, value: Tensor) -> None:
        self.tensors[name] = value if name not in self.tensors else self.tensors[name].add_(value)


@dataclass
class _Pass:
    """What one module saw in one batch: its input x (…, in), and δ (…, out), the gradient of its output."""

    x: Tensor
    head: bool
    bias: bool  # a trained one, which counts
    gradient: Tensor | None = None  # none for the Gram


def _run(
    model: nn.Module,
    points: Sequence[Callable[[], AbstractContextManager]],
    watched: Mapping[str, nn.Module],
    dataloader: Iterable[Batch],
    samples: int | None,
    sums: _Accumulator,
    autocast: torch.dtype | None,
) -> int:
    """Add the examples to the sums, at most `samples`, as the model is at each of the points; their number."""
    device = next(model.parameters()).device
    for batch in dataloader:
        if samples is not None and sums.examples >= samples:
            break
        batch = {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}
        if has_token_targets(batch) and transformer_of(model).config.is_encoder_decoder:
            batch = _with_distinct_lengths(batch)
        if samples is not None:
            batch = {key: value[: samples - sums.examples] for key, value in batch.items()}
        for point in points:
            with point():
                passes = _watch(model, watched, batch, sums, autocast)
            missing = [name for name in watched if name not in passes]
            if missing:
                raise InputError(
                    f"{len(missing)} adapted modules were not reached by the forward pass, first {missing[0]}"
                )
            {"gram": _add_gram, "fisher": _add_fisher, "factored": _add_factored}[sums.spec.kind](sums, passes, batch)
        sums.examples += len(batch["labels"])
    if not sums.examples:
        raise InputError("the curvature needs at least one example, found none")
    return sums.examples


def _watch(
    model: nn.Module,
    watched: Mapping[str, nn.Module],
    batch: Batch,
    sums: _Accumulator,
    autocast: torch.dtype | None,
) -> dict[str, _Pass]:
    """Run the batch; what each module saw of it, without those that no gradient reached."""
    passes: dict[str, _Pass] = {}
    keep_gradient = sums.spec.kind != "gram"

    def hook(name: str):
        """The forward hook of one module."""

        def capture(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            """Keep the input, and the output's gradient once it is known."""
            if name in passes:
                raise InputError(f"{name} is used more than once in a forward pass; its curvature is not supported")
            if keep_gradient and not output.requires_grad:  # nothing below is trainable
                output = output.detach().requires_grad_()
            head = isinstance(module, nn.Linear)
            passes[name] = _Pass(args[0].detach(), head, head and module.bias is not None)
            if keep_gradient:
                output.register_hook(lambda gradient: setattr(passes[name], "gradient", gradient.detach()))
            return output

        return capture

    handles = [module.register_forward_hook(hook(name)) for name, module in watched.items()]
    device = next(model.parameters()).device
    try:
        with torch.set_grad_enabled(keep_gradient):
            with autocast_to(device, autocast):
                loss = _loss(model, batch, sums)
            if keep_gradient:
                loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    return {name: seen for name, seen in passes.items() if seen.gradient is not None or not keep_gradient}


def _loss(model: nn.Module, batch: Batch, sums: _Accumulator) -> Tensor:
    """Sum over examples of the loss of each, for its own labels or for labels drawn from the model; float32."""
    if has_token_targets(batch):
        logits, truth, example = target_logits(model, batch)
        counts = torch.bincount(example, minlength=len(batch["labels"]))
        share = counts[example].float()
        if sums.spec.loss_reduction == "sum":
            share = torch.ones_like(share)
        labels = _labels(logits, truth, sums, counts.tolist())
        return (F.cross_entropy(logits.float(), labels, reduction="none") / share).sum()
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    if logits.ndim != 2:
        raise InputError(f"expected logits of shape (examples, classes), found {tuple(logits.shape)}")
    labels = _labels(logits, batch["labels"], sums, [1] * len(logits))
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def _labels(logits: Tensor, labels: Tensor, sums: _Accumulator, counts: list[int]) -> Tensor:
    """The data's labels, (n,), or ones drawn from softmax(logits), (n, C); counts: of each example, their sum is n.

    Each example has a seed of its own: what is drawn depends neither on the batches nor on the number P of processes,
    as long as process r has the examples r, r + P, r + 2P, …
    """
    if sums.spec.labels != "mc":
        return labels
    probabilities, generator, drawn = logits.detach().float().softmax(-1).cpu(), torch.Generator(), []
    for index, rows in enumerate(probabilities.split(counts), sums.examples):
        number = process_index() + index * process_count()
        digest = hashlib.sha256(f"{sums.seed}/{number}".encode()).digest()
        generator.manual_seed(int.from_bytes(digest[:7], "big"))
        drawn += [torch.multinomial(rows, 1, generator=generator)[:, 0]] if len(rows) else []
    return torch.cat(drawn).to(logits.device)


def _with_distinct_lengths(batch: Batch) -> dict[str, Tensor]:
    """The batch of an encoder-decoder with a mask for each side, (N, T) and (N, U), T ≠ U.

    Where the two would have one length, the encoder gets one more padded column. The decoder's positions end with the
    last target; the first one, its start token, is always there.
    """
    ids, targets = batch["input_ids"], batch["labels"] != IGNORED
    until_last = targets.flip(1).cumsum(1).flip(1).clamp(max=1)
    until_last[:, 0] = 1
    batch = {"attention_mask": torch.ones_like(ids), "decoder_attention_mask": until_last, **batch}
    if ids.shape[1] != targets.shape[1]:
        return batch
    return batch | {name: F.pad(batch[name], (0, 1)) for name in ("input_ids", "attention_mask")}


def _chunks(kind: CurvatureKind, name: str, seen: _Pass, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """(x (n, T, in), δ (n, T, out)) of a module in float32, as many examples at a time as `CHUNK_BYTES` allows."""
    assert seen.gradient is not None
    x = _tokens(name, seen, batch)
    d = seen.gradient.float().reshape(len(batch["labels"]), -1, seen.gradient.shape[-1])
    entries = x.shape[1] ** 2 if kind == "factored" else x.shape[2] * d.shape[2]
    rows = max(1, CHUNK_BYTES // (4 * entries))
    return zip(x.split(rows), d.split(rows), strict=True)


def _add_fisher(sums: _Accumulator, passes: Mapping[str, _Pass], batch: Batch) -> None:
    for name, seen in passes.items():
        for x, d in _chunks("fisher", name, seen, batch):
            gradient = torch.bmm(d.transpose(1, 2), x)  # (n, out, in)
            sums.add(name, gradient.square_().sum(0))


def _add_factored(sums: _Accumulator, passes: Mapping[str, _Pass], batch: Batch) -> None:
    """Σ_examples of the means of G∘G over its columns and over its rows, from (T, T) products instead of G."""
    for name, seen in passes.items():
        for x, d in _chunks("factored", name, seen, batch):
            rows = ((x @ x.transpose(1, 2) @ d) * d).sum((0, 1)) / x.shape[-1]  # (out,)
            columns = ((d @ d.transpose(1, 2) @ x) * x).sum((0, 1)) / d.shape[-1]  # (in,)
            sums.add(name, torch.cat([rows, columns]).clamp_(min=0))


def _add_gram(sums: _Accumulator, passes: Mapping[str, _Pass], batch: Batch) -> None:
    first: dict[tuple, str] = {}  # inputs are kept alive in `passes`, so one address is one tensor
    for name, seen in passes.items():
        owner = first.setdefault((seen.x.data_ptr(), seen.x.shape, seen.bias), name)
        if sums.owner.setdefault(name, owner) != owner:
            raise InputError(f"{name} shares its input with other modules in some batches only; its Gram is ambiguous")
        if owner == name:
            x = _tokens(name, seen, batch).flatten(0, 1)  # (N·T, in)
            sums.add(name, x.T @ x)


def _tokens(name: str, seen: _Pass, batch: Batch) -> Tensor:
    """The module's input as (N, T, in) in float32, padding zeroed, a column of ones appended for a trained bias."""
    x, examples = seen.x.float(), len(batch["labels"])
    windows = "pixel_values" in batch and x.shape[0] % examples == 0  # attention in windows, an example's side by side
    if x.shape[0] != examples and not windows:
        raise InputError(f"{name} sees an input of shape {tuple(x.shape)}; expected {examples} examples in dimension 0")
    x = x.reshape(examples, -1, x.shape[-1])
    if seen.head and seen.x.ndim > 2 and seen.gradient is None:
        raise InputError(f"the shared head {name} sees every token, so it has no Gram of its own; use kind='fisher'")
    if seen.bias:
        x = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
    masks = [batch[key] for key in ("attention_mask", "decoder_attention_mask") if key in batch]
    if not masks or x.shape[1] == 1:  # no padding, or one pooled position
        return x
    fitting = [mask for mask in masks if mask.shape == x.shape[:2]]
    if not fitting:
        raise InputError(f"{name} sees {x.shape[1]} positions, the attention mask has shape {tuple(masks[0].shape)}")
    return x * fitting[0][..., None].to(x.dtype)
