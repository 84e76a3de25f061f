"""Publishing: synced before it is seen, whole or not at all, litter of the dead removed."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from schemas.errors import BadConfig
from stages.contract import publish
from stages.contract.publish import publish_file, publish_folder, sweep, workspace, write_file
from tests.contract.dying import deaths

WORK_AND_WAIT = """
import sys
from pathlib import Path
from stages.contract.publish import workspace
with workspace(Path(sys.argv[1])) as work:
    (work / "half").write_bytes(b"half")
    print(work, flush=True)
    sys.stdin.read()
"""
KEEP_WRITING = """
import itertools, sys
from pathlib import Path
from stages.contract.publish import write_file
for number in itertools.count():
    write_file(Path(sys.argv[1]) / "receipt", b"%d" % (number % 10) * 3000)
    print(flush=True) if number == 0 else None
"""
PUBLISH = """
from pathlib import Path
from stages.contract.publish import publish_folder, workspace, write_file
store = Path(sys.argv[2])
_die_at(int(sys.argv[1]))
with workspace(store) as work:
    (work / "artifact").mkdir()
    for name in ("a", "b"):
        (work / "artifact" / name).write_text("1")
    publish_folder(work / "artifact", store / "artifact")
write_file(store / "receipt", b"1")
"""


def started(script: str, store: Path) -> subprocess.Popen[str]:
    """Start a process that runs `script` on `store`; it prints a line once it is at work."""
    command = [sys.executable, "-c", script, str(store)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def folder(path: Path, **files: str) -> Path:
    """Make a folder of text files."""
    (path / "inner").mkdir(parents=True)
    for name, text in files.items():
        (path / name).write_text(text)
        (path / "inner" / name).write_text(text)
    return path


def contents(path: Path) -> dict[str, str]:
    return {each.relative_to(path).as_posix(): each.read_text() for each in path.rglob("*") if each.is_file()}


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Record what is synced and renamed, in order, as (event, name)."""
    recorded: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def record_sync(descriptor: int) -> None:
        recorded.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        fsync(descriptor)

    def record_rename(self: Path, target: Path) -> Path:
        recorded.append(("rename", target.name))
        return rename(self, target)

    def record_replace(self: Path, target: Path) -> Path:
        recorded.append(("rename", target.name))
        return replace(self, target)

    monkeypatch.setattr(publish.os, "fsync", record_sync)
    monkeypatch.setattr(Path, "rename", record_rename)
    monkeypatch.setattr(Path, "replace", record_replace)
    return recorded


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc to name what was synced")


@linux
def test_target_may_have_the_longest_name_there_is(tmp_path: Path) -> None:
    target = tmp_path / ("é" * 121 + "x.safetensors")
    assert len(os.fsencode(target.name)) == 255
    write_file(target, b"one")
    write_file(target, b"two")
    assert target.read_bytes() == b"two"
    target.unlink()
    with publish.beside(target) as work:
        (work / "file").write_bytes(b"three")
        publish_file(work / "file", target)
    assert target.read_bytes() == b"three"
    assert list(tmp_path.iterdir()) == [target]


def test_folder_is_synced_whole_then_renamed_then_its_parent_is_synced(
    tmp_path: Path, events: list[tuple[str, str]]
) -> None:
    work = folder(tmp_path / "work", a="1")
    (tmp_path / "store").mkdir()
    publish_folder(work, tmp_path / "store" / "artifact")
    renamed = events.index(("rename", "artifact"))
    assert sorted(events[:renamed]) == [("sync", "a"), ("sync", "a"), ("sync", "inner"), ("sync", "work")]
    assert events[renamed - 1] == ("sync", "work")
    assert events[renamed + 1 :] == [("sync", "store")]


@linux
def test_new_folders_above_the_target_are_synced_too(tmp_path: Path, events: list[tuple[str, str]]) -> None:
    publish_folder(folder(tmp_path / "work", a="1"), tmp_path / "store" / "kind" / "artifact")
    assert ("sync", tmp_path.name) in events
    assert ("sync", "store") in events
    assert events[-1] == ("sync", "kind")


