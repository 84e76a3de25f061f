"""What may not be written or read, or does not fit: said before any model is loaded, by path, with a remedy."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.conftest import Measured
from tests.faults.judge import STAGES
from tests.stages.project import Project, Ran, contents, new_project

ROOT = Path(__file__).parents[2]
# Root may do anything, unless it gives that up.
ORDINARY = ("setpriv", "--bounding-set=-all", "--inh-caps=-all") if os.getuid() == 0 else ()
REJECTED, RESOURCES = 3, 7
MOST_SECONDS = 2.0
FREE_BYTES = 1000
# What asking leaves behind: locks, digests of what was read, the built-in model.
LOOKING = ("store/.locks", "store/.tmp", "store/lookup", "store/models")
LOADERS = ("load_autoencoder", "load_text_encoder", "load_transformer")

ordinary_only = pytest.mark.skipif(
    bool(ORDINARY) and shutil.which("setpriv") is None, reason="root cannot give up its rights here"
)


def ordinary(project: Project, command: str, *more: str) -> Ran:
    """Run a command as one who is bound to permissions."""
    line = [*ORDINARY, sys.executable, "-m", "stages", *project.arguments(command, *more)]
    ran = subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT)
    return Ran(ran.returncode, json.loads(ran.stdout), ran.stderr)


@contextmanager
def without(rights: int, *paths: Path) -> Iterator[None]:
    """Take rights from files and folders, and give them back."""
    before = {path: path.stat().st_mode for path in paths}
    for path in reversed(before):
        path.chmod(before[path] & ~rights)
    try:
        yield
    finally:
        for path, old in before.items():
            path.chmod(old)


def folders(place: Path) -> list[Path]:
    return [place, *sorted(path for path in place.rglob("*") if path.is_dir())]


def kept(project: Project) -> dict[str, bytes]:
    return {name: data for name, data in contents(project.root).items() if not name.startswith(LOOKING)}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Project]:
    """The project as each stage finds it."""
    project, found = new_project(tmp_path_factory.mktemp("places") / "project"), dict[str, Project]()
    for stage in STAGES:
        found[stage] = project.copy(project.root.parent / stage)
        project.make(stage)
    return found


@ordinary_only
@pytest.mark.bar("B7")
@pytest.mark.parametrize("place", ["store", "runs"])
def test_place_that_may_not_be_written_is_named_before_any_work(
    chain: dict[str, Project], place: str, measured: Measured
) -> None:
    seconds: list[float] = []
    for stage, project in chain.items():
        folder = project.root / place
        folder.mkdir(exist_ok=True)
        before = kept(project)
        with without(0o222, *folders(folder)):
            ran = ordinary(project, stage)
        assert (ran.code, ran.error) == (RESOURCES, "disk.permission"), ran.stderr
        assert f"cannot write ({folder}" in ran.stderr
        assert kept(project) == before
        seconds.append(ran.result["seconds"])
    measured("B7", f"{place}: {len(seconds)} stages end with {RESOURCES}, in {max(seconds):.1f} s at most")
    assert max(seconds) < MOST_SECONDS


@ordinary_only
@pytest.mark.bar("B7")
def test_helper_that_may_not_write_says_so_before_any_work(chain: dict[str, Project], measured: Measured) -> None:
    project = chain["preview"]
    away = project.root / "away"
    away.mkdir()
    commands = {
        "ema": ("--output", f"{away}/smooth.safetensors"),
        "find-lr": ("--output", f"{away}/chart.png"),
        "bundle": ("--output", f"{away}/cat.zip"),
    }
    seconds: list[float] = []
    with without(0o222, away, project.store):
        for command, more in commands.items():
            ran = ordinary(project, command, *more)
            assert (ran.code, ran.error) == (RESOURCES, "disk.permission"), ran.stderr
            assert f"cannot write ({away}" in ran.stderr
            seconds.append(ran.result["seconds"])
        places = ["--store", str(project.store), "--runs", str(project.results.parent)]
        shutil.rmtree(project.store / ".locks")
        line = [*ORDINARY, sys.executable, "-m", "stages", "gc", "--delete", "--json", *places]
        collected = subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT)
    assert collected.returncode == RESOURCES, collected.stderr
    measured("B7", f"{len(seconds) + 1} helpers end with {RESOURCES}, in {max(seconds):.1f} s at most")
    assert max(seconds) < MOST_SECONDS


@ordinary_only
@pytest.mark.bar("B8")
def test_every_file_that_may_not_be_read_is_listed(chain: dict[str, Project], measured: Measured) -> None:
    project = chain["validate"]
    unread = [project.pictures / "ada.png", project.pictures / "bob.txt"]
    with without(0o777, *unread):
        ran = ordinary(project, "validate")
        skipped = ordinary(project, "validate", "--set", "validate.skip_bad=true")
    named = [each["where"] for each in ran.result["findings"]]
    measured("B8", f"exit {ran.code}, {len(named)} of {len(unread)} listed; the others are used with skip_bad")
    assert (ran.code, named) == (REJECTED, ["ada.png", "bob.txt"])
    assert (skipped.code, skipped.counts["accepted"]) == (0, 2)
    assert ordinary(project, "validate").code == 0


@ordinary_only
@pytest.mark.bar("B8")
@pytest.mark.parametrize("rights", [0o777, 0o444, 0o111])
def test_folder_of_pictures_that_may_not_be_read_is_named(
    chain: dict[str, Project], rights: int, measured: Measured
) -> None:
    project = chain["encode-latents"]
    with without(rights, project.pictures):
        ran = ordinary(project, "validate")
    measured("B8", f"folder without {rights:o}: exit {ran.code}, {ran.error}")
    assert (ran.code, ran.error) == (RESOURCES, "dataset.unreadable")
    assert str(project.pictures) in ran.stderr
    assert ordinary(project, "validate").status == "up to date"


@pytest.mark.bar("B6")
@pytest.mark.parametrize("stage", ["encode-latents", "encode-text", "train"])
def test_what_does_not_fit_is_refused_before_the_model_is_loaded(
    chain: dict[str, Project], stage: str, monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    project = chain[stage]
    before = kept(project)

    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    for name in LOADERS:
        monkeypatch.setattr(f"stages.flux2.load.{name}", loaded)
    monkeypatch.setattr("stages.contract.places.free_bytes", lambda _: FREE_BYTES)
    ran = project.run(stage)
    measured("B6", f"{stage}: exit {ran.code}, {ran.result['error']['what']}")
    assert (ran.code, ran.error) == (RESOURCES, "disk.full")
    assert ran.result["error"]["what"].startswith("need about ")
    assert kept(project) == before
