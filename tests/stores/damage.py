"""Ways to damage a file, each undone before the next: what a disk, a copy or a person may do to an artifact."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path


def flipped_bits(path: Path, count: int, *, within: range | None = None) -> Iterator[int]:
    """Flip one seeded random bit at a time; yields the byte's offset while it is flipped."""
    whole = path.read_bytes()
    random_bits = random.Random(7)
    for _ in range(count):
        offset = random_bits.choice(within or range(len(whole)))
        damaged = bytearray(whole)
        damaged[offset] ^= 1 << random_bits.randrange(8)
        path.write_bytes(damaged)
        yield offset
    path.write_bytes(whole)


def other_lengths(path: Path, count: int) -> Iterator[int]:
    """Cut the file at `count` places, empty and one byte short among them, then lengthen it."""
    whole = path.read_bytes()
    draw = random.Random(8)
    cuts = sorted({0, 1, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(count))})
    for data in (*(whole[:cut] for cut in cuts), whole + b"\0", whole + whole):
        path.write_bytes(data)
        yield len(data)
    path.write_bytes(whole)


def zeroed_pages(path: Path, size: int = 256) -> Iterator[int]:
    """Zero one page at a time, as a filesystem does after a crash; pages of zeros are skipped."""
    whole = path.read_bytes()
    for start in range(0, len(whole), size):
        zeros = b"\0" * len(whole[start : start + size])
        if whole[start : start + size] != zeros:
            path.write_bytes(whole[:start] + zeros + whole[start + size :])
            yield start
    path.write_bytes(whole)


def not_plain_files(path: Path, elsewhere: Path) -> Iterator[str]:
    """Replace the file by nothing, by a folder, by a link to its own bytes and by a pipe nobody writes to."""
    path.rename(elsewhere)
    yield "nothing"
    path.mkdir()
    yield "a folder"
    path.rmdir()
    path.symlink_to(elsewhere)
    yield "a link"
    path.unlink()
    os.mkfifo(path)
    yield "a pipe"
    path.unlink()
    elsewhere.rename(path)