@linux
def test_file_is_synced_then_renamed_then_its_parent_is_synced(tmp_path: Path, events: list[tuple[str, str]]) -> None:
    (tmp_path / "store").mkdir()
    write_file(tmp_path / "store" / "receipt", b"1")
    assert events == [("sync", ".receipt.tmp"), ("rename", "receipt"), ("sync", "store")]
    events.clear()
    (tmp_path / "part").write_bytes(b"2")
    publish_file(tmp_path / "part", tmp_path / "store" / "part")
    assert events == [("sync", "part"), ("rename", "part"), ("sync", "store")]


def test_published_folder_is_moved_not_copied(tmp_path: Path) -> None:
    work = folder(tmp_path / "work", a="1")
    inode = work.stat().st_ino
    publish_folder(work, tmp_path / "store" / "artifact")
    assert (tmp_path / "store" / "artifact").stat().st_ino == inode
    assert contents(tmp_path / "store" / "artifact") == {"a": "1", "inner/a": "1"}
    assert not work.exists()


def test_equal_target_is_kept(tmp_path: Path) -> None:
    target = folder(tmp_path / "store" / "artifact", a="1")
    (tmp_path / "store" / "part").write_bytes(b"part")
    before = [path.stat().st_ino for path in (target, target / "a", tmp_path / "store" / "part")]
    publish_folder(folder(tmp_path / "work", a="1"), target)
    (tmp_path / "part").write_bytes(b"part")
    publish_file(tmp_path / "part", tmp_path / "store" / "part")
    assert [path.stat().st_ino for path in (target, target / "a", tmp_path / "store" / "part")] == before


@pytest.mark.parametrize("files", [{"a": "2"}, {"a": "12"}, {}, {"a": "1", "b": "1"}])
def test_damaged_target_is_replaced(tmp_path: Path, files: dict[str, str]) -> None:
    target = folder(tmp_path / "store" / "artifact", **files)
    publish_folder(folder(tmp_path / "space" / "work", a="1"), target)
    assert contents(target) == {"a": "1", "inner/a": "1"}
    (tmp_path / "part").write_bytes(b"part")
    (tmp_path / "store" / "part").write_bytes(b"paRt")
    publish_file(tmp_path / "part", tmp_path / "store" / "part")
    assert (tmp_path / "store" / "part").read_bytes() == b"part"


def test_linked_target_is_replaced_and_what_it_points_to_is_left_alone(tmp_path: Path) -> None:
    outside = folder(tmp_path / "outside", a="1")
    (tmp_path / "store").mkdir()
    for name in ("artifact", "part", "dangling"):
        (tmp_path / "store" / name).symlink_to(outside if name == "artifact" else outside / name)
    publish_folder(folder(tmp_path / "work", a="1"), tmp_path / "store" / "artifact")
    publish_folder(folder(tmp_path / "work", a="1"), tmp_path / "store" / "dangling")
    (tmp_path / "part").write_bytes(b"part")
    publish_file(tmp_path / "part", tmp_path / "store" / "part")
    assert not any(path.is_symlink() for path in (tmp_path / "store").iterdir())
    assert contents(outside) == {"a": "1", "inner/a": "1"}


def test_nothing_is_written_where_a_person_put_a_link(tmp_path: Path) -> None:
    outside = folder(tmp_path / "outside", a="1")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "receipt").symlink_to(outside / "a")
    (tmp_path / "store" / "kind").symlink_to(outside)
    (tmp_path / "part").write_bytes(b"part")
    writers = (
        lambda: write_file(tmp_path / "store" / "receipt", b"receipt"),
        lambda: publish_file(tmp_path / "part", tmp_path / "store" / "kind" / "part"),
        lambda: publish_folder(folder(tmp_path / "work", a="1"), tmp_path / "store" / "kind" / "artifact"),
    )
    for write in writers:
        with pytest.raises(BadConfig) as refused:
            write()
        assert (refused.value.exit_code, refused.value.faults[0].code) == (2, "output.symlink")
    assert contents(outside) == {"a": "1", "inner/a": "1"}
    assert (tmp_path / "store" / "receipt").is_symlink()


def test_file_linked_inside_a_target_does_not_pass_as_equal(tmp_path: Path) -> None:
    target = folder(tmp_path / "store" / "artifact", a="1")
    (target / "a").rename(tmp_path / "outside")
    (target / "a").symlink_to(tmp_path / "outside")
    publish_folder(folder(tmp_path / "space" / "work", a="1"), target)
    assert not (target / "a").is_symlink()


