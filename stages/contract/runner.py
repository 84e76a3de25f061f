"""What a stage is, and the one way it runs: plan, look, lock, build aside, publish, point the run at it."""

from __future__ import annotations

import importlib
import time
from collections.abc import Collection, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import msgspec

from schemas.errors import BadConfig, Busy, Damaged, Fault, NoResources, Stale
from schemas.manifest import Manifest
from schemas.version import VERSION
from stages.contract.artifacts import (
    Built,
    Plan,
    artifact_key,
    damaged_files,
    find,
    read_manifest,
    read_receipt,
    write_manifest,
    write_receipt,
)
from stages.contract.digests import digest_of
from stages.contract.formats import require_format
from stages.contract.job import Job
from stages.contract.launch import launched_rank
from stages.contract.locks import hold, share
from stages.contract.places import require_writable
from stages.contract.publish import no_resources, publish_folder, sweep, sweep_siblings, workspace
from stages.contract.trust import adopt, require_own

STAGES = ("validate", "encode-latents", "encode-text", "train", "preview", "verify")
PACKAGES = ("mlx", "numpy", "pillow", "zarr", "pyarrow", "tokenizers")


class Stage(Protocol):
    """A stage: what it would make (cheap), how it makes it, and what it leaves in the run folder."""

    @property
    def name(self) -> str:
        """The word for it everywhere: command, receipt, folder in the store."""
        ...

    @property
    def version(self) -> int:
        """Raised whenever the same inputs give other bytes."""
        ...

    def plan(self, job: Job) -> Plan:
        """Return the keyed settings and inputs. Raises Stale when an input artifact is missing."""
        ...

    def build(self, job: Job, plan: Plan, work: Path) -> Built:
        """Write the artifact's files into `work`."""
        ...

    def reused(self, manifest: Manifest) -> Mapping[str, int]:
        """Return the counts of a run that found everything done."""
        ...

    def restore(self, job: Job, folder: Path, manifest: Manifest) -> None:
        """Put the results people look at into the run folder, where they are missing."""
        ...


@runtime_checkable
class Findings(Protocol):
    """A stage whose artifact lists what it found."""

    def findings(self, folder: Path) -> list[Fault]:
        """Return the findings that the artifact in `folder` lists."""
        ...


@runtime_checkable
class Parallel(Protocol):
    """A stage whose work several processes, launched together, share."""

    def follow(self, job: Job) -> None:
        """Do this process's part, as the first process asks, until nothing is left."""
        ...

    def dismiss(self) -> None:
        """Tell the other processes that nothing is left."""
        ...


@runtime_checkable
class Foreseen(Protocol):
    """A stage that says what building would come to, without a model and without writing into a store or a run."""

    def foresee(self, job: Job, plan: Plan, work: Path) -> Built:
        """Return what `build` would: what no store has yet counted, and its digests in roles unknown.

        The tables that stages after it look at are written into `work`, a folder of the caller's.
        """
        ...


@runtime_checkable
class Indexed(Protocol):
    """A stage whose roles follow from the tables in its artifact."""

    def roles_of(self, manifest: Manifest, folder: Path) -> Mapping[str, str]:
        """Return the digests of what later stages read, from the tables in `folder`. Raises Damaged."""
        ...


@runtime_checkable
class Encoder(Protocol):
    """A stage that encodes records, each by itself and under its own key.

    Nothing here depends on the configuration: an artifact is judged by its manifest and by `validated`, the artifact
    of validate that it was made from.
    """

    def expected(self, manifest: Manifest, validated: tuple[Manifest, Path]) -> dict[tuple[object, ...], str]:
        """Return the key of every record that the artifact must list, by what its index names it by."""
        ...

    def encode_again(
        self, job: Job, manifest: Manifest, validated: tuple[Manifest, Path], keys: Collection[str]
    ) -> Iterator[tuple[str, Any]]:
        """Yield (key, record as stored) of those of `keys` that need a model, encoded anew; write nothing."""
        ...


@runtime_checkable
class Gathered(Protocol):
    """A stage that can store what it made in fewer files, afterwards: while it works, a kill must cost little."""

    def scattered(self, job: Job, manifest: Manifest, folder: Path) -> bool:
        """Whether the artifact lies in so many files that they are a burden."""
        ...

    def gather(self, job: Job, manifest: Manifest, folder: Path) -> Manifest:
        """Store the artifact in fewer files and return its new manifest; called while nobody else uses the store."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What one run of a stage came to."""

    manifest: Manifest
    folder: Path
    counts: Mapping[str, int]
    seconds: float
    built: bool


