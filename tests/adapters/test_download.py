"""Adapters by Hub id: the real client against a server on the loopback."""

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
from helpers import refusal
from helpers.adapter_folders import assert_same, dense, tree, write_folder
from helpers.hub import TOKEN, run_with_hub, serving

from pm_hf import InputError, merge_adapters
from pm_hf.adapters.download import _download_error, _parse, adapter_folder
from pm_hf.adapters.layout import ADAPTER_FILES

# prints {source: folder, or "error: …"} of each argument
FETCH = """
import json, sys
from pm_hf import InputError
from pm_hf.adapters.download import adapter_folder
found = {"local": str(adapter_folder(".")), "lazy": "huggingface_hub" not in sys.modules}
for source in sys.argv[1:]:
    try:
        found[source] = str(adapter_folder(source))
    except InputError as error:
        found[source] = f"error: {error}"
print(json.dumps(found))
"""

GOOD = {
    "owner/plain": ("main", ""),
    "hf://owner/plain": ("main", ""),
    "hf://models/owner/plain/": ("main", ""),
    "owner/plain@v2": ("v2", ""),
    "owner/plain@refs%2Fpr%2F1": ("refs/pr/1", ""),
    "owner/plain@refs/pr/1": ("refs/pr/1", ""),
    "owner/many/task-1/adapter": ("main", "task-1/adapter"),
    "owner/many@v2/odd [1]*": ("v2", "odd [1]*"),
}
NO_ADAPTER = "holds no adapter: expected adapter_config.json and adapter_model.safetensors, found "
BAD = {
    "owner/none": "cannot be fetched: no such repository, or a private one; check the name, or log in",
    "owner/private": "cannot be fetched: no such repository, or a private one; check the name, or log in",
    "owner/locked": "cannot be fetched: the Hub answered 401; log in",
    "owner/gated": "cannot be fetched: it is gated; accept its terms on the Hub and log in",
    "owner/broken": "cannot be fetched: the Hub answered 500; try again later",
    "owner/forbidden": "cannot be fetched: the Hub answered 403; log in",
    "owner/cut": "cannot be fetched: RemoteProtocolError: the Hub cannot be reached; check the network",
    "bad/na..me": "cannot be fetched: this is not a valid repository name",
    "owner/plain@v3": "cannot be fetched: no such revision; one with slashes is written url-encoded, refs%2Fpr%2F1",
    "owner/many": f"{NO_ADAPTER}odd [1]*/adapter_config.json",
    "owner/many/task-2": f"{NO_ADAPTER}no such subfolder; adapter_config.json is in odd [1]*, task-1/adapter",
    "owner/pickle": f"{NO_ADAPTER}adapter_model.bin: pickles are refused, never unpickled; save it again",
    "owner/text": f"{NO_ADAPTER}README.md",
}
NO_ID = ["gpt2", "/no/such/folder", "./owner/name", "owner/../name", "owner/name/../..", "hf://datasets/a/b", "a b/c"]


