"""Places where something is to be written: whether that may be done and how much fits, asked before any work."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from schemas.errors import NoResources

FIX = "free some space, or name a place on another disk (--store, --runs)"


def existing(place: Path) -> Path:
    """Return the place, or the nearest one above it that is there already."""
    return next(each for each in (place.absolute(), *place.absolute().parents) if each.exists())


def free_bytes(place: Path) -> int:
    """Return what is free on the disk that `place` is on, or will be."""
    return shutil.disk_usage(existing(place)).free


def disk_of(place: Path) -> int:
    """Return which disk `place` is on, or will be."""
    return existing(place).stat().st_dev


def require_writable(folder: Path) -> None:
    """Raise OSError unless files can be put into `folder`, which may have to be made."""
    there = existing(folder)
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there))
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(there))


def require_room(place: Path, need_bytes: float, *, why: str, fix: str = FIX) -> None:
    """Raise NoResources unless the disk that `place` is on, or will be, has so much room."""
    free = free_bytes(place)
    if need_bytes > free:
        what = f"need about {need_bytes / 1e6:.1f} MB, {free / 1e6:.1f} MB free"
        raise NoResources("disk.full", what, where=str(place), why=why, fix=fix)