def load_stage(name: str) -> Stage:
    """Return the stage of that name. Verbs are found by name, so that none imports another."""
    return importlib.import_module(f"stages.{name.replace('-', '_')}").STAGE


def upstream(job: Job, name: str) -> tuple[Manifest, Path]:
    """Return the manifest and folder of the artifact that `name` makes of the present inputs.

    Raises Stale, naming the command, when it has not been made: the inputs changed, or it never ran.
    """
    if name in job.upstream:
        return job.upstream[name]
    stage = load_stage(name)
    key = artifact_key(name, stage.version, stage.plan(job))
    folder = find(name, key, job.stores) or adopt(job, name, key)
    if folder is None:
        if read_receipt(job.run_folder, name) is None:
            raise Stale("input.missing", f"{name} has not run", where=job.run, fix=job.remedy(name))
        what = f"the inputs of {name} changed since it ran"
        raise Stale.since(name, "input.stale", what, where=job.run, fix=job.remedy(name))
    job.upstream[name] = (_read_whole(job, name, folder), folder)
    return job.upstream[name]


def _read_whole(job: Job, name: str, folder: Path) -> Manifest:
    """Return the manifest of an artifact whose own files are as they were written; its fragments prove themselves."""
    manifest = read_manifest(folder)
    own = msgspec.structs.replace(manifest, fragments={})
    if damaged := damaged_files(own, folder, job.stores, job.digests):
        raise Damaged(
            "file.changed",
            f"what {name} made is damaged",
            where=str(folder / damaged[0]),
            why=f"{len(damaged)} files are missing or their bytes changed",
            fix=job.remedy(name),
        )
    return manifest


def follow_stage(name: str, job: Job) -> None:
    """Run the stage in a process that another, launched with it, leads. Raises BadConfig where one is enough."""
    stage = None if name == "verify" else load_stage(name)
    if not isinstance(stage, Parallel):
        raise BadConfig(
            "processes.one",
            f"{name} runs as one process",
            why=f"this is number {launched_rank()} of several, counted from 0",
            fix=f"run it without mlx.launch: flux2-lora {name} ...",
        )
    stage.follow(job)


def run_stage(stage: Stage, job: Job) -> Outcome:
    """Run `stage` for `job`: nothing when its artifact is whole, else build and publish it."""
    started = time.monotonic()
    require_own(job.store)
    with no_resources(job.store):
        for store in job.stores:
            require_format(store)
    plan = stage.plan(job)
    key = artifact_key(stage.name, stage.version, plan)
    if job.flags.explain:
        _explain(stage, job, plan, key)
    # Shared by all stages at work; what clears the store away wants it alone.
    with share(store_lock(job.store), job.say):
        outcome = _run(stage, job, plan, key, started)
    return _gathered(stage, job, outcome, started) if outcome.built else outcome


def _gathered(stage: Stage, job: Job, outcome: Outcome, started: float) -> Outcome:
    """Let a stage store what it made in fewer files; where others are at work that is left to `gc --compact`."""
    if not isinstance(stage, Gathered) or not stage.scattered(job, outcome.manifest, outcome.folder):
        return outcome
    try:
        with hold(store_lock(job.store), wait=False, waiting=job.say):
            manifest = stage.gather(job, outcome.manifest, outcome.folder)
    except (Busy, NoResources) as error:
        job.warn(f"{error.faults[0].line()} ({stage.name} is done, in more files than it needs)")
        return outcome
    return replace(outcome, manifest=manifest, seconds=time.monotonic() - started)


@contextmanager
def reading(job: Job) -> Generator[None]:
    """Keep in place what lies in the store while a helper reads it. Raises Untrusted when others can write there."""
    require_own(job.store)
    with share(store_lock(job.store), job.say):
        yield


def store_lock(store: Path) -> Path:
    """Return the lock that keeps a store's content in place while anyone reads it."""
    return store / ".locks" / "store.lock"


def _run(stage: Stage, job: Job, plan: Plan, key: str, started: float) -> Outcome:
    done = None if job.flags.force else whole(stage.name, job, key)
    if done is None:
        with _locks(stage, job, key):
            # Another process may have made it while this one waited.
            done = None if job.flags.force else whole(stage.name, job, key)
            if done is None:
                return _build(stage, job, plan, key, started)
    manifest, folder = done
    # Of a process that died after publishing, nobody else would.
    sweep(job.store)
    _show(stage, job, folder, manifest)
    return Outcome(manifest, folder, stage.reused(manifest), time.monotonic() - started, built=False)


