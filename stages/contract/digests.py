"""Digests: what a thing is, as 64 hex digits of sha256.

Values are hashed as canonical JSON under a kind, so that no digest of one kind passes as another. File digests are
remembered by stat (`StatCache`) with git's rule for files written too recently to trust their times.
"""

from __future__ import annotations

import errno
import hashlib
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from os import fstat, stat_result
from pathlib import Path
from typing import NamedTuple

import msgspec

CHUNK_BYTES = 1 << 20
# A file modified this close to being hashed may change again without its times showing it.
RACY_NS = 2_000_000_000

# Rows asked for together; SQLite takes at least 999 parameters.
ROWS_TOGETHER = 500

# What SQLite answers where the file is damaged or of another layout; not where it is locked, or the disk full.
DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)

Row = tuple[str, str, str, str]
COLUMNS = "what TEXT PRIMARY KEY, stat TEXT, value TEXT, seal TEXT"

# Of what only a look ahead names: no digest that was computed, and equal to none.
UNKNOWN = "unknown "

_encoder = msgspec.json.Encoder(order="sorted")


def canonical_json(value: object) -> bytes:
    """Return `value` as compact UTF-8 JSON with sorted keys: equal values, equal bytes."""
    return _encoder.encode(value)


def digest_of(kind: str, value: object) -> str:
    """Return the hex sha256 of `value`'s canonical JSON, prefixed by its kind."""
    return sha256_bytes(f"flux2-lora/{kind}\n".encode() + canonical_json(value))


def unknown(what: str) -> str:
    """Return what stands for a digest that is not known yet; different for each `what`."""
    return f"{UNKNOWN}{what}"


def is_unknown(digest: str) -> bool:
    """Return whether `digest` only stands for one."""
    return digest.startswith(UNKNOWN)


def is_digest(text: str) -> bool:
    """Return whether `text` is spelled as a digest is: what names whatever this program made."""
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


def sha256_bytes(data: bytes) -> str:
    """Return the hex sha256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the hex sha256 of a file's bytes. Raises OSError when it gives fewer than it has."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
        # Recorded for a file that the disk failed to give whole, it would make a whole file pass for damaged.
        if file.tell() < fstat(file.fileno()).st_size:
            raise OSError(errno.EIO, "the file cannot be read to its end", str(path))
    return digest.hexdigest()


def read_proved(path: Path, sha256: str) -> bytes:
    """Return a file's bytes. Raises OSError when those read have another digest: a copy of them would be believed."""
    data = path.read_bytes()
    if sha256_bytes(data) != sha256:
        raise OSError(errno.EIO, f"what was read is not what the file holds: expected sha256 {sha256}", str(path))
    return data


class State(NamedTuple):
    """What files look like from outside: equal `text`, equal bytes; `youngest_ns` is the last of all their times."""

    text: str
    youngest_ns: int


