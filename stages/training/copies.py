"""Copies in the run folder of what lies in the store: a stored file is proved before it replaces anything."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

from schemas import results
from schemas.errors import Damaged, NoResources
from schemas.manifest import FileRecord
from stages.contract.artifacts import restore_file
from stages.contract.job import Job

MOST_NAMED = 5


def know_together(job: Job, paths: Iterable[Path]) -> None:
    """Hash those of `paths` that are there and not known yet, before they are asked for one by one.

    To remember a digest is a write to disk: a thousand by themselves take half a minute, together no time.
    """
    with suppress(OSError):
        job.digests.files([path for path in paths if path.is_file()])


def restore_proved(job: Job, source: Path, recorded: FileRecord, target: Path, stage: str) -> None:
    """Make `target` a copy of the stored file `source`, unless it is one already.

    Raises Damaged, naming the command that makes `stage` again, when the stored bytes are not the recorded ones; the
    target then stays as it is.
    """
    found = job.digests.files([source])[0] if source.is_file() else "no file"
    if found != recorded.sha256:
        raise Damaged(
            "file.changed",
            "a stored file is missing or its bytes changed",
            where=str(source),
            why=f"expected sha256 {recorded.sha256}, found {found}",
            fix=f"{job.remedy(stage)} --force",
        )
    restore_file(source, target, job.digests)


def copies_of_others(job: Job, trajectories: Collection[str]) -> str:
    """Return the names of the LoRAs beside a run's finished one that say they are of no such trajectory.

    Of many the first few, and "" of none. A file that says nothing, or cannot be read, is nobody's.
    """
    from stages.stores.tensors import read_header

    shown = [*job.run_folder.glob(results.checkpoint("*")), job.run_folder / results.ema(job.run)]
    found: list[str] = []
    for path in sorted(shown, key=lambda each: (len(each.name), each.name)):
        with suppress(Damaged, NoResources):
            said = read_header(path).metadata.get("trajectory") if path.is_file() else None
            if said is not None and said not in trajectories:
                found.append(path.name)
    more = [f"and {len(found) - MOST_NAMED} more"] if len(found) > MOST_NAMED else []
    return ", ".join([*found[:MOST_NAMED], *more])
