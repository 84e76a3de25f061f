"""Artifacts in stores: their keys, manifests and wholeness, and the receipts that name them.

`<store>/<stage>/<key>/manifest.json` is the commit of an artifact: written last, synced, then renamed into place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from schemas.base import UNREADABLE, Strict
from schemas.errors import Damaged, Stale
from schemas.manifest import CONTRACT_VERSION, FileRecord, Manifest, Receipt
from stages.contract.digests import StatCache, canonical_json, digest_of, read_proved, sha256_bytes, sha256_file
from stages.contract.publish import no_resources, read_regular, write_file

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Plan:
    """What a stage would make: all resolved values of its keyed settings, and the digest of each input's role."""

    params: Mapping[str, Any]
    inputs: Mapping[str, str]


@dataclass(frozen=True)
class Built:
    """What a stage made, beside the files in its work folder.

    `roles` are the digests of what later stages read; `fragments` the files elsewhere in the stores that it refers to
    (path below the store -> the store that holds it). `device` is what computed it, "" where nothing was computed.
    """

    roles: Mapping[str, str]
    counts: Mapping[str, int]
    fragments: Mapping[str, Path] = field(default_factory=dict[str, Path])
    device: str = ""


def keyed(table: Strict) -> dict[str, Any]:
    """Return the resolved values of a settings table as they enter keys, without fields at their neutral value."""
    values: dict[str, Any] = msgspec.to_builtins(table)
    for name in table.__struct_fields__:
        value = getattr(table, name)
        if name in table.NEUTRAL and value == table.NEUTRAL[name]:
            del values[name]
        elif isinstance(value, Strict):
            values[name] = keyed(value)
    return values


def artifact_key(stage: str, version: int, plan: Plan) -> str:
    """Return the key of what `plan` makes: never a path, time, host, flag or library version."""
    value = {
        "contract": CONTRACT_VERSION,
        "stage": stage,
        "version": version,
        "params": plan.params,
        "inputs": plan.inputs,
    }
    return digest_of("key", value)


def write_manifest(
    work: Path, identity: tuple[str, int, str], plan: Plan, built: Built, about: dict[str, str]
) -> Manifest:
    """Write the manifest of the files in `work`; `identity` is (stage, version, key), `about` the provenance."""
    stage, version, key = identity
    files = {path.relative_to(work).as_posix(): record(path) for path in sorted(work.rglob("*")) if path.is_file()}
    manifest = Manifest(
        contract=CONTRACT_VERSION,
        stage=stage,
        version=version,
        key=key,
        params=dict(plan.params),
        inputs=dict(plan.inputs),
        roles=dict(built.roles),
        files=files,
        fragments={name: record(store / name) for name, store in sorted(built.fragments.items())},
        counts=dict(built.counts),
        provenance=about,
        digest=digest_of(stage, built.roles),
        self_digest="",
    )
    manifest = msgspec.structs.replace(manifest, self_digest=_self_digest(manifest))
    (work / MANIFEST).write_bytes(_written(manifest))
    return manifest


def record(path: Path) -> FileRecord:
    """Return the size and sha256 of a file."""
    return FileRecord(size=path.stat().st_size, sha256=sha256_file(path))


def _written(manifest: Manifest) -> bytes:
    return msgspec.json.format(canonical_json(manifest)) + b"\n"


