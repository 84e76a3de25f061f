"""Lines and tables for the person, on stderr; the result for programs, on stdout.

Text from outside is escaped before it reaches a terminal. Nothing here needs rich except a table.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from schemas.errors import Fault, printable
from schemas.events import VARIABLE, Said
from stages.console.streams import silence
from stages.contract.publish import no_resources

PREFIX = {"info": "", "warning": "warning: ", "error": ""}
# Where stderr is no terminal there is no width to fit into.
PLAIN_WIDTH = 160

_quiet = False


def configure(*, quiet: bool) -> None:
    """Leave out everything that is neither a warning nor an error, for the rest of this process."""
    global _quiet
    _quiet = quiet


def say(text: str) -> None:
    """Tell the person one line."""
    if not _quiet:
        _write("info", text)


def warn(text: str) -> None:
    """Warn the person in one line, even when quiet."""
    _write("warning", text)


def faults(listed: Sequence[Fault]) -> None:
    """Print every fault as a line: `error[<code>] <what> (<where>): <why>. fix: <remedy>`."""
    for fault in listed:
        _write("error", fault.line())


def result(data: bytes) -> None:
    """Print the result, one JSON object, as a line on stdout. Raises NoResources, BrokenPipeError."""
    with no_resources(Path("/dev/stdout")):
        try:
            sys.stdout.buffer.write(data + b"\n")
            sys.stdout.buffer.flush()
        except OSError:
            silence(sys.stdout)
            raise


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table for the person: the first column is named, the others are aligned to the right."""
    if _quiet:
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(stderr=True, width=None if sys.stderr.isatty() else PLAIN_WIDTH, highlight=False)
    shown = Table(title=Text(printable(title), "bold"), title_justify="left", box=None, pad_edge=False)
    for column, name in enumerate(header):
        shown.add_column(Text(printable(name)), justify="right" if column else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(Text(printable(cell)) for cell in row))
    console.print(shown)


def _write(level: Literal["info", "warning", "error"], text: str) -> None:
    line = printable(f"{PREFIX[level]}{text}")
    if os.environ.get(VARIABLE) == "1":
        line = msgspec.json.encode(Said(level=level, text=printable(text))).decode()
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
