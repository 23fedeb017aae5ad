"""Adapters by name: a local folder, or a Hub id whose files are downloaded first."""

import errno
import glob
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from pm_hf.adapters.layout import ADAPTER_CONFIG, ADAPTER_FILES, ADAPTER_WEIGHTS
from pm_hf.errors import InputError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

PICKLES = (".bin", ".pt", ".pth", ".pkl")


SYNTAX = "a local folder or a Hub id owner/name[@revision][/subfolder]"


HUB_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"


HUB_ID = re.compile(rf"({HUB_NAME}/{HUB_NAME})(?:@(refs/(?:pr/\d+|convert/\w+)|[^/@]+))?(?:/([^@]+))?")


TOKEN = re.compile(r"hf_\w{8,}|(?<=://)[^/@]+(?=@)")


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class _Place:
    """An adapter on the Hub: repository, revision (None: the default branch), folder in it ("": the root)."""

    repo: str
    revision: str | None
    folder: str

    def __str__(self) -> str:
        parts = [f"Hub repository {self.repo}"]
        parts += [f"revision {self.revision}"] if self.revision else []
        parts += [f"subfolder {self.folder}"] if self.folder else []
        return ", ".join(parts)


def adapter_folder(source: str | os.PathLike) -> Path:
    """The folder of an adapter: `source` itself, or where its files were downloaded to.

    A local folder wins, and a path object is always local. Any other string is a Hub id
    `owner/name[@revision][/subfolder]`, with or without `hf://` in front, as in huggingface_hub's HfFileSystem; a
    revision with slashes is written url-encoded (`refs%2Fpr%2F1`). Of the repository only adapter_config.json,
    adapter_model.safetensors, labels.json and merge_report.json are fetched, into huggingface_hub's cache; without a
    network the cached ones are used. Raises InputError for whatever goes wrong, without a token in the message.
    """
    path, name = Path(source), TOKEN.sub("…", os.fspath(source))
    if name and path.is_dir():
        return path
    place = _parse(source) if isinstance(source, str) and not path.exists() else None
    if place is None:
        what = "a file" if path.is_file() else "neither"
        raise InputError(f"adapter {name} is not a folder: expected {SYNTAX}, found {what}")
    return _download(place, f"adapter {name}: not a local folder, and {place}")


def base_folder(base: str, revision: str | None, wanted: Sequence[str]) -> Path:
    """The folder of a base model: `base` itself, or where the files of the Hub id that match a pattern of `wanted` were
    downloaded to; InputError for whatever goes wrong."""
    if Path(base).is_dir():
        return Path(base)
    from huggingface_hub import snapshot_download

    try:
        with errors_only():
            return Path(snapshot_download(base, revision=revision, allow_patterns=list(wanted)))
    except Exception as error:  # whatever the client and the network libraries below it raise
        name = TOKEN.sub("…", base)
        raise InputError(f"base model {name}: not a local folder, and as a Hub id: {_download_error(error)}") from error


def base_config_file(base: object, revision: object = None) -> Path | None:
    """config.json of a base model, from its folder or from the Hub's cache; None where neither has it."""
    if not isinstance(base, str) or not base or "\0" in base:
        return None
    file = Path(base).expanduser() / "config.json"
    with suppress(OSError):
        if file.is_file():
            return file
    from huggingface_hub.constants import HF_HUB_CACHE

    if not (Path(HF_HUB_CACHE) / f"models--{base.replace('/', '--')}").is_dir():  # the client takes long to import
        return None
    from huggingface_hub import try_to_load_from_cache

    with suppress(OSError, ValueError):  # of which the client's own are kinds
        cached = try_to_load_from_cache(base, "config.json", revision=revision if isinstance(revision, str) else None)
        return Path(cached) if isinstance(cached, str) else None
    return None


def _parse(source: str) -> _Place | None:
    """The place on the Hub that a string names; None if it names none."""
    hub = source.removeprefix("hf://")
    if hub != source:
        hub = hub.removeprefix("models/")
        if hub.startswith(("datasets/", "spaces/", "kernels/", "buckets/")):
            return None
    match = HUB_ID.fullmatch(hub.rstrip("/"))
    if not match or any(part in ("", ".", "..") for part in (match[3] or "root").split("/")):
        return None
    return _Place(match[1], unquote(match[2]) if match[2] else None, match[3] or "")


