"""What every stage of a run would do now, foreseen one after the other without doing any of it.

A stage whose artifact is whole is done. Of any other the tables and digests are foreseen into a folder aside, and the
stages after it are planned on those: so an edited caption is known to leave latents and pictures alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from schemas.errors import Damaged, Stale
from schemas.manifest import Manifest
from stages.contract.artifacts import Built, Plan, artifact_key, find, read_manifest, write_manifest
from stages.contract.job import Job
from stages.contract.runner import Foreseen, load_stage, whole
from stages.inspection.lineage import MAKERS


@dataclass(frozen=True)
class Outlook:
    """What one stage would do: `done` says that its artifact is whole; `counts` are those that a run would report.

    `manifest` and `folder` are those of the artifact, or foreseen.
    """

    plan: Plan
    done: bool
    counts: Mapping[str, int]
    manifest: Manifest
    folder: Path


Ahead = Mapping[str, Outlook]


def look_ahead(job: Job, aside: Path, last: str = MAKERS[-1]) -> dict[str, Outlook]:
    """Return the outlook of every stage up to `last`; what is foreseen lies in the folder `aside`.

    `job` must be one that only looks. Raises what planning a stage raises, but never Stale for a stage that has not
    run.
    """
    ahead: dict[str, Outlook] = {}
    for name in MAKERS[: MAKERS.index(last) + 1]:
        ahead[name] = _outlook(job, name, aside / name)
        job.upstream[name] = (ahead[name].manifest, ahead[name].folder)
    return ahead


def _outlook(job: Job, name: str, work: Path) -> Outlook:
    stage = load_stage(name)
    assert isinstance(stage, Foreseen)
    plan = stage.plan(job)
    key = artifact_key(name, stage.version, plan)
    if (found := whole(name, job, key)) is not None:
        return Outlook(plan, done=True, counts=stage.reused(found[0]), manifest=found[0], folder=found[1])
    work.mkdir(parents=True)
    built = stage.foresee(job, plan, work)
    before = _damaged(job, name, key)
    if before is not None:
        # Made again, it comes out as it was.
        built = Built(before.roles, built.counts)
    manifest = write_manifest(work, (name, stage.version, key), plan, built, {})
    return Outlook(plan, done=False, counts=built.counts, manifest=manifest, folder=work)


def _damaged(job: Job, name: str, key: str) -> Manifest | None:
    """Return the manifest of an artifact that is there but not whole."""
    folder = find(name, key, job.stores)
    try:
        return None if folder is None else read_manifest(folder)
    except (Damaged, Stale):
        return None
