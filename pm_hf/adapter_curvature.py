"""Curvature files beside adapter folders: the task vector they were measured with, one file for each adapter."""

import os
from collections import ChainMap
from collections.abc import Mapping, Sequence

from pm_hf.adapters import Adapter
from pm_hf.errors import InputError, raise_all
from pm_hf.merging.curvature import Curvature
from pm_hf.merging.lowrank import LowRank
from pm_hf.merging.methods import get_method
from pm_hf.merging.solve import check_fits

Curvatures = str | os.PathLike | Curvature | None | Sequence[str | os.PathLike | Curvature]


def head_modules(adapter: Adapter, curvature: Curvature) -> list[str]:
    """Saved linear heads that the curvature covers (one shared head over all tasks)."""
    return [
        name for name in sorted(curvature.modules) if name not in adapter.layouts and f"{name}.weight" in adapter.saved
    ]


def task_vector(
    task: Adapter, running: Adapter | None, curvature: Curvature
) -> tuple[Mapping[str, LowRank], Mapping[str, LowRank]]:
    """(Δ, θ̂_{t−1}) of every module in the curvature; heads are absolute, so theirs is the difference.

    The mappings read a module when it is asked for.
    """
    delta, merged = task.products(), {} if running is None else running.products()
    heads, past = {}, {}
    for head in head_modules(task, curvature):
        heads[head] = task.head_matrix(head)
        if running is None:
            continue
        if f"{head}.weight" not in running.saved or running.labels.get(head) != task.labels.get(head):
            raise InputError(
                f"the curvature covers {head}, so both adapters need it with the same labels in the same order; "
                f"{running.path} has {running.labels.get(head)}, {task.path} {task.labels.get(head)}"
            )
        past[head] = running.head_matrix(head)
        heads[head] = LowRank(heads[head].B - past[head].B, heads[head].A)
    return ChainMap(heads, delta), ChainMap(past, merged)  # type: ignore[arg-type]  # read only


def one_for_each(method: str, given: Curvatures, adapters: Sequence[Adapter], fold: bool) -> tuple[Curvature, ...]:
    """The curvature of each adapter, where the method needs one each; InputError when one does not fit its adapter."""
    kind = get_method(method).curvature
    if kind not in ("fisher", "gram"):
        return ()
    files = listed(given)
    if None in files or len(files) != len(adapters):
        there = sum(file is not None for file in files)
        raise InputError(
            f"method {method!r} needs a {kind} curvature file for each of {len(adapters)} adapters, in order "
            f"(in a fold the running merge's first); found {there}; measure them with pm_hf.estimate_curvature"
        )
    sums = tuple(found for file in files if (found := load_curvature(file)) is not None)
    problems = [
        f"the curvature of {a.path} is of kind {c.settings.kind}, expected {kind}"
        for a, c in zip(adapters, sums, strict=True)
        if c.settings.kind != kind
    ]
    problems += [
        f"the curvature of {a.path} lacks {missing[0]}"
        for a, c in zip(adapters, sums, strict=True)
        if (missing := sorted(set(a.layouts) - c.modules))
    ]
    problems += [f"{a.path} has LoRA biases, which no curvature covers" for a in adapters if a.config.get("lora_bias")]
    raise_all(problems, f"method {method!r}")
    for adapter, own in list(zip(adapters, sums, strict=True))[-1 if fold else 0 :]:
        check_fits(task_vector(adapter, None, own)[0], own)  # the sums of a running merge have no Δ of it
    return sums


def listed(given: Curvatures) -> list[str | os.PathLike | Curvature | None]:
    """One or several curvatures as a list."""
    return [given] if isinstance(given, str) or not isinstance(given, Sequence) else list(given)


def load_curvature(curvature: str | os.PathLike | Curvature | None) -> Curvature | None:
    """The sums, from a file or as they are."""
    return Curvature.load(curvature) if isinstance(curvature, str | os.PathLike) else curvature
