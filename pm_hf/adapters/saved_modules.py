"""Absolute values in a merge: classification heads, other `modules_to_save`, embeddings of tokens."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from pm_hf.adapters.absolute_values import (
    Part,
    blend,
    blend_rows,
    by_row,
    differing,
    parts_of,
    same_values,
    sum_of_weights,
)
from pm_hf.adapters.checks import two_spellings
from pm_hf.adapters.folder import Adapter
from pm_hf.adapters.layout import LABELS_FILE
from pm_hf.adapters.plan import Plan, head_modules, task_vector
from pm_hf.adapters.rows import feeds_another, row_kind, saved_modules
from pm_hf.adapters.vocabulary import ROWS_FROM, match_vocabulary, merge_tokens
from pm_hf.errors import InputError, raise_all
from pm_hf.merging.coefficient import free_solution


@dataclass
class Saved:
    """The absolute values of a merge.

    tensors: by name. labels: of each head, as labels.json holds them. how: for each tensor how it was merged.
    tokenizer: {file name: content} of the one that names the rows, from the folder `tokenizer_of`.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    labels: dict[str, list[str] | None] = field(default_factory=dict)
    how: dict[str, str] = field(default_factory=dict)
    tokenizer: Mapping[str, bytes] = field(default_factory=dict)
    tokenizer_of: str | None = None


def merge_saved(plan: Plan, rows_from: Adapter | None = None) -> Saved:
    """Heads and other saved modules of a merge, and the tokenizer of its rows.

    Class heads merge by label: the same label by the weights, a new label appends its row; where a label has several
    rows in one adapter, of which the largest logit decides, the rows of all adapters stand side by side. Embeddings of
    tokens merge by token, see match_tokens; those that PEFT saved along untrained must be equal. Other modules merge by
    the weights, which must sum to 1. rows_from: the adapter whose rows are taken where they cannot be told apart.
    InputError names what conflicts.
    """
    result, problems = Saved(), list[str]()
    modules = saved_modules(plan.adapters)
    labels = _labels(plan.adapters, modules)
    in_order = {module for adapter in plan.adapters for module in adapter.in_order} - set(labels)
    kinds = {m: "units" if m in in_order else row_kind(m, plan.adapters) for m in modules if m not in labels}
    tokens = [name for module, kind in kinds.items() if kind == "tokens" for name in modules[module]]
    vocabulary = match_vocabulary(plan, tokens, rows_from)
    result.tokenizer, result.tokenizer_of = vocabulary.tokenizer, vocabulary.source
    for module, names in modules.items():
        if module in labels:
            _merge_labelled(plan, module, names, labels[module], result)
            continue
        if kinds[module] == "tokens":
            for name in names:
                value, result.how[name] = merge_tokens(plan, name, vocabulary, rows_from)
                result.tensors |= {} if value is None else {name: value}
            continue
        parts = {name: parts_of(plan, name) for name in names}
        result.labels |= {module: None} if module in in_order else {}
        if not _mixable(kinds[module], parts):
            if rows_from is None or any(name not in rows_from.saved for name in names):
                problems.append(_unnamed(module, kinds[module], parts))
                continue
            result.tensors |= {name: rows_from.tensor(name) for name in names}
            result.how |= dict.fromkeys(names, f"from {rows_from.path}")
            continue
        for name, values in parts.items():
            result.tensors[name] = blend(name, values, sum_of_weights(plan, name))
            mixed = "by coefficient, a hidden layer" if kinds[module] == "hidden" else "by coefficient"
            result.how[name] = mixed if len(values) > 1 else "from the only adapter that has it"
    raise_all(problems, "these adapters cannot be merged")
    if plan.free is not None:
        result.how |= _free_heads(plan, result.tensors)
    return result


def roots(adapters: Sequence[Adapter]) -> list[str]:
    """Every entry of `modules_to_save`."""
    return list(dict.fromkeys(root for adapter in adapters for root in adapter.config.get("modules_to_save") or []))


def _mixable(kind: str, parts: Mapping[str, Sequence[Part]]) -> bool:
    """Whether row i is the same in every adapter: not of what may be a class head, unless all are equal."""
    if any(part.value.shape != values[0].value.shape for values in parts.values() for part in values):
        return False
    return kind != "classes" or all(torch.equal(p.value, values[0].value) for values in parts.values() for p in values)


