"""A Hub on the loopback: the few endpoints that reading and writing a model repository needs; Xet is off."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"
LARGE = (".safetensors", ".png")  # stored through LFS

Files = dict[str, bytes]


class HubServer(ThreadingHTTPServer):
    """repos: {owner/name: {revision: {path: content}}}. refusals: {owner/name: (status, X-Error-Code)} for its files,
    or for everything with status 401 and above 499; status 0 drops the connection. seen: "METHOD path" of each request.
    private: repositories that need the token. objects: what LFS holds, {sha256: content}. drops: {"METHOD part of a
    path": how many such requests lose their connection before an answer}. refused: an id that no card may name.
    """

    def __init__(self, repos: dict[str, dict[str, Files]], refusals: dict[str, tuple[int, str | None]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos, self.refusals = repos, refusals
        self.private: set[str] = set()
        self.objects: dict[str, bytes] = {}
        self.drops: dict[str, int] = {}
        self.refused: str | None = None
        self.seen: list[str] = []
        self.tokens: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.server.seen.append(f"{self.command} {unquote(path)}")
        self.server.tokens.add(self.headers["Authorization"])
        parts = path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        repo, rest = "/".join(parts[2:4] if api else parts[:2]), parts[4:] if api else parts[2:]
        status, code = self.server.refusals.get(repo, (200, None))
        if status == 0:
            self.close_connection = True
        elif status == 401 or status > 499 or (status > 399 and not api):
            self.answer(status, code)
        elif repo not in self.server.repos:
            self.answer(404, "RepoNotFound")
        elif repo in self.server.private and not self.known():
            self.answer(401, "RepoNotFound")
        else:
            self.repository(self.server.repos[repo], repo, rest or ["revision", "main"])

    do_HEAD = do_GET

    def known(self) -> bool:
        """Whether the request brings the token."""
        return self.headers["Authorization"] == f"Bearer {TOKEN}"

    def do_POST(self) -> None:
        path, content = self.received()
        if content is None:
            return None
        parts = path.strip("/").split("/")
        if path == "/api/validate-yaml":
            return self.validate(json.loads(content)["content"])
        if not self.known():
            return self.answer(401)
        if path == "/api/repos/create":
            return self.create(json.loads(content))
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.batch(json.loads(content)["objects"])
        repo = "/".join(parts[2:4])
        files = self.server.repos[repo][parts[5]]
        return self.preupload(files, content) if parts[4] == "preupload" else self.commit(repo, files, content)

    def do_PUT(self) -> None:
        path, content = self.received()
        if content is not None:
            assert hashlib.sha256(content).hexdigest() == path.rpartition("/")[2]
            self.server.objects[path.rpartition("/")[2]] = content
            self.answer(200)

    def received(self) -> tuple[str, bytes | None]:
        """Path and body of a request; None where its connection is dropped."""
        path = unquote(urlsplit(self.path).path)
        self.server.seen.append(f"{self.command} {path}")
        content = self.rfile.read(int(self.headers["Content-Length"] or 0))
        for key, left in self.server.drops.items():
            method, _, part = key.partition(" ")
            if left and method == self.command and part in path:
                self.server.drops[key] -= 1
                self.close_connection = True
                return path, None
        return path, content

    def create(self, asked: dict) -> None:
        """A repository with the one file that a new one has."""
        repo = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] == "stranger":
            return self.answer(403)
        if repo in self.server.repos:
            return self.answer(409, body={"url": f"{self.server.url}/{repo}"})
        self.server.repos[repo] = {"main": {".gitattributes": b"*.safetensors filter=lfs"}}
        self.server.private |= {repo} if asked["visibility"] == "private" else set()
        return self.answer(200, body={"url": f"{self.server.url}/{repo}"})

    def validate(self, card: str) -> None:
        """The Hub's rules that a card is in danger of breaking."""
        data = yaml.safe_load(card.split("---\n")[1])
        named = [data["base_model"], *data.get("datasets", [])]
        wrong = [f'"{name}" is not a valid id' for name in named if _no_id(name) or name == self.server.refused]
        tests = [part for model in data["model-index"] for part in model["results"]]
        wrong += [f"no type in {part}" for part in tests if not (part["task"]["type"] and part["dataset"]["type"])]
        self.answer(400 if wrong else 200, body={"errors": [{"message": text} for text in wrong], "warnings": []})

    def preupload(self, files: Files, content: bytes) -> None:
        answers = []
        for file in json.loads(content)["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith(LARGE) else "regular"
            answer = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            answers.append(answer | ({"oid": _remote_oid(files[path], mode)} if path in files else {}))
        self.answer(200, body={"files": answers})

    def batch(self, wanted: list[dict]) -> None:
        objects = []
        for item in wanted:
            upload = {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}"}}
            objects.append(item | ({} if item["oid"] in self.server.objects else {"actions": upload}))
        self.answer(200, body={"transfer": "basic", "objects": objects})

    def commit(self, repo: str, files: Files, content: bytes) -> None:
        for line in content.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        self.answer(200, body={"commitUrl": f"{self.server.url}/{repo}/commit/1", "commitOid": "1" * 40})

    def repository(self, revisions: dict[str, Files], repo: str, rest: list[str]) -> None:
        """revision/R, tree/R or resolve/R/path of a repository; R is a name or a commit."""
        commits = {hashlib.sha1(f"{repo} {name}".encode()).hexdigest(): name for name in revisions}
        asked = unquote(rest[1])
        commit = next((commit for commit, name in commits.items() if asked in (commit, name)), None)
        if commit is None:
            return self.answer(404, "RevisionNotFound")
        files = revisions[commits[commit]]
        if rest[0] == "revision":
            siblings = [{"rfilename": name} for name in files]
            body = {"id": repo, "sha": commit, "siblings": siblings, "private": repo in self.server.private}
            return self.answer(200, body=body, commit=commit)
        if rest[0] == "tree":
            entries = [{"type": "file", "path": n, "size": len(f), "oid": _oid(f)} for n, f in files.items()]
            return self.answer(200, body=entries, commit=commit)
        name = unquote("/".join(rest[2:]))
        if name not in files:
            return self.answer(404, "EntryNotFound", commit=commit)
        return self.answer(200, body=files[name], commit=commit)

    def answer(self, status: int, code: str | None = None, body: object = b"", commit: str | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        headers = {"Content-Length": len(content), "ETag": f'"{_oid(content)}"', "X-Repo-Commit": commit}
        for name, value in (headers | {"X-Error-Code": code}).items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _no_id(name: str) -> bool:
    return name.count("/") > 1 or name[0] in "./~"


def _remote_oid(content: bytes, mode: str) -> str:
    """What the Hub calls a stored file: git's hash, or LFS's."""
    if mode == "lfs":
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serving(repos, refusals=None) -> Iterator[HubServer]:
    """A running server, stopped at the end of the block."""
    with HubServer(repos, refusals or {}) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def run_with_hub(url, home, program, *arguments, offline=False) -> subprocess.CompletedProcess:
    """Run a Python program whose huggingface_hub talks to `url`, caches in `home` and has a token."""
    settings = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline)), "HF_TOKEN": TOKEN}
    switches = dict.fromkeys(("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_TELEMETRY"), "1")
    command = [sys.executable, "-c", program, *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")} | settings | switches
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
