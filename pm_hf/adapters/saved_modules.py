"""Absolute values in a merge: classification heads, other `modules_to_save`, copies of base embeddings."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pm_hf.adapters.folder import Adapter
from pm_hf.adapters.plan import Plan, head_modules, task_vector
from pm_hf.errors import InputError
from pm_hf.merging.coefficient import free_solution


def merge_saved(plan: Plan) -> tuple[dict[str, Tensor], dict[str, list[str]], dict[str, str]]:
    """(tensors, labels, how each tensor was merged).

    Heads merge by label: the same label by the weights, a new label appends its row; where a label has several rows in
    one adapter, of which the largest logit decides, the rows of all adapters stand side by side. Other modules merge by
    the weights, which must sum to 1. Base weights that PEFT saved along must be equal. InputError names what conflicts.
    """
    heads = dict.fromkeys(head for adapter in plan.adapters for head in adapter.labels)
    every = {head: [label for adapter in plan.adapters for label in adapter.labels.get(head, [])] for head in heads}
    beside = {h for h in heads if any(len(set(a.labels.get(h, []))) < len(a.labels.get(h, [])) for a in plan.adapters)}
    labels = {h: rows if h in beside else list(dict.fromkeys(rows)) for h, rows in every.items()}
    saved, how = {}, {}
    for name in dict.fromkeys(tensor for adapter in plan.adapters for tensor in adapter.saved):
        head = name.rpartition(".")[0]
        holders = [(a, w) for a, w in zip(plan.adapters, plan.absolute_for(head), strict=True) if name in a.saved]
        if head in labels:
            saved[name] = _rows(plan, name, None if head in beside else labels[head], holders)
            how[name] = f"{'side by side' if head in beside else 'by label'}, {len(labels[head])} rows"
            continue
        values = [(adapter.tensor(name), weight) for adapter, weight in holders]
        shapes = {tuple(value.shape) for value, _ in values}
        copies = any(name in adapter.base_copies for adapter, _ in holders)
        _check_classes(name, [a for a, _ in holders], [value for value, _ in values])
        if len(shapes) > 1:
            way_out = (
                "resize both to one vocabulary"
                if copies
                else "write a labels.json that says which rows belong together"
            )
            raise InputError(f"{name} has different shapes {sorted(shapes)} in the adapters; {way_out}")
        copies = copies and not all(_tied(adapter, name) for adapter, _ in holders)
        if copies and not all(torch.equal(value, values[0][0]) for value, _ in values):
            raise InputError(f"{name} is a weight of the base model and differs between the adapters: not one base")
        saved[name] = _blend(name, values, sum(plan.absolute_for(head)) if len(plan.adapters) > 1 else 1.0)
        taken = "a copy of the base" if copies else "from the only adapter that has it"
        how[name] = "by coefficient" if len(values) > 1 and not copies else taken
    if plan.free is not None:
        how |= _free_heads(plan, saved)
    return saved, labels, how


def roots(adapters: Sequence[Adapter]) -> list[str]:
    """Every entry of `modules_to_save`."""
    return list(dict.fromkeys(root for adapter in adapters for root in adapter.config.get("modules_to_save") or []))


def _check_classes(name: str, adapters: Sequence[Adapter], values: Sequence[Tensor]) -> None:
    """InputError for class heads that differ and whose rows nobody named: row i may be another class in each."""
    classifiers = all(adapter.config.get("task_type") in ("SEQ_CLS", "TOKEN_CLS") for adapter in adapters)
    head = name.split(".")[0] in ("classifier", "score")
    if (
        classifiers
        and head
        and not all(torch.equal(value, values[0]) for value in values if value.shape == values[0].shape)
    ):
        module = name.rpartition(".")[0]
        raise InputError(
            f"{name} differs between the adapters and no labels.json says which class a row is; write labels.json "
            f'{{"{module}": [label, …]}} into each folder'
        )


def _tied(adapter: Adapter, name: str) -> bool:
    """Whether the tensor is that of a trained module under a second name, as with tied embeddings."""
    value = adapter.tensor(name)
    trained = [adapter.tensor(other) for other in adapter.saved if other not in adapter.base_copies]
    return any(value.shape == other.shape and torch.equal(value, other) for other in trained)


def _rows(plan: Plan, name: str, labels: Sequence[str] | None, holders: Sequence[tuple[Adapter, float]]) -> Tensor:
    """Rows of a head's tensor, one for each label, or with None all there are, side by side."""
    head = name.rpartition(".")[0]
    if without := [str(a.path) for a, _ in holders if head not in a.labels]:
        raise InputError(f"{', '.join(without)}: {head} has no entry in labels.json, which the other adapter has")
    if lacking := [str(a.path) for a in plan.adapters if head in a.labels and name not in a.saved]:
        raise InputError(f"{', '.join(lacking)} has no {name}, the other adapter has")
    tables = [(a.labels[head], a.tensor(name), weight) for a, weight in holders]
    if len(shapes := {tuple(tensor.shape[1:]) for _, tensor, _ in tables}) > 1:
        raise InputError(f"{name} has different row shapes: {sorted(shapes)}")
    if labels is None:
        return torch.cat([tensor.float() for _, tensor, _ in tables])
    rows = [(dict(zip(names, tensor, strict=True)), weight) for names, tensor, weight in tables]
    whole = sum(plan.absolute_for(head)) if len(plan.adapters) > 1 else 1.0
    return torch.stack([_blend(f"{name} row {x}", [(r[x], w) for r, w in rows if x in r], whole) for x in labels])


def _blend(name: str, values: Sequence[tuple[Tensor, float]], whole: float) -> Tensor:
    """Weighted mean of absolute values; one value, or equal ones, are taken as they are."""
    first = values[0][0]
    if all(torch.equal(value, first) for value, _ in values):
        return first
    if abs(whole - 1) > 1e-6:
        raise InputError(
            f"{name} is an absolute value, so its weights must sum to 1; found {whole:.6g}; give weights= that do"
        )
    total = sum(weight for _, weight in values)
    if total <= 0 or min(weight for _, weight in values) < 0:
        raise InputError(
            f"{name} is an absolute value: expected weights of 0 or more, not all 0, found {[w for _, w in values]}"
        )
    return sum(
        (value.float() * (weight / total) for value, weight in values), torch.zeros_like(first, dtype=torch.float32)
    )


def _free_heads(plan: Plan, saved: dict[str, Tensor]) -> dict[str, str]:
    """Replace shared heads that the curvature covers by their free optimum."""
    assert plan.free is not None
    task, running = plan.adapters[-1], plan.adapters[0] if len(plan.adapters) == 2 else None
    delta, merged = task_vector(task, running, plan.free)
    how = {}
    for head in head_modules(task, plan.free):
        full = min(delta[head].shape)
        past = merged.get(head)
        matrix = free_solution(head, delta[head], past, plan.free, full)[0].dense().float()
        columns = saved[f"{head}.weight"].shape[1]
        saved[f"{head}.weight"] = matrix[:, :columns]
        how[f"{head}.weight"] = "free optimum"
        if f"{head}.bias" in saved:
            saved[f"{head}.bias"] = matrix[:, columns]
            how[f"{head}.bias"] = "free optimum"
    return how
