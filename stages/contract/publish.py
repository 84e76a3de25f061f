"""The one way anything is published: written aside, synced, renamed, its folder synced.

Work happens below `<store>/.tmp` on the target's own filesystem, so the rename is atomic; a process that dies leaves
only litter there, which the next run removes once its owner's lock is free.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

from schemas.errors import NoResources

TEMPORARY = ".tmp"


@contextlib.contextmanager
def workspace(store: Path) -> Iterator[Path]:
    """Yield a fresh folder below `<store>/.tmp`, removed afterwards; litter of dead processes is removed first."""
    base = store / TEMPORARY
    with no_resources(base):
        base.mkdir(parents=True, exist_ok=True)
    sweep(base)
    folder = base / uuid.uuid4().hex
    folder.mkdir()
    # Held as long as this process lives: what tells litter from work in progress.
    with (base / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            with no_resources(folder):
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            Path(lock.name).unlink(missing_ok=True)


def sweep(base: Path) -> None:
    """Remove work folders below `base` whose owner is gone."""
    for path in base.glob("*.lock"):
        try:
            with path.open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path.with_suffix(""), ignore_errors=True)
                path.unlink(missing_ok=True)
        except (BlockingIOError, FileNotFoundError):
            continue


@contextlib.contextmanager
def no_resources(path: Path) -> Iterator[None]:
    """Turn a full disk, a missing permission or a failing device into an error with a remedy."""
    try:
        yield
    except PermissionError as error:
        raise NoResources(
            "disk.permission", "cannot write", where=str(error.filename or path), fix="make the folder writable"
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free_bytes = shutil.disk_usage(_existing(path)).free
            raise NoResources(
                "disk.full",
                "the disk is full",
                where=str(path),
                why=f"{free_bytes / 1e6:.0f} MB free",
                fix="free some space and run the same command again; finished work is kept",
            ) from error
        if error.errno in (errno.EIO, errno.EROFS, errno.EXDEV):
            raise NoResources(
                "disk.failed", "cannot write", where=str(path), why=str(error), fix="check the disk, then run again"
            ) from error
        raise


def publish_folder(work: Path, target: Path) -> bool:
    """Sync every file and folder of `work`, rename it to `target`, sync the parent.

    Returns False when `target` already exists: a published thing is immutable, the first one wins.
    """
    for path in sorted(work.rglob("*")):
        sync(path)
    sync(work)
    return _move(work, target)


def publish_file(work: Path, target: Path) -> bool:
    """Sync the file `work`, rename it to `target`, sync the parent. False when `target` already exists."""
    sync(work)
    return _move(work, target)


def replace_folder(work: Path, target: Path) -> None:
    """Publish `work` over `target`, whose old content moves into `work`'s folder and dies with it."""
    if target.exists():
        target.rename(work.parent / f"{work.name}.replaced")
    publish_folder(work, target)


def write_file(target: Path, data: bytes) -> None:
    """Write `data` to `target` by way of a synced sibling and a rename; a symlink is replaced, never followed."""
    with no_resources(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.parent / f".{uuid.uuid4().hex}.tmp"
        try:
            with aside.open("wb") as file:
                file.write(data)
                file.flush()
                _sync_descriptor(file.fileno())
            aside.replace(target)
            sync(target.parent)
        finally:
            aside.unlink(missing_ok=True)


def copy_file(source: Path, target: Path) -> None:
    """Copy `source` to `target` as `write_file` does."""
    write_file(target, source.read_bytes())


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's entries, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _sync_descriptor(descriptor)
    finally:
        os.close(descriptor)


def _sync_descriptor(descriptor: int) -> None:
    if sys.platform == "darwin":
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)  # fsync alone stops at the drive's cache there
    else:
        os.fsync(descriptor)


def _move(work: Path, target: Path) -> bool:
    _make_folder(target.parent)
    if target.exists():
        return False
    try:
        work.rename(target)
    except OSError as error:
        # ENOTEMPTY, EEXIST: another process published the same thing between the look and the rename.
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    sync(target.parent)
    return True


def _make_folder(folder: Path) -> None:
    if folder.exists():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync(folder.parent)


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)
