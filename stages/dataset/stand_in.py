"""What a folder of pictures holds; or, where a bundle came without them, what it held.

A stand-in is a folder with one file, which lists the path and sha256 of everything that `validate` once saw there. It
gives the same keys as the pictures, so all that was made of them is found; nothing can be made of it anew.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import msgspec

from schemas.base import UNREADABLE, Strict
from schemas.errors import BadConfig, Damaged, NoResources, Stale
from stages.contract.digests import StatCache, digest_of
from stages.dataset.discover import LISTING_VERSION, listing, state

STAND_IN = "pictures-elsewhere.json"
MOST_BYTES = 256 << 20


class StandIn(Strict, frozen=True):
    """(path, sha256) of every file that counted, in the order of `listing`."""

    files: tuple[tuple[str, str], ...]


def stands_in(folder: Path) -> bool:
    """Return whether the pictures of `folder` are elsewhere. Raises NoResources when we may not look into it."""
    if folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
        raise NoResources(
            "dataset.unreadable",
            "the folder of pictures may not be read",
            where=str(folder),
            fix="make it readable (chmod u+rx)",
        )
    return (folder / STAND_IN).is_file()


def contents(folder: Path, digests: StatCache, *, masks: bool) -> StandIn:
    """Return path and sha256 of every file of `folder` that counts, or counted where a stand-in is all there is.

    Raises Damaged for a stand-in that cannot be read, BadConfig when pictures lie beside it.
    """
    try:
        return _contents(folder, digests, masks=masks)
    except OSError:
        # A file that cannot be read is a fault that `validate` lists with all the others; nothing is published then.
        return StandIn(files=tuple((path, f"unread {path}") for path in listing(folder, masks=masks)))


def folder_digest(folder: Path, digests: StatCache, *, masks: bool) -> str:
    """Return the digest of `contents`, remembered for as long as nothing in `folder` looks changed.

    Every stage asks for it: of a large folder this costs a stat of each file and one question to the cache.
    """
    what = f"folder {LISTING_VERSION} {'with masks' if masks else 'plain'} {folder.absolute()}"
    try:
        return digests.looked(what, partial(state, folder), lambda: _digest(_contents(folder, digests, masks=masks)))
    except OSError:
        return _digest(contents(folder, digests, masks=masks))


def _digest(found: StandIn) -> str:
    return digest_of("folder", found.files)


def _contents(folder: Path, digests: StatCache, *, masks: bool) -> StandIn:
    if stands_in(folder):
        return _read(folder, masks=masks)
    paths = listing(folder, masks=masks)
    found = digests.files([folder / path for path in paths])
    return StandIn(files=tuple(zip(paths, found, strict=True)))


def require_pictures(folder: Path, fix: str) -> None:
    """Raise Stale when the pictures of `folder` are elsewhere."""
    if stands_in(folder):
        what = "this needs the pictures, and the bundle came without them"
        raise Stale("dataset.elsewhere", what, where=str(folder), fix=fix)


def _read(folder: Path, *, masks: bool) -> StandIn:
    path = folder / STAND_IN
    if beside := [name for name in listing(folder, masks=masks) if name != STAND_IN]:
        raise BadConfig(
            "dataset.stand_in",
            "pictures, and a list of pictures that are elsewhere",
            where=str(path),
            why=f"beside it lies {beside[0]}",
            fix=f"delete {STAND_IN} to use the pictures",
        )
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(MOST_BYTES), type=StandIn)
    except (OSError, *UNREADABLE) as error:
        fix = "unpack the bundle again"
        raise Damaged("dataset.stand_in", "cannot read it", where=str(path), why=str(error), fix=fix) from error
