"""What an inspection has found so far; every room mate adds to it, none stops at the first fault."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from schemas import results
from schemas.errors import Damaged, Fault, NoResources, StageError, Stale, Stopped, Untrusted
from schemas.manifest import FileRecord, Manifest
from stages.contract.digests import sha256_file
from stages.contract.job import Job
from stages.inspection.depth import Depth
from stages.training.control import who_trains

Artifact = tuple[Manifest, Path]
Chain = dict[str, Artifact]
# What is told first, and decides the exit code: damage, then trust, then lineage.
ORDER = (Damaged, Untrusted, Stale)
# In the run folder, written anew while training goes on.
LIVE = (results.METRICS, results.CURVES, results.PREVIEWS, results.LATEST_PREVIEW)


@dataclass
class Inspection:
    """The findings about one run. An error of kind `Stale` is lineage, `Untrusted` trust, any other is damage."""

    job: Job
    depth: Depth
    checked: int = 0
    errors: list[tuple[type[StageError], Fault]] = field(default_factory=list[tuple[type[StageError], Fault]])
    hints: list[Fault] = field(default_factory=list[Fault])
    not_checked: list[str] = field(default_factory=list[str])
    recomputed: dict[str, int] = field(default_factory=dict[str, int])
    unsound: set[Path] = field(default_factory=set[Path])

    def error(self, kind: type[StageError], code: str, what: str, where: Path | str, fix: str) -> None:
        """Note something wrong."""
        if isinstance(where, Path):
            self.unsound.add(where)
        self.errors.append((kind, Fault(code=code, what=what, where=str(where), fix=fix)))

    def failed(self, error: StageError) -> None:
        """Note what looking at something raised."""
        self.errors += [(type(error), fault.given(self.job.command_line)) for fault in error.faults]

    @contextmanager
    def noting(self) -> Generator[None]:
        """Note what the body raises, and go on; a stop ends it all."""
        try:
            yield
        except Stopped:
            raise
        except StageError as error:
            self.failed(error)

    def hint(self, code: str, what: str, fix: str) -> None:
        """Note something worth knowing."""
        self.hints.append(Fault(code=code, what=what, fix=fix))

    def count_again(self, kind: str, outcome: str, count: int = 1) -> None:
        """Count what was made again: equal to the bit, close as another backend's, or another."""
        name = f"{kind}_{outcome}"
        self.recomputed[name] = self.recomputed.get(name, 0) + count

    def leave_out(self, what: str) -> None:
        """Note what is not looked at."""
        if what not in self.not_checked:
            self.not_checked.append(what)

    def file(self, path: Path, entry: FileRecord, name: str, fix: str) -> bool:
        """Check one file: there, a regular file, its size, its bytes as far as the depth reads them.

        `name` decides whether a subset holds it. Returns whether it is as it should be.
        """
        self.checked += 1
        if not path.is_file() or path.is_symlink():
            self.error(Damaged, "file.missing", "a file is missing", path, fix)
        elif path.stat().st_size != entry.size:
            what = f"a file has another size: expected {entry.size} bytes, found {path.stat().st_size}"
            self.error(Damaged, "file.size", what, path, fix)
        elif not self.depth.reads(name):
            return True
        elif (found := content(path)) != entry.sha256:
            what = f"a file's bytes changed: expected sha256 {entry.sha256}, found {found}"
            self.error(Damaged, "file.changed", what, path, fix)
        else:
            return True
        return False

    def result(self, name: str, entry: FileRecord, stage: str) -> None:
        """Check a file of the run folder that `stage` puts there.

        Not one that a training under way writes as it goes: it is of that training then.
        """
        if name in LIVE and self.under_way:
            self.leave_out("what the training under way writes into the run folder")
        else:
            self.file(self.job.run_folder / name, entry, name, self.job.remedy(stage))

    @cached_property
    def under_way(self) -> bool:
        """Whether somebody trains in the run folder; where nobody can say, nobody does."""
        try:
            return who_trains(self.job.run_folder) is not None
        except NoResources:
            return False

    def sound(self, *paths: Path) -> bool:
        """Whether none of these files was found damaged: only then does it help to look into them."""
        return not self.unsound & set(paths)

    def sorted_errors(self) -> list[tuple[type[StageError], Fault]]:
        """Return the errors, each once though several looks met it, damage before trust before lineage."""
        return sorted(dict.fromkeys(self.errors), key=lambda each: ORDER.index(each[0]) if each[0] in ORDER else 0)


def content(path: Path) -> str:
    """Return the sha256 of a file, or in words why it has none."""
    try:
        return sha256_file(path)
    except OSError as error:
        return f"none: {error.strerror}"
