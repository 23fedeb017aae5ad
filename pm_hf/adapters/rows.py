"""What the rows of a saved module stand for: tokens, classes, or units that are the same in every adapter.

An adapter says it by its tensors' names and shapes alone. What these leave open may be a class head.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from pm_hf.adapters.folder import EMBEDDINGS, Adapter

RowKind = Literal["tokens", "classes", "hidden", "units"]

# embeddings of tokens and what maps back to them
TOKEN_TABLES = frozenset(EMBEDDINGS) - {"wpe", "output", "decoder"} | {"vocab_projector"}
# modules around the map back to tokens, in masked language models
TOKEN_HEADS = frozenset(("lm_head", "cls.predictions", "generator_lm_head", "lm_predictions"))
# layers between a body and a class head in transformers, and names that some of them share with heads
HIDDEN_LAYERS = frozenset(("pooler", "pre_classifier", "sequence_summary"))
PERHAPS_HIDDEN = frozenset(("dense", "projector"))
FIXED_ROWS = frozenset(("qa_outputs",))  # start and end of an answer
EMBEDDING = re.compile(r"^wpe$|^(?!.*(class|bbox|box)).*embed", re.IGNORECASE)
LAYER_NUMBER = re.compile(r"\.\d+\.")


def saved_modules(adapters: Sequence[Adapter]) -> dict[str, list[str]]:
    """{module: names of its own saved tensors}, in the order in which the files hold them."""
    modules: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.saved):
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    return modules


def row_kind(module: str, adapters: Sequence[Adapter]) -> RowKind:
    """What the rows of a saved module are.

    tokens: of a vocabulary. hidden: units of a layer below a class head. units: of a norm, a position, a layer inside
    the stack that LoRA adapts. classes: anything else, so that the rows must be named before they are mixed.
    """
    holders = [adapter for adapter in adapters if any(_is_in(name, module) for name in adapter.saved)]
    parts = _parts(module)
    if is_token_table(module) or any(_is_copy(adapter, module) for adapter in holders):
        return "tokens"
    perhaps = parts[-1] in ("decoder", "output", "proj_out") or TOKEN_HEADS & set(parts)
    if perhaps and all(_rows(adapter, module) == vocabulary_rows(adapter) != 0 for adapter in holders):
        return "tokens"
    known = any(EMBEDDING.search(part) for part in parts) or {*TOKEN_HEADS, *FIXED_ROWS} & set(parts)
    if known or _in_adapted_stack(module, adapters) or not any(_is_map(adapter, module) for adapter in holders):
        return "units"
    named = HIDDEN_LAYERS & set(parts)
    return "hidden" if named or all(feeds_another(adapter, module) for adapter in holders) else "classes"


def is_token_table(module: str) -> bool:
    """Whether a module's name is that of an embedding of tokens, or of the map back to them."""
    parts = _parts(module)
    return parts[-1] in TOKEN_TABLES or (parts[-1] in ("decoder", "cls.predictions") and bool(TOKEN_HEADS & set(parts)))


def vocabulary_rows(adapter: Adapter) -> int:
    """Rows of the largest embedding of tokens that an adapter saves or adapts; 0 where it leaves them alone."""
    saved = {name.rpartition(".")[0] for name in adapter.saved}
    tables = [module for module in saved if is_token_table(module) or _is_copy(adapter, module)]
    rows = [_rows(adapter, module) for module in tables]
    adapted = [layout for module, layout in adapter.layouts.items() if is_token_table(module)]
    rows += [layout.shape[1] if layout.kind == "embedding" else layout.shape[0] for layout in adapted]
    return max(rows, default=0)


def feeds_another(adapter: Adapter, module: str) -> bool:
    """Whether a module's outputs are the inputs of another saved one, so that its rows are no classes.

    The other is of the same entry of modules_to_save, or the module has a name of hidden layers. Of two that could feed
    each other, the one with labels is the head.
    """
    sizes = _sizes(adapter)
    if module not in sizes:
        return False
    rows, columns = sizes[module]
    roots = [r for r in adapter.config.get("modules_to_save") or [] if f".{r}." in f".{module}."]
    for other, (outputs, inputs) in sizes.items():
        near = bool(PERHAPS_HIDDEN & set(_parts(module))) or any(f".{root}." in f".{other}." for root in roots)
        circle = outputs == columns and other not in adapter.labels
        if other != module and near and inputs == rows and not circle:
            return True
    return False


def _parts(module: str) -> list[str]:
    """The names that a module's path is made of, with the map of BERT back to tokens as one."""
    parts = module.replace(".base_layer", "").split(".")
    for i in range(len(parts) - 1):
        if parts[i : i + 2] == ["cls", "predictions"]:
            return [*parts[:i], "cls.predictions", *parts[i + 2 :]]
    return parts


def _is_in(name: str, module: str) -> bool:
    return name.rpartition(".")[0] == module


def _is_copy(adapter: Adapter, module: str) -> bool:
    """Whether PEFT wrote the module along as a copy of the base's: it does so for embeddings of tokens."""
    return any(_is_in(name, module) for name in adapter.base_copies) and _parts(module)[-1] != "wpe"


def _rows(adapter: Adapter, module: str) -> int:
    """Rows of the module's own tensors."""
    shapes = [adapter.saved_shape(name) for name in adapter.saved if _is_in(name, module)]
    return max((shape[0] for shape in shapes if shape), default=0)


def _is_map(adapter: Adapter, module: str) -> bool:
    """Whether a module maps inputs to rows: it has a matrix, or a bias without the scale that a norm has."""
    names = [name for name in adapter.saved if _is_in(name, module)]
    matrix = any(len(adapter.saved_shape(name)) > 1 for name in names)
    return matrix or [name.rpartition(".")[2] for name in names] == ["bias"]


def _sizes(adapter: Adapter) -> Mapping[str, tuple[int, int]]:
    """{saved module: (outputs, inputs)}."""
    shapes = {name: adapter.saved_shape(name) for name in adapter.saved}
    return {
        name.rpartition(".")[0]: (shape[0], shape[1])
        for name, shape in shapes.items()
        if len(shape) > 1 and not is_token_table(name.rpartition(".")[0])
    }


def _in_adapted_stack(module: str, adapters: Sequence[Adapter]) -> bool:
    """Whether the module lies inside one of numbered layers (`layers.3.…`) of which LoRA adapts some, and has as many
    rows as one of the adapted modules has inputs or outputs."""
    stack = _stack(f"{module}.")
    widths = {width for a in adapters for name in a.layouts if _stack(name) == stack for width in a.shape(name)}
    return stack is not None and all(_rows(a, module) in {0, *widths} for a in adapters) and bool(widths)


def _stack(module: str) -> str | None:
    """What stands before the first number inside a module's path."""
    parts = LAYER_NUMBER.split(module, maxsplit=1)
    return parts[0] if len(parts) == 2 and parts[1] else None
