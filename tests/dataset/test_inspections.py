"""Bytes that were decoded once are known: by nothing but those bytes, under the same limit and version."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

import pytest

from schemas.errors import Fault
from stages.contract.digests import StatCache
from stages.dataset.decoder import Decoders
from stages.dataset.inspections import ANEW, Look
from stages.dataset.pixels import Inspected
from tests.dataset.corpus import jpeg, png, turned, webp, write
from tests.stages.project import Project, draw, new_project

PICTURES: dict[str, bytes | str] = {"a.png": png(), "b.jpg": jpeg(), "c.webp": webp(), "d.png": turned(6)}


class Seen:
    """The pictures that were handed to a decoder."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        inspect = Decoders.inspect

        def counted(decoders: Decoders, folder: Path, names: Sequence[str], *, glance: bool = False) -> object:
            self.names += names
            return inspect(decoders, folder, names, glance=glance)

        patch.setattr(Decoders, "inspect", counted)

    def take(self) -> list[str]:
        names, self.names = self.names, []
        return names


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    return Seen(monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "pictures", PICTURES)


@pytest.fixture
def memory(tmp_path: Path, folder: Path, seen: Seen) -> StatCache:
    """What all pictures of the folder were found to be."""
    made = StatCache(database(tmp_path))
    assert look(folder, made) == look(folder)
    assert seen.take() == [*PICTURES, *PICTURES]
    return made


def database(root: Path) -> Path:
    return root / "lookup" / "digests.sqlite"


def look(folder: Path, memory: StatCache | None = None, most: float = 64.0) -> list[Inspected | Fault]:
    names = sorted(path.name for path in folder.iterdir())
    return list(Look(memory=memory).inspect(folder, names, most))


def test_what_was_decoded_once_is_known_in_any_order_and_folder(folder: Path, memory: StatCache, seen: Seen) -> None:
    assert look(folder, memory) == look(folder)
    assert seen.take() == list(PICTURES)
    moved = folder.rename(folder.parent / "moved")
    (moved / "a.png").rename(moved / "z.png")
    names = ["d.png", "z.png", "b.jpg"]
    known = list(Look(memory=memory).inspect(moved, names, 64.0))
    assert seen.take() == []
    assert known == list(ANEW.inspect(moved, names, 64.0))


def test_only_the_picture_that_changed_is_decoded(folder: Path, memory: StatCache, seen: Seen) -> None:
    (folder / "b.jpg").write_bytes(jpeg(64, 64))
    found = look(folder, memory)
    assert seen.take() == ["b.jpg"]
    assert found == look(folder)
    # Put back, it is known: by its bytes, not by its time.
    write(folder, {"b.jpg": PICTURES["b.jpg"]})
    seen.take()
    assert look(folder, memory) == look(folder)
    assert seen.take() == list(PICTURES)


def test_another_limit_decodes_all_again(folder: Path, memory: StatCache, seen: Seen) -> None:
    faults = look(folder, memory, most=0.001)
    assert seen.take() == list(PICTURES)
    assert {fault.code for fault in faults if isinstance(fault, Fault)} == {"picture.too_large"}
    assert len(faults) == len(PICTURES)


@pytest.mark.parametrize(
    ("name", "version"), [("stages.dataset.inspections.INSPECTION_VERSION", 99), ("PIL.__version__", "13.99")]
)
def test_another_version_of_looking_decodes_all_again(
    folder: Path, memory: StatCache, seen: Seen, monkeypatch: pytest.MonkeyPatch, name: str, version: object
) -> None:
    monkeypatch.setattr(name, version)
    look(folder, memory)
    assert seen.take() == list(PICTURES)


def test_suffix_that_says_another_format_is_told_of(folder: Path, memory: StatCache, seen: Seen) -> None:
    (folder / "a.png").rename(folder / "a.jpg")
    (first, *_) = look(folder, memory)
    assert seen.take() == ["a.jpg"]
    assert isinstance(first, Inspected)
    assert first.notes == ("holds PNG data under another suffix",)


