"""A trained project, made once for the tests of a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.staleness.changes import new_trained_project
from tests.stages.project import Project


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project that is trained; only to be copied."""
    return new_trained_project(tmp_path_factory.mktemp("staleness") / "project")


@pytest.fixture
def project(finished: Project, tmp_path: Path) -> Project:
    """A copy of its own for each test."""
    return finished.copy(tmp_path / "project")