def _unnamed(module: str, kind: str, parts: Mapping[str, Sequence[Part]]) -> str:
    """Why a module cannot be merged by the weights."""
    differing = {n: v for n, v in parts.items() if not _mixable("classes", {n: v})}
    name = next((n for n in differing if n.endswith(".weight")), next(iter(differing)))
    shapes = sorted({tuple(part.value.shape) for part in parts[name]})
    differs = f"has different shapes {shapes} in" if len(shapes) > 1 else "differs between"
    if kind != "classes":
        return f"{name} {differs} the adapters, and has no labels; leave it frozen, or {ROWS_FROM}"
    return (
        f"{name} {differs} the adapters, it may be a class head, and no labels.json says which class a row is; write a "
        f'labels.json that says which rows belong together into each folder, {{"{module}": [label, …]}}, with null for '
        f"the list where the rows are the same in all; or {ROWS_FROM}"
    )


def _labels(adapters: Sequence[Adapter], modules: Mapping[str, Sequence[str]]) -> dict[str, dict[Path, list[str]]]:
    """{head: {adapter: labels}}; an adapter without labels gets those of the others where the heads are equal."""
    labels: dict[str, dict[Path, list[str]]] = {}
    for head in dict.fromkeys(head for adapter in adapters for head in adapter.labels):
        given = {adapter.path: adapter.labels[head] for adapter in adapters if head in adapter.labels}
        holders = [adapter for adapter in adapters if set(modules[head]) & set(adapter.saved)]
        if lacking := [adapter.path for adapter in holders if adapter.path not in given]:
            if not same_values(holders, modules[head]) or len(set(map(tuple, given.values()))) > 1:
                raise InputError(
                    f"{', '.join(map(str, lacking))}: {head} has no entry in labels.json, which the other adapter has"
                )
            given |= dict.fromkeys(lacking, next(iter(given.values())))
        _check_labels(head, [adapter for adapter in holders if head in adapter.labels])
        labels[head] = given
    return labels


def _check_labels(head: str, adapters: Sequence[Adapter]) -> None:
    """InputError for labels of a hidden layer, and for labels that are one number written in two ways."""
    lists = {tuple(adapter.labels[head]) for adapter in adapters}
    if len(lists) > 1 and all(feeds_another(adapter, head) for adapter in adapters):
        raise InputError(
            f"labels.json names rows of {head}, a hidden layer: its rows are the inputs of another saved module; "
            "remove its entry from each labels.json"
        )
    written = [label for adapter in adapters for label in adapter.rows[head] or ()]
    if pair := two_spellings(written):
        first, second = map(json.dumps, pair)
        raise InputError(
            f"{LABELS_FILE} names one label of {head} {first} in one adapter and {second} in another; write every "
            "label as the text it stands for"
        )


def _merge_labelled(
    plan: Plan, head: str, names: Sequence[str], labels: Mapping[Path, list[str]], result: Saved
) -> None:
    """Tensors of a head, one row for each label, or all rows side by side."""
    lists = [labels[adapter.path] for adapter in plan.adapters if adapter.path in labels]
    every = [label for own in lists for label in own]
    beside = any(len(set(own)) < len(own) for own in lists)
    rows = every if beside else list(dict.fromkeys(every))
    result.labels[head] = rows
    for name in names:
        if lacking := [str(a.path) for a in plan.adapters if a.path in labels and name not in a.saved]:
            raise InputError(f"{', '.join(lacking)} has no {name}, the other adapter has")
        parts, weight = parts_of(plan, name), sum_of_weights(plan, name)
        if any(part.value.shape[:1] != (len(labels[part.adapter.path]),) for part in parts):  # no value for each row
            result.tensors[name], result.how[name] = blend(name, parts, weight), "by coefficient"
            continue
        if len(shapes := {tuple(part.value.shape[1:]) for part in parts}) > 1:
            raise InputError(f"{name} has different row shapes: {sorted(shapes)}; train heads of one shape")
        if beside:
            result.tensors[name] = torch.cat([part.value.float() for part in parts])
        else:
            result.tensors[name] = _by_label(name, parts, labels, rows, weight)
        result.how[name] = f"{'side by side' if beside else 'by label'}, {len(rows)} rows"


def _by_label(
    name: str, parts: Sequence[Part], labels: Mapping[Path, list[str]], rows: Sequence[str], weight: float
) -> Tensor:
    """A row for each label, blended where several adapters have it."""
    index = {label: row for row, label in enumerate(rows)}
    placed = [replace(part, places=[index[label] for label in labels[part.adapter.path]]) for part in parts]

    def blended(few: list[Part], where: Tensor) -> Tensor:
        first = next(iter(where[differing(few)].tolist()), None)
        return blend_rows(name if first is None else f"{name} row {rows[first]}", few, weight)

    return by_row(placed, len(rows), blended)


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
