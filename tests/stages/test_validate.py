"""validate: every bad file in one run, nothing published while anything is wrong, tables anyone can read."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest

from schemas.errors import Damaged
from schemas.tables import CAPTIONS, DATASET
from stages.validate import STAGE
from tests.stages.project import Project, draw, listing, new_project, rows, truncate

STRAY = ["lookup", ".tmp", ".locks"]


@pytest.fixture
def fresh(tmp_path: Path) -> Project:
    """A project that has run nothing yet."""
    return new_project(tmp_path / "project")


def spoil(project: Project) -> set[str]:
    """Add a bad file of each kind; return the files to blame."""
    truncate(draw(project.pictures, "short", (1, 2, 3)))
    (project.pictures / "page.png").write_text("<html>not found</html>")
    (project.pictures / "page.txt").write_text("a page")
    (project.pictures / "empty.jpg").touch()
    (project.pictures / "empty.txt").write_text("nothing")
    draw(project.pictures, "silent", (1, 2, 3))
    (project.pictures / "silent.txt").unlink()
    draw(project.pictures, "blank", (3, 2, 1)).with_suffix(".txt").write_text(" \n")
    return {"short.png", "page.png", "empty.jpg", "silent.png", "blank.txt"}


def test_tables_hold_a_row_per_picture_and_caption(finished: Project) -> None:
    folder = finished.run("validate").folder
    pictures = rows(folder / "dataset.parquet")
    captions = rows(folder / "captions.parquet")
    assert set(pictures[0]) == set(DATASET.columns)
    assert set(captions[0]) == set(CAPTIONS.columns)
    assert sorted(row["path"] for row in pictures) == ["ada.png", "bob.png", "cyd.png", "dot.png"]
    assert sorted(row["text"] for row in captions) == [
        f"a zorb called {name}" for name in ("ada", "bob", "cyd", "dot")
    ]
    assert {row["caption_id"] for row in pictures} == {row["caption_id"] for row in captions}


def test_every_bad_file_is_listed_in_one_run_and_nothing_is_published(fresh: Project) -> None:
    expected = spoil(fresh)
    ran = fresh.run("validate")
    assert (ran.code, ran.status, ran.result["key"]) == (3, "failed", None)
    named = {Path(finding["where"]).name for finding in ran.result["findings"]}
    assert named == expected
    assert ran.stderr.count("error[") == len(expected)
    assert all(finding["fix"] for finding in ran.result["findings"])
    assert sorted(path.name for path in fresh.store.iterdir() if path.name not in STRAY) == []
    assert not fresh.results.exists()


def test_skip_bad_goes_on_without_them_and_records_them(fresh: Project) -> None:
    expected = spoil(fresh)
    before = listing(fresh.pictures)
    ran = fresh.make("validate", sets=("validate.skip_bad=true",))["validate"]
    assert (ran.counts["accepted"], ran.counts["rejected"]) == (4, len(expected))
    assert ran.stderr.count("left out: error[") == len(expected)
    report = msgspec.json.decode((ran.folder / "report.json").read_bytes())
    assert {Path(finding["where"]).name for finding in report["findings"]} == expected
    assert ran.result["findings"] == report["findings"]
    assert listing(fresh.pictures) == before
    # The same findings again when there is nothing to do.
    again = fresh.run("validate", sets=("validate.skip_bad=true",))
    assert (again.status, again.result["findings"]) == ("up to date", ran.result["findings"])


def test_mended_picture_is_accepted(fresh: Project) -> None:
    truncate(fresh.pictures / "ada.png")
    assert fresh.run("validate").code == 3
    draw(fresh.pictures, "ada", (200, 30, 30))
    assert fresh.run("validate").counts["accepted"] == 4


def test_absent_dataset_folder_is_a_wrong_setting(fresh: Project) -> None:
    ran = fresh.run("validate", sets=("validate.dataset=elsewhere",))
    assert (ran.code, ran.error) == (2, "dataset.absent")
    assert "validate.dataset" in ran.result["error"]["fix"]


@pytest.mark.parametrize("left", [(), ("notes.md",)])
def test_dataset_without_a_picture_is_rejected(fresh: Project, left: tuple[str, ...]) -> None:
    shutil.rmtree(fresh.pictures)
    fresh.pictures.mkdir()
    for name in left:
        (fresh.pictures / name).write_text("not a picture")
    ran = fresh.run("validate")
    assert (ran.code, ran.error) == (3, "dataset.empty")


def test_dataset_of_bad_pictures_only_is_rejected_even_when_skipping(fresh: Project) -> None:
    for path in fresh.pictures.glob("*.png"):
        truncate(path)
    ran = fresh.run("validate", sets=("validate.skip_bad=true",))
    assert (ran.code, ran.error) == (3, "dataset.empty")


def test_same_picture_twice_is_a_finding_not_a_fault(fresh: Project) -> None:
    shutil.copyfile(fresh.pictures / "ada.png", fresh.pictures / "eve.png")
    (fresh.pictures / "eve.txt").write_text("the same once more")
    ran = fresh.run("validate")
    assert (ran.code, ran.counts["warnings"]) == (0, 1)
    assert "are the same picture" in ran.stderr
    assert [finding["code"] for finding in ran.result["findings"]] == ["dataset.warning"]


def test_trigger_and_comments_of_the_file_decide_what_is_made_anew(project: Project) -> None:
    project.config.write_text("# a comment\n" + project.config.read_text())
    assert project.run("validate").status == "up to date"
    assert project.run("validate", sets=("validate.trigger=blorb",)).status == "built"


@pytest.mark.parametrize("data", [b"", b"{", b"\xff"])
def test_report_that_cannot_be_read_is_damage_and_no_bug(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "report.json").write_bytes(data)
    with pytest.raises(Damaged, match=r"report\.unreadable.*fix: "):
        STAGE.findings(tmp_path)
