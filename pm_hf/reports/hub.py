"""Publishing a run on the Hub: the only network writer."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pm_hf.adapters.download import TOKEN, errors_only, http_reason, log_in
from pm_hf.adapters.layout import ADAPTER_FILES, ADAPTER_WEIGHTS, CARD_FILE
from pm_hf.errors import InputError, raise_all
from pm_hf.reports.card import model_card
from pm_hf.reports.release import ReleasedRun, read_finished_run, valid_id
from pm_hf.runs.paths import REPORT_FILE

if TYPE_CHECKING:
    from huggingface_hub import HfApi
TASK_FOLDERS, PLOTS_INSIDE = "tasks/", "plots/"
UNRELATED = (".gitattributes", CARD_FILE, "LICENSE")  # what a repository may hold before the first push


class PushError(OSError):
    """An upload that stopped. What has arrived is kept on the Hub; pushing again sends the rest."""


@dataclass(frozen=True)
class Upload:
    """What goes to a repository: {path in it: local file, or content}."""

    repo: str
    base: str
    card: str
    files: dict[str, Path | bytes]

    def sizes(self) -> dict[str, int]:
        """{path in the repository: bytes}."""
        return {
            name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in self.files.items()
        }


def build_upload(
    run: str | os.PathLike,
    repo: str,
    *,
    base_model_id: str | None = None,
    license: str | None = None,
    language: str | None = None,
) -> Upload:
    """Everything that `push` would upload, checked, without any network; InputError for what cannot be published.

    The merged adapter, its card and report.json at the root, each task's own adapter in tasks/, pictures in plots/.
    Checkpoints, curvature and the rows' fingerprints stay here: they say more about the data than the adapter does.
    """
    if repo.count("/") != 1 or not valid_id(repo):
        raise InputError(f"repository {TOKEN.sub('…', repo)}: expected owner/name, as on the Hub")
    released = read_finished_run(run, base_model_id)
    card = model_card(released, repo, license=license, language=language)
    files: dict[str, Path | bytes] = {CARD_FILE: card.encode(), REPORT_FILE: _json(released.clean_report())}
    files |= _adapter(released, released.paths.merged, "")
    for task in released.tasks:
        files |= _adapter(released, task.adapter, f"{TASK_FOLDERS}{task.name}/")
    files |= {f"{PLOTS_INSIDE}{path.name}": path for path in released.plots}
    raise_all(_private(files, released.local_paths), f"run {run} cannot be published")
    return Upload(repo, released.base, card, files)


def push(
    run: str | os.PathLike,
    repo: str,
    *,
    base_model_id: str | None = None,
    license: str | None = None,
    language: str | None = None,
    public: bool = False,
) -> str:
    """Publish a finished run in one commit and return the repository's URL.

    base_model_id: the base model's id on the Hub, needed where model.base is a local folder. license, language: of the
    card, as the Hub writes them (apache-2.0, en). The repository is created
    if it is not there, private unless `public`; an existing one keeps its visibility, which must be the one asked for.
    Files that are there already are not sent again, so a second call finishes one that was interrupted; files of an
    earlier push that this run does not have are removed. A card edited on the Hub is replaced and stays in its history.
    Raises InputError before anything is uploaded, PushError when the upload stops.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    upload = build_upload(run, repo, base_model_id=base_model_id, license=license, language=language)
    api, subject = HfApi(), f"run {run} cannot be pushed to {repo}"
    if get_token() is None:
        raise InputError(f"{subject}: not logged in; {log_in('write to')}")
    with _failures(InputError, subject), errors_only():
        existing = _existing_files(api, upload, public)
        _check_card(upload.card)
        if existing is None:
            api.create_repo(repo, private=not public, exist_ok=True)
    operations: list = [CommitOperationAdd(name, file) for name, file in upload.files.items()]
    operations += [CommitOperationDelete(name) for name in _stale(existing or (), upload)]
    stopped = f"the upload to {repo} stopped, push again: what has arrived is kept"
    with _failures(PushError, stopped), errors_only():
        api.create_commit(repo, operations, commit_message="Upload adapters, card and report with pm-hf push")
    return f"{api.endpoint}/{repo}"


def _adapter(run: ReleasedRun, folder: Path, inside: str) -> dict[str, Path | bytes]:
    files = run.adapter_files(folder).items()
    return {inside + name: file if isinstance(file, Path) else _json(file) for name, file in files}


def _private(files: Mapping[str, Path | bytes], local_paths: Iterable[str]) -> list[str]:
    """Texts that still name a local path of the run, or hold the token: pictures and labels are not rewritten."""
    from huggingface_hub import get_token

    secrets = [secret.encode() for secret in (*local_paths, get_token()) if secret]
    texts = {name: file for name, file in files.items() if not name.endswith((ADAPTER_WEIGHTS, ".png"))}
    contents = {name: file if isinstance(file, bytes) else file.read_bytes() for name, file in texts.items()}
    telling = [name for name, content in contents.items() if any(secret in content for secret in secrets)]
    return [f"{name} names a local path or holds a token; remove it" for name in telling]


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _existing_files(api: "HfApi", upload: Upload, public: bool) -> set[str] | None:
    """Files that the repository holds, None where there is none.

    InputError when it must not be written to, or when the base model is not on the Hub.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    repo = upload.repo
    if not api.repo_exists(upload.base):
        raise InputError(
            f"base model {upload.base} is not on the Hub, or not visible to this account; give its id: "
            "--base_model_id ID"
        )
    try:
        info = api.model_info(repo)
    except RepositoryNotFoundError:
        return None
    if info.private and public:
        raise InputError(f"{repo} exists and is private; change that in its settings on the Hub, or leave out --public")
    if not info.private and not public:
        raise InputError(f"{repo} exists and is public; give --public, or push to another repository")
    files = {file.rfilename for file in info.siblings or ()}
    foreign = sorted(name for name in files if not name.startswith(UNRELATED))
    if foreign and REPORT_FILE not in files:
        raise InputError(f"{repo} holds something else ({', '.join(foreign[:3])}); push to another repository")
    return files


def _check_card(card: str) -> None:
    """InputError when the Hub refuses the card."""
    from huggingface_hub import ModelCard

    try:
        ModelCard(card).validate()
    except ValueError as error:
        raise InputError(f"the Hub refuses the card: {' '.join(str(error).split())}") from error


def _stale(existing: Iterable[str], upload: Upload) -> list[str]:
    """Files of an earlier push that this one does not have."""
    ours = (name for name in existing if name in ADAPTER_FILES or name.startswith((TASK_FOLDERS, PLOTS_INSIDE)))
    return sorted(name for name in ours if name not in upload.files)


@contextmanager
def _failures(kind: type[InputError] | type[PushError], subject: str) -> Iterator[None]:
    """Whatever the client and the network libraries below it raise, as one error of `kind` without their text."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{subject}: {TOKEN.sub('…', str(error))}") from error
    except Exception as error:
        raise kind(f"{subject}: {_upload_error(error)}") from error


def _upload_error(error: Exception) -> str:
    """Why it failed, and the way out. The client's own text may hold signed addresses and is left out."""
    from huggingface_hub import errors

    cause = error
    while not isinstance(cause, errors.HfHubHTTPError) and isinstance(cause.__cause__, Exception):
        cause = cause.__cause__
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it"
    if isinstance(cause, errors.HfHubHTTPError):
        return http_reason(cause, "write to")
    return f"{type(cause).__name__}: the Hub cannot be reached, or answers nonsense; check the network"
