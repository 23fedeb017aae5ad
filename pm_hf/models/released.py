"""What an adapter folder holds besides its LoRA factors, in a base model: vocabulary, embeddings, norms, other modules.

PEFT restores it where a folder is loaded alone. A model that trains on top of a folder has the same values in its base,
so that it is the model that was released.
"""

import re
from contextlib import suppress

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pm_hf.adapters.folder import Adapter
from pm_hf.errors import InputError, raise_all
from pm_hf.models.contexts import seeded


def fit_vocabulary(model: PreTrainedModel, adapter: Adapter) -> None:
    """Give the embeddings as many rows as the adapter's have.

    InputError where its tables disagree, or where it lacks one of them: the rows of new tokens would be random.
    """
    tables = _token_tables(model)
    whole = {name: rows for name in tables if (rows := _whole_rows(adapter, name)) is not None}
    wanted = whole | {name: rows for name in tables if (rows := _adapted_rows(adapter, name)) is not None}
    before = {name: len(table.weight) for name, table in tables.items()}
    if all(rows == before[name] for name, rows in wanted.items()):
        return
    if len(sizes := {*whole.values(), *wanted.values()}) > 1:
        raise InputError(f"adapter {adapter.path}: its embeddings have different numbers of rows: {sorted(sizes)}")
    (rows,) = sizes
    shared = {id(tables[name].weight) for name in whole if _is_copy(adapter, name)}
    lacking = [name for name, table in tables.items() if name not in whole and id(table.weight) not in shared]
    if lacking:
        raise InputError(
            f"adapter {adapter.path} is of a vocabulary of {rows} rows, the base has {before[lacking[0]]}, and it "
            f"holds no {lacking[0]}.weight: the rows of the new tokens are lost; save it with "
            "save_embedding_layers=True, or with both embeddings in modules_to_save"
        )
    with seeded(0):  # every row is replaced afterwards
        model.resize_token_embeddings(rows, mean_resizing=False)


def put_saved(model: PreTrainedModel, adapter: Adapter, head_root: str | None) -> None:
    """Put the values that the adapter holds whole into the model, those of its class head aside.

    A module of `modules_to_save` gets parameters of its own, also where the base ties them to another's; a copy of the
    base's weights is shared as the base's are. InputError with everything that the model has no place for.
    """
    problems, values = [], saved_values(adapter)
    for (place, own), name in sorted(values.items(), key=lambda item: item[0][1]):  # shared values first
        if head_root is not None and place.startswith(f"{head_root}."):
            continue
        module, leaf = _owner(model, place)
        target = None if module is None else getattr(module, leaf, None)
        if not isinstance(target, Tensor):
            problems.append(f"holds {name}, which the base does not have")
        elif target.shape != (value := adapter.tensor(name)).shape:
            problems.append(f"holds {name} of shape {tuple(value.shape)}, the base's is {tuple(target.shape)}")
        elif not target.is_floating_point():
            problems.append(f"holds {name}, which is quantised in this base; load the base without quantisation")
        elif own:
            put = torch.empty_like(target).copy_(value)
            setattr(module, leaf, nn.Parameter(put, requires_grad=False) if isinstance(target, nn.Parameter) else put)
        else:
            target.data.copy_(value)
    raise_all(problems, f"adapter {adapter.path} does not fit the base model")


def saved_values(adapter: Adapter) -> dict[tuple[str, bool], str]:
    """{(name in the base, whether the value is the adapter's own or the base's): name of the tensor}.

    PEFT names a value by the base's name, or by that of a module that it put around the base's.
    """
    values: dict[tuple[str, bool], str] = {}
    for name in adapter.saved:
        original = name in adapter.base_copies or ".original_module." in name
        place = re.sub(r"\.(base_layer|original_module|modules_to_save)\.", ".", name)
        if place == name or (place, not original) not in values:
            values[place, not original] = name
    return values


def vocabulary_size(model: PreTrainedModel) -> int | None:
    """Rows of the input embeddings; None for a model without tokens."""
    rows = [len(table.weight) for table in _token_tables(model).values()]
    return rows[0] if rows else None


def _token_tables(model: PreTrainedModel) -> dict[str, nn.Embedding | nn.Linear]:
    """{name: module with a row for each token}: input embeddings, then output embeddings where there are some."""
    names, tables = {id(module): name for name, module in model.named_modules()}, {}
    for get in (model.get_input_embeddings, model.get_output_embeddings):
        with suppress(NotImplementedError):  # pictures
            if isinstance(table := get(), nn.Embedding | nn.Linear):
                tables[names[id(table)]] = table
    return tables


def _whole_rows(adapter: Adapter, table: str) -> int | None:
    """Rows of a table that the adapter holds whole."""
    names = [name for name in _whole_names(table) if name in adapter.saved]
    return adapter.tensor(names[0]).shape[0] if names else None


def _adapted_rows(adapter: Adapter, table: str) -> int | None:
    """Rows of a table that the adapter has LoRA factors of."""
    layout = adapter.layouts.get(table)
    if layout is None:
        return None
    return layout.shape[1] if layout.kind == "embedding" else layout.shape[0]


def _is_copy(adapter: Adapter, table: str) -> bool:
    """Whether the adapter holds a table as a copy of the base's weights, which what is tied to it shares."""
    return any(name in adapter.base_copies for name in _whole_names(table))


def _whole_names(table: str) -> tuple[str, str]:
    return f"{table}.weight", f"{table}.base_layer.weight"


def _owner(model: nn.Module, name: str) -> tuple[nn.Module | None, str]:
    module, _, leaf = name.rpartition(".")
    try:
        return model.get_submodule(module), leaf
    except AttributeError:
        return None, leaf