def files_of(folder: Path, inside: str = "") -> dict[str, bytes]:
    return {inside + path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def repos(tmp_path_factory):
    """{repository: {revision: {path: content}}}, adapters of different weights."""
    root = tmp_path_factory.mktemp("adapters")
    config = {"base_model_name_or_path": "tiny/base"}
    made = [files_of(write_folder(root / str(i), seed=i, config=config)) for i in range(3)]
    extra = {"README.md": b"card", "optimizer.pt": b"pickle", "adapter_model.bin": b"pickle", "labels.json": b"{}"}
    extra |= {"tokenizer.json": b'{"model": {"vocab": {}}}'}
    odd = {f"odd [1]*/{name}": content for name, content in made[0].items()}
    deep = {f"task-1/adapter/{name}": content for name, content in made[1].items()}
    pickle = {"adapter_config.json": made[0]["adapter_config.json"], "adapter_model.bin": b"pickle"}
    return {
        "owner/plain": {"main": made[0] | extra, "v2": made[1], "refs/pr/1": made[2]},
        "owner/many": {"main": odd | deep, "v2": odd},
        "owner/pickle": {"main": pickle},
        "owner/text": {"main": {"README.md": b"card"}},
        "owner/gated": {"main": made[0]},
        "owner/forbidden": {"main": made[0]},
    }


@pytest.fixture(scope="module")
def hub(repos):
    refusals = {"owner/private": (401, "RepoNotFound"), "owner/locked": (401, None), "owner/gated": (403, "GatedRepo")}
    refusals |= {"owner/forbidden": (403, None), "owner/broken": (500, None), "owner/cut": (0, None)}
    with serving(repos, refusals) as server:
        yield server


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def fetched(hub, home):
    """{source: folder or error} of one run over all sources."""
    done = run_with_hub(hub.url, home, FETCH, *GOOD, *BAD)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert TOKEN not in done.stdout
    return json.loads(done.stdout.splitlines()[-1])


def test_the_client_is_loaded_for_hub_ids_only(fetched):
    assert fetched["local"] == "."
    assert fetched["lazy"]


@pytest.mark.parametrize("source", GOOD)
def test_a_hub_id_becomes_the_folder_of_its_revision_and_subfolder(fetched, repos, source):
    assert not fetched[source].startswith("error"), fetched[source]
    revision, inside = GOOD[source]
    repo = repos["owner/many" if "many" in source else "owner/plain"][revision]
    prefix = f"{inside}/" if inside else ""
    expected = {name: repo[prefix + name] for name in ADAPTER_FILES if prefix + name in repo}
    assert len(expected) >= 2
    assert {p.name: p.read_bytes() for p in Path(fetched[source]).iterdir() if p.is_file()} == expected


def test_nothing_but_an_adapters_own_files_is_fetched(fetched, hub):
    assert fetched
    wanted = [line for line in hub.seen if "/resolve/" in line]
    assert {line.rsplit("/", 1)[1] for line in wanted} == {*ADAPTER_FILES[:3], "tokenizer.json"}
    assert hub.tokens == {f"Bearer {TOKEN}"}, "the server saw the token that no message may show"


@pytest.mark.parametrize("source", BAD)
def test_what_cannot_be_fetched_is_one_clear_error(fetched, source):
    repo = source.split("@")[0].removesuffix("/task-2")
    start = f"error: adapter {source}: not a local folder, and Hub repository {repo}"
    assert fetched[source].startswith(start)
    assert BAD[source] in fetched[source]
    assert TOKEN not in fetched[source]
    assert "\n" not in fetched[source]


def test_no_network_and_no_space_are_told_apart():
    from huggingface_hub import errors

    unreachable = errors.LocalEntryNotFoundError("long text")
    unreachable.__cause__ = ConnectionRefusedError(errno.ECONNREFUSED, "refused")
    assert _download_error(unreachable).startswith(
        "ConnectionRefusedError: the Hub cannot be reached; check the network"
    )
    assert (
        _download_error(OSError(errno.ENOSPC, "disk full"))
        == "disk full; check the cache folder, HF_HOME, and its disk"
    )


def test_offline_the_cache_is_used(fetched, hub, home):
    before = len(hub.seen)
    done = run_with_hub(hub.url, home, FETCH, "owner/plain@v2", "owner/none", "owner/pickle", offline=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["owner/plain@v2"] == fetched["owner/plain@v2"]
    assert "HF_HUB_OFFLINE is set and it is not in the cache; unset it, or give a folder" in found["owner/none"]
    assert "the cache holds no more of it, and the Hub cannot be asked: HF_HUB_OFFLINE is set" in found["owner/pickle"]
    assert len(hub.seen) == before


def test_merge_adapters_takes_hub_ids(hub, tmp_path, repos):
    program = "import sys, pm_hf; pm_hf.merge_adapters(sys.argv[1:3], sys.argv[3], method='average')"
    sources = ["owner/plain@v2", "hf://owner/many/task-1/adapter"]
    done = run_with_hub(hub.url, tmp_path / "home", program, *sources, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    (tmp_path / "one").mkdir()
    for name, content in repos["owner/plain"]["v2"].items():
        (tmp_path / "one" / name).write_bytes(content)
    assert_same(dense(tmp_path / "out"), dense(tmp_path / "one"))
    names = ("owner/plain v2", "owner/many main")
    commits = [hashlib.sha1(name.encode()).hexdigest() for name in names]
    assert json.loads((tmp_path / "out" / "merge_report.json").read_text())["inputs"] == [
        f"{source} (commit {commit})" for source, commit in zip(sources, commits, strict=True)
    ]


def test_a_local_folder_called_snapshots_has_no_commit(tmp_path):
    folder = write_folder(tmp_path / "models--owner--plain" / "snapshots")
    merge_adapters([folder, f"{folder}/../snapshots"], tmp_path / "out", method="average")
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["inputs"] == [str(folder), f"{folder}/../snapshots"]


def test_a_local_folder_wins(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "owner" / "plain")
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    assert adapter_folder("owner/plain") == Path("owner/plain")
    assert adapter_folder(folder) == folder
    assert tree(tmp_path) == before


@pytest.mark.parametrize("source", [*NO_ID, "", "hf://", "owner/name@", "owner/name/deep@v2"])
def test_a_string_that_is_neither_folder_nor_id(source):
    expected = "expected a local folder or a Hub id owner/name"
    with pytest.raises(InputError, match="is not a folder: " + expected):
        adapter_folder(source)


def test_paths_are_always_local(tmp_path):
    with pytest.raises(InputError, match="owner/name is not a folder.*found neither"):
        adapter_folder(Path("owner/name"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file is not a folder.*found a file"):
        adapter_folder(os.fspath(tmp_path / "file"))


def test_secrets_in_a_source_are_not_shown():
    for source in (f"https://user:{TOKEN}@huggingface.co/a/b", f"https://{TOKEN}@x/a", f"a/b/c/d@{TOKEN}"):
        assert TOKEN not in refusal(adapter_folder, source)


def test_ids_are_read_as_huggingface_hub_reads_them():
    from huggingface_hub import HfFileSystem

    system = HfFileSystem()
    system._repo_and_revision_exist = lambda *_: (True, None)
    for source in (source for source in GOOD if "models/" not in source):  # newer than the oldest client
        place, expected = _parse(source), system.resolve_path(source.rstrip("/"))
        assert (place.repo, place.folder) == (expected.repo_id, expected.path_in_repo)
        assert (place.revision or "main") == expected.revision
