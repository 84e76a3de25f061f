"""A small project on disk, and the stages run on it in this process exactly as the command line runs them."""

from __future__ import annotations

import contextlib
import io
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from stages.cli import run
from stages.stores.tensors import Tensor, load, save
from stages.training.loop import Line
from stages.training.recorder import Recorder

MAKING = ("validate", "encode-latents", "encode-text", "train", "preview")
SETTINGS = """
[run]
seed = 7

[validate]
dataset = "pictures"
trigger = "zorb"
resolutions = [32]

[train]
steps = 4
batch_size = 2
learning_rate = 1e-3
rank = 4
alpha = 4.0
checkpoint_every = 2
caption_dropout = 0.3
gradient_checkpointing = false

[preview]
prompts = ["a red [trigger]"]
size = 32
steps = 2
"""
COLORS = {"ada": (200, 30, 30), "bob": (30, 200, 30), "cyd": (30, 30, 200), "dot": (200, 200, 30)}

Listing = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Ran:
    """What one command came to: exit code, the object on stdout, the lines on stderr."""

    code: int
    result: dict[str, Any]
    stderr: str

    @property
    def status(self) -> str:
        return self.result["status"]

    @property
    def counts(self) -> dict[str, int]:
        return self.result["counts"]

    @property
    def folder(self) -> Path:
        return Path(self.result["path"])

    @property
    def error(self) -> str:
        return self.result["error"]["code"]


@dataclass(frozen=True)
class Project:
    """A folder with <name>.toml, pictures/, store/ and runs/<name>/."""

    root: Path
    name: str = "cat"

    @property
    def config(self) -> Path:
        return self.root / f"{self.name}.toml"

    @property
    def pictures(self) -> Path:
        return self.root / "pictures"

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def results(self) -> Path:
        return self.root / "runs" / self.name

    @property
    def lora(self) -> Path:
        return self.results / f"{self.name}.safetensors"

    def arguments(self, stage: str, *more: str) -> list[str]:
        places = {"--config": self.config, "--store": self.store, "--runs": self.root / "runs"}
        return [stage, *(str(part) for place in places.items() for part in place), "--json", *more]

    def run(self, stage: str, *more: str, sets: tuple[str, ...] = ()) -> Ran:
        """Run a stage, whatever comes of it; `sets` are assignments for --set."""
        return command(*self.arguments(stage, *more), *(part for each in sets for part in ("--set", each)))

    def make(self, *stages: str, sets: tuple[str, ...] = ()) -> dict[str, Ran]:
        """Run `stages` (unless named, all that make something) and expect each to end well."""
        ran = {stage: self.run(stage, sets=sets) for stage in stages or MAKING}
        for stage, each in ran.items():
            assert each.code == 0, f"{stage}: {each.stderr}"
        return ran

    def copy(self, root: Path) -> Project:
        shutil.copytree(self.root, root, dirs_exist_ok=True)
        return Project(root, self.name)


def command(*arguments: str) -> Ran:
    """Run a command line, `--json` among its arguments, whatever comes of it."""
    out, errors = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = run(arguments)
    out.seek(0)
    return Ran(code, msgspec.json.decode(out.read()), errors.getvalue())


def draw(folder: Path, name: str, color: tuple[int, int, int], caption: str = "") -> Path:
    """Put a picture of 48 x 48 with a spot of one colour into `folder`, and its caption; sizes in bytes are equal."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.full((48, 48, 3), 240, np.uint8)
    pixels[10:30, 16:40] = color
    Image.fromarray(pixels).save(folder / f"{name}.png", compress_level=0)
    (folder / f"{name}.txt").write_text(caption or f"a [trigger] called {name}")
    return folder / f"{name}.png"


def new_project(root: Path) -> Project:
    """Return a project of four pictures that has run nothing yet."""
    project = Project(root)
    for name, color in COLORS.items():
        draw(project.pictures, name, color)
    project.config.write_text(SETTINGS)
    return project


def edit(path: Path, old: str, new: str) -> None:
    """Replace a piece of a text file that is there exactly once."""
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def rows(path: Path) -> list[dict[str, Any]]:
    """Read a table as any other program would."""
    from pyarrow import parquet

    return parquet.read_table(path).to_pylist()


def listing(folder: Path, *leaving_out: str) -> Listing:
    """Return size and time of every file and folder below `folder`, but those `leaving_out`."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return {
        name: (path.stat().st_size, path.stat().st_mtime_ns)
        for name, path in paths.items()
        if not name.startswith(leaving_out)
    }


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below `folder`."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip(path: Path, at: float = 0.5) -> None:
    """Flip one bit of a file, at that share of its length."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    """Cut the last byte off a file."""
    path.write_bytes(path.read_bytes()[:-1])


def undefined(path: Path, name: str) -> None:
    """Write a model's file again with one of its tensors, a bfloat16 or a float32, all NaN."""
    file = load(path)
    path.unlink()
    before = file.tensors[name]
    nan = np.full_like(before.data, 0x7FC0 if before.dtype == "BF16" else np.nan)
    save(path, {**file.tensors, name: Tensor(before.dtype, nan)}, file.metadata)


def stop_after(step: int, number: signal.Signals, patch: pytest.MonkeyPatch) -> None:
    """Send this process a signal when the line of `step` has been written."""
    record = Recorder.line

    def line(recorder: Recorder, line: Line) -> None:
        record(recorder, line)
        if line["step"] == step:
            signal.raise_signal(number)

    patch.setattr(Recorder, "line", line)
