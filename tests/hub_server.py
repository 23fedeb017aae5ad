"""A Hub on the loopback: the few endpoints that downloading a snapshot of a model repository needs."""

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

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"

Files = dict[str, bytes]


class HubServer(ThreadingHTTPServer):
    """repos: {owner/name: {revision: {path: content}}}. refusals: {owner/name: (status, X-Error-Code)} for its files,
    or for everything with status 401 and above 499; status 0 drops the connection. seen: "METHOD path" of each request.
    """

    def __init__(self, repos: dict[str, dict[str, Files]], refusals: dict[str, tuple[int, str | None]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos, self.refusals = repos, refusals
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
        else:
            self.repository(self.server.repos[repo], repo, rest)

    do_HEAD = do_GET

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
            return self.answer(200, body={"id": repo, "sha": commit, "siblings": siblings}, commit=commit)
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
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


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
