"""Places asked before any work: what is in the way, what may not be written, what does not fit."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from schemas.errors import NoResources
from stages.contract.places import disk_of, existing, free_bytes, require_room, require_writable


def test_place_that_is_not_there_is_judged_by_the_nearest_above_it(tmp_path: Path) -> None:
    assert existing(tmp_path / "store" / "latents") == tmp_path
    assert disk_of(tmp_path / "store") == tmp_path.stat().st_dev
    assert free_bytes(tmp_path / "store") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    require_writable(tmp_path / "store" / "latents")
    assert list(tmp_path.iterdir()) == []


def test_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_bytes(b"")
    with pytest.raises(NotADirectoryError, match="runs'"):
        require_writable(tmp_path / "runs" / "cat")


def test_folder_that_may_not_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(os, "access", lambda _, mode: asked.append(mode))
    with pytest.raises(PermissionError, match=tmp_path.name):
        require_writable(tmp_path / "runs")
    assert asked == [os.W_OK | os.X_OK]


def test_what_does_not_fit_is_told_with_both_numbers(tmp_path: Path) -> None:
    free = free_bytes(tmp_path)
    require_room(tmp_path / "store", free / 2, why="for 3 latents")
    with pytest.raises(NoResources) as raised:
        require_room(tmp_path / "store", 2 * free, why="for 3 latents")
    fault = raised.value.faults[0]
    assert (fault.code, fault.where, fault.why) == ("disk.full", str(tmp_path / "store"), "for 3 latents")
    assert fault.what.startswith(f"need about {2 * free / 1e6:.1f} MB, ")