def test_fault_is_never_remembered(folder: Path, memory: StatCache, seen: Seen) -> None:
    (folder / "a.png").write_bytes(png()[:-20])
    for _ in range(2):
        (first, *_) = look(folder, memory)
        assert isinstance(first, Fault)
        assert seen.take() == ["a.png"]


def test_glance_is_never_remembered_as_a_look(folder: Path, tmp_path: Path, seen: Seen) -> None:
    memory = StatCache(database(tmp_path))
    list(Look(glance=True, memory=memory).inspect(folder, list(PICTURES), 64.0))
    seen.take()
    look(folder, memory)
    assert seen.take() == list(PICTURES)


def test_paranoid_decodes_everything(folder: Path, memory: StatCache, tmp_path: Path, seen: Seen) -> None:
    assert look(folder, StatCache(database(tmp_path), paranoid=True)) == look(folder)
    assert seen.take() == [*PICTURES, *PICTURES]


def test_answer_is_kept_under_the_bytes_that_were_decoded(folder: Path, tmp_path: Path, seen: Seen) -> None:
    """A picture that changes between being hashed and being decoded must not speak for the bytes it had before."""

    class Early(StatCache):
        def files(self, paths: Sequence[Path]) -> list[str]:
            hashed = super().files(paths)
            (folder / "a.png").write_bytes(png(48, 48))
            return hashed

    look(folder, Early(database(tmp_path)))
    write(folder, {"a.png": PICTURES["a.png"]})
    seen.take()
    assert look(folder, StatCache(database(tmp_path))) == look(folder)
    assert seen.take() == ["a.png", *PICTURES]


@pytest.mark.parametrize("forged", ["value", "what", "all"])
def test_forged_or_lost_memory_costs_time_only(
    folder: Path, memory: StatCache, tmp_path: Path, seen: Seen, forged: str
) -> None:
    if forged == "all":
        database(tmp_path).unlink()
    else:
        with sqlite3.connect(database(tmp_path)) as connection:
            rows = connection.execute(f"SELECT {forged}, rowid FROM remembered WHERE what LIKE 'inspection %'")
            for text, number in rows.fetchall():
                # A width, or a digest, with one digit changed.
                changed = text.replace("9", "8", 1) if forged == "value" else text[:-1] + "g"
                connection.execute(f"UPDATE remembered SET {forged} = ? WHERE rowid = ?", (changed, number))
    assert look(folder, memory) == look(folder)
    assert seen.take() == [*PICTURES, *PICTURES]


@pytest.fixture
def project(tmp_path: Path, seen: Seen) -> Project:
    made = new_project(tmp_path / "project")
    made.make("validate")
    assert len(seen.take()) == 4
    return made


def test_validate_decodes_what_changed_and_all_by_force(project: Project, seen: Seen) -> None:
    draw(project.pictures, "ada", (1, 2, 3))
    first = project.make("validate")["validate"]
    assert seen.take() == ["ada.png"]
    (project.pictures / "bob.png").rename(project.pictures / "bea.png")
    (project.pictures / "bob.txt").rename(project.pictures / "bea.txt")
    assert project.make("validate")["validate"].status == "built"
    assert seen.take() == []
    again = project.run("validate", "--force")
    assert (len(seen.take()), again.code) == (4, 0)
    assert (again.result["digest"], again.counts) == (first.result["digest"], first.counts)


def test_validate_says_the_same_from_memory(project: Project, seen: Seen) -> None:
    (project.pictures / "eva.jpg").write_bytes(png())
    (project.pictures / "eva.txt").write_text("a [trigger]")
    whole = project.make("validate")["validate"]
    assert seen.take() == ["eva.jpg"]
    for path in (project.store / "validate").iterdir():
        path.rename(project.root / path.name)
    again = project.make("validate")["validate"]
    assert seen.take() == []
    assert (again.result["digest"], again.counts) == (whole.result["digest"], whole.counts)
    assert again.result["findings"] == whole.result["findings"] != []
