"""One unbroken training for all tests of this folder, and a fresh one for each that asks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training import corpus
from tests.training.runs import Run


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run without a stop; only to be looked at."""
    store = tmp_path_factory.mktemp("unbroken")
    run = Run(store, corpus.write(store))
    run.go()
    return run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path, corpus.write(tmp_path))
