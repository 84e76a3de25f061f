"""Somebody else's Parquet table, read in a child process: Arrow trusts what a file says about itself.

A table of 30 kB can expand to gigabytes, and a footer made to hurt can end the process that reads it. The child gets
the bytes on stdin, under the limits of `stages/dataset/decoding.py`, and answers with JSON on stdout.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Sequence

import msgspec

from schemas.base import UNREADABLE, Strict
from schemas.errors import Fault, NoResources, RejectedInput
from stages.dataset.decoder import child_command, child_environment
from stages.dataset.decoding import confine

MODULE = "stages.dataset.reading"
LIBRARIES = ("msgspec", "numpy", "pyarrow")
SECONDS = 120
# The interpreter and Arrow map 0.4 GB; rows of the most text that is taken need half as much again.
MEMORY_BYTES = 3 << 29
READ, REFUSED = 0, 3


class Read(Strict, frozen=True):
    """What a child answers: rows, or why there are none."""

    rows: list[dict[str, str]]
    fault: Fault | None = None


def texts_of(data: bytes, columns: Sequence[str]) -> list[dict[str, str]] | Fault:
    """Return what `stores.tables.read_texts` does, or the fault. Raises NoResources when no child can be started."""
    command = child_command(MODULE, *columns)
    try:
        done = subprocess.run(
            command, input=data, capture_output=True, check=False, timeout=SECONDS, env=child_environment(*LIBRARIES)
        )
        read = msgspec.json.decode(done.stdout, type=Read)
    except OSError as error:
        raise NoResources(
            "reader.not_started", "cannot start a process", why=str(error), fix="free some memory, then run again"
        ) from error
    except subprocess.TimeoutExpired:
        return _fault("table.too_slow", "reading the table takes too long", f"stopped after {SECONDS} s")
    except UNREADABLE:
        return _fault("table.crash", "the table ends whoever reads it", f"exit code {done.returncode}")
    return read.rows if read.fault is None else read.fault


def _fault(code: str, what: str, why: str) -> Fault:
    fix = "write it as metadata.jsonl with the fields file_name and text"
    return Fault(code=code, what=what, why=why, fix=fix)


def main() -> None:
    """Read the table on stdin; argv names the columns."""
    from stages.stores.tables import read_texts

    # Imports whatever reading a table needs: afterwards no file can be opened.
    with contextlib.suppress(RejectedInput):
        read_texts(b"", ())
    data = sys.stdin.buffer.read()
    confine(MEMORY_BYTES)
    try:
        answer = Read(rows=read_texts(data, sys.argv[1:]))
    except RejectedInput as error:
        answer = Read(rows=[], fault=error.faults[0])
    sys.stdout.buffer.write(msgspec.json.encode(answer))


if __name__ == "__main__":
    main()
