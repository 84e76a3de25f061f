"""Locks by flock: held by a process, freed by its death, never stale."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import IO

from schemas.errors import Busy, NoResources
from stages.contract.publish import make_folder, no_resources


@contextlib.contextmanager
def hold(path: Path, *, wait: bool, waiting: Callable[[str], None]) -> Generator[None]:
    """Hold the lock at `path` while the body runs.

    When another process has it: with `wait`, call `waiting` with who that is and block; else raise Busy.
    """
    with no_resources(path):
        make_folder(path.parent)
        file = path.open("a+")
    with file:
        if not _take(file, fcntl.LOCK_EX | fcntl.LOCK_NB, path):
            file.seek(0)
            holder = file.read().strip() or "another process"
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
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {os.uname().nodename}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _take(file: IO[str], operation: int, path: Path) -> bool:
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
