"""One finished run for all tests of this folder; each test that asks for `project` gets a copy of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.flux2.micro import make_micro
from tests.stages.project import Project, edit, new_project


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A run that went through all stages; only to be looked at."""
    project = new_project(tmp_path_factory.mktemp("finished") / "project")
    project.make()
    return project


@pytest.fixture(scope="session")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The same run before training; only to be copied."""
    project = new_project(tmp_path_factory.mktemp("encoded") / "project")
    project.make("validate", "encode-latents", "encode-text")
    return project


@pytest.fixture
def project(finished: Project, tmp_path: Path) -> Project:
    """A copy of the finished run."""
    return finished.copy(tmp_path / "project")


@pytest.fixture
def untrained(encoded: Project, tmp_path: Path) -> Project:
    """A copy of the run before training."""
    return encoded.copy(tmp_path / "project")


@pytest.fixture(scope="session")
def encoded_own_model(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A run before training whose model lies in a folder of its own; only to be copied."""
    project = new_project(tmp_path_factory.mktemp("own-model") / "project")
    edit(project.config, "[validate]", '[model]\nsource = "model"\n\n[validate]')
    make_micro(project.root / "model")
    project.make("validate", "encode-latents", "encode-text")
    return project


@pytest.fixture
def own_model(encoded_own_model: Project, tmp_path: Path) -> Project:
    """A copy of that run; its model is in model/."""
    return encoded_own_model.copy(tmp_path / "project")
