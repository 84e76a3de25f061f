"""fetch: bring a model's files from the Hugging Face hub into its cache; the only command that opens a socket.

A branch or tag is resolved to a commit once, and every file is that commit's. What is there is checked, what is
missing is loaded, and only then does the branch stand for the commit: no stage ever opens half a model.
"""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Sequence
from fnmatch import fnmatchcase

import click
import msgspec

from schemas.errors import BadConfig, Damaged, NoResources, Stopped
from schemas.manifest import Result
from stages.console import messages
from stages.console.invocation import shared
from stages.console.progress import Progress, progress
from stages.contract.digests import StatCache
from stages.contract.locks import hold
from stages.contract.publish import make_folder, no_resources, write_file
from stages.flux2 import configs
from stages.flux2.variants import MICRO, VARIANTS
from stages.hub import cache
from stages.hub.cache import Snapshot
from stages.hub.listing import File, Published, explained, look_up
from stages.hub.transfer import keep, load, partial_bytes, present

INDEX = "model_index.json"
# The parts that the stages read; the single-file copy of the transformer at the root would be 8 to 60 GB for nothing.
PATTERNS = (INDEX, "transformer/*", "vae/*", "text_encoder/*", "tokenizer/*", "scheduler/*")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5")
ON_THE_HUB = {name: row.hub_id for name, row in VARIANTS.items() if row.hub_id}
MEGABYTE = 10**6
HELP = f"""Bring a model's files into the Hugging Face cache; what is there already is checked and not loaded again.

MODEL is one of {", ".join(ON_THE_HUB)}, or ORG/NAME of the hub. Stopped at any moment, the same command goes on
where it stopped.

\b
Example:
  flux2-lora fetch klein-base-4b
"""


