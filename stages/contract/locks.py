"""Locks by flock: held by a process, freed by its death, never stale."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Generator
from io import FileIO
from pathlib import Path

from schemas.errors import Busy
from stages.contract.publish import make_folder, no_resources, refuse_link, regular, take

# Of who holds a lock, read for a message.
MOST_BYTES = 1024


@contextlib.contextmanager
def hold(path: Path, *, wait: bool, waiting: Callable[[str], None]) -> Generator[None]:
    """Hold the lock at `path` while the body runs.

    When another process has it: with `wait`, call `waiting` with who that is and block; else raise Busy.
    """
    with _opened(path) as file:
        if not take(file, fcntl.LOCK_EX | fcntl.LOCK_NB, path):
            file.seek(0)
            holder = file.read(MOST_BYTES).decode("utf-8", "replace").strip() or "another process"
            if not wait:
                raise Busy(
                    "lock.held",
                    "another process is at work here",
                    where=path.stem,
                    why=holder,
                    fix="let it finish, then give the same command again; a stage or gc waits for it with --wait",
                )
            waiting(f"waiting for {holder}")
            take(file, fcntl.LOCK_EX, path)
        _say_who(file, f"pid {os.getpid()} on {os.uname().nodename}")
        try:
            yield
        finally:
            _say_who(file, "")


@contextlib.contextmanager
def _opened(path: Path) -> Generator[FileIO]:
    with no_resources(path):
        refuse_link(path.parent)
        make_folder(path.parent)
        file = FileIO(path, "a+", opener=regular)
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


@contextlib.contextmanager
def share(path: Path, waiting: Callable[[str], None]) -> Generator[None]:
    """Hold the lock at `path` together with all who share it; while they do, nobody can `hold` it.

    Where we may not write nobody takes anything away in our name, so there is nothing to wait for. Raises NoResources
    where the file cannot be made for any other reason: reading would go on unprotected.
    """
    with no_resources(path):
        try:
            make_folder(path.parent)
            file = FileIO(path, "r", opener=_made)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            file = None
    if file is None:
        yield
        return
    with file:
        if not take(file, fcntl.LOCK_SH | fcntl.LOCK_NB, path):
            waiting(f"waiting for {file.read(MOST_BYTES).decode('utf-8', 'replace').strip() or 'another process'}")
            take(file, fcntl.LOCK_SH, path)
        yield


def _made(path: str, flags: int) -> int:
    """Open for reading what is made if need be: there it may be that only others can write."""
    return regular(path, flags | os.O_CREAT)
