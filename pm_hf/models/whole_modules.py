"""Modules that are trained whole beside LoRA: which ones a name means, and whether they can be."""

import re
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from pm_hf.errors import InputError, raise_all

ALL_LINEAR = "all-linear"  # PEFT's word for every linear layer but the head


def whole_modules(base: PreTrainedModel, names: Sequence[str], head_root: str | None) -> list[str]:
    """Full names of the modules that `lora.modules_to_save` means: those whose name is, or ends with, one of them.

    head_root: top module of a classification head, None without one. InputError where a module could not be merged
    exactly as it was trained: it is tied to another, quantized, the run's own head, or has state besides its weights.
    """
    problems, whole = [], list[str]()
    modules = {name: module for name, module in base.named_modules() if name}
    for name in names:
        meant = [full for full in modules if f".{full}".endswith(f".{name}")]
        if not meant:
            problems.append(f"{name} names no module of {type(base).__name__}; {_candidates(base)}")
        whole += [full for full in meant if full not in whole]
    for name in whole:
        if head_root is not None and f"{name}.".startswith(f"{head_root}."):
            problems.append(f"{name} is of the class head, whose rows the run trains and merges by itself")
        elif outer := next((other for other in whole if name.startswith(f"{other}.")), None):
            problems.append(f"{name} is a part of {outer}; name one of the two")
        elif problem := _problem(base, modules[name], name):
            problems.append(f"{name} {problem}")
    raise_all(problems, "lora.modules_to_save")
    return whole


def check_apart(base: nn.Module, whole: Sequence[str], targets: Sequence[str] | str | None) -> None:
    """InputError where a module that is trained whole is, or holds, one that `targets` names: PEFT would leave it out
    without a word. None and all-linear name nothing."""
    for name, _ in base.named_modules():
        root = next((root for root in whole if f"{name}.".startswith(f"{root}.")), None)
        if isinstance(targets, str):
            named = targets != ALL_LINEAR and re.fullmatch(targets, name) is not None
        else:
            named = any(f".{name}".endswith(f".{target}") for target in targets or ())
        if root is not None and named:
            inside = "" if name == root else f"{name} of "
            raise InputError(
                f"lora.modules_to_save: {root} is to be trained whole, and lora.target_modules names {inside}it too; "
                "leave it out of one of them"
            )


def _problem(base: PreTrainedModel, module: nn.Module, name: str) -> str | None:
    """Why a module cannot be trained whole, and merged."""
    own = dict(module.named_parameters())
    if not own:
        return "has no weights of its own"
    if not all(value.is_floating_point() for value in own.values()):
        return "is quantized on this base, and only whole weights can be trained; name norms or embeddings"
    if state := sorted(module.state_dict().keys() - own.keys()):
        return f"keeps {state[0]} besides its weights, which is neither trained nor merged"
    ids = {id(value) for value in own.values()}
    shared = [full for full, value in base.named_parameters(remove_duplicate=False) if id(value) in ids]
    others = [full for full in shared if not full.startswith(f"{name}.")]
    if others:
        return f"is tied to {others[0]}: PEFT would train a copy of it and leave the other as it was"
    return None


def _candidates(base: PreTrainedModel) -> str:
    """The names that norms and embeddings of a model end with, in words."""
    kinds = [
        name.rpartition(".")[2]
        for name, module in base.named_modules()
        if isinstance(module, nn.Embedding) or "norm" in type(module).__name__.lower()
    ]
    return f"its norms and embeddings are called {', '.join(dict.fromkeys(kinds))}"
