"""One invocation: the configuration, where things lie, and the flags that change no byte."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from schemas.errors import BadConfig
from schemas.manifest import Manifest
from schemas.run import Config
from stages.contract.config import is_folder, located
from stages.contract.digests import StatCache
from stages.contract.publish import make_folder, no_resources, refuse_link


@dataclass(frozen=True)
class Flags:
    """How to run; nothing here can change a result."""

    force: bool = False
    explain: bool = False
    wait: bool = False
    quiet: bool = False
    resume_only: bool = False
    quick: bool = False
    deep: bool = False
    subset: str = ""
    recompute: str = ""
    paranoid: bool = False
    profile: int = 0


def _silent(_: str) -> None:
    """Say nothing."""


def require_apart(pictures: Path, store: Path, runs: Path) -> None:
    """Raise BadConfig when results would lie among the pictures: each run would take them for new ones."""
    for option, place in (("--store", store), ("--runs", runs)):
        if place.resolve().is_relative_to(pictures.resolve()):
            raise BadConfig(
                "dataset.not_apart",
                "what is made would lie in the folder of pictures",
                where=f"{option} {place}",
                why=f"the pictures are all that {pictures.resolve()} holds",
                fix="move the pictures into a folder of their own, or name others with --store and --runs",
            )


@dataclass
class Job:
    """What a stage is given. `store` is ours and writable; `also` are read-only.

    `foreign` are other people's stores, of which only what the `allowed` signed is taken (stages/contract/trust.py).
    `given` is what the command line said of settings and places, to be said again in a remedy.

    With `look_only` nothing at all is written and no large file is read: what that leaves open has a digest that is
    unknown. `say` and `warn` take a line for the person; `upstream` remembers the artifacts this process has already
    found.
    """

    config: Config
    config_path: Path
    store: Path
    runs: Path
    also: tuple[Path, ...] = ()
    foreign: tuple[Path, ...] = ()
    allowed: Path | None = None
    given: tuple[str, ...] = ()
    look_only: bool = False
    flags: Flags = Flags()
    say: Callable[[str], None] = _silent
    warn: Callable[[str], None] = _silent
    upstream: dict[str, tuple[Manifest, Path]] = field(default_factory=dict[str, tuple[Manifest, Path]])

    @property
    def run(self) -> str:
        """The run's name: `[run].name`, or the configuration file's stem."""
        return self.config.run.name or self.config_path.stem

    @property
    def run_folder(self) -> Path:
        """Where the person finds the results. Raises BadConfig when it is a symlink."""
        folder = self.runs / self.run
        refuse_link(folder)
        return folder

    @property
    def base(self) -> Path:
        """The folder relative paths in the configuration start from."""
        return self.config_path.absolute().parent

    def located(self, name: str) -> Path:
        """Return where a path of the configuration leads."""
        return located(name, self.base)

    @property
    def dataset(self) -> Path:
        """The folder of pictures. Raises BadConfig when it does not exist, or what is made would lie in it."""
        folder = self.located(self.config.validate.dataset)
        if not is_folder(folder):
            raise BadConfig(
                "dataset.absent",
                "the dataset folder does not exist",
                where=str(folder),
                fix=f"correct validate.dataset in {self.config_path} (it is relative to that file)",
            )
        require_apart(folder, self.store, self.runs)
        return folder

    @property
    def stores(self) -> tuple[Path, ...]:
        """All stores to look in, ours first."""
        return (self.store, *self.also)

    @cached_property
    def digests(self) -> StatCache:
        """Digests of files that did not change since they were last read."""
        with no_resources(self.store):
            path = self.store / "lookup" / "digests.sqlite"
            if not self.look_only:
                make_folder(path.parent)
            return StatCache(path, paranoid=self.flags.paranoid, look_only=self.look_only)

    @property
    def command_line(self) -> str:
        """What the command line said of settings and places, for a shell."""
        return shlex.join(["--config", str(self.config_path), *self.given])

    def remedy(self, stage: str) -> str:
        """Return the command that runs `stage` with the same settings in the same places."""
        return f"flux2-lora {stage} {self.command_line}"