def test_pipe_inside_a_target_keeps_nobody_waiting(tmp_path: Path) -> None:
    target = folder(tmp_path / "store" / "artifact", a="1")
    (target / "a").unlink()
    os.mkfifo(target / "a")
    publish_folder(folder(tmp_path / "space" / "work", a="1"), target)
    assert (target / "a").read_text() == "1"


def test_folder_published_by_another_process_at_the_same_moment_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "store" / "artifact"
    rename = Path.rename

    def beaten(self: Path, to: Path) -> Path:
        if to == target and not target.exists():
            rename(folder(tmp_path / "theirs", a="1"), target)
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", beaten)
    work = folder(tmp_path / "work", a="1")
    publish_folder(work, target)
    assert target.stat().st_ino != work.stat().st_ino
    assert contents(target) == {"a": "1", "inner/a": "1"}


def test_workspace_lies_on_the_stores_own_filesystem_and_is_removed(tmp_path: Path) -> None:
    with workspace(tmp_path / "store") as work:
        assert work.parent == tmp_path / "store" / ".tmp"
        (work / "half").write_bytes(b"half")
    assert list((tmp_path / "store" / ".tmp").iterdir()) == []


def test_workspace_is_removed_on_any_error(tmp_path: Path) -> None:
    def interrupted(error: type[BaseException]) -> None:
        with workspace(tmp_path) as work:
            (work / "half").write_bytes(b"half")
            raise error

    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            interrupted(error)
    assert list((tmp_path / ".tmp").iterdir()) == []


def test_litter_of_a_dead_process_is_swept_and_a_living_ones_work_stays(tmp_path: Path) -> None:
    dead, alive = started(WORK_AND_WAIT, tmp_path), started(WORK_AND_WAIT, tmp_path)
    try:
        litter, work = (Path(process.stdout.readline().strip()) for process in (dead, alive) if process.stdout)
        kill(dead)
        assert (litter / "half").exists()
        with workspace(tmp_path) as ours:
            assert not litter.exists()
            assert (work / "half").read_bytes() == b"half"
            assert {path.name for path in (tmp_path / ".tmp").iterdir()} == {
                each.name for path in (work, ours) for each in (path, path.with_suffix(".lock"))
            }
    finally:
        kill(alive)


def test_sweeper_that_comes_before_the_lock_is_held_takes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, taken = fcntl.flock, []

    def late(file: object, operation: int) -> None:
        if operation == fcntl.LOCK_EX and not taken:
            taken.extend((tmp_path / ".tmp").iterdir())
            sweep(tmp_path)
        flock(file, operation)  # type: ignore[arg-type]

    monkeypatch.setattr(publish.fcntl, "flock", late)
    with workspace(tmp_path) as work:
        assert [path.exists() for path in taken] == [False]
        assert work.with_suffix(".lock").exists()
        sweep(tmp_path)
        assert work.exists()


def test_process_killed_at_any_moment_leaves_only_whole_results(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    states = set()
    for _ in deaths(PUBLISH, [str(store)]):
        found = contents(store)
        states.add(tuple(sorted((name, text) for name, text in found.items() if not name.startswith("."))))
        shutil.rmtree(store)
        store.mkdir()
    artifact = (("artifact/a", "1"), ("artifact/b", "1"))
    assert states == {(), artifact, (*artifact, ("receipt", "1"))}


def test_damaged_target_is_gone_or_whole_wherever_its_replacer_dies(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    states = set()
    for _ in deaths(PUBLISH, [str(tmp_path)]):
        states.add(contents(target).get("a"))
        shutil.rmtree(target, ignore_errors=True)
        folder(target, a="damaged")
    assert states == {"damaged", None, "1"}
    assert contents(target) == {"a": "1", "b": "1"}
    assert {path.name for path in tmp_path.iterdir()} == {"artifact", "receipt", ".tmp"}
    assert list((tmp_path / ".tmp").iterdir()) == []


def test_two_processes_writing_one_file_leave_the_bytes_of_one(tmp_path: Path) -> None:
    writers = [started(KEEP_WRITING, tmp_path) for _ in range(2)]
    try:
        for process in writers:
            assert process.stdout is not None
            process.stdout.readline()
        for number in range(100):
            write_file(tmp_path / "receipt", b"%d" % (number % 10) * 3000)
            data = (tmp_path / "receipt").read_bytes()
            assert data == data[:1] * 3000
        assert [process.poll() for process in writers] == [None, None]
    finally:
        for process in writers:
            kill(process)
