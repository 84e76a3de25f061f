"""Bundles: a store, the pipeline that made it and what stood where its pictures were, as one file or folder.

`bundle.json` lists every other member with its size and sha256, and a signature, where there is one, is over its
bytes. The file is a plain zip without compression, the same bytes for the same content. It is not read as a zip: the
list says what must come next, byte for byte, so there is no directory to lie and nothing to expand.
"""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec

from schemas.base import UNREADABLE, Strict
from schemas.errors import BadConfig, Damaged, Stale
from schemas.manifest import FileRecord, Manifest
from schemas.run import Config, RunName
from stages.contract.artifacts import MANIFEST, read_manifest, record, stays_inside
from stages.contract.config import load_config
from stages.contract.digests import canonical_json, sha256_bytes
from stages.contract.trust import inside, read_regular

LIST = "bundle.json"
SIGNATURE = "bundle.json.sig"
PIPELINE = "pipeline.toml"
SOURCES = "sources"
STORE = "store"
PURPOSE = "flux2-lora-bundle"
BUNDLED = ("validate", "encode-latents", "encode-text")
SUFFIX = ".zip"
MOST_LIST_BYTES = 64 << 20
# The earliest date a zip can hold.
DATE = (1980, 1, 1, 0, 0, 0)
HEADER_BYTES = 30
MAGIC = b"PK\x03\x04"
# From which share of the limit on zipfile adds a zip64 field, not knowing how much will be written.
ZIP64_SHARE = 1.05


class Bundle(Strict, frozen=True):
    """What `bundle.json` says: the run, the key of each stage's artifact, and every other member."""

    format: Literal[1]
    run: RunName
    artifacts: dict[str, str]
    files: dict[str, FileRecord]


Member = tuple[str, bytes]
Stored = tuple[Path, FileRecord]


def listed(run: str, manifests: Iterable[Manifest], members: Iterable[tuple[str, FileRecord]]) -> bytes:
    """Return the bytes of `bundle.json`."""
    artifacts = {each.stage: each.key for each in manifests}
    return canonical_json(Bundle(format=1, run=run, artifacts=artifacts, files=dict(sorted(members))))


