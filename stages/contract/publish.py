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
from collections.abc import Generator
from pathlib import Path

from schemas.errors import NoResources
from stages.contract.digests import sha256_file

TEMPORARY = ".tmp"


@contextlib.contextmanager
def workspace(store: Path) -> Generator[Path]:
    """Yield a fresh folder below `<store>/.tmp`, removed afterwards; litter of dead processes is removed first."""
    base = store / TEMPORARY
    with no_resources(base):
        base.mkdir(parents=True, exist_ok=True)
    sweep(base)
    folder = base / uuid.uuid4().hex
    # Held as long as this process lives: what tells litter from work in progress.
    with (base / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder.mkdir()
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
def no_resources(path: Path) -> Generator[None]:
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


def publish_folder(work: Path, target: Path) -> None:
    """Sync every file and folder of `work`, rename it to `target`, sync the parent.

    A target with the same files and bytes stays; one that differs (damaged, or rebuilt by force) is replaced.
    """
    if target.exists() and _same_folder(work, target):
        return
    for path in sorted(work.rglob("*")):
        sync(path)
    sync(work)
    _move(work, target)


def publish_file(work: Path, target: Path) -> None:
    """Sync the file `work`, rename it to `target`, sync the parent; an equal target stays."""
    if target.is_file() and not target.is_symlink() and sha256_file(work) == sha256_file(target):
        return
    sync(work)
    _move(work, target)


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


def _move(work: Path, target: Path) -> None:
    _make_folder(target.parent)
    if target.exists():
        target.rename(work.parent / f"{uuid.uuid4().hex}.replaced")
    work.rename(target)
    sync(target.parent)


def _same_folder(left: Path, right: Path) -> bool:
    names = sorted(path.relative_to(left) for path in left.rglob("*") if path.is_file())
    if names != sorted(path.relative_to(right) for path in right.rglob("*") if not path.is_dir()):
        return False
    return all(
        not (right / name).is_symlink() and sha256_file(left / name) == sha256_file(right / name) for name in names
    )


def _make_folder(folder: Path) -> None:
    if folder.exists():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync(folder.parent)


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)
