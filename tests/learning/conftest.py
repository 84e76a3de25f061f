"""The studio, and LoRAs trained once for all tests of a worker."""

from __future__ import annotations

import tomllib
from collections.abc import Callable

import pytest

from tests.learning.studio import Studio, commonest_shape
from tests.learning.training import ENCODING, Sets, Trained, demo, trained
from tests.stages.project import Project

Teach = Callable[[Sets], Trained]


@pytest.fixture(scope="session")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    return Studio(tmp_path_factory.mktemp("studio") / "model")


@pytest.fixture(scope="session")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The demo before training; only to be copied."""
    project = demo(tmp_path_factory.mktemp("encoded") / "project")
    project.make(*ENCODING)
    return project


@pytest.fixture(scope="session")
def teach(encoded: Project, tmp_path_factory: pytest.TempPathFactory) -> Teach:
    """`teach(sets)` trains the demo with those settings changed, once."""
    known: dict[Sets, Trained] = {}

    def once(sets: Sets) -> Trained:
        if sets not in known:
            project = encoded.copy(tmp_path_factory.mktemp("taught") / "project")
            if any(setting.startswith("validate.") for setting in sets):
                project.make(*ENCODING, sets=sets)
            known[sets] = trained(project, sets)
        return known[sets]

    return once


@pytest.fixture(scope="session")
def shape(encoded: Project) -> str:
    """The shape that the demo's new word means."""
    settings = tomllib.loads(encoded.config.read_text())
    return commonest_shape(encoded.root / settings["validate"]["dataset"])