def write_zip(path: Path, members: Iterable[Member]) -> None:
    """Write a zip file of `members`, in their order."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members:
            archive.writestr(_info(name), data)


def write_tree(folder: Path, members: Iterable[Member]) -> None:
    """Write `members` as files below `folder`."""
    for name, data in members:
        path = folder / inside(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


@contextlib.contextmanager
def opened(path: Path) -> Generator[tuple[bytes, bytes, Callable[[Bundle], Iterator[Member]]]]:
    """Yield the list, its signature (empty for none), and what yields the other members, each checked.

    Raises Damaged for anything that is not a bundle, whole and as it was listed.
    """
    if path.is_dir():
        data = read_regular(path, LIST, MOST_LIST_BYTES)
        signature = read_regular(path, SIGNATURE, MOST_LIST_BYTES) if (path / SIGNATURE).exists() else b""
        yield data, signature, lambda bundle: _from_folder(path, bundle)
        return
    with _file(path) as file:
        data = _next(file, LIST, None, path)
        signature = _next(file, SIGNATURE, None, path)
        yield data, signature, lambda bundle: _from_zip(file, path, bundle)


def parse(data: bytes, path: Path) -> Bundle:
    """Return what a list says, its names being those of a bundle. Raises Damaged."""
    try:
        bundle = msgspec.json.decode(data, type=Bundle)
    except UNREADABLE as error:
        raise _damaged("bundle.list", f"{LIST} is not a bundle's", path, str(error)) from error
    if canonical_json(bundle) != data or list(bundle.files) != sorted(bundle.files):
        raise _damaged("bundle.list", f"{LIST} is not as it is written here", path)
    if set(bundle.artifacts) != set(BUNDLED):
        raise _damaged("bundle.list", "these are not the artifacts of a bundle", path, ", ".join(bundle.artifacts))
    for name in bundle.files:
        parts = inside(name).parts
        source = parts[0] == SOURCES and parts[-1].endswith(".json")
        if not name.isprintable() or not (name == PIPELINE or source or (parts[0] == STORE and len(parts) > 2)):
            raise _damaged("bundle.name", "a name that no bundle has", path, name)
    return bundle


def check_pipeline(folder: Path, bundle: Bundle, path: Path) -> Config:
    """Return the configuration of the bundle `path`, unpacked in `folder`.

    Raises Damaged unless it is of that run, and names no place but those below it.
    """
    try:
        config = load_config(folder / PIPELINE)
    except BadConfig as error:
        raise _damaged("bundle.pipeline", f"{PIPELINE} cannot be read", path, error.faults[0].what) from error
    if config.run.name != bundle.run:
        raise _damaged("bundle.pipeline", f"{PIPELINE} is of another run than the list says", path)
    model = config.model
    places = [
        config.validate.dataset,
        config.validate.class_dataset,
        config.train.init_lora,
        config.preview.distilled,
    ]
    places += [model.source, model.transformer, model.autoencoder, model.text_encoder, model.tokenizer]
    if outside := [each for each in places if each is not None and not stays_inside(each)]:
        raise _damaged("bundle.pipeline", f"{PIPELINE} names a place outside the bundle", path, outside[0])
    return config


def check_artifacts(folder: Path, bundle: Bundle, path: Path) -> list[Manifest]:
    """Return the manifests of the bundle `path`, unpacked in `folder`: every file of theirs is in it, and no other.

    Raises Damaged.
    """
    manifests: list[Manifest] = []
    needed: dict[str, FileRecord | None] = {}
    for stage, key in bundle.artifacts.items():
        base = f"{STORE}/{inside(f'{stage}/{key}')}"
        try:
            manifest = read_manifest(folder / base)
        except (Damaged, Stale) as error:
            raise _damaged("bundle.artifact", error.faults[0].what, path, base) from error
        if (manifest.stage, manifest.key) != (stage, key):
            raise _damaged("bundle.artifact", "an artifact is another one than the list says", path, base)
        needed |= {f"{base}/{MANIFEST}": None}
        needed |= {f"{base}/{name}": entry for name, entry in manifest.files.items()}
        needed |= {f"{STORE}/{name}": entry for name, entry in manifest.fragments.items()}
        manifests.append(manifest)
    there = {name: entry for name, entry in bundle.files.items() if name.startswith(f"{STORE}/")}
    for name in sorted({*there, *needed}):
        if name not in needed or name not in there or needed[name] not in (None, there[name]):
            what = "a file of an artifact is not the one its manifest lists"
            what = "a file of an artifact is missing" if name not in there else what
            what = "a file that no artifact names" if name not in needed else what
            raise _damaged("bundle.files", what, path, name)
    return manifests


def members_of(store: Callable[[str], Path], manifest: Manifest, folder: Path) -> Iterator[tuple[str, Stored]]:
    """Yield the name of every file of an artifact, where it lies, and what it is to be.

    `store(name)` is the store that has a fragment.
    """
    base = f"{STORE}/{manifest.stage}/{manifest.key}"
    yield f"{base}/{MANIFEST}", (folder / MANIFEST, record(folder / MANIFEST))
    yield from ((f"{base}/{name}", (folder / name, entry)) for name, entry in manifest.files.items())
    yield from ((f"{STORE}/{name}", (store(name) / name, entry)) for name, entry in manifest.fragments.items())


def _from_folder(path: Path, bundle: Bundle) -> Iterator[Member]:
    for name, entry in bundle.files.items():
        yield name, _checked(read_regular(path, name, entry.size), entry, path, name)


def _from_zip(file: BinaryIO, path: Path, bundle: Bundle) -> Iterator[Member]:
    for name, entry in bundle.files.items():
        yield name, _checked(_next(file, name, entry.size, path), entry, path, name)


def _checked(data: bytes, entry: FileRecord, path: Path, name: str) -> bytes:
    if len(data) != entry.size or sha256_bytes(data) != entry.sha256:
        raise _damaged("bundle.changed", "a member is not what the list says", path, name)
    return data


def _next(file: BinaryIO, name: str, size: int | None, path: Path) -> bytes:
    """Return the member that must come next; without `size`, one of bearable size that its header gives."""
    info = _info(name)
    head = file.read(HEADER_BYTES)
    if not head.startswith(MAGIC):
        raise _damaged("bundle.member", f"expected {name} next", path, "this is no bundle, or it was changed")
    if size is None:
        size = int.from_bytes(head[22:26], "little")
        if size > MOST_LIST_BYTES:
            raise _damaged("bundle.list", f"{name} is too large", path, f"{size} bytes")
    info.file_size = info.compress_size = size
    info.CRC = int.from_bytes(head[14:18], "little")
    expected = info.FileHeader(zip64=size * ZIP64_SHARE > zipfile.ZIP64_LIMIT)
    if head + file.read(len(expected) - HEADER_BYTES) != expected:
        raise _damaged("bundle.member", f"expected {name} next", path, "this is no bundle, or it was changed")
    # Asked for more than there is, Python would make room for all of it first.
    there = os.fstat(file.fileno()).st_size - file.tell()
    data = file.read(min(size, there))
    if len(data) != size:
        raise _damaged("bundle.truncated", "the bundle is cut off", path, f"in {name}")
    return data


def _info(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, DATE)
    info.create_system = 3
    info.external_attr = 0o644 << 16
    return info


@contextlib.contextmanager
def _file(path: Path) -> Generator[BinaryIO]:
    if not path.is_file():
        raise _damaged("bundle.absent", "no such bundle", path)
    with path.open("rb") as file:
        yield file


def _damaged(code: str, what: str, where: Path, why: str = "") -> Damaged:
    return Damaged(code, what, where=str(where), why=why, fix="ask its maker for it again")
