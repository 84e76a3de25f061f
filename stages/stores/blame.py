"""Reading bytes that may be damaged: every fault names the thing, what was expected and found, and the remedy."""

from __future__ import annotations

import hashlib
import stat
from dataclasses import dataclass
from pathlib import Path

from schemas.errors import Damaged


@dataclass(frozen=True)
class Blame:
    """What an error about damage names: the kind of thing (its code's prefix), which one, and how to get it back."""

    kind: str
    where: str
    fix: str

    def error(self, code: str, what: str, why: str = "") -> Damaged:
        """Return the error `<kind>.<code>`."""
        return Damaged(f"{self.kind}.{code}", what, where=self.where, why=why, fix=self.fix)


def file_size(path: Path, blame: Blame) -> int:
    """Return the size in bytes of a regular file. Raises Damaged for anything else, links included."""
    try:
        status = path.lstat()
    except OSError as error:
        raise blame.error("absent", f"{path.name} is missing", error.strerror or "") from error
    if not stat.S_ISREG(status.st_mode):
        raise blame.error("not_a_file", f"{path.name} is not a regular file")
    return status.st_size


def read_bytes(path: Path, offset: int, length: int, blame: Blame) -> bytes:
    """Return exactly `length` bytes from `offset` on, or raise Damaged.

    Read rather than mapped: a file that shrinks or a disk that fails under a map kills the process.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(length)
    except OSError as error:
        raise blame.error("unreadable", f"cannot read {path.name}", error.strerror or "") from error
    if len(data) != length:
        raise blame.error("truncated", f"{path.name} ends early", f"expected {length} bytes, found {len(data)}")
    return data


def check_sha256(data: bytes | memoryview, sha256: str, blame: Blame) -> None:
    """Raise Damaged unless the sha256 of `data` is the recorded one."""
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise blame.error("digest", "the record's bytes differ", f"expected sha256 {sha256}, found {found}")


def check_crc32c(data: bytes, stored: int, blame: Blame) -> None:
    """Raise Damaged unless the crc32c of `data` is the stored one."""
    import google_crc32c

    found = google_crc32c.value(data)
    if found != stored:
        raise blame.error("checksum", "bytes are damaged", f"expected crc32c {stored:08x}, found {found:08x}")
