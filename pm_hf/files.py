"""Writes that are whole or absent: one file or one folder at a time, synced before it takes its name."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

from pm_hf.errors import InputError


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically and synced; NaN is written as null."""
    write_text(path, json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically and synced."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def read_json(path: Path) -> Any:
    """Read a JSON file; InputError when it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error


@contextmanager
def new_folder(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder beside `path` that takes its name when the block ends without an error.

    The old folder, if any, keeps its content until then; after an error the new one is removed and nothing changed.
    """
    if path.exists() and not overwrite:
        raise InputError(f"output {path} exists; choose another folder, or overwrite=True (--overwrite) to replace it")
    path = path.resolve()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output {path} cannot be written: {error}") from error
    if path.exists() and not path.is_dir():
        raise InputError(f"output {path} is a file, expected a folder")
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync_file(file)
        _swap(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def copy_folder(source: Path, target: Path) -> None:
    """Replace `target` by a copy of `source`, whole or not at all."""
    with new_folder(target, overwrite=True) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left beside its target in `folder`."""
    for pattern in (".*.tmp-*", ".*.old-*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def same_folder(left: Path, right: Path) -> bool:
    """Whether two folders hold the same files."""
    if not right.is_dir():
        return False
    names = sorted(path.name for path in left.iterdir())
    return names == sorted(p.name for p in right.iterdir()) and all(
        (left / name).read_bytes() == (right / name).read_bytes() for name in names
    )


def _swap(new: Path, path: Path) -> None:
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    if path.exists():
        os.replace(path, old)
    try:
        os.replace(new, path)
    except BaseException:
        if old.exists():
            os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)
    _sync_folder(path.parent)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(_plain(item) for item in value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float) and value != value:  # NaN
        return None
    return value


def _sync_file(path: Path) -> None:
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
