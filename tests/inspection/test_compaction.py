"""Many small fragments become few, once nobody is at work on the store; and nothing that refers to them is broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from schemas.errors import NoResources
from stages import encode_latents
from stages.contract.locks import share
from stages.contract.runner import store_lock
from stages.inspection import compaction
from stages.stores import fragments
from tests.stages.project import Project, draw, listing, new_project, rows

FULL_512 = 128 * 32 * 32 * 4


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fragments of two records while encoding goes on."""
    monkeypatch.setattr(fragments, "MOST_RECORDS", 2)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch, small: None) -> None:
    """Two files are many already."""
    monkeypatch.setattr(encode_latents, "MANY_FILES", 2)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    made = new_project(tmp_path / "project")
    made.make("validate")
    return made


def names(project: Project, folder: Path | None = None) -> set[str]:
    """Return the fragments that lie in the store, or those that an artifact's index names."""
    if folder is None:
        return {f"fragments/latents/{path.name}" for path in (project.store / "fragments" / "latents").iterdir()}
    return {row["fragment"] for row in rows(folder / "index.parquet")}


@pytest.mark.parametrize(
    ("record_bytes", "records"),
    [(1, 1024), (2048, 1024), (FULL_512 // 4, 256), (FULL_512 // 2, 128), (FULL_512, 64), (4 * FULL_512, 64)],
)
def test_small_records_lie_in_large_fragments(record_bytes: int, records: int) -> None:
    assert fragments.full(record_bytes) == records


def test_many_fragments_become_few_of_the_same_digest(
    project: Project, tmp_path: Path, eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode_latents, "MANY_FILES", 500)
        scattered = project.copy(tmp_path / "scattered")
        whole = scattered.make("encode-latents")["encode-latents"]
        assert len(names(scattered)) == 2
    ran = project.make("encode-latents")["encode-latents"]
    assert "putting 4 files of fragments together" in ran.stderr
    assert len(names(project)) == 1
    assert names(project, ran.folder) == names(project)
    assert (ran.result["key"], ran.result["digest"]) == (whole.result["key"], whole.result["digest"])
    project.make("encode-text", "train", "preview")
    before = listing(project.store, "lookup")
    assert project.make("encode-latents")["encode-latents"].counts == {"total": 4, "encoded": 0, "reused": 4}
    assert listing(project.store, "lookup") == before
    assert project.run("verify", "--deep", "--recompute", "100%").code == 0


def test_later_pictures_find_what_was_put_together(project: Project, eager: None) -> None:
    project.make("encode-latents")
    (together,) = names(project)
    draw(project.pictures, "eva", (9, 9, 9))
    ran = project.make("validate", "encode-latents")["encode-latents"]
    assert ran.counts == {"total": 5, "encoded": 1, "reused": 4}
    # Five fit into one; but what the artifact before refers to stays.
    assert len(names(project, ran.folder)) == 1
    assert names(project) == names(project, ran.folder) | {together}


def test_fragments_of_another_artifact_stay(project: Project, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    first = project.make("encode-latents")["encode-latents"]
    before = names(project)
    draw(project.pictures, "eva", (9, 9, 9))
    project.make("validate")
    monkeypatch.setattr(encode_latents, "MANY_FILES", 2)
    second = project.make("encode-latents")["encode-latents"]
    assert names(project, first.folder) == before
    assert names(project) == before | names(project, second.folder)
    assert len(names(project, second.folder)) == 1
    (project.pictures / "eva.png").unlink()
    (project.pictures / "eva.txt").unlink()
    assert project.make("validate", "encode-latents")["encode-latents"].status == "up to date"


def test_all_stays_where_another_artifact_cannot_be_read(project: Project, eager: None) -> None:
    other = project.store / "encode-latents" / ("0" * 64)
    other.mkdir(parents=True)
    (other / "manifest.json").write_text("{")
    ran = project.make("encode-latents")["encode-latents"]
    assert len(names(project, ran.folder)) == 1
    assert len(names(project)) == 3


def test_nothing_moves_while_another_stage_is_at_work(project: Project, eager: None) -> None:
    with share(store_lock(project.store), lambda _: None):
        ran = project.make("encode-latents")["encode-latents"]
    assert "encode-latents is done, in more files than it needs" in ran.stderr
    assert len(names(project, ran.folder)) == len(names(project)) == 2
    project.make("encode-text", "train", "preview")
    assert project.run("verify", "--deep").code == 0


def test_no_room_to_put_fragments_together_is_no_failure(
    project: Project, eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(work: Path, target: Path) -> None:
        raise NoResources("disk.full", "the disk is full", where=str(target))

    monkeypatch.setattr(compaction, "publish_folder", full)
    ran = project.make("encode-latents")["encode-latents"]
    assert "disk.full" in ran.stderr
    assert len(names(project, ran.folder)) == 2
    project.make("encode-text", "train")


def test_death_between_both_leaves_fragments_that_nothing_needs(
    project: Project, eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Died(BaseException):
        """Nothing catches it."""

    def dies(store: Path, paths: object) -> None:
        raise Died

    monkeypatch.setattr(compaction, "withdraw", dies)
    with pytest.raises(Died):
        project.run("encode-latents")
    monkeypatch.undo()
    ran = project.make("encode-latents")["encode-latents"]
    assert ran.status == "up to date"
    assert len(names(project, ran.folder)) == 1
    assert len(names(project)) == 3
    project.make("encode-text", "train")
