"""The project whose inputs change, and the changes that several tests make."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from stages.flux2.micro import make_micro
from tests.stages.project import Project, draw, edit, new_project

FRAGMENTS = {"encode-latents": "latents", "encode-text": "embeddings"}
STAGES = ("validate", *FRAGMENTS, "train")
# The least that every stage has to do; a model of the project's own, whose files can be exchanged.
SMALL = {
    "steps = 4": "steps = 1",
    "checkpoint_every = 2": 'checkpoint_every = 1\ntargets = ["single_blocks.0.linear1"]',
    "\n[validate]": '\n[model]\nsource = "model"\n\n[validate]',
    "\n[preview]": "\n[preview]\nduring_training = false",
}
CAPTIONS = {"ada": "a [trigger] called ada,\nin two lines", "dot": "a [trigger] called D\u00e9d\u00e9"}
PICTURES, TEXTS = 4, 6
UP_TO_DATE = "up to date"

Change = Callable[[Project], object]


def new_trained_project(root: Path) -> Project:
    """Return a project that went through all stages up to train."""
    project = new_project(root)
    for name, caption in CAPTIONS.items():
        (project.pictures / f"{name}.txt").write_bytes(caption.encode())
    for old, new in SMALL.items():
        edit(project.config, old, new)
    make_micro(project.root / "model")
    ran = project.make(*STAGES)
    assert [ran[stage].counts["encoded"] for stage in FRAGMENTS] == [PICTURES, TEXTS]
    return project


def repainted(project: Project, name: str = "ada", color: tuple[int, int, int] = (99, 30, 30)) -> None:
    """Change a picture's pixels; its name, size and time stay."""
    path = project.pictures / f"{name}.png"
    kept, caption = path.stat(), path.with_suffix(".txt").read_bytes()
    draw(project.pictures, name, color)
    path.with_suffix(".txt").write_bytes(caption)
    os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (kept.st_size, kept.st_mtime_ns)


def recaptioned(name: str, change: Callable[[str], bytes]) -> Change:
    def change_it(project: Project) -> None:
        path = project.pictures / f"{name}.txt"
        before = path.read_bytes()
        path.write_bytes(change(before.decode()))
        assert path.read_bytes() != before

    return change_it


def renamed(project: Project, old: str = "ada", new: str = "zoe") -> None:
    (project.pictures / new).parent.mkdir(exist_ok=True)
    for suffix in ("png", "txt"):
        (project.pictures / f"{old}.{suffix}").rename(project.pictures / f"{new}.{suffix}")


def removed(project: Project, name: str = "bob") -> None:
    for suffix in ("png", "txt"):
        (project.pictures / f"{name}.{suffix}").unlink()
