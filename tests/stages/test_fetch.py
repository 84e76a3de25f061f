"""fetch, against a server on this machine that speaks as much of the hub's protocol as a download needs."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

from stages.flux2.micro import make_micro

MODEL = "black-forest-labs/FLUX.2-klein-base-4B"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves one model's folder; `asked` lists the files that were downloaded."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder = folder
        self.asked: list[str] = []

    def files(self) -> list[str]:
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())


class Answer(BaseHTTPRequestHandler):
    """Answers the two questions a snapshot asks: which files there are, and each file."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlparse(self.path).path)
        if path.startswith(f"/api/models/{MODEL}/tree/"):
            tree = [self._entry(name) for name in self.server.files()]
            self._send(200, json.dumps(tree).encode(), {}, body=body)
        elif path.startswith(f"/api/models/{MODEL}"):
            siblings = [{"rfilename": name} for name in self.server.files()]
            self._send(200, json.dumps({"id": MODEL, "sha": COMMIT, "siblings": siblings}).encode(), {}, body=body)
        elif path.startswith(f"/{MODEL}/resolve/{COMMIT}/"):
            name = path.removeprefix(f"/{MODEL}/resolve/{COMMIT}/")
            data = (self.server.folder / name).read_bytes()
            if body:
                self.server.asked.append(name)
            etag = hashlib.sha256(data).hexdigest()
            self._send(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, body=body)
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body=body)

    def _entry(self, name: str) -> dict[str, object]:
        data = (self.server.folder / name).read_bytes()
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def _send(self, status: int, data: bytes, headers: dict[str, str], *, body: bool) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    make_micro(tmp_path / "published")
    (tmp_path / "published" / "flux-2-klein-base-4b.safetensors").write_bytes(b"the same weights once more")
    server = Hub(tmp_path / "published")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def fetch(hub: Hub, home: Path, model: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-m", "stages", "fetch", model]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_a_model_by_its_short_name_lands_in_the_cache_and_opens(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from schemas.run import Model
    from stages.flux2.folder import open_model

    done = fetch(hub, tmp_path / "home", "klein-base-4b")
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    model = open_model(Model(source=MODEL), tmp_path, lambda name: tmp_path / name)
    published = hub.folder / "transformer" / "diffusion_pytorch_model.safetensors"
    assert model.transformer[0].read_bytes() == published.read_bytes()


def test_only_what_the_stages_read_is_downloaded_and_only_once(hub: Hub, tmp_path: Path) -> None:
    fetch(hub, tmp_path / "home", MODEL)
    wanted = [name for name in hub.files() if name != "flux-2-klein-base-4b.safetensors"]
    assert sorted(hub.asked) == wanted
    assert fetch(hub, tmp_path / "home", MODEL).returncode == 0
    assert sorted(hub.asked) == wanted


def test_an_unknown_model_and_an_absent_hub_are_errors_with_a_remedy(hub: Hub, tmp_path: Path) -> None:
    unknown = fetch(hub, tmp_path / "home", "someone/nothing")
    assert unknown.returncode == 7
    assert unknown.stderr.startswith("error[fetch.unknown]")
    hub.server_port = 9  # nobody answers there
    absent = fetch(hub, tmp_path / "home", MODEL)
    assert absent.returncode == 7
    assert absent.stderr.startswith("error[fetch.failed]")
    assert "fix: run it again" in absent.stderr
