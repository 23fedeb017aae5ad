"""The tokenizers beside adapters: which token each row of an embedding is, and the tokenizer of a merge."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pm_hf.adapters.layout import TOKENIZER_FILES
from pm_hf.errors import InputError
from pm_hf.files import read_json

FAST, SETTINGS, ADDED = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}


@dataclass(frozen=True)
class Tokens:
    """What a tokenizer's files say of rows.

    names: {row: token}, the whole vocabulary if `complete`, else the added tokens alone. added: {row: how the token
    was added, as tokenizer.json writes it}, for tokens that no model of words or pieces gives.
    """

    folder: Path
    names: dict[int, str] = field(default_factory=dict)
    added: dict[int, dict[str, Any]] = field(default_factory=dict)
    complete: bool = False


@dataclass(frozen=True)
class Match:
    """Where each adapter's rows stand in the merge.

    places: for each adapter, and each of its rows, the row of the merge; None for a row that no token uses. rows: of
    the merge. kept: the tokenizer that names them, once the tokens `more` {row: how it was added} are added to it.
    """

    places: list[list[int | None]]
    rows: int
    kept: Tokens | None
    more: dict[int, dict[str, Any]]

    @property
    def moved(self) -> bool:
        """Whether a token stands elsewhere in the merge than in an adapter."""
        return any(place not in (row, None) for places in self.places for row, place in enumerate(places))


def read_tokens(folder: Path) -> Tokens | None:
    """The tokens that the tokenizer in a folder names; None without one. InputError for what is no tokenizer."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    names: dict[int, str] = {}
    added: dict[int, dict[str, Any]] = {}
    complete = (folder / FAST).is_file()
    if complete:
        content = _mapping(folder / FAST)
        _name(names, folder / FAST, _vocabulary(folder / FAST, content.get("model")))
        entries = content.get("added_tokens") or []
        if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
            raise InputError(f"{folder / FAST}: added_tokens is no list of tokens; save the tokenizer again")
        new = _name(names, folder / FAST, [(entry.get("id"), entry.get("content")) for entry in entries])
        added |= {entry["id"]: dict(entry) for entry in entries if entry["id"] in new}
    if (folder / SETTINGS).is_file():
        decoder = _mapping(folder / SETTINGS).get("added_tokens_decoder") or {}
        if not isinstance(decoder, Mapping) or not all(isinstance(entry, Mapping) for entry in decoder.values()):
            raise InputError(
                f"{folder / SETTINGS}: added_tokens_decoder is no {{row: token}}; save the tokenizer again"
            )
        numbered = [(_row(row), entry) for row, entry in decoder.items()]
        new = _name(names, folder / SETTINGS, [(row, entry.get("content")) for row, entry in numbered])
        added |= {row: {**entry, "id": row} for row, entry in numbered if row in new}
    if (folder / ADDED).is_file():
        rows = [(row, token) for token, row in _mapping(folder / ADDED).items()]
        new = _name(names, folder / ADDED, rows)
        added |= {row: {"id": row, "content": token, **FLAGS} for row, token in rows if row in new}
    once = {token: row for row, token in sorted(names.items(), reverse=True)}
    names = {row: token for token, row in once.items()}
    return Tokens(folder, names, {row: entry for row, entry in added.items() if row in names}, complete)


