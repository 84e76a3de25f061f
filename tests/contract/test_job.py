"""What a stage is given: places that the person named, and no others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from schemas.errors import BadConfig, NoResources
from tests.contract.toy import run_toy, toy_job


def test_run_folder_that_is_a_link_is_refused_before_any_work(tmp_path: Path) -> None:
    job = toy_job(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "cat").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadConfig, match=r"output\.symlink.*runs/cat"):
        run_toy(job)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert not (tmp_path / "store" / "toy").exists()


def test_store_and_runs_may_be_links_to_another_disk(tmp_path: Path) -> None:
    job = toy_job(tmp_path)
    for name in ("store", "runs"):
        (tmp_path / f"other {name}").mkdir()
        (tmp_path / name).symlink_to(tmp_path / f"other {name}")
    assert run_toy(job).built
    assert (tmp_path / "other runs" / "cat" / "word.txt").read_text() == "zorb"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="only Linux has a folder where nothing can be made")
@pytest.mark.parametrize("place", ["store", "runs"])
def test_place_where_no_folder_can_be_made_is_refused_with_a_remedy(tmp_path: Path, place: str) -> None:
    job = replace(toy_job(tmp_path), **{place: Path("/proc/x")})
    with pytest.raises(
        NoResources, match=r"cannot write \(/proc/x\): .*\. fix: make the folder writable, or name another"
    ):
        run_toy(job)
