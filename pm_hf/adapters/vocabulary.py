"""Embeddings of tokens in a merge: which rows of the adapters are one token, and the tokenizer that names them."""

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
from pm_hf.adapters.download import base_config_file
from pm_hf.adapters.folder import Adapter
from pm_hf.adapters.plan import Plan
from pm_hf.adapters.rows import is_token_table, vocabulary_rows
from pm_hf.adapters.tokens import (
    Match,
    Tokens,
    match_tokens,
    read_tokens,
    tokenizer_files,
    vocabulary_size,
)
from pm_hf.errors import InputError

ROWS_FROM = "take one adapter's as it is: rows_from=ADAPTER (--rows-from)"
SAVE_TOKENIZERS = "rows of new tokens are matched by the tokenizer beside each adapter; save it into each folder"


@dataclass(frozen=True)
class Vocabulary:
    """Rows of tokens in a merge.

    places: {adapter: the row of the merge for each of its rows, None for one that no token uses}. base: rows of the
    base's embedding, 0 where that is not known. names: {row: token}. tokenizer: {file name: content} of the one that
    names the rows; source: the folder that it is from. whole: the adapter whose embeddings are taken, where tokens
    cannot be matched.
    """

    places: Mapping[Path, Sequence[int | None]] = field(default_factory=dict)
    base: int = 0
    names: Mapping[int, str] = field(default_factory=dict)
    tokenizer: Mapping[str, bytes] = field(default_factory=dict)
    source: str | None = None
    whole: Adapter | None = None


def match_vocabulary(plan: Plan, names: Sequence[str], rows_from: Adapter | None) -> Vocabulary:
    """Which rows of the adapters are one token; names: the saved tensors with a row for each token, but those whose
    rows labels.json calls the same in all.

    InputError where rows cannot be matched and no `rows_from` is there to take them from.
    """
    owners = [adapter for adapter in plan.adapters if vocabulary_rows(adapter)]
    if len(owners) < 2 or not (names or _token_layers(owners)):
        return _with_tokenizer([adapter.path for adapter in owners or plan.adapters])
    try:
        last = owners[-1].config
        config = base_config_file(last.get("base_model_name_or_path"), last.get("revision"))
        base = None if config is None else config.parent
        tokens = _tokens(owners, names, [read_tokens(adapter.path) for adapter in owners], base)
        match = match_tokens(
            [str(adapter.path) for adapter in owners], tokens, [vocabulary_rows(adapter) for adapter in owners]
        )
        _check_moves(owners, names, match)
    except InputError as error:
        if _token_layers(owners):
            raise
        if rows_from is None or not vocabulary_rows(rows_from):
            raise InputError(f"{error}; or {ROWS_FROM}") from error
        return replace(_with_tokenizer([rows_from.path]), whole=rows_from)
    places = {adapter.path: rows for adapter, rows in zip(owners, match.places, strict=True)}
    known = Vocabulary(places, vocabulary_size(base))
    if match.kept is None:
        return known
    files = tokenizer_files(match.kept.folder, match.more)
    return replace(known, names=match.kept.names, tokenizer=files, source=str(match.kept.folder))


def merge_tokens(plan: Plan, name: str, vocabulary: Vocabulary, rows_from: Adapter | None) -> tuple[Tensor | None, str]:
    """(tensor with a row for each token, how it was merged); no tensor where the adapter that is taken has none."""
    if (whole := vocabulary.whole) is not None:
        return (whole.tensor(name) if name in whole.saved else None), f"from {whole.path}"
    parts, weight = parts_of(plan, name), sum_of_weights(plan, name)
    copies = [part.adapter for part in parts if name in part.adapter.base_copies]
    copied = bool(copies) and not all(map(_tied, parts))
    if len(parts) == 1:
        return parts[0].value, "a copy of the base" if copied else "from the only adapter that has it"
    if len(shapes := {tuple(part.value.shape[1:]) for part in parts}) > 1:
        raise InputError(f"{name} has different row shapes: {sorted(shapes)}")
    places = [vocabulary.places.get(part.adapter.path, ()) for part in parts]
    if any(part.value.shape[:1] != (len(own),) for part, own in zip(parts, places, strict=True)):
        if len(shapes := {tuple(part.value.shape) for part in parts}) > 1:
            raise InputError(
                f"{name} has different shapes {sorted(shapes)}, other rows than the tokens have; {ROWS_FROM}"
            )
        places = [range(len(part.value)) if part.value.dim() else () for part in parts]
    placed = [replace(part, places=own) for part, own in zip(parts, places, strict=True)]
    count = max((row + 1 for own in places for row in own if row is not None), default=0)
    by_token = any(list(own) != list(range(count)) for own in places)
    if copied and len(copies) < len(parts) and not all(torch.equal(part.value, parts[0].value) for part in parts):
        raise InputError(
            f"{name} is trained in some adapters and a copy of the base in {copies[0].path}; train it in all"
        )
    if copied:
        merged = by_row(placed, count, lambda few, rows: _copied_rows(name, few, rows, count, vocabulary, rows_from))
        return merged, "copies of the base, by token" if by_token else "a copy of the base"
    if by_token:
        return by_row(placed, count, lambda few, _: blend_rows(name, few, weight)), f"by token, {count} rows"
    return blend(name, parts, weight), "by coefficient"


