"""Whose layer is this: one name for a module, whatever wrapped the model that wrote the file."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pm_hf.adapters.layout import PEFT_PREFIX

# what FSDP, activation checkpointing, torch.compile and others put around a module
WRAPPERS = frozenset(("_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_orig_mod"))
WRAPPERS |= {"_forward_module", "_ddp_module"}


PARALLEL = "module"  # what data parallel, DeepSpeed and others put before the whole model


FACTORS = frozenset(("lora_A", "lora_B", "lora_E", "lora_embedding_A", "lora_embedding_B"))


LIBRARIES = frozenset(("transformers", "peft", "torch", "accelerate", "deepspeed", "lightning", "pytorch_lightning"))


@dataclass
class Names:
    """Names of a file's tensors. stored: {plain name, `module.lora_A.weight`: name in the file}, without the copies of
    base weights that PEFT keeps beside trained ones. called: {adapted module: (its plain name, the file's without
    PEFT's prefix)}. problems: what cannot be read."""

    stored: dict[str, str] = field(default_factory=dict)
    called: dict[str, tuple[str, str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_names(stored: Iterable[str], config: Mapping) -> Names:
    """Plain names for the tensors of a file; two tensors of one name, or of two adapters, are problems."""
    names, outside, own = Names(), list[str](), is_own_class(config)
    adapters: set[str] = set()
    for full in stored:
        inner = _inside(full, own)
        if inner is None:
            outside.append(full)
            continue
        plain, adapter = _without_adapter_name(inner)
        adapters |= {adapter} if adapter is not None else set()
        if plain is None:
            continue
        if plain in names.stored:
            names.problems.append(f"{names.stored[plain]} and {full} are two tensors for {plain}; save it with PEFT")
        names.stored[plain] = full
        module = re.match(r"(.+)\.lora_", full.partition(PEFT_PREFIX)[2])
        if module:
            name = plain.rpartition(".lora_")[0]
            names.called[name] = name, module[1]
    if outside:
        names.problems.append(
            f"expected tensor names that start with {PEFT_PREFIX}, found {min(outside)}; save it with PEFT"
        )
    if len(adapters) > 1:
        names.problems.append(
            f"its tensors are of several adapters, {', '.join(sorted(adapters))}; save each one by itself with "
            "model.save_pretrained(folder, selected_adapters=[name])"
        )
    return names


def is_own_class(config: Mapping) -> bool:
    """Whether the adapter says that its base is a class of somebody's own, whose modules may be called anything."""
    mapping = config.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, Mapping) else None
    return isinstance(library, str) and library.partition(".")[0] not in LIBRARIES


def plain_path(path: str, own: bool = False) -> str:
    """A module's path without wrappers; without data parallel's too unless the base is a class of one's own."""
    parts = without_wrappers(path).split(".")
    while not own and len(parts) > 1:
        if parts[0] == PARALLEL and parts[1] not in FACTORS:
            parts = parts[1:]
        elif parts[:2] == ["base_model", "model"] and len(parts) > 2:  # an adapter on an adapter
            parts = parts[2:]
        else:
            break
    return ".".join(parts)


def without_wrappers(name: str) -> str:
    """A name without what FSDP, activation checkpointing and torch.compile put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _inside(full: str, own: bool) -> str | None:
    """Name below the model that PEFT was given; None where PEFT's prefix is missing."""
    outer, prefix, inner = full.partition(PEFT_PREFIX)
    wrapped = set(outer.split(".")) <= {"", PARALLEL, *WRAPPERS}
    return plain_path(inner, own) if prefix and wrapped and inner else None


def _without_adapter_name(name: str) -> tuple[str | None, str | None]:
    """(name as PEFT saves it, the adapter's name that a state dict has in it); (None, …) for a copy of the base's."""
    parts = name.split(".")
    if "original_module" in parts:
        return None, None
    for place, part in enumerate(parts[:-2]):
        if part == "modules_to_save":
            return ".".join(parts[:place] + parts[place + 2 :]), parts[place + 1]
    place = max((i for i, part in enumerate(parts) if part in FACTORS), default=-1)
    if place < 0:
        return name, None
    rest = parts[place + 1 :]
    of_module = not parts[place].startswith("lora_embedding")  # whose factors are parameters themselves
    tail = rest[-1:] if of_module and rest[-1:] in (["weight"], ["bias"]) else []
    inner = rest[: len(rest) - len(tail)]
    return (".".join(parts[: place + 1] + tail), inner[0]) if len(inner) == 1 else (name, None)
