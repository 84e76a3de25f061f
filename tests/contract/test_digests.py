"""Digests of values and files, and the memory of file digests: quick, and never wrong."""

from __future__ import annotations

import io
import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest
from msgspec import to_builtins

from schemas.train import Train
from stages.contract import digests
from stages.contract.digests import (
    StatCache,
    State,
    canonical_json,
    digest_of,
    is_unknown,
    sha256_bytes,
    sha256_file,
    unknown,
)

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-4, the one-block example


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Believe times at once: no test waits for a file to grow old."""
    monkeypatch.setattr(digests, "RACY_NS", 0)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the files that were hashed, as they are."""
    names: list[str] = []

    def counted(path: Path) -> str:
        names.append(path.name)
        return sha256_file(path)

    monkeypatch.setattr(digests, "sha256_file", counted)
    return names


def picture(folder: Path, data: bytes = b"abc") -> Path:
    """Write a file whose times are past: the clock of file times is coarser than that of programs."""
    path = folder / "a.png"
    path.write_bytes(data)
    tick(path, path.stat().st_ctime_ns)
    return path


def tick(path: Path, since_ns: int) -> None:
    """Touch a sibling until the file system's clock has passed `since_ns`."""
    clock = path.with_name("clock")
    clock.touch()
    while clock.stat().st_ctime_ns <= since_ns:
        os.utime(clock)


