"""What the system refuses, as a person reads it: what, where and the remedy, and nothing half done."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from schemas.errors import NoResources
from stages.contract import publish
from stages.contract.publish import no_resources, publish_folder, workspace, write_file


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, "disk.full"),
        (errno.EDQUOT, "disk.full"),
        (errno.EACCES, "disk.permission"),
        (errno.EROFS, "disk.permission"),
        (errno.EFBIG, "disk.limit"),
        (errno.EMFILE, "disk.limit"),
        (errno.EIO, "disk.failed"),
    ],
)
def test_disk_that_takes_no_bytes_is_named_and_the_old_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: str
) -> None:
    write_file(tmp_path / "receipt", b"old")

    def full(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(publish, "_sync_descriptor", full)
    with pytest.raises(NoResources) as raised:
        write_file(tmp_path / "receipt", b"new")
    assert raised.value.faults[0].code == code
    assert raised.value.faults[0].fix
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"receipt": b"old"}


def test_file_in_place_of_the_store_is_named(tmp_path: Path) -> None:
    (tmp_path / "store").write_bytes(b"")
    with pytest.raises(NoResources, match=r"disk\.in_the_way"), workspace(tmp_path / "store"):
        pass
    with pytest.raises(NoResources, match=r"disk\.in_the_way"):
        write_file(tmp_path / "store" / "run" / "receipt", b"")


def test_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "receipt").mkdir()
    with pytest.raises(NoResources, match=r"disk\.in_the_way"):
        write_file(tmp_path / "receipt", b"")
    assert [path.name for path in tmp_path.iterdir()] == ["receipt"]


def test_refused_rename_names_its_target_and_not_the_work_on_its_way_there(tmp_path: Path) -> None:
    target = tmp_path / "store" / "validate" / "key"
    target.parent.mkdir(parents=True)
    target.write_bytes(b"mine")
    with workspace(tmp_path / "store") as space:
        (space / "artifact").mkdir()
        with pytest.raises(NoResources) as raised, no_resources(space):
            publish_folder(space / "artifact", target)
    assert raised.value.faults[0].where == str(target)
    (tmp_path / "receipt").mkdir()
    with pytest.raises(NoResources) as raised:
        write_file(tmp_path / "receipt", b"new")
    assert raised.value.faults[0].where == str(tmp_path / "receipt")


def test_what_may_not_be_read_is_told_from_what_may_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state"
    path.write_bytes(b"")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(NoResources) as raised, no_resources(tmp_path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    fault = raised.value.faults[0]
    assert (fault.what, fault.where, fault.fix) == ("cannot read", str(path), "make it readable, or name another")


def test_disk_that_is_full_under_work_names_the_store(tmp_path: Path) -> None:
    state = tmp_path / "store" / ".tmp" / "work" / "state"
    for named in (state, state.parent):
        with pytest.raises(NoResources) as raised, no_resources(named):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(state))
        assert raised.value.faults[0].where == str(tmp_path / "store")


def test_errors_of_other_kinds_pass_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), workspace(tmp_path):
        (tmp_path / "none").read_bytes()
