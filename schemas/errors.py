"""The errors a person meets: each says what happened, where, why, and the remedy.

A fault is one line; a `StageError` carries one or more faults of one kind and the exit code they end with.
Every exit code of the command line has exactly one class here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import ClassVar

import msgspec

from schemas.base import Strict

# What a fix says for the settings and places of the command line, where only the command knows them.
GIVEN = "--config ..."


class Fault(Strict, frozen=True):
    """One fault: a stable code, what happened, where (file, item or field), expected vs found, the remedy."""

    code: str
    what: str
    where: str = ""
    why: str = ""
    fix: str = ""

    def given(self, words: str) -> Fault:
        """Return the fault whose fix says `words`, the settings and places of the command line, again."""
        return msgspec.structs.replace(self, fix=self.fix.replace(GIVEN, words))

    def line(self) -> str:
        """Return the line people see, with control characters from outside escaped."""
        where = f" ({self.where})" if self.where else ""
        why = f": {self.why}" if self.why else ""
        fix = f". fix: {self.fix}" if self.fix else ""
        return printable(f"error[{self.code}] {self.what}{where}{why}{fix}")


def legible(name: str) -> str:
    r"""Return a name from the system as text that can be printed and stored: what is not UTF-8 becomes `\xe9`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def printable(text: str) -> str:
    """Escape control, bidirectional and undecodable characters, so that a file name cannot drive a terminal."""
    return "".join(
        char if char.isprintable() or char == " " else char.encode("unicode_escape", "surrogatepass").decode("ascii")
        for char in text
    )


class StageError(Exception):
    """Base of all expected failures; `exit_code` is the process's exit code."""

    exit_code: ClassVar[int] = 1

    def __init__(self, code: str, what: str, *, where: str = "", why: str = "", fix: str = "") -> None:
        self.faults: tuple[Fault, ...] = (Fault(code=code, what=what, where=where, why=why, fix=fix),)
        super().__init__(self.faults[0].line())

    @classmethod
    def of(cls, faults: Iterable[Fault]) -> StageError:
        """Return one error of this kind that lists several faults."""
        listed = tuple(faults)
        first = listed[0]
        error = cls(first.code, first.what, where=first.where, why=first.why, fix=first.fix)
        error.faults = listed
        return error


class BadConfig(StageError):
    """Usage or configuration: an unknown key, a wrong type, a value out of range."""

    exit_code = 2


class RejectedInput(StageError):
    """Input data rejected: a bad picture, a missing caption, an empty dataset."""

    exit_code = 3


class Damaged(StageError):
    """Integrity: a damaged, truncated or wrong-architecture file."""

    exit_code = 4


class Stale(StageError):
    """Lineage: an input artifact is missing or no longer matches what it was made from.

    `stage` is the stage whose inputs changed, where that is why.
    """

    exit_code = 5
    stage: str = ""

    @classmethod
    def since(cls, stage: str, code: str, what: str, *, where: str, fix: str) -> Stale:
        """Return the error that what `stage` read is not what it was."""
        error = cls(code, what, where=where, fix=fix)
        error.stage = stage
        return error


class Busy(StageError):
    """Another process holds the lock."""

    exit_code = 6


class NoResources(StageError):
    """Disk, permission, memory, or a model that is not on this machine."""

    exit_code = 7


class Diverged(StageError):
    """Training diverged or made no progress."""

    exit_code = 8


class Untrusted(StageError):
    """Trust refused."""

    exit_code = 9


class Stopped(StageError):
    """Stopped by a signal after the work done so far was made durable."""

    def __init__(self, signal_number: int, what: str, *, fix: str) -> None:
        super().__init__("run.stopped", what, fix=fix)
        self.signal_number = signal_number