class StatCache:
    """Remembers what was computed from files, for as long as their stat stays the same.

    The database lies in `<store>/lookup/` and may be deleted at any time; a damaged one is started anew.
    """

    def __init__(self, path: Path, *, paranoid: bool = False, look_only: bool = False) -> None:
        """Use the database at `path`; with `paranoid`, believe nothing in it and compute everything anew.

        With `look_only` nothing is written, so what is computed is forgotten.
        """
        self._path = path
        self._paranoid = paranoid
        self._look_only = look_only
        if not look_only:
            path.parent.mkdir(parents=True, exist_ok=True)

    def files(self, paths: Sequence[Path]) -> list[str]:
        """Return the sha256 of each file, reading only those whose stat changed."""
        return self.many([(f"sha256 {path.absolute()}", [path], partial(sha256_file, path)) for path in paths])

    def one(self, what: str, paths: Sequence[Path], compute: Callable[[], str]) -> str:
        """Return `compute()`, remembered under `what` until one of `paths` changes."""
        return self.many([(what, paths, compute)])[0]

    def recalled(self, what: str, paths: Sequence[Path]) -> str | None:
        """Return what is remembered under `what`; None where it would have to be computed."""
        return None if self._paranoid else self._recall([what]).get((what, _state(paths).text))

    def recall(self, names: Sequence[str]) -> dict[str, str]:
        """Return the values of those of `names` that `remember` was told: their names say all they follow from."""
        return (
            {} if self._paranoid else {what: value for (what, stat), value in self._recall(names).items() if not stat}
        )

    def remember(self, values: Mapping[str, str]) -> None:
        """Remember values that follow from their names alone, such as what was found in bytes of a digest."""
        if values and not self._look_only:
            self._remember([(what, "", value) for what, value in values.items()])

    def many(self, asked: Sequence[tuple[str, Sequence[Path], Callable[[], str]]]) -> list[str]:
        """Return the value of each (what, paths, compute), in order."""
        return self._values([(what, partial(_state, paths), compute) for what, paths, compute in asked])

    def looked(self, what: str, look: Callable[[], State], compute: Callable[[], str]) -> str:
        """Return `compute()`, remembered under `what` until `look()` says something else."""
        return self._values([(what, look, compute)])[0]

    def _values(self, asked: Sequence[tuple[str, Callable[[], State], Callable[[], str]]]) -> list[str]:
        known = {} if self._paranoid else self._recall([what for what, _, _ in asked])
        values: list[str] = []
        fresh: list[tuple[str, str, str]] = []
        for what, look, compute in asked:
            state = look()
            if (what, state.text) in known:
                values.append(known[what, state.text])
                continue
            started_ns = time.time_ns()
            values.append(compute())
            # Unchanged while it was read, and old enough that a later edit must move its times.
            if look() == state and state.youngest_ns < started_ns - RACY_NS:
                fresh.append((what, state.text, values[-1]))
        if fresh and not self._look_only:
            self._remember(fresh)
        return values

    def _recall(self, names: Sequence[str]) -> dict[tuple[str, str], str]:
        """Return (what, stat) -> value of the rows that are what was written."""
        select = "SELECT what, stat, value, seal FROM remembered WHERE what IN ({})"

        def rows(database: sqlite3.Connection) -> list[Row]:
            return [
                row
                for start in range(0, len(names), ROWS_TOGETHER)
                for together in [names[start : start + ROWS_TOGETHER]]
                for row in database.execute(select.format(",".join("?" * len(together))), together)
            ]

        return {
            (what, stat): value for what, stat, value, seal in self._ask(rows) if seal == _seal(what, stat, value)
        }

    def _remember(self, rows: Sequence[tuple[str, str, str]]) -> None:
        sealed = [(*row, _seal(*row)) for row in rows]
        self._ask(
            lambda database: database.executemany("INSERT OR REPLACE INTO remembered VALUES (?, ?, ?, ?)", sealed)
        )

    def _ask(self, question: Callable[[sqlite3.Connection], Iterable[Row]]) -> list[Row]:
        """Return the rows `question` finds; none where the database does not answer.

        A damaged one is started anew. One that is locked, or that the disk has no room for, stays as it is.
        """
        if self._look_only:
            return self._ask_only(question)
        try:
            with closing(sqlite3.connect(self._path, timeout=30)) as database, database:
                database.execute(f"CREATE TABLE IF NOT EXISTS remembered ({COLUMNS})")
                return list(question(database))
        except sqlite3.DatabaseError as error:
            # Text that is no UTF-8 is damage which Python finds, without a code. Above the low byte is detail.
            damaged = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF in DAMAGED
            with suppress(OSError):
                for path in (self._path, Path(f"{self._path}-journal")) if damaged else ():
                    path.unlink(missing_ok=True)
            return []

    def _ask_only(self, question: Callable[[sqlite3.Connection], Iterable[Row]]) -> list[Row]:
        read_only = f"{self._path.absolute().as_uri()}?mode=ro"
        try:
            with closing(sqlite3.connect(read_only, timeout=30, uri=True)) as database:
                return list(question(database))
        except sqlite3.DatabaseError:
            return []


def _seal(what: object, stat: object, value: object) -> str:
    """SQLite keeps no checksums: a flipped bit in a digest would pass for another file's."""
    return digest_of("remembered", [what, stat, value])


def _state(paths: Iterable[Path]) -> State:
    stats = [path.stat() for path in paths]
    return State(canonical_json([identity(each) for each in stats]).decode(), max(map(youngest_ns, stats)))


def identity(stat: stat_result) -> tuple[int, int, int, int]:
    """Return what no edit leaves as it was: size, both times in nanoseconds, inode."""
    return (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


def youngest_ns(stat: stat_result) -> int:
    """Return the later of the times at which content or inode changed, in nanoseconds."""
    return max(stat.st_mtime_ns, stat.st_ctime_ns)
