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
import stat
import sys
import uuid
from collections.abc import Generator
from pathlib import Path
from typing import IO, Any

from schemas.errors import GIVEN, BadConfig, NoResources
from stages.contract.digests import sha256_bytes, sha256_file
from stages.contract.formats import FORMAT, missing_note, require_format
from stages.contract.memory import is_out_of_memory
from stages.contract.places import free_bytes

TEMPORARY = ".tmp"
# Of a file name, on every file system in use.
MOST_NAME_BYTES = 255


@contextlib.contextmanager
def workspace(store: Path) -> Generator[Path]:
    """Yield a fresh folder below `<store>/.tmp`, removed afterwards; litter of dead processes is removed first."""
    with no_resources(store / TEMPORARY):
        require_format(store)
        if (note := missing_note(store)) is not None:
            write_file(store / FORMAT, note)
        with _fresh(store / TEMPORARY) as folder:
            yield folder


@contextlib.contextmanager
def beside(target: Path) -> Generator[Path]:
    """Yield a fresh folder as `workspace` does, for a `target` that lies in no store; on its filesystem.

    Raises BadConfig where a symlink stands: it would be replaced, and what it leads to stay as it is.
    """
    refuse_link(target)
    target = target.absolute()
    base = sibling(target)
    with no_resources(base):
        try:
            with _fresh(base) as folder:
                yield folder
        finally:
            # Another process may be at work there too.
            with contextlib.suppress(OSError):
                base.rmdir()


@contextlib.contextmanager
def _fresh(base: Path) -> Generator[Path]:
    refuse_link(base)
    _sweep(base)
    with _held(base) as lock:
        folder = lock.with_suffix("")
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)


@contextlib.contextmanager
def _held(base: Path) -> Generator[Path]:
    """Hold a new lock file as long as this process lives: what tells work in progress from litter."""
    while True:
        make_folder(base)
        path = base / f"{uuid.uuid4().hex}.lock"
        try:
            lock = path.open("w")
        except FileNotFoundError:
            # Whoever was done there removed the folder at this moment.
            continue
        with lock:
            take(lock, fcntl.LOCK_EX, path)
            # Until it was held, somebody's sweep could take it for litter.
            if path.exists():
                yield path
                return


def take(file: IO[Any], operation: int, path: Path) -> bool:
    """Lock an open file by flock; False when another has it. Raises NoResources where there are no locks."""
    try:
        fcntl.flock(file, operation)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise NoResources(
            "lock.unsupported",
            "this file system has no locks",
            where=str(path),
            why=str(error),
            fix="keep store and results on a local disk (--store DIR, --runs DIR)",
        ) from error
    return True


def sweep(store: Path) -> None:
    """Remove the work folders in a store whose owner is gone; what cannot be removed is left for another time."""
    _sweep(store / TEMPORARY)


def sweep_beside(target: Path) -> None:
    """Remove what dead processes left beside a `target` that stands and is never written again."""
    base = sibling(target.absolute())
    _sweep(base)
    with contextlib.suppress(OSError):
        base.rmdir()


def _sweep(base: Path) -> None:
    for path in base.glob("*.lock"):
        try:
            with path.open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path.with_suffix(""), ignore_errors=True)
                path.unlink(missing_ok=True)
        except OSError:
            continue


@contextlib.contextmanager
def no_resources(path: Path) -> Generator[None]:
    """Turn a full disk, a missing permission, a limit, a failing device or full memory into an error with a remedy.

    `path` is what is named where the error names nothing, or only a file of ours on its way there.
    """
    try:
        yield
    except OSError as error:
        found = _refusal(error, _meant(error, path))
        if found is None:
            raise
        raise found from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        fix = f"close other programs, or ask for less: flux2-lora plan {GIVEN} says what each stage needs"
        raise NoResources("memory.full", "there is no memory left", why=str(error), fix=fix) from error


def _meant(error: OSError, path: Path) -> Path:
    """Return what could not be read or written: of a rename the target, and no name that only we know."""
    for name in (error.filename2, error.filename):
        named = Path(os.fsdecode(name)) if isinstance(name, str | bytes) else None
        if named is not None and TEMPORARY not in named.parts and named.suffix != TEMPORARY:
            return named
    return next((each.parent for each in path.parents if each.name == TEMPORARY), path)


def _refusal(error: OSError, where: Path) -> NoResources | None:
    """Return what the system's answer means to a person; None for what is no matter of resources."""
    why = error.strerror or str(error)
    match error.errno:
        case errno.EACCES | errno.EPERM | errno.EROFS:
            unread = os.path.lexists(where) and not os.access(where, os.R_OK)
            what, fix = (
                ("cannot read", "make it readable") if unread else ("cannot write", "make the folder writable")
            )
            return NoResources("disk.permission", what, where=str(where), why=why, fix=f"{fix}, or name another")
        case errno.ENOSPC | errno.EDQUOT:
            return NoResources(
                "disk.full",
                "the disk is full",
                where=str(where),
                why=f"{free_bytes(where) / 1e6:.0f} MB free",
                fix="free some space and run the same command again; finished work is kept",
            )
        case errno.ENOTDIR | errno.EISDIR | errno.ELOOP | errno.ENAMETOOLONG | errno.ENXIO:
            fix = "move away what is there, or name another folder"
            return NoResources("disk.in_the_way", "cannot write there", where=str(where), why=why, fix=fix)
        case errno.EFBIG | errno.EMFILE | errno.ENFILE:
            fix = "raise the limit (ulimit -a lists them), or name a place on another file system"
            return NoResources("disk.limit", "the system sets a limit", where=str(where), why=why, fix=fix)
        case errno.EIO | errno.EXDEV:
            fix = "check it, then run again"
            return NoResources("disk.failed", "the disk failed", where=str(where), why=str(error), fix=fix)
        case _:
            return None