def _with_tokenizer(folders: Sequence[Path]) -> Vocabulary:
    """A vocabulary whose rows need no matching, with the tokenizer that names all that the others name (of several the
    last); without one where they contradict, or cannot be read."""
    having, files, differ = list[Path](), dict[str, bytes](), False
    for folder in dict.fromkeys(folders):
        if own := tokenizer_files(folder, {}):
            differ = differ or (bool(having) and own != files)
            having.append(folder)
            files = own
    if not having:
        return Vocabulary()
    source = having[-1]
    if differ:
        try:
            tokens = [known for folder in reversed(having) if (known := read_tokens(folder))]
        except InputError:
            return Vocabulary()
        most = max(tokens, key=lambda known: (known.complete, len(known.names)))
        if not all(known.names.items() <= most.names.items() for known in tokens):
            return Vocabulary()
        if most.folder != source:
            source, files = most.folder, tokenizer_files(most.folder, {})
    return Vocabulary(tokenizer=files, source=str(source))


def _tokens(
    owners: Sequence[Adapter], names: Sequence[str], beside: Sequence[Tokens | None], base: Path | None
) -> list[Tokens | None]:
    """What names the rows of each: its own tokenizer; without one another adapter's, where all values are equal, or the
    base's, where it has no more rows. InputError where nothing names rows that must be named."""
    given, base_rows = [own for own in beside if own], vocabulary_size(base)
    sizes = [vocabulary_rows(adapter) for adapter in owners]
    if given:
        equal = len(given) < len(owners) and same_values(owners, names)
        default = given[0] if equal else read_tokens(base) if base else None
        return [
            own or (default if equal or size <= base_rows else None) for own, size in zip(beside, sizes, strict=True)
        ]
    if len(set(sizes)) > 1:
        listed = ", ".join(f"{size} in {adapter.path}" for adapter, size in zip(owners, sizes, strict=True))
        raise InputError(f"the adapters' embeddings have different shapes, rows: {listed}; {SAVE_TOKENIZERS}")
    copies = all(name in adapter.base_copies for adapter in owners for name in names if name in adapter.saved)
    if 0 < base_rows < sizes[0] and not copies and not same_values(owners, names):
        raise InputError(
            f"the adapters' embeddings have {sizes[0]} rows, the base's {base_rows}, and differ; {SAVE_TOKENIZERS}"
        )
    return list(beside)


def _token_layers(owners: Sequence[Adapter]) -> list[tuple[Adapter, str]]:
    """Embeddings of tokens that LoRA adapts."""
    return [(adapter, module) for adapter in owners for module in adapter.layouts if is_token_table(module)]


def _check_moves(owners: Sequence[Adapter], names: Sequence[str], match: Match) -> None:
    """InputError where a row would have to move in something that cannot move: LoRA factors, or what is not saved."""
    if match.moved and (adapted := _token_layers(owners)):
        adapter, module = adapted[0]
        raise InputError(
            f"one row is another token in each adapter, and {adapter.path} adapts {module} by LoRA, whose rows cannot "
            "be moved; add the same tokens in the same order in all, or train the embeddings in modules_to_save"
        )
    for name in names:
        having = [adapter for adapter in owners if name in adapter.saved]
        rows = [adapter.saved_shape(name)[:1] for adapter in having]
        of_tokens = rows == [(vocabulary_rows(adapter),) for adapter in having]
        if of_tokens and len(having) < len(owners) and (match.moved or max(rows) < (match.rows,)):
            lacking = next(adapter for adapter in owners if adapter not in having)
            raise InputError(
                f"new tokens differ between the adapters, and {lacking.path} has no {name}, which another has; save "
                "the same embeddings in all (save_embedding_layers=True)"
            )


def _copied_rows(
    name: str, parts: Sequence[Part], where: Tensor, count: int, vocabulary: Vocabulary, rows_from: Adapter | None
) -> Tensor:
    """Rows of copies of the base's weight, which are equal; those of new tokens may be taken from `rows_from`."""
    differ = differing(parts)
    if not differ.any():
        return parts[0].value
    where = where[differ]
    if int(where.min()) < (vocabulary.base or max(1, count // 2)):
        raise InputError(f"{name} is a weight of the base model and differs between the adapters: not one base")
    if rows_from is None:
        token = vocabulary.names.get(int(where[0]))
        raise InputError(
            f"{name}: the adapters have one base, and copies of it that differ in {len(where)} of {count} rows only, "
            f"first row {int(where[0])}{'' if token is None else f' ({token!r})'}: rows of new tokens that were drawn "
            f"anew for each adapter; {ROWS_FROM}, or draw them once, save that base and train all from it"
        )
    return next((part.value for part in parts if part.adapter.path == rows_from.path), parts[0].value)


def _tied(part: Part) -> bool:
    """Whether the tensor is that of a trained module under a second name, as with tied embeddings."""
    adapter = part.adapter
    trained = [other for other in adapter.saved if other not in adapter.base_copies]
    same_shape = [other for other in trained if adapter.saved_shape(other) == tuple(part.value.shape)]
    return any(torch.equal(part.value, adapter.tensor(other)) for other in same_shape)