def _build(stage: Stage, job: Job, plan: Plan, key: str, started: float) -> Outcome:
    with no_resources(job.run_folder):
        # Not only when the work is done.
        require_writable(job.run_folder)
    with workspace(job.store) as space:
        work = space / "artifact"
        work.mkdir()
        built = stage.build(job, plan, work)
        if isinstance(stage, Encoder):
            _require_unmoved(stage, job, key)
        about = _provenance(started, built.device)
        manifest = write_manifest(work, (stage.name, stage.version, key), plan, built, about)
        folder = job.store / stage.name / key
        publish_folder(work, folder)
    _show(stage, job, folder, manifest)
    return Outcome(manifest, folder, built.counts, time.monotonic() - started, built=True)


def _show(stage: Stage, job: Job, folder: Path, manifest: Manifest) -> None:
    """Put the results into the run folder and point the run at the artifact; what dead processes left there goes."""
    with no_resources(job.run_folder):
        sweep_siblings(job.run_folder)
        stage.restore(job, folder, manifest)
        write_receipt(job.run_folder, manifest)


def _require_unmoved(stage: Stage, job: Job, key: str) -> None:
    """Raise Stale when what a stage reads changed while it worked. Its records stay, each under what was read."""
    if artifact_key(stage.name, stage.version, stage.plan(replace(job, upstream={}))) != key:
        raise Stale(
            "input.moving",
            f"what {stage.name} reads changed while it worked",
            where=job.run,
            fix="run the same command again",
        )


def _locks(stage: Stage, job: Job, key: str) -> ExitStack:
    """Take the run's lock for this stage (busy is an error), then the artifact's (shared work is waited for)."""
    run = digest_of("run-folder", str(job.run_folder.resolve()))[:16]
    folder = job.store / ".locks"
    with ExitStack() as taken:
        taken.enter_context(hold(folder / f"{stage.name}-{run}.lock", wait=job.flags.wait, waiting=job.say))
        taken.enter_context(hold(folder / f"{stage.name}-{key}.lock", wait=True, waiting=job.say))
        return taken.pop_all()


def whole(stage: str, job: Job, key: str) -> tuple[Manifest, Path] | None:
    """Return the artifact when it is complete; a damaged one is announced and made again."""
    folder = find(stage, key, job.stores) or adopt(job, stage, key)
    if folder is None:
        return None
    try:
        manifest = read_manifest(folder)
    except Damaged as error:
        job.warn(f"{error.faults[0].line()} (making it again)")
        return None
    # Of another's store, where it is only looked at, the fragments lie there too.
    stores = (*job.stores, folder.parent.parent)
    if damaged := damaged_files(manifest, folder, stores, job.digests):
        job.warn(f"{stage}: {len(damaged)} files are missing or damaged, first {damaged[0]}; making them again")
        return None
    return manifest, folder


def _explain(stage: Stage, job: Job, plan: Plan, key: str) -> None:
    receipt = read_receipt(job.run_folder, stage.name)
    job.say(f"{stage.name}: key {key}")
    if receipt is None:
        job.say("  this run has not made it before")
        return
    folder = find(stage.name, receipt.key, job.stores)
    if receipt.key == key or folder is None:
        job.say("  nothing changed" if receipt.key == key else "  what it was made from before is gone")
        return
    try:
        before = read_manifest(folder)
    except Damaged:
        job.say("  what it was made from before is damaged")
        return
    for line in differences(before.params, before.inputs, plan):
        job.say(f"  {line}")


def differences(params: Mapping[str, object], inputs: Mapping[str, object], plan: Plan) -> list[str]:
    """Return one line `name: old -> new` for each setting and input of `plan` that differs from those given."""
    old, new = flattened({**params, **inputs}), flattened({**plan.params, **plan.inputs})
    return [
        f"{name}: {_short(old.get(name, 'absent'))} -> {_short(new.get(name, 'absent'))}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]


def flattened(values: Mapping[str, object]) -> dict[str, object]:
    """Return nested tables as dotted names, everything as plain JSON values."""
    flat: dict[str, object] = {}
    for name, value in msgspec.to_builtins(values).items():
        if isinstance(value, dict):
            inner = flattened(cast("dict[str, object]", value))
            flat.update({f"{name}.{key}": each for key, each in inner.items()})
        else:
            flat[name] = list(cast("tuple[object, ...]", value)) if isinstance(value, tuple) else value
    return flat


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 48 else f"{text[:16]}..."


def _provenance(started: float, device: str) -> dict[str, str]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    about = {"flux2-lora": VERSION, "python": platform.python_version(), "platform": platform.platform(terse=True)}
    for package in PACKAGES:
        try:
            about[package] = version(package)
        except PackageNotFoundError:
            continue
    computed = {"device": device} if device else {}
    return {**about, **computed, "seconds": f"{time.monotonic() - started:.2f}"}
