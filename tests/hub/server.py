"""A server on this machine that speaks as much of the hub's protocol as fetching a model needs, faults included."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

MODEL = "black-forest-labs/FLUX.2-klein-base-4B"
FIRST, SECOND = "1" * 40, "2" * 40
# As on the hub, larger files are kept apart: the answer leads to another host, and their digest is sha256.
LARGE_BYTES = 4096
RANGE = re.compile(r"bytes=(\d+)-")

Files = dict[str, bytes]


def files_of(folder: Path) -> Files:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub(ThreadingHTTPServer):
    """Serves the commits of one model.

    `asked` lists the downloads as (path, first byte asked for). Faults: `cuts` ends an answer after that many bytes,
    once a number; `sends` has other bytes in place of a file's; `lacks` are files that are listed and not there;
    `licensed` are the tokens that may download; `refusals` are (status, message) of the next answers about files;
    `listing` is what is said in place of the list.
    """

    def __init__(self, files: Files) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.commits = {FIRST: files}
        self.refs = {"main": FIRST}
        self.asked: list[tuple[str, int]] = []
        self.tokens: list[tuple[str, str | None]] = []
        self.cuts: dict[str, list[int]] = {}
        self.sends: Files = {}
        self.lacks: set[str] = set()
        self.licensed: set[str] | None = None
        self.refusals: list[tuple[int, str]] = []
        self.listing: bytes | None = None
        self.ranges = True
        self.after_listing: list[tuple[str, str]] = []

    @property
    def paths(self) -> list[str]:
        """The files that were downloaded, whole or in part."""
        return sorted({path for path, _ in self.asked})


class Answer(BaseHTTPRequestHandler):
    """Answers which files a revision has, and each file of a commit."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        if found := re.fullmatch(rf"/api/models/{re.escape(MODEL)}(?:/revision/(.+))?", path):
            self._list(found[1] or "main")
        elif found := re.fullmatch(rf"/{re.escape(MODEL)}/resolve/([0-9a-f]{{40}})/(.+)", path):
            self._resolve(found[1], found[2])
        elif found := re.fullmatch(r"/elsewhere/([0-9a-f]{40})/(.+)", path):
            self.server.tokens.append((found[2], self.headers["Authorization"]))
            self._send_file(found[1], found[2])
        else:
            self._refuse(404, "RepoNotFound")

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _list(self, revision: str) -> None:
        commit = self.server.refs.get(revision, revision)
        if commit not in self.server.commits:
            self._refuse(404, "RevisionNotFound")
            return
        if self.server.listing is not None:
            self._send(self.server.listing)
            return
        siblings = [_listed(path, data) for path, data in self.server.commits[commit].items()]
        self._send(json.dumps({"id": MODEL, "sha": commit, "siblings": siblings}).encode())
        # What happens on the hub between the question and the downloads.
        self.server.refs.update(self.server.after_listing)

    def _resolve(self, commit: str, path: str) -> None:
        token = self.headers["Authorization"]
        data = self.server.commits[commit].get(path)
        if self.server.refusals:
            return self._refuse(self.server.refusals[0][0], "", self.server.refusals.pop(0)[1])
        if self.server.licensed is not None and (token or "").removeprefix("Bearer ") not in self.server.licensed:
            return self._refuse(403 if token else 401, "GatedRepo")
        if data is None or path in self.server.lacks:
            return self._refuse(404, "EntryNotFound")
        if len(data) < LARGE_BYTES:
            return self._send_file(commit, path)
        # Another name of this machine is another host.
        self.send_response(302)
        self.send_header("Location", f"http://localhost:{self.server.server_port}/elsewhere/{commit}/{path}")
        self.send_header("Content-Length", "0")
        return self.end_headers()

    def _send_file(self, commit: str, path: str) -> None:
        data = self.server.sends.get(path, self.server.commits[commit][path])
        found = RANGE.fullmatch(self.headers["Range"] or "")
        start = int(found[1]) if found else 0
        self.server.asked.append((path, start))
        if not self.server.ranges:
            found, start = None, 0
        cut = self.server.cuts[path].pop(0) if self.server.cuts.get(path) else None
        self.send_response(206 if found else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start:][:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True

    def _send(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refuse(self, status: int, code: str, message: str = "") -> None:
        self.send_response(status)
        for name, value in (("X-Error-Code", code), ("X-Error-Message", message)):
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _listed(path: str, data: bytes) -> dict[str, object]:
    listed: dict[str, object] = {"rfilename": path, "size": len(data), "blobId": git_sha1(data)}
    if len(data) >= LARGE_BYTES:
        listed["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return listed


@contextmanager
def serving(files: Files) -> Iterator[Hub]:
    """Yield a server with a first commit of these files."""
    server = Hub(files)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
