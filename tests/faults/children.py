"""Driving the zygote: a project at every point of its chain, and commands that fail in it as told."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from tests.faults.judge import STAGES
from tests.faults.zygote import Answer, Fault, Request
from tests.stages.project import Project, contents, draw, edit, new_project

HERE = Path(__file__).parent
MODELS = Path("store/models")
DIGESTS = Path("store/lookup/digests.sqlite")
# Digests of files younger than this are not remembered.
YOUNG_SECONDS = 2.1
NO_FAULT = Fault()
# The least that goes through every writer: few tensors, two checkpoints, a picture at each.
SMALL = {
    "steps = 4": "steps = 2",
    "size = 32\nsteps = 2": "size = 32\nsteps = 1",
    "checkpoint_every = 2": 'checkpoint_every = 1\ntargets = ["single_blocks.0.linear1"]',
    "resolutions = [32]": "resolutions = [32, 48]",
}
COMPILERS = ("cc", "gcc", "clang")


class NoShim(Exception):
    """The library that fails system calls cannot be had here; the text says why."""


def compiled(folder: Path, *more: str) -> Path:
    """Return the shim as a library; `more` is for the compiler. Raises NoShim."""
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if compiler is None or sys.platform != "linux":
        raise NoShim("failing system calls needs Linux and a C compiler")
    library = folder / "shim.so"
    subprocess.run(
        [compiler, "-O2", "-shared", "-fPIC", "-Wall", "-Werror", *more, "-o", library, HERE / "shim.c"],
        check=True,
    )
    return library


def scratch() -> Path:
    """Return a new folder, in memory where there is room: thousands of projects are made and thrown away."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 1 << 30
    return Path(tempfile.mkdtemp(prefix="flux2-lora-faults-", dir=memory if roomy else None)).resolve()


@dataclass
class Bench:
    """One project, put back to any point of its chain, and the process that runs commands in it.

    `root` never moves: locks are named by where the run is. `after[stage]` is the project as that stage left it when
    nothing failed, and `ran[stage]` what it said. `lent`: the model in the project is the spare one.
    """

    zygote: subprocess.Popen[bytes]
    folder: Path
    after: dict[str, Path] = field(default_factory=dict[str, Path])
    ran: dict[str, Answer] = field(default_factory=dict[str, Answer])
    lent: bool = False

    @property
    def root(self) -> Path:
        return self.folder / "project"

    @property
    def project(self) -> Project:
        return Project(self.root)

    @property
    def reference(self) -> Path:
        """The project after the whole chain."""
        return self.after[STAGES[-1]]

    def before(self, stage: str) -> Path:
        """Return the project as `stage` finds it."""
        place = STAGES.index(stage)
        return self.after[STAGES[place - 1]] if place else self.after["nothing"]

    def put(self, snapshot: Path) -> None:
        """Put the project back to a snapshot, its model the same files each time.

        Digests are remembered by inode and time: else a try would remember what another did not, in other calls.
        """
        models, spare = self.root / MODELS, self.folder / "spare models"
        if self.lent and models.is_dir():
            models.rename(spare)
        self.lent = (snapshot / MODELS).is_dir()
        if self.lent and not (spare.is_dir() and contents(spare) == contents(snapshot / MODELS)):
            shutil.rmtree(spare, ignore_errors=True)
            shutil.copytree(snapshot / MODELS, spare)
            time.sleep(YOUNG_SECONDS)
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(snapshot, self.root, ignore=shutil.ignore_patterns(MODELS.name))
        if self.lent:
            spare.rename(models)

    def keep(self, name: str) -> None:
        """Remember the project as it is."""
        shutil.copytree(self.root, self.folder / name)
        self.after[name] = self.folder / name

    def stage(self, name: str, fault: Fault = NO_FAULT, *more: str, script: str = "") -> Answer:
        """Run a stage, failing as told."""
        return self.ask(self.project.arguments(name, *more), fault, script)

    def ask(self, arguments: list[str], fault: Fault = NO_FAULT, script: str = "") -> Answer:
        assert self.zygote.stdin is not None
        assert self.zygote.stdout is not None
        request = Request(arguments, str(self.root), fault, script)
        self.zygote.stdin.write(msgspec.json.encode(request) + b"\n")
        self.zygote.stdin.flush()
        return msgspec.json.decode(self.zygote.stdout.readline(), type=Answer)


@contextmanager
def bench(*, library: bool) -> Iterator[Bench]:
    """Yield a bench whose children fail by the library, or else by Python; its chain has run once. Raises NoShim."""
    folder = scratch()
    try:
        preload = {"LD_PRELOAD": str(compiled(folder))} if library else {}
        (folder / "said").mkdir()
        with subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote", str(folder / "said")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=HERE.parents[1],
            env={**os.environ, **preload, "OPENBLAS_NUM_THREADS": "1", "MLX_DISABLE_COMPILE": "1"},
        ) as zygote:
            assert zygote.stdout is not None
            assert zygote.stdout.readline() == b"ready\n"
            made = Bench(zygote, folder)
            _run_chain(made)
            try:
                yield made
            finally:
                zygote.kill()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run_chain(bench: Bench) -> None:
    project = new_project(bench.root)
    # Two shapes: two fragments of latents.
    draw(project.pictures, "eve", (9, 99, 199), "a [trigger] called eve, and rather more of it")
    for old, new in SMALL.items():
        edit(project.config, old, new)
    bench.keep("nothing")
    for stage in STAGES:
        # As it will be found again and again: digests are remembered by inode and time, and a copy has its own.
        bench.put(bench.before(stage))
        if stage == "train":
            # What it reads was remembered before, as it mostly is: remembering is tried at the encoders.
            assert bench.stage(stage).code == 0
            shutil.copyfile(bench.root / DIGESTS, bench.before(stage) / DIGESTS)
            bench.put(bench.before(stage))
        bench.ran[stage] = bench.stage(stage)
        assert bench.ran[stage].code == 0, bench.ran[stage].err
        bench.keep(stage)


def result(answer: Answer) -> dict[str, Any]:
    """Return the object that a command printed; empty when it died before."""
    return json.loads(answer.out) if answer.out.startswith("{") else {}
