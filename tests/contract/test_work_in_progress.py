"""Work in progress: where it lies, what the dead leave of it, and what others may have put in its place."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from schemas.errors import BadConfig, NoResources
from stages.contract import publish
from stages.contract.publish import beside, sweep_siblings, workspace, write_file
from tests.contract.test_publish import WORK_AND_WAIT, kill, started


def test_folder_beside_a_target_is_removed_and_so_is_what_a_dead_process_left_there(tmp_path: Path) -> None:
    target = tmp_path / "cat"
    with started(WORK_AND_WAIT.replace("workspace", "beside"), target) as dead:
        assert dead.stdout is not None
        left = Path(dead.stdout.readline().strip())
        with beside(target) as work:
            assert work.stat().st_dev == tmp_path.stat().st_dev
            assert list(work.iterdir()) == []
            assert work.parent == left.parent
        assert (left / "half").is_file()
        kill(dead)
    with beside(target):
        assert not left.exists()
    assert list(tmp_path.iterdir()) == []


def test_what_dead_writers_left_aside_goes_and_what_is_being_written_stays(tmp_path: Path) -> None:
    for name in (".a.tmp", ".b.tmp", ".hidden", "c.tmp"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / ".folder.tmp").mkdir()
    (tmp_path / ".link.tmp").symlink_to(tmp_path / "c.tmp")
    with (tmp_path / ".b.tmp").open("rb") as living:
        fcntl.flock(living, fcntl.LOCK_EX)
        sweep_siblings(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {".b.tmp", ".hidden", "c.tmp", ".folder.tmp", ".link.tmp"}
    sweep_siblings(tmp_path)
    assert not (tmp_path / ".b.tmp").exists()
    sweep_siblings(tmp_path / "none")


def test_link_in_place_of_the_work_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / ".tmp").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadConfig, match=r"output\.symlink"), workspace(tmp_path / "store"):
        pass
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_pipe_in_place_of_a_sibling_keeps_nobody_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".receipt.tmp")
    with pytest.raises(NoResources, match=r"disk\.in_the_way"):
        write_file(tmp_path / "receipt", b"new")


def test_file_system_without_locks_is_named_by_whoever_publishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_file: object, _operation: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(publish.fcntl, "flock", refused)
    for publishing in (workspace(tmp_path), beside(tmp_path / "cat")):
        with pytest.raises(NoResources, match=r"lock\.unsupported.*fix: "), publishing:
            pass
    with pytest.raises(NoResources, match=r"lock\.unsupported.*fix: "):
        write_file(tmp_path / "receipt", b"new")
    assert not (tmp_path / "receipt").exists()