def _download(place: _Place, subject: str) -> Path:
    """The downloaded folder; InputError that starts with `subject`."""
    from huggingface_hub import snapshot_download

    inside = f"{place.folder}/" if place.folder else ""
    # a pickle is never fetched
    wanted = [glob.escape(inside + name) for name in ADAPTER_FILES]
    try:
        with errors_only():
            snapshot = Path(snapshot_download(place.repo, revision=place.revision, allow_patterns=wanted))
    except Exception as error:  # whatever the client and the network libraries below it raise
        raise InputError(f"{subject} cannot be fetched: {_download_error(error)}") from error
    folder = snapshot / place.folder
    if not (folder / ADAPTER_CONFIG).is_file() or not (folder / ADAPTER_WEIGHTS).is_file():
        holds = _listing(place.repo, snapshot.name, inside)
        raise InputError(f"{subject} holds no adapter: expected {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}, {holds}")
    return folder


@contextmanager
def errors_only() -> Iterator[None]:
    """No warnings of the client on stderr: what it warns of (no file matches) is our error a moment later."""
    from huggingface_hub.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _download_error(error: Exception) -> str:
    """Why a download failed, and the way out. The client's own text may hold signed addresses and is left out."""
    from huggingface_hub import errors

    reasons = {
        errors.GatedRepoError: f"it is gated; accept its terms on the Hub and {log_in('read')}",
        errors.RevisionNotFoundError: "no such revision; one with slashes is written url-encoded, refs%2Fpr%2F1",
        errors.RepositoryNotFoundError: f"no such repository, or a private one; check the name, or {log_in('read')}",
        errors.OfflineModeIsEnabled: "HF_HUB_OFFLINE is set and it is not in the cache; unset it, or give a folder",
        errors.HFValidationError: "this is not a valid repository name",
    }
    cause = error
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        cause = error.__cause__
    for kind, reason in reasons.items():
        if isinstance(cause, kind):
            return reason
    if isinstance(cause, errors.HfHubHTTPError):
        return http_reason(cause, "read")
    if isinstance(cause, OSError) and cause.errno in DISK_ERRORS:
        return f"{cause.strerror}; check the cache folder, HF_HOME, and its disk"
    return f"{type(cause).__name__}: the Hub cannot be reached; check the network, or give a local folder"


def log_in(verb: str) -> str:
    """The way out where an account may not `verb` (read, write to) a repository."""
    return f"log in (hf auth login, or HF_TOKEN) with an account that may {verb} it"


def http_reason(error: "HfHubHTTPError", verb: str) -> str:
    """What the Hub answered, and the way out. The client's own text may hold signed addresses and is left out."""
    status = error.response.status_code
    return f"the Hub answered {status}; " + (log_in(verb) if status in (401, 403) else "try again later")


def _listing(repo: str, commit: str, inside: str) -> str:
    """What the repository holds instead of an adapter, below the folder `inside`."""
    from huggingface_hub import HfApi

    try:
        files = HfApi().list_repo_files(repo, revision=commit)
    except Exception as error:  # as above
        return f"the cache holds no more of it, and the Hub cannot be asked: {_download_error(error)}"
    here = sorted(file.removeprefix(inside) for file in files if file.startswith(inside))
    pickles = [file for file in here if file.endswith(PICKLES)]
    folders = sorted(
        {os.path.dirname(file) or "its root" for file in files if os.path.basename(file) == ADAPTER_CONFIG}
    )
    if not here:
        holds = "found no such subfolder"
    elif pickles:
        holds = f"found {pickles[0]}: pickles are refused, never unpickled; save it again as safetensors"
    else:
        holds = f"found {', '.join(here[:5])}"
    return holds + (f"; {ADAPTER_CONFIG} is in {', '.join(folders[:5])}" if folders and not pickles else "")
