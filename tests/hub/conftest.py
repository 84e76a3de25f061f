from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from stages.flux2.micro import make_micro
from stages.hub import transfer
from tests.hub.home import Fetch, address
from tests.hub.server import Files, Hub, files_of, serving


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("published") / "model"
    make_micro(folder)
    return {
        **files_of(folder),
        "flux-2-klein-base-4b.safetensors": b"the same weights once more",
        "text_encoder/pytorch_model.bin": b"a pickle",
        "README.md": b"# words",
    }


@pytest.fixture
def hub(published: Files) -> Iterator[Hub]:
    with serving(dict(published)) as server:
        yield server


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def fetch(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Fetch:
    address(hub.server_port, monkeypatch)
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(transfer, "PAUSE_SECONDS", 0.0)
    return Fetch(capfd)
