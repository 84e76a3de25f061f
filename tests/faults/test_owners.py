"""Whose store it is: what others may have written is no base for anything, and nothing of ours is open to all."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.conftest import Measured
from tests.stages.project import MAKING, Project, listing, new_project

ROOT = Path(__file__).parents[2]
STRANGER = 12345
HELPERS = {
    "ema": ("--output", "smooth.safetensors"),
    "find-lr": ("--output", "chart.png"),
    "bundle": ("--output", "cat.zip"),
}
OPEN: dict[str, Callable[[Project], None]] = {
    "open to all": lambda project: project.store.chmod(0o777),
    "one kind open to all": lambda project: (project.store / "checkpoints").chmod(0o757),
    "a stranger's": lambda project: os.chown(project.store, STRANGER, -1),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = new_project(tmp_path_factory.mktemp("owners") / "project")
    project.make()
    return project


@pytest.mark.bar("L9")
@pytest.mark.parametrize("name", OPEN)
def test_store_that_others_can_write_to_is_refused_by_whoever_would_use_it(
    finished: Project, tmp_path: Path, name: str, measured: Measured
) -> None:
    if name == "a stranger's" and os.getuid() != 0:
        pytest.skip("only root gives folders away")
    project = finished.copy(tmp_path / "project")
    OPEN[name](project)
    before = listing(project.root)
    refused: list[str] = []
    for command in (*MAKING, *HELPERS, "repair"):
        ran = project.run(command, *HELPERS.get(command, ()))
        if (ran.code, ran.error) == (9, "trust.own_store") or (command == "repair" and ran.code == 9):
            refused.append(command)
            assert "chmod" in ran.stderr
            assert str(project.store) in ran.stderr
    measured("L9", f"{name}: {len(refused)} of {len(MAKING) + len(HELPERS) + 1} commands end with 9 and a remedy")
    assert refused == [*MAKING, *HELPERS, "repair"]
    assert listing(project.root) == before
    # As the remedy says.
    for folder in (project.store, project.store / "checkpoints"):
        folder.chmod(0o755)
        os.chown(folder, os.getuid(), -1)
    assert {ran.status for ran in project.make().values()} == {"up to date"}


def test_store_that_a_group_shares_is_used(finished: Project, tmp_path: Path) -> None:
    project = finished.copy(tmp_path / "project")
    for path in (project.store, *project.store.rglob("*")):
        path.chmod(0o775 if path.is_dir() else 0o664)
    assert {ran.status for ran in project.make().values()} == {"up to date"}
    assert project.run("verify", "--deep").code == 0


@pytest.mark.bar("L9")
@pytest.mark.parametrize(
    ("mask", "stages", "denied"),
    [
        pytest.param(0o000, (*MAKING, "verify"), 0o022, marks=pytest.mark.full),
        (0o000, ("validate", "encode-text", "encode-latents"), 0o022),
        (0o002, ("validate",), 0o002),
        (0o077, ("validate",), 0o077),
    ],
)
def test_what_is_made_is_never_open_to_all_whatever_the_mask(
    tmp_path: Path, mask: int, stages: tuple[str, ...], denied: int, measured: Measured
) -> None:
    project = new_project(tmp_path / "project")
    own = {path for path in project.root.rglob("*")}
    for stage in stages:
        line = [sys.executable, "-m", "stages", *project.arguments(stage)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        ran = subprocess.run(line, capture_output=True, text=True, check=False, env=environment, umask=mask)
        assert ran.returncode == 0, ran.stderr
        assert json.loads(ran.stdout)["error"] is None
    made = {path: stat.S_IMODE(path.lstat().st_mode) for path in project.root.rglob("*") if path not in own}
    loose = {str(path.relative_to(project.root)): oct(mode) for path, mode in made.items() if mode & denied}
    measured(
        "L9", f"umask {mask:03o}: {len(loose)} of {len(made)} files and folders more open than {denied:03o} allows"
    )
    assert loose == {}
    assert len(made) > 10
