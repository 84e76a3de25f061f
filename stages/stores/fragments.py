"""Fragments: immutable, content-named groups of records that artifacts refer to, below `<store>/fragments/`.

What latents and embeddings share: where a fragment lies, that nothing on the way to it is a link, and how damage is
told. A fragment's path comes from a table, so it is checked before it is followed.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from schemas.errors import Damaged

MOST_RECORDS = 64
ROOT = "fragments"

# How a record lies in memory and on disk; numpy has no bfloat16, so its bits travel as uint16.
LAYOUTS = {"float32": np.dtype("<f4"), "bfloat16": np.dtype("<u2")}


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
        return len(digest) == 64 and set(digest) <= set("0123456789abcdef") and fragment == self.path(digest)


@dataclass(frozen=True)
class Blame:
    """What an error about a fragment names: the fragment, the record where one was asked for, and the remedy."""

    kind: Kind
    fragment: str
    record: str = ""

    def error(self, code: str, what: str, why: str = "") -> Damaged:
        """Return the error `<kind>.<code>`."""
        record = f", record {self.record}" if self.record else ""
        fix = f"flux2-lora {self.kind.stage} --config ... --force"
        return Damaged(f"{self.kind.name}.{code}", what, where=f"{self.fragment}{record}", why=why, fix=fix)


def locate(stores: Sequence[Path], blame: Blame) -> Path:
    """Return where the fragment lies: in the first of `stores` that has it. Raises Damaged when absent or unsafe."""
    if not blame.kind.names(blame.fragment):
        why = f"expected {blame.kind.path('<64 hex digits>')}, found {blame.fragment}"
        raise blame.error("bad_path", "not a fragment's path", why)
    for store in stores:
        path = store / blame.fragment
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
            raise blame.error("symlink", "a symbolic link inside the store", f"expected a real {each.name}")


def file_size(path: Path, blame: Blame) -> int:
    """Return the size in bytes of a regular file. Raises Damaged for anything else."""
    try:
        status = path.lstat()
    except OSError as error:
        raise blame.error("absent", f"{path.name} is missing", error.strerror or "") from error
    if not stat.S_ISREG(status.st_mode):
        raise blame.error("not_a_file", f"{path.name} is not a regular file")
    return status.st_size


def read_bytes(path: Path, offset: int, length: int, blame: Blame) -> bytearray:
    """Return exactly `length` bytes from `offset` on.

    Read rather than mapped: a file that shrinks or a disk that fails under a map kills the process.
    """
    data = bytearray(length)
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            found = file.readinto(data)
    except OSError as error:
        raise blame.error("unreadable", f"cannot read {path.name}", error.strerror or "") from error
    if found != length:
        raise blame.error("truncated", f"{path.name} ends early", f"expected {length} bytes, found {found}")
    return data


def checked_record(data: bytearray | memoryview, sha256: str, blame: Blame) -> bytearray | memoryview:
    """Return `data` when its sha256 is the recorded one, else raise Damaged."""
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise blame.error("digest", "the record's bytes differ", f"expected sha256 {sha256}, found {found}")
    return data


def raw_bytes(array: np.ndarray, dtype: str) -> bytes:
    """Return the record as it is stored: little-endian, row-major. Raises ValueError for another dtype."""
    layout = LAYOUTS[dtype]
    if array.dtype != layout:
        raise ValueError(f"{dtype} records are given as {layout.name}, not {array.dtype}")
    return np.ascontiguousarray(array).tobytes()


def check_keys(keys: Sequence[str]) -> None:
    """Raise ValueError unless there are 1 to 64 different keys."""
    if not 0 < len(keys) <= MOST_RECORDS or len(set(keys)) != len(keys):
        raise ValueError(f"a fragment holds 1 to {MOST_RECORDS} records of different keys, not {len(keys)}")
