"""Means of absolute values: whole tensors, and tensors whose rows stand in another place in each adapter."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from pm_hf.adapters.folder import Adapter
from pm_hf.adapters.plan import Plan
from pm_hf.errors import InputError


@dataclass(frozen=True)
class Part:
    """One adapter's tensor, its weight in the merge, and for each of its rows that of the merge (None: unused)."""

    adapter: Adapter
    value: Tensor
    weight: float
    places: Sequence[int | None] = ()


def parts_of(plan: Plan, name: str) -> list[Part]:
    """The tensor of every adapter that has it, with the weight of an absolute value."""
    weights = plan.absolute_for(name.rpartition(".")[0])
    return [Part(a, a.tensor(name), w) for a, w in zip(plan.adapters, weights, strict=True) if name in a.saved]


def sum_of_weights(plan: Plan, name: str) -> float:
    """What the weights of a tensor sum to; 1 for a single adapter, which is taken as it is."""
    return sum(plan.absolute_for(name.rpartition(".")[0])) if len(plan.adapters) > 1 else 1.0


def same_values(adapters: Sequence[Adapter], names: Sequence[str]) -> bool:
    """Whether all adapters have the same tensors of these names, with the same values."""
    held = [[name for name in names if name in adapter.saved] for adapter in adapters]
    shapes = [[adapter.saved_shape(name) for name in own] for adapter, own in zip(adapters, held, strict=True)]
    if any(own != held[0] for own in held) or any(own != shapes[0] for own in shapes):
        return False
    return all(
        torch.equal(adapter.tensor(name), adapters[0].tensor(name)) for name in held[0] for adapter in adapters[1:]
    )


def by_row(parts: Sequence[Part], count: int, combine: Callable[[list[Part], Tensor], Tensor]) -> Tensor:
    """A tensor of `count` rows: those that the same adapters have are combined together.

    combine(parts with these rows alone, the rows' places): their rows in the merge. InputError for a row of none.
    """
    source = [[-1] * count for _ in parts]
    for rows, part in zip(source, parts, strict=True):
        for row, place in enumerate(part.places):
            if place is not None:
                rows[place] = row
    groups: dict[tuple[bool, ...], list[int]] = {}
    for place, having in enumerate(zip(*source, strict=True)):
        groups.setdefault(tuple(row >= 0 for row in having), []).append(place)
    blocks = []
    for having, places in groups.items():
        few = [
            replace(part, value=_select(part.value, [rows[place] for place in places]))
            for part, rows, has in zip(parts, source, having, strict=True)
            if has
        ]
        if not few:
            raise InputError(f"no adapter has row {places[0]}; the tokenizers name more tokens than there are rows")
        blocks.append((torch.tensor(places), combine(few, torch.tensor(places))))
    if len(blocks) == 1:
        return blocks[0][1]
    dtype = reduce(torch.promote_types, (block.dtype for _, block in blocks))
    merged = torch.empty(count, *parts[0].value.shape[1:], dtype=dtype)
    for chosen, block in blocks:
        merged[chosen] = block.to(dtype)
    return merged


def blend_rows(name: str, parts: Sequence[Part], whole: float) -> Tensor:
    """Weighted mean of absolute values row by row; equal rows are taken as they are."""
    first, differ = parts[0].value, differing(parts)
    if not differ.any():
        return first
    mean = first.float().clone()
    mean[differ] = blend(name, [replace(part, value=part.value[differ]) for part in parts], whole)
    return mean


def differing(parts: Sequence[Part]) -> Tensor:
    """Which rows are not the same in all."""
    first = parts[0].value
    differ = torch.zeros(len(first), dtype=torch.bool)
    for part in parts[1:]:
        differ |= (part.value != first).reshape(len(first), -1).any(1)
    return differ


def blend(name: str, parts: Sequence[Part], whole: float) -> Tensor:
    """Weighted mean of absolute values; one value, or equal ones, are taken as they are."""
    first = parts[0].value
    if all(torch.equal(part.value, first) for part in parts):
        return first
    if abs(whole - 1) > 1e-6:
        raise InputError(
            f"{name} is an absolute value, so its weights must sum to 1; found {whole:.6g}; give weights= that do"
        )
    weights = [part.weight for part in parts]
    if sum(weights) <= 0 or min(weights) < 0:
        raise InputError(f"{name} is an absolute value: expected weights of 0 or more, not all 0, found {weights}")
    total = sum(weights)
    return sum(
        (part.value.float() * (part.weight / total) for part in parts), torch.zeros_like(first, dtype=torch.float32)
    )


def _select(value: Tensor, rows: list[int]) -> Tensor:
    return value if rows == list(range(len(value))) else value[rows]
