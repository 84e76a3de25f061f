"""What a stage that refuses to work tells of why: how much changed since the stage before it ran, and what first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from schemas.errors import StageError, Stale, Stopped
from stages.contract.job import Flags, Job
from stages.outlook.chain import look_ahead
from stages.outlook.changes import Change, why

MOST_NAMED = 3
OF_DATASET = ("picture", "caption", "mask")


def explained(error: Stale, job: Job) -> Stale:
    """Return `error` with what changed since `error.stage` ran, counted and named; as it is where that is not known.

    Nothing is written. The pictures' headers are read again: of a large dataset that takes its time. Raises Stopped.
    """
    if not error.stage:
        return error
    looking = replace(job, look_only=True, flags=Flags(), upstream={})
    try:
        with TemporaryDirectory() as aside:
            changes = why(looking, look_ahead(looking, Path(aside), error.stage), error.stage).changes
    except Stopped:
        raise
    except StageError:
        # The refusal stands, whatever else is wrong.
        return error
    if not changes:
        return error
    [fault] = error.faults
    told = Stale(
        fault.code, f"{fault.what}: {counted(changes)}", where=fault.where, why=named(changes), fix=fault.fix
    )
    told.stage = error.stage
    return told


def counted(changes: Sequence[Change]) -> str:
    """Return how many there are of each: `2 pictures added, 1 caption changed`."""
    counts = Counter((each.kind, _happened(each)) for each in changes)
    return ", ".join(f"{count} {kind}{'s' * (count > 1)} {done}" for (kind, done), count in counts.items())


def named(changes: Sequence[Change]) -> str:
    """Return the first of them by name: `eve.png added, ada.txt changed, and 4 more`."""
    first = [
        f"{each.name} {_happened(each)}" if each.kind in OF_DATASET else each.line() for each in changes[:MOST_NAMED]
    ]
    more = len(changes) - len(first)
    return ", ".join([*first, f"and {more} more"] if more else first)


def _happened(change: Change) -> str:
    """Return what happened to a thing: pictures come, go and get other names as well."""
    if change.kind == "picture" and change.old in ("there", "not there"):
        return change.new
    return "renamed" if change.kind == "picture" and change.old == change.name else "changed"
