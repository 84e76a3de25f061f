"""This machine's side of a fetch: the command, and what the cache has afterwards."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from stages import cli
from tests.hub.server import FIRST, MODEL, Files, Hub, files_of

ROOT = Path(__file__).parents[2]
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Done:
    """What one command came to."""

    returncode: int
    stdout: str
    stderr: str


class Fetch:
    """Runs the command in this process, with the hub's address and this machine's cache where the test has them."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd

    def __call__(self, *arguments: str) -> Done:
        self._capfd.readouterr()
        code = cli.run(["fetch", *(arguments or (MODEL,))])
        out, err = self._capfd.readouterr()
        return Done(code, str(out), str(err))


def address(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub, which reads HF_ENDPOINT when it is imported, ask there."""
    endpoint = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )


def process(hub: Hub, home: Path, *line: str, **more: str) -> subprocess.Popen[str]:
    """Start Python in a process of its own with the hub's address and the cache in its environment."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))},
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(home),
        **more,
    }
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *line], env=environment, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)


def the_object(done: Done) -> dict[str, Any]:
    assert done.stdout.count("\n") == 1, done.stderr
    return json.loads(done.stdout)


def repository(home: Path) -> Path:
    return home / "hub" / f"models--{MODEL.replace('/', '--')}"


def in_cache(home: Path, commit: str = FIRST) -> Files:
    return files_of(repository(home) / "snapshots" / commit)


def wanted(files: Files) -> Files:
    return {path: data for path, data in files.items() if "/" in path and not path.endswith(".bin")} | {
        "model_index.json": files["model_index.json"]
    }


def blob(home: Path, data: bytes, suffix: str = "") -> Path:
    return repository(home) / "blobs" / f"{hashlib.sha256(data).hexdigest()}{suffix}"