class Meter:
    """Counts bytes on a bar that shows megabytes."""

    def __init__(self, bar: Progress, done: int = 0) -> None:
        self._bar = bar
        self._done = done

    def add(self, count: int, path: str) -> None:
        """Count bytes of a file that came or, below zero, were thrown away."""
        self._done += count
        self._bar.advance(self._done // MEGABYTE - self._bar.done, note=path)


def hub_id(model: str) -> str:
    """Return the hub's name of a model given by it or by ours. Raises BadConfig for anything else."""
    if model in ON_THE_HUB:
        return ON_THE_HUB[model]
    if cache.HUB_ID.fullmatch(model):
        return model
    what = "this model is built in, there is nothing to fetch" if model == MICRO.name else "no such model"
    raise BadConfig("fetch.name", what, where=model, fix=f"name one of {', '.join(ON_THE_HUB)}, or ORG/NAME")


def is_wanted(path: str) -> bool:
    """Whether a stage, or another program that opens the model's folder, reads that file."""
    return any(fnmatchcase(path, pattern) for pattern in PATTERNS) and not path.endswith(PICKLES)


def absent_files(published: Published, snapshot: Snapshot, *, quiet: bool) -> list[File]:
    """Return the files that are not in the cache with the published bytes; others in their place are thrown away."""
    digests = StatCache(snapshot.root / "digests.sqlite")
    there = {file: path for file in published.files if (path := present(snapshot, file)) is not None}
    absent = set(published.files) - there.keys()
    total = sum(file.size for file in there) // MEGABYTE
    with progress("check", total=total, unit="MB", quiet=quiet or not there) as bar:
        meter = Meter(bar)
        for file, path in there.items():
            if not keep(snapshot, file, path, digests):
                absent.add(file)
                messages.warn(f"{file.path} is not what the hub publishes: it is loaded again")
            meter.add(file.size, file.path)
    return [file for file in published.files if file in absent]


def require_space(absent: Sequence[File], snapshot: Snapshot) -> None:
    """Raise NoResources unless what is still to come fits on the disk."""
    missing_bytes = sum(file.size - partial_bytes(snapshot, file) for file in absent)
    free_bytes = shutil.disk_usage(snapshot.root).free
    if missing_bytes > free_bytes:
        raise NoResources(
            "fetch.disk",
            "the model does not fit on this disk",
            where=str(snapshot.root),
            why=f"{missing_bytes / 1e9:.3f} GB are still to come, {free_bytes / 1e9:.3f} GB are free",
            fix="free some space, or set HF_HUB_CACHE to a folder on a larger disk",
        )


def load_all(published: Published, absent: Sequence[File], snapshot: Snapshot, *, quiet: bool) -> None:
    """Load the absent files, small ones first. Raises what `load` raises, NoResources for another kind of model."""
    total = sum(file.size for file in published.files)
    done = total - sum(file.size - partial_bytes(snapshot, file) for file in absent)
    with progress("fetch", total=total // MEGABYTE, done=done // MEGABYTE, unit="MB", quiet=quiet) as bar:
        meter = Meter(bar, done)
        for file in absent:
            load(published, snapshot, file, lambda count, path=file.path: meter.add(count, path))
            if file.path == INDEX:
                require_flux2(published, snapshot)


def require_flux2(published: Published, snapshot: Snapshot) -> None:
    """Raise NoResources unless the repository is FLUX.2 in the layout of diffusers: before gigabytes are loaded."""
    why = f"it has no {INDEX}"
    if INDEX in {file.path for file in published.files}:
        try:
            configs.read_json(snapshot.folder / INDEX, configs.Pipeline)
            return
        except Damaged as error:
            why = error.faults[0].why
    raise NoResources(
        "fetch.layout",
        "this repository is no FLUX.2 model in the layout of diffusers",
        where=published.hub_id,
        why=why,
        fix=f"fetch one of {', '.join(ON_THE_HUB.values())}; name single files you have in [model]",
    )


def point(published: Published, snapshot: Snapshot, revision: str) -> None:
    """Let the branch or tag stand for the commit, whose files are whole; say so when it stood for another."""
    before = cache.commit_of(published.hub_id, revision)
    if before == published.commit:
        return
    write_file(snapshot.root / "refs" / revision, published.commit.encode())
    if before is not None:
        messages.warn(
            f"{revision} of {published.hub_id} was {before} and is {published.commit} now: runs that name it use the "
            f'new files. To stay with the old: model.revision = "{before}"'
        )


def bring(name: str, revision: str, *, quiet: bool) -> tuple[Snapshot, dict[str, int]]:
    """Have the model in the cache, whole and as published; return where it is and what was done."""
    published = look_up(name, revision, is_wanted)
    snapshot = Snapshot(cache.repository(name), published.commit)
    if INDEX not in {file.path for file in published.files}:
        require_flux2(published, snapshot)
    lock = snapshot.root.parent / ".locks" / f"{snapshot.root.name}.flux2-lora.lock"
    with no_resources(snapshot.root), hold(lock, wait=True, waiting=messages.say):
        make_folder(snapshot.root)
        absent = absent_files(published, snapshot, quiet=quiet)
        require_space(absent, snapshot)
        if absent:
            load_all(published, absent, snapshot, quiet=quiet)
        require_flux2(published, snapshot)
        point(published, snapshot, revision)
    counts = {"files": len(published.files), "loaded": len(absent), "reused": len(published.files) - len(absent)}
    return snapshot, counts


@shared("json", "quiet", "debug")
@click.command("fetch", help=HELP, context_settings={"max_content_width": 118, "show_default": True})
@click.argument("model")
@click.option("--revision", default=cache.MAIN, help="A branch, tag or commit.")
def COMMAND(model: str, revision: str, *, json: bool, quiet: bool) -> int:
    """Be the `fetch` command."""
    started = time.monotonic()
    messages.configure(quiet=quiet)
    name = hub_id(model)
    if not cache.is_path(revision):
        raise BadConfig("fetch.revision", "no name of a revision", where=revision, fix="a branch, tag or commit")
    try:
        with explained(name, revision):
            snapshot, counts = bring(name, revision, quiet=quiet)
    except KeyboardInterrupt as error:
        raise Stopped(
            signal.SIGINT, "stopped; what came so far is kept", fix="give the same command again"
        ) from error
    messages.say(f"{name} at {snapshot.commit}: {counts['loaded']} files loaded, {counts['reused']} were there")
    messages.say(str(snapshot.folder))
    if json:
        result = Result(
            stage="fetch",
            status="built" if counts["loaded"] else "up to date",
            key=snapshot.commit,
            path=str(snapshot.folder.absolute()),
            digest=None,
            counts=counts,
            seconds=round(time.monotonic() - started, 3),
            error=None,
        )
        messages.result(msgspec.json.encode(result))
    return 0