def test_sha256_is_the_standard_one(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_bytes(b"abc") == sha256_file(tmp_path / "abc") == ABC


@pytest.mark.parametrize("size", [0, 1, digests.CHUNK_BYTES - 1, digests.CHUNK_BYTES, digests.CHUNK_BYTES + 1])
def test_file_digest_covers_every_chunk(tmp_path: Path, size: int) -> None:
    data = bytes(range(256)) * (size // 256) + b"\1" * (size % 256)
    (tmp_path / "file").write_bytes(data)
    assert sha256_file(tmp_path / "file") == sha256_bytes(data)


def test_canonical_json_is_compact_sorted_utf8() -> None:
    value = {"b": [1, 2.5, None, True], "a": {"z": "Kätzchen", "y": 1e-4}}
    assert canonical_json(value) == '{"a":{"y":0.0001,"z":"Kätzchen"},"b":[1,2.5,null,true]}'.encode()


def test_canonical_json_tells_floats_from_integers_and_bits_apart() -> None:
    assert canonical_json(1) != canonical_json(1.0)
    assert canonical_json(0.1 + 0.2) != canonical_json(0.3)


def test_structs_and_their_plain_values_give_equal_json() -> None:
    """Whatever order a struct declares its fields in."""
    assert canonical_json(Train()) == canonical_json(to_builtins(Train()))
    assert canonical_json((1, 2)) == canonical_json([1, 2])


def test_no_digest_of_one_kind_passes_as_another() -> None:
    assert digest_of("latent", [1]) != digest_of("embedding", [1])
    assert digest_of("latent", {"a": 1, "b": 2}) == digest_of("latent", {"b": 2, "a": 1})
    assert digest_of("latent", [1]) == sha256_bytes(b"flux2-lora/latent\n[1]")


@pytest.mark.usefixtures("settled")
def test_unchanged_file_is_read_once_over_all_processes(tmp_path: Path, read: list[str]) -> None:
    path = picture(tmp_path)
    for _ in range(3):
        assert StatCache(tmp_path / "digests.sqlite").files([path]) == [ABC]
    assert read == ["a.png"]


@pytest.mark.usefixtures("settled")
def test_only_the_edited_file_is_read_again(tmp_path: Path, read: list[str]) -> None:
    paths = [picture(tmp_path), tmp_path / "b.png", tmp_path / "c.png"]
    for path in paths[1:]:
        path.write_bytes(b"abc")
    tick(paths[2], paths[2].stat().st_ctime_ns)
    cache = StatCache(tmp_path / "digests.sqlite")
    cache.files(paths)
    read.clear()
    paths[1].write_bytes(b"abd")
    assert cache.files(paths) == [ABC, sha256_bytes(b"abd"), ABC]
    assert read == ["b.png"]


@pytest.mark.usefixtures("settled")
def test_edit_with_restored_times_is_seen(tmp_path: Path) -> None:
    path = picture(tmp_path)
    before = path.stat()
    cache = StatCache(tmp_path / "digests.sqlite")
    assert cache.files([path]) == [ABC]
    path.write_bytes(b"xyz")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert cache.files([path]) == [sha256_bytes(b"xyz")]


@pytest.mark.usefixtures("settled")
def test_file_moved_into_its_place_with_equal_size_and_times_is_seen(tmp_path: Path) -> None:
    path, other = picture(tmp_path), tmp_path / "other.png"
    cache = StatCache(tmp_path / "digests.sqlite")
    cache.files([path])
    other.write_bytes(b"xyz")
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)
    assert cache.files([path]) == [sha256_bytes(b"xyz")]


def test_file_written_a_moment_ago_is_read_again(tmp_path: Path, read: list[str]) -> None:
    path = picture(tmp_path)
    for _ in range(2):
        StatCache(tmp_path / "digests.sqlite").files([path])
    assert read == ["a.png", "a.png"]


@pytest.mark.usefixtures("settled")
def test_file_changed_while_it_was_read_is_not_remembered(tmp_path: Path) -> None:
    path = picture(tmp_path)
    cache = StatCache(tmp_path / "digests.sqlite")

    def edited() -> str:
        before = sha256_file(path)
        path.write_bytes(b"abcd")
        return before

    assert cache.one("sha256", [path], edited) == ABC
    assert cache.one("sha256", [path], lambda: sha256_file(path)) == sha256_bytes(b"abcd")


@pytest.mark.usefixtures("settled")
def test_value_of_several_files_is_computed_anew_when_one_changes(tmp_path: Path) -> None:
    first, second = picture(tmp_path), tmp_path / "second"
    second.write_bytes(b"1")
    tick(second, second.stat().st_ctime_ns)
    cache = StatCache(tmp_path / "digests.sqlite")
    values = iter(["one", "two"])
    assert [cache.one("pair", [first, second], lambda: next(values)) for _ in range(2)] == ["one", "one"]
    second.write_bytes(b"22")
    assert cache.one("pair", [first, second], lambda: next(values)) == "two"


@pytest.mark.usefixtures("settled")
def test_paranoid_reads_everything_and_corrects_what_was_remembered(tmp_path: Path, read: list[str]) -> None:
    path = picture(tmp_path)
    database = tmp_path / "digests.sqlite"
    cache = StatCache(database)
    cache.one(f"sha256 {path.absolute()}", [path], lambda: "a lie")
    assert cache.files([path]) == ["a lie"]
    assert StatCache(database, paranoid=True).files([path]) == [ABC]
    assert cache.files([path]) == [ABC]
    assert read == ["a.png"]


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the SQL statements that are put to any database, as they are."""
    said: list[str] = []
    connect = sqlite3.connect

    def traced(*arguments: object, **named: object) -> sqlite3.Connection:
        database: sqlite3.Connection = connect(*arguments, **named)  # type: ignore[arg-type]
        database.set_trace_callback(said.append)
        return database

    monkeypatch.setattr(digests.sqlite3, "connect", traced)
    return said


@pytest.mark.usefixtures("settled")
def test_many_files_are_asked_for_together(tmp_path: Path, statements: list[str], read: list[str]) -> None:
    paths = [tmp_path / str(number) for number in range(digests.ROWS_TOGETHER + 1)]
    for path in paths:
        path.write_bytes(b"abc")
    tick(paths[-1], paths[-1].stat().st_ctime_ns)
    cache = StatCache(tmp_path / "digests.sqlite")
    cache.files(paths)
    read.clear()
    statements.clear()
    assert cache.files(paths) == [ABC] * len(paths)
    assert read == []
    assert sum(said.startswith("SELECT") for said in statements) == 2


@pytest.mark.usefixtures("settled")
def test_value_is_remembered_until_what_it_was_made_from_looks_otherwise(tmp_path: Path) -> None:
    cache = StatCache(tmp_path / "digests.sqlite")
    values = iter(["one", "two"])
    for text, value in (("a", "one"), ("a", "one"), ("b", "two"), ("b", "two")):
        assert cache.looked("folder", lambda text=text: State(text, 0), lambda: next(values)) == value


def test_value_of_what_looks_young_or_changes_meanwhile_is_not_remembered(tmp_path: Path) -> None:
    cache = StatCache(tmp_path / "digests.sqlite")
    young = State("a", time.time_ns())
    assert [cache.looked("young", lambda: young, lambda each=each: each) for each in ("one", "two")] == ["one", "two"]
    looks = iter("abbb")
    moving = [
        cache.looked("moving", lambda: State(next(looks), 0), lambda each=each: each) for each in ("one", "two")
    ]
    assert moving == ["one", "two"]


def _garbage(path: Path) -> None:
    path.write_bytes(b"this is no database" * 100)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def _scrambled(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + bytes(len(whole) - 4096))


def _of_another_layout(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE remembered (what TEXT PRIMARY KEY, stat TEXT, value TEXT)")


def _no_text(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("UPDATE remembered SET value = CAST(x'ff' AS TEXT)")


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("damage", [_garbage, _cut, _scrambled, _of_another_layout, _no_text, Path.unlink])
def test_damaged_database_is_started_anew(tmp_path: Path, read: list[str], damage: Callable[[Path], object]) -> None:
    path, database = picture(tmp_path), tmp_path / "digests.sqlite"
    StatCache(database).files([path])
    damage(database)
    assert StatCache(database).files([path]) == [ABC]
    assert StatCache(database).files([path]) == [ABC]
    assert StatCache(database).files([path]) == [ABC]
    assert len(read) <= 3
    assert len(read) > 1


@pytest.mark.usefixtures("settled")
def test_locked_or_full_database_is_gone_without_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: list[str]
) -> None:
    path, file = picture(tmp_path), tmp_path / "digests.sqlite"
    StatCache(file).files([path])
    connect, few_pages = sqlite3.connect, "PRAGMA max_page_count = 1"

    def impatient(*arguments: object, **_: object) -> sqlite3.Connection:
        database: sqlite3.Connection = connect(*arguments, timeout=0)  # type: ignore[arg-type]
        with suppress(sqlite3.OperationalError):
            database.execute(few_pages)
        return database

    monkeypatch.setattr(digests.sqlite3, "connect", impatient)
    with closing(connect(file)) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert StatCache(file).files([path]) == [ABC]
    StatCache(file).remember({"too long for the few pages": "x" * 100_000})
    assert StatCache(file).recall(["too long for the few pages"]) == {}
    assert StatCache(file).files([path]) == [ABC]
    assert read == ["a.png", "a.png"]


@pytest.mark.usefixtures("settled")
def test_no_flipped_bit_of_the_database_changes_a_digest(tmp_path: Path) -> None:
    path, database = picture(tmp_path), tmp_path / "digests.sqlite"
    StatCache(database).files([path])
    whole = database.read_bytes()
    start = whole.index(ABC.encode())
    for offset in range(start, start + 64):
        database.write_bytes(whole[:offset] + bytes([whole[offset] ^ 1]) + whole[offset + 1 :])
        assert StatCache(database).files([path]) == [ABC]


@pytest.mark.usefixtures("settled")
def test_folder_in_place_of_the_database_costs_only_time(tmp_path: Path, read: list[str]) -> None:
    path = picture(tmp_path)
    (tmp_path / "digests.sqlite").mkdir()
    assert [StatCache(tmp_path / "digests.sqlite").files([path]) for _ in range(2)] == [[ABC], [ABC]]
    assert read == ["a.png", "a.png"]


def test_absent_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        StatCache(tmp_path / "digests.sqlite").files([tmp_path / "none"])


class Ending(io.FileIO):
    """A file whose disk gives nothing where there is something."""

    def readinto(self, _: object, /) -> int:
        return 0


def test_file_that_ends_before_its_end_has_no_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "part").write_bytes(b"part")
    monkeypatch.setattr(Path, "open", lambda path, _: io.BufferedReader(Ending(path)))
    with pytest.raises(OSError, match="cannot be read to its end"):
        sha256_file(tmp_path / "part")


@pytest.mark.usefixtures("settled")
def test_look_alone_recalls_what_was_remembered_and_writes_nothing(tmp_path: Path) -> None:
    path, file = tmp_path / "lookup" / "digests.sqlite", tmp_path / "a"
    looking = StatCache(path, look_only=True)
    file.write_bytes(b"a")
    assert looking.one("what", [file], lambda: "computed") == "computed"
    assert looking.recalled("what", [file]) is None
    assert not path.parent.exists()
    StatCache(path).one("what", [file], lambda: "kept")
    before = path.read_bytes()
    assert looking.recalled("what", [file]) == "kept"
    assert looking.one("what", [file], lambda: "computed") == "kept"
    assert path.read_bytes() == before
    path.write_bytes(b"no database")
    assert looking.recalled("what", [file]) is None
    assert path.read_bytes() == b"no database"


def test_unknown_digest_equals_no_other() -> None:
    assert unknown("a") != unknown("b")
    assert is_unknown(unknown("a"))
    assert not is_unknown(digest_of("a", "a"))
