"""The standard streams as the program needs them: all of them there, and a stderr that takes everything.

What people are told is never worth the work: a terminal that was closed, a reader that left (Ctrl-C ends `| tee` too)
or a log on a full disk loses lines, not a training.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any, TextIO


class _Lossy(io.FileIO):
    """A file that takes everything; what cannot be written is lost."""

    def write(self, data: Any, /) -> int:
        """Return the size of `data`, or how much of it was written."""
        written = None
        with contextlib.suppress(OSError):
            written = super().write(data)
        return memoryview(data).nbytes if written is None else written


def steady() -> None:
    """Open the null device in place of standard streams that are closed, and let stderr lose what it cannot write."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free, which is this one: else the next file would get what is said.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # noqa: FBT003
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    encoding = sys.stderr.encoding if sys.stderr else "utf-8"
    stderr = io.BufferedWriter(_Lossy(2, "w", closefd=False))
    sys.stderr = io.TextIOWrapper(stderr, encoding, "backslashreplace", line_buffering=True)


def silence(stream: TextIO) -> None:
    """Let what is still to be written to `stream` go nowhere: Python would complain when it flushes at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
