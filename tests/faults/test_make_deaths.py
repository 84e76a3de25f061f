"""make and its recipe killed together, in any stage: asked again, it never takes half a thing for done."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.children import SMALL
from tests.faults.conftest import Measured
from tests.faults.judge import differences, half_published
from tests.stages.project import Project, edit, new_project

ROOT = Path(__file__).parents[2]
STAGES = ("validate", "encode-latents", "encode-text", "train", "preview", "verify")
SAMPLE = ("encode-text", "publishing")
SECONDS = 120
# What stands for the installed command: at the named moment it takes the whole process group with it, make too.
COMMAND = """#!{python}
import os, signal, sys

sys.path.insert(0, {root!r})
STAGE, MOMENT = os.environ["DIES"].split(":")
PLACES = {{"publishing": f"/store/{{STAGE}}/", "pointing at it": f"/{{STAGE}}.json"}}


def watch(event, arguments):
    if event == "os.rename" and PLACES.get(MOMENT, "/nowhere/") in str(arguments[1]):
        os.killpg(0, signal.SIGKILL)


if sys.argv[1] == STAGE:
    if MOMENT == "beginning":
        os.killpg(0, signal.SIGKILL)
    sys.addaudithook(watch)
from stages.cli import main

main()
"""
# verify publishes nothing: it points at what it found.
MOMENTS = {stage: ("beginning", "publishing", "pointing at it") for stage in STAGES} | {
    "verify": ("beginning", "pointing at it")
}
DEATHS = [(stage, moment) for stage in STAGES for moment in MOMENTS[stage]]
SAID = re.compile(r"^([a-z-]+): (built|up to date)", re.MULTILINE)

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


@dataclass(frozen=True)
class Made:
    """What make came to: its exit code (negative: the signal that killed it), and what each stage said."""

    code: int
    said: dict[str, str]
    output: str


@dataclass(frozen=True)
class Workshop:
    """The Makefile with a command that dies when told, and a project at every point of its chain."""

    folder: Path
    after: dict[str, Path]

    @property
    def project(self) -> Project:
        return Project(self.folder / "project")

    def put(self, stage: str) -> None:
        """Put the project back to how `stage` finds it."""
        shutil.rmtree(self.project.root, ignore_errors=True)
        before = ("nothing", *STAGES)[STAGES.index(stage)]
        shutil.copytree(self.after[before], self.project.root)

    def make(self, target: str, dies: str = ":") -> Made:
        """Run make in a process group of its own."""
        project = self.project
        places = {"RUN": project.config, "STORE": project.store, "RUNS": project.root / "runs"}
        line = ["make", target, *(f"{name}={path}" for name, path in places.items())]
        environment = {**os.environ, "DIES": dies, "OPENBLAS_NUM_THREADS": "1"}
        ran = subprocess.run(
            line, cwd=self.folder / "workshop", env=environment, capture_output=True, text=True, check=False,
            start_new_session=True, timeout=SECONDS,
        )  # fmt: skip
        return Made(ran.returncode, dict(SAID.findall(ran.stderr)), ran.stderr)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    folder = tmp_path_factory.mktemp("make")
    tools = folder / "workshop" / ".venv" / "bin"
    tools.mkdir(parents=True)
    for name in ("Makefile", "pipelines", "pyproject.toml"):
        (folder / "workshop" / name).symlink_to(ROOT / name)
    (tools / "flux2-lora").write_text(COMMAND.format(python=sys.executable, root=str(ROOT)))
    (tools / "flux2-lora").chmod(0o755)
    (tools.parent / "installed").touch()
    made = Workshop(folder, {"nothing": folder / "nothing"})
    project = new_project(made.project.root)
    for old, new in SMALL.items():
        edit(project.config, old, new)
    project.copy(made.after["nothing"])
    for stage in STAGES:
        assert project.run(stage, *(["--quick"] if stage == "verify" else [])).code == 0
        made.after[stage] = project.copy(folder / stage).root
    return made


@pytest.mark.bar("Q2")
@pytest.mark.parametrize(
    ("stage", "moment"),
    [pytest.param(*each, marks=[] if each == SAMPLE else [pytest.mark.full]) for each in DEATHS],
)
def test_make_killed_with_its_recipe_takes_nothing_half_for_done(
    workshop: Workshop, stage: str, moment: str, measured: Measured
) -> None:
    workshop.put(stage)
    died = workshop.make(stage, f"{stage}:{moment}")
    assert died.code == -signal.SIGKILL, died.output
    assert set(died.said.values()) <= {"up to date"}
    assert stage not in died.said
    root, reference = workshop.project.root, workshop.after[stage]
    half = half_published(root, reference)
    there = any((workshop.project.store / stage).glob("*/manifest.json"))
    again = workshop.make(stage)
    different = differences(root, reference)
    measured("Q2", f"make killed in {stage}, {moment}: then {again.said.get(stage)}, {len(different)} differences")
    assert half == []
    assert again.code == 0, again.output
    # Done is only what was published whole before the end came; verify looks every time.
    assert again.said[stage] == ("up to date" if there else "built")
    assert there == (moment == "pointing at it" and stage != "verify")
    assert different == []
    assert set(workshop.make(stage).said.values()) <= {"up to date", "built" if stage == "verify" else "up to date"}
