"""What of a store any run still uses: reached from receipts, over manifests, down to fragments and checkpoints.

A pin is a run whose receipts lie in `<store>/pins/<run>/`: it keeps what they name until that folder is removed.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from schemas import results
from schemas.errors import Damaged, Fault
from schemas.manifest import Manifest
from stages.contract.artifacts import read_manifest, read_receipt
from stages.contract.digests import is_digest
from stages.contract.publish import TEMPORARY, no_resources, workspace
from stages.flux2.prequantized import PARTS, kind
from stages.inspection.files import is_litter
from stages.inspection.lineage import MAKERS
from stages.training.checkpoints import FOLDER, trajectory_of
from stages.training.note import read_note

PINS = "pins"
DAY_SECONDS = 86_400
# What this program makes in a store and can make again. Anything else is somebody's, and stays.
FRAGMENT_KINDS = ("latents", "embeddings", "previews")
PACKED = tuple(kind(part) for part in PARTS)


@dataclass(frozen=True)
class Thing:
    """One thing in a store: a folder or a file that goes or stays as a whole. `kind` is what a table calls it."""

    kind: str
    path: Path
    size_bytes: int
    age_days: float


@dataclass
class Reach:
    """What runs use of a store: artifacts by folder, fragments by path below the store, trajectories.

    `weights` are the parts of models, with the digest of their tensors and how they are held.
    """

    runs: list[str] = field(default_factory=list[str])
    artifacts: dict[Path, Manifest] = field(default_factory=dict[Path, Manifest])
    fragments: set[str] = field(default_factory=set[str])
    trajectories: set[str] = field(default_factory=set[str])
    weights: set[tuple[str, str, str]] = field(default_factory=set[tuple[str, str, str]])


def reached(store: Path, runs: Sequence[Path]) -> Reach:
    """Return what the runs in the folders `runs`, and the pins, use of `store`.

    Raises Damaged when a receipt or manifest cannot be read: what it stands for is not known then.
    """
    reach, faults = Reach(), list[Fault]()
    for folder in _run_folders([*runs, store / PINS]):
        reach.runs.append(str(folder))
        try:
            _add_run(reach, store, folder)
        except Damaged as error:
            faults += error.faults
    if faults:
        raise Damaged.of(faults)
    return reach


def _run_folders(places: Sequence[Path]) -> Iterator[Path]:
    names = [*(f"{stage}.json" for stage in MAKERS), results.TRAJECTORY]
    for place in places:
        for folder in sorted(place.iterdir()) if place.is_dir() else ():
            if any((folder / name).is_file() for name in names):
                yield folder


def _add_run(reach: Reach, store: Path, folder: Path) -> None:
    for stage in MAKERS:
        if not (folder / f"{stage}.json").exists():
            continue
        receipt = read_receipt(folder, stage)
        if receipt is None:
            fix = "run that stage again, or remove the file"
            where = str(folder / f"{stage}.json")
            raise Damaged(
                "gc.receipt", "a receipt that cannot be read: what it uses is not known", where=where, fix=fix
            )
        artifact = store / stage / receipt.key
        if artifact.is_dir() and artifact not in reach.artifacts:
            manifest = read_manifest(artifact)
            reach.artifacts[artifact] = manifest
            reach.fragments |= {whole_fragment(name) for name in manifest.fragments}
            reach.weights |= _weights(manifest)
            if stage == "train":
                reach.trajectories.add(trajectory_of(manifest.params, manifest.inputs))
    try:
        note = read_note(folder)
    except Damaged as error:
        what = "a training's note that cannot be read: its checkpoints are not known"
        fix = "run train again, or remove the file"
        raise Damaged("gc.note", what, where=error.faults[0].where, why=error.faults[0].why, fix=fix) from error
    if note is not None:
        reach.trajectories.add(note.trajectory)


def _weights(manifest: Manifest) -> set[tuple[str, str, str]]:
    """Return the parts of a model that an artifact was made with: part, digest, how they are held."""
    held = str(manifest.params.get("quantize", "none"))
    return {(part, manifest.inputs[part], held) for part in PARTS if part in manifest.inputs}


def whole_fragment(name: str) -> str:
    """Return the fragment a file belongs to: `fragments/<kind>/<name>`."""
    return "/".join(Path(name).parts[:3])


def unreachable(store: Path, reach: Reach, older_than_days: float) -> list[Thing]:
    """Return what no run uses and is old enough that nobody is about to: by kind, the oldest first."""
    found = [
        thing
        for thing in _things(store)
        if thing.age_days >= older_than_days and not _is_reached(store, reach, thing)
    ]
    return sorted(found, key=lambda thing: (thing.kind, -thing.age_days, thing.path))


def withdraw(store: Path, paths: Sequence[Path]) -> None:
    """Delete for good what lies in a store: each gone from its place in one rename. Raises NoResources.

    The caller holds the store's lock alone.
    """
    with workspace(store) as space, no_resources(store):
        for number, path in enumerate(paths):
            moved = path.rename(space / str(number))
            if moved.is_dir() and not moved.is_symlink():
                shutil.rmtree(moved)
            else:
                moved.unlink()


def _things(store: Path) -> Iterator[Thing]:
    """Yield everything in a store that this program made and could make again."""
    from stages.stores.fragments import ROOT

    for stage in MAKERS:
        yield from (_thing(stage, path) for path in _made(store / stage))
    for name in FRAGMENT_KINDS:
        yield from (_thing(f"{ROOT}/{name}", path) for path in _made(store / ROOT / name))
    for part in PARTS:
        yield from (_thing(kind(part), path) for path in _made(store / kind(part)))
    yield from (_thing(FOLDER, path) for path in _made(store / FOLDER))
    yield from (_thing("work left behind", path) for path in _below(store / TEMPORARY) if is_litter(path))


def _is_reached(store: Path, reach: Reach, thing: Thing) -> bool:
    name = thing.path.relative_to(store).as_posix()
    if thing.kind == FOLDER:
        return thing.path.name in reach.trajectories
    if thing.kind in PACKED:
        return _weights(read_manifest(thing.path)) <= reach.weights
    return thing.path in reach.artifacts or name in reach.fragments


def _below(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else []


def _made(folder: Path) -> list[Path]:
    """Return what lies in a folder under a name that only this program gives."""
    return [path for path in _below(folder) if is_digest(path.name.partition(".")[0])]


def _thing(kind: str, path: Path) -> Thing:
    files = (
        [each for each in path.rglob("*") if each.is_file()] if path.is_dir() and not path.is_symlink() else [path]
    )
    youngest = max((each.lstat().st_mtime for each in [path, *files]), default=0.0)
    size = sum(each.lstat().st_size for each in files)
    return Thing(kind, path, size, max(0.0, (time.time() - youngest) / DAY_SECONDS))