def _self_digest(manifest: Manifest) -> str:
    return sha256_bytes(canonical_json(msgspec.structs.replace(manifest, self_digest="")))


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest in `folder`, strictly parsed and proved by its own digest.

    Raises Damaged when it is absent, malformed, or not what it says it is, Stale when another version wrote it.
    """
    path = folder / MANIFEST
    fix = "delete that folder and run the stage again"
    try:
        data = path.read_bytes()
        manifest = msgspec.json.decode(data, type=Manifest)
    except (OSError, *UNREADABLE) as error:
        raise Damaged(
            "manifest.unreadable", "no readable manifest", where=str(path), why=str(error), fix=fix
        ) from error
    # The bytes as well: another spacing or a name twice is no manifest that was written here.
    if manifest.self_digest != _self_digest(manifest) or data != _written(manifest):
        raise Damaged("manifest.altered", "the manifest does not match its own digest", where=str(path), fix=fix)
    if manifest.contract != CONTRACT_VERSION:
        raise Stale(
            "manifest.version",
            "the artifact was made by another version of this program",
            where=str(path),
            why=f"expected contract {CONTRACT_VERSION}, found {manifest.contract}",
            fix="use that version, or another store",
        )
    if outside := [name for name in (*manifest.files, *manifest.fragments) if not stays_inside(name)]:
        raise Damaged(
            "manifest.path", "a file outside the store", where=str(path), why=f"found {outside[0]!r}", fix=fix
        )
    if manifest.key != artifact_key(manifest.stage, manifest.version, Plan(manifest.params, manifest.inputs)):
        raise Damaged(
            "manifest.key", "the key does not follow from what the manifest lists", where=str(path), fix=fix
        )
    if (folder.parent.name, folder.name) != (manifest.stage, manifest.key):
        raise Damaged(
            "manifest.misplaced",
            "the folder is not named by the key",
            where=str(folder),
            why=f"expected {manifest.stage}/{manifest.key}",
            fix=fix,
        )
    return manifest


def stays_inside(name: str) -> bool:
    """Whether a path that somebody wrote is one below its folder, on any system, spelled the one way we spell it."""
    path = PurePosixPath(name)
    plain = not path.is_absolute() and ".." not in path.parts and str(path) == name and name != "."
    return plain and name.isprintable() and "\\" not in name and not name.startswith("~")


def missing_files(manifest: Manifest, folder: Path, stores: Sequence[Path]) -> list[str]:
    """Return the files of an artifact that are absent or of another size (contents are not read)."""
    entries, places = {**manifest.files, **manifest.fragments}, _places(manifest, folder, stores)
    return [name for name, path in places.items() if _size(path) != entries[name].size]


def damaged_files(manifest: Manifest, folder: Path, stores: Sequence[Path], digests: StatCache) -> list[str]:
    """Return the files of an artifact that are absent, or not the bytes that were written.

    Digests are remembered by stat, so that a second look costs one stat a file. What changed without a trace in size,
    times and inode (a failing disk) is seen with `--paranoid`, by verify, and by whoever reads a record.
    """
    entries, places = {**manifest.files, **manifest.fragments}, _places(manifest, folder, stores)
    missing = missing_files(manifest, folder, stores)
    there = [name for name in places if name not in set(missing)]
    with no_resources(folder):
        found = digests.files([places[name] for name in there])
    return missing + [name for name, sha256 in zip(there, found, strict=True) if sha256 != entries[name].sha256]


def _places(manifest: Manifest, folder: Path, stores: Sequence[Path]) -> dict[str, Path]:
    """Return where each file of an artifact lies: a fragment in the first store that has it, as readers look."""
    own = {name: folder / name for name in manifest.files}
    return own | {name: holder(name, stores) / name for name in manifest.fragments}


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() and not path.is_symlink() else None


def find(stage: str, key: str, stores: Sequence[Path]) -> Path | None:
    """Return the folder of the artifact in the first store that has it."""
    return next((store / stage / key for store in stores if (store / stage / key / MANIFEST).is_file()), None)


def holder(name: str, stores: Sequence[Path]) -> Path:
    """Return the store that has the file `name` below it; ours where none has."""
    return next((store for store in stores if (store / name).is_file()), stores[0])


def read_receipt(run_folder: Path, stage: str) -> Receipt | None:
    """Return the run's receipt for `stage`; None when absent, unreadable or another's (it is only a pointer)."""
    try:
        receipt = msgspec.json.decode(read_regular(run_folder / f"{stage}.json"), type=Receipt)
    except (OSError, *UNREADABLE):
        return None
    return receipt if receipt.stage == stage else None


def write_receipt(run_folder: Path, manifest: Manifest) -> None:
    """Point the run at an artifact; an equal receipt is left untouched."""
    receipt = Receipt(stage=manifest.stage, key=manifest.key, digest=manifest.digest)
    path, data = run_folder / f"{manifest.stage}.json", receipt_bytes(receipt)
    if path.is_symlink() or not path.is_file() or path.read_bytes() != data:
        write_file(path, data)


def receipt_bytes(receipt: Receipt) -> bytes:
    """Return a receipt as it is written."""
    return msgspec.json.format(canonical_json(receipt)) + b"\n"


def restore_file(source: Path, target: Path, digests: StatCache) -> None:
    """Make `target` a copy of `source` unless it is one already, judged by content. Raises NoResources."""
    with no_resources(source):
        expected = digests.files([source])[0]
        if _size(target) == _size(source) and digests.files([target]) == [expected]:
            return
        data = read_proved(source, expected)
    write_file(target, data)
