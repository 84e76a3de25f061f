"""Fragments: immutable, content-named groups of records that artifacts refer to, below `<store>/fragments/`.

What latents and embeddings share: where a fragment lies, that nothing on the way to it is a link, and how a record
lies in it. A fragment's path comes from a table, so it is checked before it is followed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from schemas.errors import GIVEN, Damaged
from stages.contract.artifacts import holder
from stages.contract.digests import StatCache, digest_of, is_digest
from stages.stores.blame import Blame

# Written together while encoding goes on: what a kill costs at most.
MOST_RECORDS = 64
# Put together afterwards: of small records more, so that a large dataset is not a burden of files. One of latents of
# 512 pixels holds 64 either way.
FULL_RECORDS = 1024
FULL_BYTES = 32 << 20
# Beside a record on disk: its checksum, its name in the fragment's list, a fragment of its own at worst.
RECORD_BYTES = 2048
ROOT = "fragments"

# How a record lies in memory and on disk; numpy has no bfloat16, so its bits travel as uint16.
LAYOUTS = {"float32": np.dtype("<f4"), "bfloat16": np.dtype("<u2")}


class Place(Protocol):
    """Where a record lies."""

    @property
    def fragment(self) -> str:
        """The fragment's path below the store."""
        ...

    @property
    def row(self) -> int:
        """Its row there, from 0."""
        ...


Row = TypeVar("Row", bound=Place)
Read = TypeVar("Read", contravariant=True)


class Reader(Protocol[Read]):
    """What reads single records and checks every byte of them."""

    def read(self, row: Read) -> np.ndarray:
        """Return the record. Raises Damaged."""
        ...


@dataclass(frozen=True)
class Kind:
    """One kind of fragment: its folder and error prefix, how a fragment's name ends, the stage that makes it."""

    name: str
    suffix: str
    stage: str

    def path(self, digest: str) -> str:
        """Return the path below the store of the fragment named `digest`."""
        return f"{ROOT}/{self.name}/{digest}{self.suffix}"

    def names(self, fragment: str) -> bool:
        """Whether `fragment` is the path of a fragment of this kind, and so stays inside the store."""
        digest = fragment.removeprefix(f"{ROOT}/{self.name}/").removesuffix(self.suffix)
        return is_digest(digest) and fragment == self.path(digest)

    def blame(self, fragment: str, record: str = "") -> Blame:
        """Return what errors about a fragment, or one of its records, name."""
        where = f"{fragment}, record {record}" if record else fragment
        return Blame(self.name, where, f"flux2-lora {self.stage} {GIVEN} --force")


def locate(stores: Sequence[Path], kind: Kind, fragment: str, blame: Blame) -> Path:
    """Return where `fragment` lies: in the first of `stores` that has it. Raises Damaged when absent or unsafe."""
    if not kind.names(fragment):
        why = f"expected {kind.path('<64 hex digits>')}, found {fragment}"
        raise blame.error("bad_path", "not a fragment's path", why)
    for store in stores:
        path = store / fragment
        if path.exists() or path.is_symlink():
            refuse_links(store, path, blame)
            return path
    raise blame.error("absent", "the fragment is missing", f"looked in {', '.join(map(str, stores))}")


def refuse_links(store: Path, path: Path, blame: Blame) -> None:
    """Raise Damaged when `path`, or a folder between it and `store`, is a symbolic link."""
    for each in (path, *path.parents):
        if each == store:
            return
        if each.is_symlink():
            # Encoding again would write through it, and change nothing.
            linked = replace(blame, fix=f"replace the link {each} by what it leads to")
            raise linked.error("symlink", "a symbolic link inside the store", f"expected a real {each.name}")


def whole_records(
    stores: Sequence[Path],
    rows: Sequence[Row],
    reader: Reader[Row],
    files: Callable[[Path, str], list[Path]],
    digests: StatCache,
) -> list[Row]:
    """Return those of `rows` whose bytes are as they were written.

    A fragment is read anew only when its `files` changed: `digests` remembers by stat what was found.
    """
    fragments: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        fragments[row.fragment].append(row)
    asked: list[tuple[str, list[Path], Callable[[], str]]] = []
    for name, listed in fragments.items():
        paths = files(holder(files(Path(), name)[-1].as_posix(), stores), name)
        what = f"damaged {digest_of('rows', listed)} in {paths[0].absolute()}"
        asked.append((what, paths, partial(_damaged_rows, reader, listed)))
    damaged = [set(each.split()) for each in digests.many(asked)]
    return [
        row
        for listed, broken in zip(fragments.values(), damaged, strict=True)
        for row in listed
        if str(row.row) not in broken
    ]


def _damaged_rows(reader: Reader[Row], rows: Sequence[Row]) -> str:
    def broken(row: Row) -> bool:
        try:
            reader.read(row)
        except Damaged:
            return True
        return False

    return " ".join(str(row.row) for row in rows if broken(row))


def raw_bytes(array: np.ndarray, dtype: str) -> bytes:
    """Return the record as it is stored: little-endian, row-major. Raises ValueError for another dtype."""
    layout = LAYOUTS[dtype]
    if array.dtype != layout:
        raise ValueError(f"{dtype} records are given as {layout.name}, not {array.dtype}")
    return np.ascontiguousarray(array).tobytes()


def stored_bytes(values: int, dtype: str) -> int:
    """Return what a record of so many values takes on disk, at most."""
    return values * LAYOUTS[dtype].itemsize + RECORD_BYTES


def full(record_bytes: int) -> int:
    """Return how many records of that size one fragment holds when they are put together."""
    return max(MOST_RECORDS, min(FULL_RECORDS, FULL_BYTES // record_bytes))


def check_keys(keys: Sequence[str], most: int) -> None:
    """Raise ValueError unless there are 1 to `most` different keys."""
    if not 0 < len(keys) <= most or len(set(keys)) != len(keys):
        raise ValueError(f"a fragment holds 1 to {most} records of different keys, not {len(keys)}")
