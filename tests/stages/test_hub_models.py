"""A model from the hub's cache: which commit a run uses, and what it says when a branch has moved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from stages.flux2.micro import make_micro
from stages.stores import tensors
from stages.stores.tensors import Tensor
from tests.hub.server import FIRST, MODEL, SECOND
from tests.stages.project import Project, edit, listing, new_project

AUTOENCODER = "vae/diffusion_pytorch_model.safetensors"


class Cache:
    """The Hugging Face cache with one model in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / f"models--{MODEL.replace('/', '--')}"

    def place(self, commit: str, *, like: str | None = None) -> Path:
        """Put a commit there: a fresh model, or a copy of another commit."""
        target = self.folder / "snapshots" / commit
        if like is None:
            target.parent.mkdir(parents=True)
            make_micro(target)
        else:
            shutil.copytree(self.folder / "snapshots" / like, target)
        return target

    def point(self, commit: str) -> None:
        """Let the main branch stand for a commit."""
        (self.folder / "refs").mkdir(exist_ok=True)
        (self.folder / "refs" / "main").write_text(commit)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    cache = Cache(tmp_path / "hub")
    cache.place(FIRST)
    cache.point(FIRST)
    return cache


@pytest.fixture
def project(tmp_path: Path, cache: Cache) -> Project:
    project = new_project(tmp_path / "project")
    edit(project.config, "[run]\n", f'[model]\nsource = "{MODEL}"\n\n[run]\n')
    project.make("validate", "encode-latents")
    return project


def change(path: Path) -> None:
    file = tensors.load(path)
    name = "encoder.conv_in.bias"
    data = file.tensors[name].data.copy()
    data.reshape(-1)[0] = np.array(0.5, np.float32).view(np.uint32) >> 16 if data.dtype == np.uint16 else 0.5
    path.unlink()
    tensors.save(path, file.tensors | {name: Tensor(file.tensors[name].dtype, data)}, file.metadata)


def test_run_says_which_commit_it_uses(project: Project) -> None:
    note = json.loads((project.results / "model.json").read_text())
    assert note == {"source": MODEL, "revision": "main", "commit": FIRST}
    before = listing(project.results)
    assert project.run("encode-latents").status == "up to date"
    assert listing(project.results) == before


def test_branch_that_moved_to_other_weights_is_told_once_and_encoded_anew(project: Project, cache: Cache) -> None:
    change(cache.place(SECOND, like=FIRST) / AUTOENCODER)
    cache.point(SECOND)
    ran = project.run("encode-latents")
    assert (ran.status, ran.counts["encoded"]) == ("built", 4)
    assert f"warning: main of {MODEL} was {FIRST} when this run last used it, it is {SECOND} now" in ran.stderr
    assert f'model.revision = "{FIRST}"' in ran.stderr
    assert "warning" not in project.run("encode-latents").stderr


def test_branch_that_moved_to_the_same_weights_makes_nothing_anew(project: Project, cache: Cache) -> None:
    cache.place(SECOND, like=FIRST)
    cache.point(SECOND)
    ran = project.run("encode-latents")
    assert ran.status == "up to date"
    assert f"is {SECOND} now" in ran.stderr


def test_pinned_commit_stays_when_the_branch_moves(project: Project, cache: Cache) -> None:
    change(cache.place(SECOND, like=FIRST) / AUTOENCODER)
    cache.point(SECOND)
    ran = project.run("encode-latents", sets=(f'model.revision="{FIRST}"',))
    assert ran.status == "up to date"
    assert "warning" not in ran.stderr
