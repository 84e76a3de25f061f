from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from schemas.errors import BadConfig
from stages.dataset.discover import discover, listing, state
from tests.dataset.corpus import write


def codes(folder: Path) -> list[tuple[str, str]]:
    return [(fault.code, fault.where) for fault in discover(folder).faults]


def test_pictures_are_found_to_any_depth_in_byte_order(tmp_path: Path) -> None:
    write(tmp_path, {"b.PNG": "", "a/z.jpg": "", "a/deep/x.webp": "", "é.jpeg": "", "Z.Jpg": "", "c.jfif": ""})
    assert discover(tmp_path).pictures == ["Z.Jpg", "a/deep/x.webp", "a/z.jpg", "b.PNG", "c.jfif", "é.jpeg"]


def test_hidden_and_foreign_files_are_ignored_and_counted(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": "", ".DS_Store": "", "._a.png": "", "Thumbs.db": "", "notes.md": "", ".git/x.png": ""})
    found = discover(tmp_path)
    assert (found.pictures, found.ignored, found.faults) == (["a.png"], 5, [])


def test_formats_that_are_not_read_are_faults_not_silence(tmp_path: Path) -> None:
    write(tmp_path, {"a.heic": "", "b.GIF": "", "c.svg": ""})
    assert codes(tmp_path) == [("picture.format", "a.heic"), ("picture.format", "b.GIF"), ("picture.format", "c.svg")]
    assert discover(tmp_path).refused == ["a.heic", "b.GIF", "c.svg"]


def test_link_inside_is_followed_and_links_outside_broken_looped_or_to_folders_are_faults(tmp_path: Path) -> None:
    outside = write(tmp_path / "outside", {"secret.png": "x"})
    folder = write(tmp_path / "set", {"real.png": "x", "sub/other.png": "x"})
    (folder / "inside.png").symlink_to("real.png")
    (folder / "escape.png").symlink_to(outside / "secret.png")
    (folder / "dangling.jpg").symlink_to("nothing.jpg")
    (folder / "loop.webp").symlink_to("loop.webp")
    (folder / "folder").symlink_to("sub")
    (folder / "stray.md").symlink_to("nothing.md")
    assert discover(folder).pictures == ["inside.png", "real.png", "sub/other.png"]
    assert codes(folder) == [
        ("link.broken", "dangling.jpg"),
        ("link.outside", "escape.png"),
        ("link.folder", "folder"),
        ("link.broken", "loop.webp"),
    ]


def test_dataset_folder_may_itself_be_a_link(tmp_path: Path) -> None:
    write(tmp_path / "real", {"a.png": ""})
    (tmp_path / "link").symlink_to("real")
    assert discover(tmp_path / "link").pictures == ["a.png"]


def test_pipe_named_as_a_picture_is_a_fault_and_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    os.mkfifo(tmp_path / "a.txt")
    started = time.monotonic()
    assert codes(tmp_path) == [("file.not_regular", "a.png"), ("file.not_regular", "a.txt")]
    assert time.monotonic() - started < 2


def test_name_that_is_not_utf8_is_a_fault_with_its_bytes_escaped(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/caf\xe9.png"
    try:
        os.close(os.open(raw, os.O_CREAT | os.O_WRONLY))
    except OSError:
        pytest.skip("this file system holds UTF-8 names only")
    (fault,) = discover(tmp_path).faults
    assert (fault.code, fault.where) == ("name.not_utf8", r"caf\xe9.png")
    fault.line().encode()


def test_names_equal_on_other_systems_are_faults(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": "", "A.png": "", "e\u0301.png": "", "\u00e9.png": ""})
    if len(list(tmp_path.iterdir())) < 4:
        pytest.skip("this file system already folds such names")
    found = discover(tmp_path)
    assert [(fault.code, fault.where) for fault in found.faults] == [
        ("name.twins", "A.png"),
        ("name.twins", "e\u0301.png"),
    ]
    assert found.pictures == []
    assert len(found.refused) == 4


def test_names_with_shell_characters_are_plain_names(tmp_path: Path) -> None:
    names = ["$(touch canary).png", "-rf.png", "a b.png", "a\nb.png", "*?.png", "'q'.png", "#%;.png"]
    write(tmp_path, dict.fromkeys(names, ""))
    assert sorted(discover(tmp_path).pictures) == sorted(names)


def test_unreadable_folder_is_a_fault_and_the_rest_goes_on(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": "", "locked/b.png": ""})
    (tmp_path / "locked").chmod(0)
    try:
        if os.access(tmp_path / "locked", os.R_OK):
            pytest.skip("permissions do not bind this user")
        assert codes(tmp_path) == [("folder.unreadable", "locked/")]
        assert discover(tmp_path).pictures == ["a.png"]
    finally:
        (tmp_path / "locked").chmod(0o755)


def test_listing_holds_what_decides_the_result_and_nothing_else(tmp_path: Path) -> None:
    files = ["a.png", "a.txt", "b.jpg", "b.json", "metadata.jsonl", "stray.txt", "info.json", "readme.md"]
    write(tmp_path, dict.fromkeys(files, ""))
    assert listing(tmp_path) == ["a.png", "a.txt", "b.jpg", "b.json", "metadata.jsonl"]
    assert discover(tmp_path).orphans == ["stray.txt"]


def test_absent_folder_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match=r"dataset\.missing"):
        discover(tmp_path / "nowhere")
    write(tmp_path, {"file": ""})
    with pytest.raises(BadConfig, match="not a folder"):
        discover(tmp_path / "file")


def test_ten_thousand_files_are_listed_within_two_seconds(tmp_path: Path) -> None:
    for number in range(5000):
        (tmp_path / f"{number}.png").touch()
        (tmp_path / f"{number}.txt").touch()
    started = time.monotonic()
    assert len(listing(tmp_path)) == 10_000
    assert time.monotonic() - started < 2


def _edit(folder: Path) -> None:
    """Change bytes but neither size nor modification time."""
    path = folder / "sub" / "b.png"
    before = path.stat()
    while path.stat().st_ctime_ns == before.st_ctime_ns:
        path.write_text("y")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _swap(folder: Path) -> None:
    (folder / "a.png").rename(folder / "c")
    (folder / "sub" / "b.png").rename(folder / "a.png")
    (folder / "c").rename(folder / "sub" / "b.png")


def _retarget(folder: Path) -> None:
    (folder / "link.png").unlink()
    (folder / "link.png").symlink_to("a.png")


CHANGES: list[Callable[[Path], object]] = [
    _edit,
    _swap,
    _retarget,
    lambda folder: (folder / "a.png").rename(folder / "z.png"),
    lambda folder: (folder / "a.txt").unlink(),
    lambda folder: (folder / "new.txt").touch(),
    lambda folder: (folder / "sub").rename(folder / "bus"),
    lambda folder: (folder.parent / "outside.png").write_text("longer"),
]


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_a_file_or_its_name_changes_how_the_folder_looks(
    tmp_path: Path, change: Callable[[Path], object]
) -> None:
    write(tmp_path, {"outside.png": "x"})
    folder = write(tmp_path / "set", {"a.png": "x", "a.txt": "", "sub/b.png": "x"})
    (folder / "link.png").symlink_to("sub/b.png")
    (folder / "out.png").symlink_to("../outside.png")
    before = state(folder)
    assert state(folder) == before
    change(folder)
    assert state(folder).text != before.text


def test_hidden_files_change_nothing_of_how_a_folder_looks(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": "x", ".git/x.png": ""})
    before = state(tmp_path)
    write(tmp_path, {".DS_Store": "", ".git/y.png": ""})
    assert state(tmp_path) == before


def test_folder_is_as_young_as_its_youngest_file_or_what_a_link_leads_to(tmp_path: Path) -> None:
    write(tmp_path, {"outside.png": "x"})
    folder = write(tmp_path / "set", {"a.png": "x"})
    (folder / "link.png").symlink_to("../outside.png")
    os.utime(tmp_path / "outside.png", ns=(0, later := 2 * time.time_ns()))
    assert state(folder).youngest_ns == later


def test_names_that_are_not_utf8_can_be_looked_at(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9.png")).touch()
    assert state(tmp_path) == state(tmp_path)