def publish_folder(work: Path, target: Path) -> None:
    """Sync every file and folder of `work`, rename it to `target`, sync the parent.

    A target with the same files and bytes stays; one that differs (damaged, or rebuilt by force) or is a link is
    replaced.
    """
    if _same_folder(work, target):
        return
    for path in sorted(work.rglob("*")):
        sync(path)
    sync(work)
    while not _moved(work, target):
        # Another process published it since we looked.
        if _same_folder(work, target):
            return


def publish_file(work: Path, target: Path) -> None:
    """Sync the file `work`, rename it to `target`, sync the parent; an equal target stays."""
    if target.is_file() and not target.is_symlink() and sha256_file(work) == sha256_file(target):
        return
    sync(work)
    _moved(work, target)


def write_file(target: Path, data: bytes) -> None:
    """Write `data` to `target` by way of a synced sibling and a rename. Raises BadConfig where a symlink stands."""
    refuse_link(target)
    with no_resources(target):
        make_folder(target.parent)
        while not _written(data, sibling(target), target):
            # Another process renamed its own sibling of that name while we waited for it.
            continue
        sync(target.parent)


def sibling(target: Path) -> Path:
    """Return where the bytes of `target` are made ready, beside it: one name for all writers."""
    name = f".{target.name}{TEMPORARY}"
    if len(os.fsencode(name)) > MOST_NAME_BYTES:
        name = f".{sha256_bytes(os.fsencode(target.name))}{TEMPORARY}"
    return target.parent / name


def _written(data: bytes, aside: Path, target: Path) -> bool:
    """One name for all writers, and a lock: what a killed process leaves, the next one overwrites."""
    with open(aside, "ab", opener=regular) as file:
        try:
            take(file, fcntl.LOCK_EX, aside)
            if aside.stat().st_ino != os.fstat(file.fileno()).st_ino:
                return False
        except FileNotFoundError:
            return False
        except NoResources:
            aside.unlink()
            raise
        try:
            # Not the file's own: that one gives up when a signal interrupts it.
            os.ftruncate(file.fileno(), 0)
            file.write(data)
            file.flush()
            _sync_descriptor(file.fileno())
            aside.replace(target)
        except OSError:
            aside.unlink()
            raise
    return True


def sweep_siblings(folder: Path) -> None:
    """Remove from a folder what writers that died left aside: files of a name that nobody may ever write again."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError), open(path, "rb", opener=regular) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its writer may have published it, and another begun, since we looked.
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                path.unlink()


def regular(path: str, flags: int) -> int:
    """Open a file; raise OSError for a link, a pipe or a device that somebody put in its place."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.ENXIO, "not a regular file", path)
    return descriptor


def read_regular(path: Path) -> bytes:
    """Return a file's bytes. Raises OSError as `regular` does: an ordinary open would wait for a pipe's writer."""
    with open(path, "rb", opener=regular) as file:
        return file.read()


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


def _moved(work: Path, target: Path) -> bool:
    """Rename `work` to `target`; False when another process put a folder there at this moment."""
    refuse_link(target.parent)
    make_folder(target.parent)
    # A file takes a file's place in one rename; a folder needs the place free.
    if target.is_dir() or target.is_symlink():
        with contextlib.suppress(FileNotFoundError):
            target.rename(work.parent / f"{uuid.uuid4().hex}.replaced")
    try:
        work.rename(target)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            return False
        raise
    sync(target.parent)
    return True


def _same_folder(left: Path, right: Path) -> bool:
    if right.is_symlink() or not right.is_dir():
        return False
    names = sorted(path.relative_to(left) for path in left.rglob("*") if path.is_file())
    if names != sorted(path.relative_to(right) for path in right.rglob("*") if not path.is_dir()):
        return False
    # Only files are read: a pipe in the place of one would wait for ever.
    real = all((right / name).is_file() and not (right / name).is_symlink() for name in names)
    return real and all(sha256_file(left / name) == sha256_file(right / name) for name in names)


def refuse_link(path: Path) -> None:
    """Raise BadConfig when `path` is a symlink: what is written there would land where nobody named."""
    if path.is_symlink():
        raise BadConfig(
            "output.symlink",
            "a symbolic link is in the way of what is to be written",
            where=str(path),
            why=f"it points to {path.readlink()}",
            fix="remove the link, or name the place it points to",
        )


def make_folder(folder: Path) -> None:
    """Make `folder` and those above it, durably. Raises OSError, also where something else is in the way."""
    if folder.is_dir():
        return
    if os.path.lexists(folder):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    make_folder(folder.parent)
    try:
        folder.mkdir(exist_ok=True)
    except FileNotFoundError as error:
        if not folder.parent.is_dir():
            raise
        # So says a file system of the kernel's own, such as /proc, where nobody can make anything.
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder)) from error
    sync(folder.parent)
