"""The digest of a folder of pictures: that of its contents, at the price of a look."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from stages.contract import digests
from stages.contract.digests import StatCache, digest_of, sha256_bytes, sha256_file
from stages.dataset import stand_in
from stages.dataset.discover import listing
from stages.dataset.stand_in import folder_digest
from tests.dataset.corpus import write

FILES: dict[str, bytes | str] = {"a.png": "1", "a.txt": "22", "sub/b.jpg": "333", "notes.md": "4444"}
COUNTED = ("a.png", "a.txt", "sub/b.jpg")


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Believe times at once: no test waits for a file to grow old."""
    monkeypatch.setattr(digests, "RACY_NS", -(10**12))


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what is hashed, and "listed" for every time that a folder is sorted, as it happens."""
    done: list[str] = []

    def hashed(path: Path) -> str:
        done.append(path.name)
        return sha256_file(path)

    def listed(folder: Path, *, masks: bool) -> list[str]:
        done.append("listed")
        return listing(folder, masks=masks)

    monkeypatch.setattr(digests, "sha256_file", hashed)
    monkeypatch.setattr(stand_in, "listing", listed)
    return done


def expected(folder: Path) -> str:
    return digest_of("folder", [[name, sha256_bytes((folder / name).read_bytes())] for name in COUNTED])


def cache(tmp_path: Path, *, paranoid: bool = False) -> StatCache:
    return StatCache(tmp_path / "digests.sqlite", paranoid=paranoid)


@pytest.mark.usefixtures("settled")
def test_folder_that_looks_the_same_is_neither_listed_nor_read_again(tmp_path: Path, work: list[str]) -> None:
    folder = write(tmp_path / "set", FILES)
    first = folder_digest(folder, cache(tmp_path), masks=False)
    assert first == expected(folder)
    assert work == ["listed", "a.png", "a.txt", "b.jpg"]
    work.clear()
    assert folder_digest(folder, cache(tmp_path), masks=False) == first
    assert work == []


@pytest.mark.usefixtures("settled")
def test_of_a_changed_folder_only_the_changed_file_is_read(tmp_path: Path, work: list[str]) -> None:
    folder = write(tmp_path / "set", FILES)
    before = folder_digest(folder, cache(tmp_path), masks=False)
    work.clear()
    (folder / "sub" / "b.jpg").write_text("55555")
    assert folder_digest(folder, cache(tmp_path), masks=False) == expected(folder) != before
    assert work == ["listed", "b.jpg"]


def test_young_folder_is_read_again(tmp_path: Path, work: list[str]) -> None:
    folder = write(tmp_path / "set", FILES)
    for _ in range(2):
        work.clear()
        folder_digest(folder, cache(tmp_path), masks=False)
        assert work == ["listed", "a.png", "a.txt", "b.jpg"]


@pytest.mark.usefixtures("settled")
def test_paranoid_reads_every_file(tmp_path: Path, work: list[str]) -> None:
    folder = write(tmp_path / "set", FILES)
    folder_digest(folder, cache(tmp_path), masks=False)
    work.clear()
    assert folder_digest(folder, cache(tmp_path, paranoid=True), masks=False) == expected(folder)
    assert work == ["listed", "a.png", "a.txt", "b.jpg"]


@pytest.mark.usefixtures("settled")
def test_masks_are_remembered_apart(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", {"a.png": "1", "stray.mask.png": "2"})
    plain, masked = (folder_digest(folder, cache(tmp_path), masks=masks) for masks in (False, True))
    again = [folder_digest(folder, cache(tmp_path), masks=masks) for masks in (False, True)]
    assert again == [plain, masked]
    assert plain != masked


@pytest.mark.usefixtures("settled")
def test_folder_with_a_file_that_could_not_be_read_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "set", FILES)

    def failing(path: Path) -> str:
        raise OSError(errno.EIO, "the disk fails", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(digests, "sha256_file", failing)
        failed = folder_digest(folder, cache(tmp_path), masks=False)
    assert failed != expected(folder)
    assert folder_digest(folder, cache(tmp_path), masks=False) == expected(folder)


@pytest.mark.usefixtures("settled")
def test_link_that_leads_nowhere_is_seen_once_it_leads_somewhere(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", FILES)
    (folder / "gone.png").symlink_to("sub/new")
    found = folder_digest(folder, cache(tmp_path), masks=False)
    assert found == expected(folder)
    (folder / "sub" / "new").write_text("x")
    assert folder_digest(folder, cache(tmp_path), masks=False) != found
