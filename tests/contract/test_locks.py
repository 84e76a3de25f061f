"""Locks: one holder at a time, named to the others, freed by its death."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from schemas.errors import BadConfig, Busy, NoResources
from stages.contract import locks
from stages.contract.locks import hold, share

HOLD = """
import sys
from pathlib import Path
from stages.contract.locks import hold
with hold(Path(sys.argv[1]), wait=False, waiting=print):
    print("held", flush=True)
    sys.stdin.read()
"""


def silent(_: str) -> None:
    """Be told of no one."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / ".locks" / "train.lock"


@pytest.fixture
def holder(path: Path) -> Generator[subprocess.Popen[str]]:
    """Return a process that holds the lock until its stdin ends."""
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_second_holder_is_busy_and_told_who_is_at_work(path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(Busy) as raised, hold(path, wait=False, waiting=silent):
        pass
    fault = raised.value.faults[0]
    assert raised.value.exit_code == 6
    assert fault.code == "lock.held"
    assert f"pid {holder.pid} on " in fault.why
    assert "--wait" in fault.fix


def test_lock_is_freed_by_the_holders_death(path: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert f"pid {holder.pid}" in path.read_text()
    with hold(path, wait=False, waiting=silent):
        assert f"pid {os.getpid()} on " in path.read_text()


def test_waiting_is_announced_and_ends_when_the_holder_does(path: Path, holder: subprocess.Popen[str]) -> None:
    told: list[str] = []

    def waiting(who: str) -> None:
        told.append(who)
        assert holder.stdin is not None
        holder.stdin.close()

    with hold(path, wait=True, waiting=waiting):
        assert f"pid {os.getpid()} on " in path.read_text()
    assert holder.wait() == 0
    assert len(told) == 1
    assert f"waiting for pid {holder.pid} on " in told[0]


def test_free_lock_is_taken_without_a_word_and_names_nobody_afterwards(path: Path) -> None:
    told: list[str] = []
    for _ in range(2):
        with hold(path, wait=True, waiting=told.append):
            pass
    assert told == []
    assert path.read_text() == ""


def test_lock_is_freed_by_an_error(path: Path) -> None:
    with pytest.raises(ValueError, match="inside"), hold(path, wait=False, waiting=silent):
        raise ValueError("inside")
    with hold(path, wait=False, waiting=silent):
        assert path.exists()


def test_other_locks_are_free(path: Path, holder: subprocess.Popen[str]) -> None:
    with hold(path.with_name("preview.lock"), wait=False, waiting=silent):
        assert holder.poll() is None


def test_file_system_without_locks_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_file: object, _operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.fcntl, "flock", refused)
    with pytest.raises(NoResources, match=r"lock\.unsupported.*--store"), hold(path, wait=False, waiting=silent):
        pass


def test_file_in_place_of_the_lock_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / ".locks").write_bytes(b"")
    with (
        pytest.raises(NoResources, match=r"disk\.in_the_way"),
        hold(tmp_path / ".locks" / "train.lock", wait=False, waiting=silent),
    ):
        pass


def test_disk_that_cannot_take_the_holders_name_does_not_stop_it(path: Path) -> None:
    """Where no file may grow every write fails; closing one would write again what is buffered."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with hold(path, wait=False, waiting=silent), pytest.raises(Busy), hold(path, wait=False, waiting=silent):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b""


@pytest.mark.parametrize("there", [True, False])
def test_link_in_place_of_a_lock_is_not_followed(path: Path, tmp_path: Path, *, there: bool) -> None:
    victim = tmp_path / "victim"
    if there:
        victim.write_text("mine")
    path.parent.mkdir()
    path.symlink_to(victim)
    for locked in (hold(path, wait=False, waiting=silent), share(path, silent)):
        with pytest.raises(NoResources, match=r"disk\.in_the_way.*fix: "), locked:
            pass
    assert victim.exists() == there
    assert not there or victim.read_text() == "mine"


def test_link_in_place_of_the_folder_of_locks_is_not_followed(path: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    path.parent.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadConfig, match=r"output\.symlink"), hold(path, wait=False, waiting=silent):
        pass
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_pipe_in_place_of_a_lock_keeps_nobody_waiting_for_its_other_end(path: Path) -> None:
    path.parent.mkdir()
    os.mkfifo(path)
    for locked in (hold(path, wait=False, waiting=silent), share(path, silent)):
        with pytest.raises(NoResources, match=r"disk\.in_the_way.*not a regular file"), locked:
            pass


@pytest.mark.parametrize(("number", "shared"), [(errno.EACCES, True), (errno.EROFS, True), (errno.ENOSPC, False)])
def test_lock_that_cannot_be_made_is_done_without_only_where_nobody_may_write(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int, *, shared: bool
) -> None:
    def failing(_path: str, _flags: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks, "_made", failing)
    with contextlib.nullcontext() if shared else pytest.raises(NoResources, match=r"disk\.full"), share(path, silent):
        pass


def test_who_shares_a_lock_keeps_out_who_wants_it_alone(path: Path, holder: subprocess.Popen[str]) -> None:
    told: list[str] = []

    def waiting(who: str) -> None:
        told.append(who)
        assert holder.stdin is not None
        holder.stdin.close()

    with share(path, waiting), share(path, silent), pytest.raises(Busy), hold(path, wait=False, waiting=silent):
        pass
    assert [f"waiting for pid {holder.pid} on " in each for each in told] == [True]