def match_tokens(owners: Sequence[str], tokens: Sequence[Tokens | None], sizes: Sequence[int]) -> Match:
    """Rows of several adapters by token: one row for each token, which keeps its place unless another token has it.

    owners: the adapters' names, for messages. tokens: None where nothing names rows. sizes: rows of each. Rows without
    a name keep their place. InputError where a row cannot be told.
    """
    given = [(owner, own) for owner, own in zip(owners, tokens, strict=True) if own]
    given.sort(key=lambda pair: not pair[1].complete)
    names: dict[int, str] = {}
    place: dict[str, int] = {}
    following = 0  # numbers of added tokens go on without gaps, as tokenizers read them
    added: dict[int, dict[str, Any]] = {}
    for owner, own in given:
        for row, token in sorted(own.names.items()):
            if token not in place:
                if row in names and row not in own.added:
                    raise InputError(
                        f"row {row} is {names[row]!r} in {given[0][0]} and {token!r} in {owner}: tokenizers of "
                        "different vocabularies; train both with the base's, new tokens added to it"
                    )
                moves = bool(names) and row in own.added and (row in names or row > following)
                place[token] = following if moves else row
                names[place[token]] = token
                following = max(following, place[token] + 1)
            if row in own.added:
                added.setdefault(place[token], own.added[row] | {"id": place[token]})
    places = []
    for owner, maybe, size in zip(owners, tokens, sizes, strict=True):
        known = maybe or Tokens(Path())
        unnamed = [row for row in range(size) if row not in known.names and row in names]
        if not known.complete and (unknown := [row for row in unnamed if row in added]):
            raise InputError(
                f"row {unknown[0]} is the new token {names[unknown[0]]!r} in another adapter, and no tokenizer beside "
                f"{owner} says what it is there; save the tokenizer that it was trained with into its folder"
            )
        rows: list[int | None] = [place[known.names[row]] if row in known.names else row for row in range(size)]
        for row in unnamed if known.complete else ():
            rows[row] = None
        places.append(rows)
    taken = [row for rows in places for row in rows if row is not None]
    whole = next((own for own in reversed(tokens) if own and own.names == names), None)
    kept = whole or (given[0][1] if given else None)
    more = {row: added[row] for row in sorted(added) if kept and row not in kept.names}
    return Match(places, max([*sizes, *(row + 1 for row in taken)], default=0), kept, more)


def tokenizer_files(folder: Path, more: Mapping[int, Mapping[str, Any]]) -> dict[str, bytes]:
    """{name: content} of the tokenizer in a folder, with further tokens {row: how it was added} added to it."""
    try:
        files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    except OSError as error:
        raise InputError(f"the tokenizer in {folder} cannot be read: {error}; copy it again") from error
    if not more:
        return files
    if FAST in files:
        content = json.loads(files[FAST])
        content["added_tokens"] = [
            *(content.get("added_tokens") or []),
            *({**FLAGS, **entry} for entry in more.values()),
        ]
        files[FAST] = _bytes(content)
    if SETTINGS in files and "added_tokens_decoder" in (content := json.loads(files[SETTINGS])):
        entries = {str(row): {k: v for k, v in entry.items() if k != "id"} for row, entry in more.items()}
        files[SETTINGS] = _bytes(content | {"added_tokens_decoder": content["added_tokens_decoder"] | entries})
    if ADDED in files:
        tokens = {entry["content"]: row for row, entry in more.items()}
        files[ADDED] = _bytes(json.loads(files[ADDED]) | tokens)
    return files


def vocabulary_size(base: Path | None) -> int:
    """Rows of a base model's embedding, from its configuration; 0 where that is not known."""
    if base is None or not (base / "config.json").is_file():
        return 0
    config = read_json(base / "config.json")
    for place in (config, config.get("text_config") if isinstance(config, Mapping) else None):
        if isinstance(place, Mapping) and type(size := place.get("vocab_size")) is int:
            return max(size, 0)
    return 0


def _mapping(path: Path) -> Mapping:
    content = read_json(path)
    if not isinstance(content, Mapping):
        raise InputError(
            f"{path} holds a {type(content).__name__}, expected names and values; save the tokenizer again"
        )
    return content


def _row(text: object) -> object:
    """A number out of a key of JSON."""
    return int(text) if isinstance(text, str) and text.isdecimal() and len(text) < 10 else text


def _vocabulary(path: Path, model: object) -> list[tuple[object, object]]:
    """(row, token) of a tokenizer's model of words or pieces."""
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocabulary, Mapping):
        return [(row, token) for token, row in vocabulary.items()]
    if isinstance(vocabulary, list) and all(isinstance(piece, list) and piece for piece in vocabulary):
        return [(row, piece[0]) for row, piece in enumerate(vocabulary)]  # [[piece, score], …]
    raise InputError(f"{path} has no model.vocab of words or pieces; save the tokenizer again")


def _name(names: dict[int, str], path: Path, rows: Sequence[tuple[object, object]]) -> set[int]:
    """Name rows out of a file; returns those that had no name. InputError for what is no row or no token, or another
    token than a file before."""
    new = set()
    for row, token in rows:
        if type(row) is not int or row < 0 or not isinstance(token, str):
            raise InputError(f"{path}: expected tokens with their numbers, found {token!r} at {row!r}; save it again")
        if row not in names:
            names[row] = token
            new.add(row)
        elif names[row] != token:
            raise InputError(
                f"{path}: token {row} is {token!r}, another file of the tokenizer says {names[row]!r}; save it again"
            )
    return new


def _bytes(content: Any) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
