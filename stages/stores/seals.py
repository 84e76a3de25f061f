"""Seals: what Parquet lacks to be believed. A sealed file is plain Parquet with a seal before its footer:

    PAR1 | row groups | seal | footer | footer's length | PAR1
    seal = for each row group (length u64, crc32c u32) | number of row groups u32 | sha256 of all that follows PAR1
    but for the row groups and itself

Parquet's page checksums leave page headers and the footer open, and a footer with one flipped bit can make Arrow end
the process. So nothing reaches Arrow before its seal holds. Other readers never see a seal: no offset points to it.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from stages.stores.blame import Blame, check_crc32c, file_size, read_bytes

if TYPE_CHECKING:
    from pyarrow import parquet

MAGIC = b"PAR1"
COUNT_BYTES = 4
SHA256_BYTES = 32
ENTRY = np.dtype([("length", "<u8"), ("crc32c", "<u4")])
# The footer's length and the closing magic.
TAIL_BYTES = 8
MOST_GROUPS = 1 << 12


@dataclass(frozen=True)
class Sealed:
    """A Parquet file whose footer is as it was written, and where its row groups lie: (offset, length, crc32c)."""

    path: Path
    footer: bytes
    groups: tuple[tuple[int, int, int], ...]

    def metadata(self) -> parquet.FileMetaData:
        """Return the footer as Arrow reads it."""
        import pyarrow as pa
        from pyarrow import parquet

        return parquet.read_metadata(pa.BufferReader(MAGIC + self.footer))

    def check_group(self, group: int, blame: Blame) -> None:
        """Raise Damaged when a byte of a row group is not as it was written."""
        offset, length, crc32c = self.groups[group]
        check_crc32c(read_bytes(self.path, offset, length, blame), crc32c, blame)


def seal(path: Path) -> None:
    """Put the seal into a Parquet file just written. Raises OSError when it cannot be read back."""
    import google_crc32c
    from pyarrow import ArrowInvalid, parquet

    try:
        metadata = parquet.read_metadata(path)
    except ArrowInvalid as error:
        raise _lost(path.name) from error
    with path.open("r+b") as file:
        footer_at = file.seek(-TAIL_BYTES - metadata.serialized_size, 2)
        footer = _exactly(file, TAIL_BYTES + metadata.serialized_size)
        ends = [*(_start(metadata.row_group(group)) for group in range(1, metadata.num_row_groups)), footer_at]
        file.seek(len(MAGIC))
        entries = np.zeros(metadata.num_row_groups, ENTRY)
        for entry, end in zip(entries, ends, strict=False):
            group = _exactly(file, end - file.tell())
            entry["length"], entry["crc32c"] = len(group), google_crc32c.value(group)
        listing = entries.tobytes() + len(entries).to_bytes(COUNT_BYTES, "little")
        file.seek(footer_at)
        file.write(listing + hashlib.sha256(listing + footer).digest() + footer)


def _exactly(file: BinaryIO, count: int) -> bytes:
    """Return the next bytes of a file just written. Raises OSError when it gives fewer: sealed, that would pass."""
    data = file.read(count)
    if len(data) != count:
        raise _lost(file.name)
    return data


def _lost(name: str) -> OSError:
    return OSError(errno.EIO, "what was just written cannot be read back", name)


def open_sealed(path: Path, blame: Blame) -> Sealed:
    """Return the file once its seal holds and accounts for every byte. Raises Damaged."""
    size = file_size(path, blame)
    fixed = COUNT_BYTES + SHA256_BYTES
    if size < len(MAGIC) + fixed + TAIL_BYTES:
        raise blame.error("truncated", f"{path.name} is too short", f"{size} bytes")
    tail = read_bytes(path, size - TAIL_BYTES, TAIL_BYTES, blame)
    footer_at = size - TAIL_BYTES - int.from_bytes(tail[:4], "little")
    if tail[4:] != MAGIC or footer_at < len(MAGIC) + fixed or read_bytes(path, 0, len(MAGIC), blame) != MAGIC:
        raise blame.error("not_parquet", f"{path.name} is not a whole Parquet file")
    end = read_bytes(path, footer_at - fixed, size - footer_at + fixed, blame)
    count = int.from_bytes(end[:COUNT_BYTES], "little")
    seal_at = footer_at - fixed - count * ENTRY.itemsize
    broken = blame.error("seal", f"{path.name} is damaged, or was not written here", "its seal does not fit")
    if count > MOST_GROUPS or seal_at < len(MAGIC):
        raise broken
    listed = read_bytes(path, seal_at, count * ENTRY.itemsize, blame)
    footer = end[fixed:]
    if hashlib.sha256(listed + end[:COUNT_BYTES] + footer).digest() != end[COUNT_BYTES:fixed]:
        raise broken
    entries = np.frombuffer(listed, ENTRY)
    lengths: list[int] = entries["length"].tolist()
    if len(MAGIC) + sum(lengths) != seal_at:
        raise blame.error("size", f"{path.name} has another size", f"found {size} bytes")
    offsets = itertools.accumulate(lengths[:-1], initial=len(MAGIC))
    return Sealed(path, footer, tuple(zip(offsets, lengths, entries["crc32c"].tolist(), strict=False)))


def _start(group: parquet.RowGroupMetaData) -> int:
    first = group.column(0)
    return first.dictionary_page_offset or first.data_page_offset
