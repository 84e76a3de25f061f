"""Locks by flock: held by a process, freed by its death, never stale."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Generator
from io import FileIO
from pathlib import Path

from schemas.errors import Busy, NoResources
from stages.contract.publish import make_folder, no_resources

# Of who holds a lock, read for a message.
MOST_BYTES = 1024


@contextlib.contextmanager
def hold(path: Path, *, wait: bool, waiting: Callable[[str], None]) -> Generator[None]:
    """Hold the lock at `path` while the body runs.

    When another process has it: with `wait`, call `waiting` with who that is and block; else raise Busy.
    """
    with _opened(path) as file:
        if not _take(file, fcntl.LOCK_EX | fcntl.LOCK_NB, path):
            file.seek(0)
            holder = file.read(MOST_BYTES).decode("utf-8", "replace").strip() or "another process"
            if not wait:
                raise Busy(
                    "lock.held",
                    "another process is at work here",
                    where=path.stem,
                    why=holder,
                    fix="let it finish, or wait for it with --wait",
                )
            waiting(f"waiting for {holder}")
            _take(file, fcntl.LOCK_EX, path)
        _say_who(file, f"pid {os.getpid()} on {os.uname().nodename}")
        try:
            yield
        finally:
            _say_who(file, "")


@contextlib.contextmanager
def _opened(path: Path) -> Generator[FileIO]:
    with no_resources(path):
        make_folder(path.parent)
        file = path.open("a+b", buffering=0)
    try:
        yield file
    finally:
        # The lock goes with the descriptor, whether or not the disk likes what was written.
        with contextlib.suppress(OSError):
            file.close()


def _say_who(file: FileIO, who: str) -> None:
    """Write who holds the lock, for those who wait: a full disk that cannot take it is not worth an error."""
    with contextlib.suppress(OSError):
        file.truncate(0)
        file.write(who.encode())


def _take(file: FileIO, operation: int, path: Path) -> bool:
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
            fix="put the store on a local disk (--store DIR)",
        ) from error
    return True


@contextlib.contextmanager
def share(path: Path, waiting: Callable[[str], None]) -> Generator[None]:
    """Hold the lock at `path` together with all who share it; while they do, nobody can `hold` it.

    Where its file cannot be made nobody can take anything away either, so there is nothing to wait for.
    """
    try:
        if not path.exists():
            make_folder(path.parent)
            path.touch()
        file = path.open("rb", buffering=0)
    except OSError:
        yield
        return
    with file:
        if not _take(file, fcntl.LOCK_SH | fcntl.LOCK_NB, path):
            waiting(f"waiting for {file.read().decode('utf-8', 'replace').strip() or 'another process'}")
            _take(file, fcntl.LOCK_SH, path)
        yield
