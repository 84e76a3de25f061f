from __future__ import annotations

import hashlib
import shutil
import time
from pathlib import Path

import msgspec
import pytest
from PIL import Image

from schemas.errors import BadConfig
from schemas.validate import Validate
from stages.dataset.inspections import Look
from stages.dataset.items import Dataset, build_items
from tests.dataset.corpus import bilevel_png, encoded, jpeg, png, scene, webp, write

GOOD = {
    "a.png": png(),
    "a.txt": "a red [trigger]",
    "b.jpg": jpeg(200, 200),
    "b.txt": "two",
    "c.webp": webp(300, 120),
    "c.txt": "x",
}


def build(folder: Path, **settings: object) -> Dataset:
    config = {"dataset": ".", "trigger": "zorb", "resolutions": (64, 128), **settings}
    return build_items(folder, msgspec.convert(config, Validate), 64, silent)


def silent(done: int, total: int) -> None:
    """Nobody watches."""


def ids(dataset: Dataset) -> list[str]:
    return [item.item_id for item in dataset.items]


def test_each_picture_gives_one_item_for_each_size_it_fills(tmp_path: Path) -> None:
    dataset = build(write(tmp_path, GOOD))
    assert dataset.faults == []
    buckets = {(item.path, item.bucket_width, item.bucket_height) for item in dataset.items}
    assert buckets == {
        ("a.png", 80, 48),
        ("b.jpg", 64, 64),
        ("b.jpg", 128, 128),
        ("c.webp", 96, 32),
        ("c.webp", 192, 80),
    }
    assert sorted(dataset.captions.values()) == ["a red zorb", "zorb two", "zorb x"]


def test_items_name_their_caption_and_the_bytes_of_their_picture(tmp_path: Path) -> None:
    dataset = build(write(tmp_path, GOOD))
    for item in dataset.items:
        assert item.image_sha256 == hashlib.sha256(GOOD[item.path]).hexdigest()  # type: ignore[arg-type]
        assert item.caption_id == hashlib.sha256(dataset.captions[item.caption_id].encode()).hexdigest()[:32]
        assert len(item.item_id) == 32
    assert len(set(ids(dataset))) == len(dataset.items)
    assert ids(dataset) == sorted(ids(dataset))


def test_renaming_and_moving_changes_no_id(tmp_path: Path) -> None:
    before = build(write(tmp_path / "one", GOOD))
    renamed = {f"deep/{name.replace('a.', 'z.')}": content for name, content in GOOD.items()}
    after = build(write(tmp_path / "two", renamed))
    assert ids(before) == ids(after)
    assert before.captions == after.captions


def test_changed_caption_changes_only_its_own_items(tmp_path: Path) -> None:
    before = {(item.path, item.bucket_width): item.item_id for item in build(write(tmp_path, GOOD)).items}
    write(tmp_path, {"b.txt": "three"})
    after = {(item.path, item.bucket_width): item.item_id for item in build(tmp_path).items}
    assert {key[0] for key in before if before[key] != after[key]} == {"b.jpg"}


def test_background_matters_to_transparent_pictures_only(tmp_path: Path) -> None:
    clear = encoded(Image.new("RGBA", (96, 96), (255, 0, 0, 0)), "PNG")
    write(tmp_path, {**GOOD, "clear.png": clear, "clear.txt": "x"})
    white = {(item.path, item.bucket_width): item for item in build(tmp_path).items}
    black = {(item.path, item.bucket_width): item for item in build(tmp_path, background="#000000").items}
    assert {key[0] for key in white if white[key].item_id != black[key].item_id} == {"clear.png"}
    assert {item.background for item in black.values()} == {"", "#000000"}


def test_exact_duplicates_keep_their_own_ids_and_are_named(tmp_path: Path) -> None:
    dataset = build(write(tmp_path, {"a.png": png(), "a.txt": "x", "b.png": png(), "b.txt": "x"}), resolutions=(64,))
    assert len(set(ids(dataset))) == 2
    assert sorted(item.ordinal for item in dataset.items) == [0, 1]
    assert "a.png and b.png are the same picture" in dataset.warnings
    assert dataset.statistics.duplicates == 1


def bad_corpus(folder: Path) -> Path:
    good = {f"good{number}.png": png(64 + number, 64) for number in range(20)}
    texts = {f"good{number}.txt": "fine" for number in range(20)}
    bad = {
        "truncated.jpg": jpeg()[:-40],
        "page.jpg": b"<html>",
        "empty.png": b"",
        "bomb.png": bilevel_png(9000, 9000),
        "tiny.png": png(20, 20),
        "strip.png": png(400, 40),
        "old.gif": encoded(scene(), "GIF"),
        "anim.webp": encoded(scene(), "WEBP", save_all=True, append_images=[scene().rotate(90)]),
        "blank.png": png(),
        "latin.png": png(),
        "lonely.png": png(),
    }
    captions = {f"{name.rpartition('.')[0]}.txt": "x" for name in bad if name != "lonely.png"}
    return write(folder, {**good, **texts, **bad, **captions, "blank.txt": " ", "latin.txt": b"caf\xe9"})


def test_every_fault_is_listed_in_one_run_and_the_good_pictures_come_through(tmp_path: Path) -> None:
    dataset = build(bad_corpus(tmp_path))
    assert sorted((fault.code, fault.where) for fault in dataset.faults) == [
        ("caption.empty", "blank.txt"),
        ("caption.missing", "lonely.png"),
        ("caption.not_utf8", "latin.txt"),
        ("picture.animated", "anim.webp"),
        ("picture.empty", "empty.png"),
        ("picture.format", "old.gif"),
        ("picture.not_an_image", "page.jpg"),
        ("picture.too_large", "bomb.png"),
        ("picture.too_long", "strip.png"),
        ("picture.too_small", "tiny.png"),
        ("picture.truncated", "truncated.jpg"),
    ]
    assert all(fault.fix for fault in dataset.faults)
    assert (dataset.statistics.images, dataset.statistics.accepted, dataset.statistics.rejected) == (31, 20, 11)
    assert {item.path for item in dataset.items} == {f"good{number}.png" for number in range(20)}


def test_a_bad_picture_with_a_bad_caption_has_both_faults(tmp_path: Path) -> None:
    dataset = build(write(tmp_path, {"a.png": b"", "a.txt": b"\xff"}))
    assert sorted(fault.code for fault in dataset.faults) == ["caption.not_utf8", "picture.empty"]


def test_folder_is_left_exactly_as_it_was(tmp_path: Path) -> None:
    bad_corpus(tmp_path)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.rglob("*")}
    build(tmp_path)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.rglob("*")} == before


def test_file_names_cannot_drive_a_terminal(tmp_path: Path) -> None:
    dataset = build(write(tmp_path, {"\x1b[2J.png": png(40, 40), "\x1b[2J.txt": "x", "\x1b[2J\n.jpg": b""}))
    lines = [*dataset.warnings, *(fault.line() for fault in dataset.faults)]
    assert len(lines) == 3
    assert all(line.isprintable() for line in lines)


def test_empty_dataset_is_a_fault(tmp_path: Path) -> None:
    (fault,) = build(write(tmp_path, {"readme.md": "x"})).faults
    assert (fault.code, fault.why) == ("dataset.empty", "1 other files ignored")


def test_trigger_in_a_caption_without_a_trigger_set_is_a_fault(tmp_path: Path) -> None:
    (fault,) = build(write(tmp_path, GOOD), trigger="").faults
    assert (fault.code, fault.where) == ("caption.no_trigger", "a.png")


def test_small_picture_trains_at_its_own_size_with_a_warning(tmp_path: Path) -> None:
    dataset = build(write(tmp_path, {"a.png": png(100, 70), "a.txt": "x"}), resolutions=(512,))
    assert [(item.bucket_width, item.bucket_height) for item in dataset.items] == [(96, 64)]
    assert dataset.warnings == ["a.png is smaller than every resolution and trains at its own size"]
    assert (dataset.statistics.small, dataset.statistics.own_size) == (1, 1)
    enlarged = build(tmp_path, resolutions=(512,), upscale=True)
    assert enlarged.items[0].bucket_width * enlarged.items[0].bucket_height > 0.75 * 512**2
    assert enlarged.warnings == []


def test_statistics_count_what_is_there(tmp_path: Path) -> None:
    statistics = build(write(tmp_path, {**GOOD, ".hidden": ""})).statistics
    assert (statistics.images, statistics.accepted, statistics.captions, statistics.ignored_files) == (3, 3, 3, 1)
    assert (statistics.caption_words.minimum, statistics.caption_words.maximum) == (2, 3)
    assert (statistics.widths_px.minimum, statistics.widths_px.median, statistics.widths_px.maximum) == (96, 200, 300)
    assert sum(statistics.buckets.values()) == statistics.items


def test_progress_counts_every_picture_once_in_order(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write(tmp_path, GOOD)
    build_items(tmp_path, Validate(dataset=".", trigger="z"), 64, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_two_thousand_small_pictures_take_less_than_four_seconds(tmp_path: Path) -> None:
    write(tmp_path, {"0.jpg": jpeg(64, 64), "0.txt": "x"})
    for number in range(1, 2000):
        shutil.copy(tmp_path / "0.jpg", tmp_path / f"{number}.jpg")
        shutil.copy(tmp_path / "0.txt", tmp_path / f"{number}.txt")
    started = time.monotonic()
    dataset = build(tmp_path, resolutions=(64,))
    assert len(set(ids(dataset))) == 2000
    assert time.monotonic() - started < 4


@pytest.mark.parametrize("settings", [{"resolutions": (64,)}, {"trigger": "other"}, {"resolutions": (128,)}])
def test_each_setting_that_shapes_items_moves_ids(tmp_path: Path, settings: dict[str, object]) -> None:
    write(tmp_path, GOOD)
    assert ids(build(tmp_path)) != ids(build(tmp_path, **settings))


def drawn(dataset: Dataset) -> dict[str, set[tuple[str, int]]]:
    """How each picture's items are drawn: (picture, times)."""
    found: dict[str, set[tuple[str, int]]] = {}
    for item in dataset.items:
        found.setdefault(item.path, set()).add((item.draw.picture, item.draw.times))
    return found


def test_every_line_of_a_caption_is_an_item_of_the_same_picture(tmp_path: Path) -> None:
    write(tmp_path, {**GOOD, "a.txt": "one [trigger]\n\ntwo"})
    dataset = build(tmp_path, captions="lines", resolutions=(64,))
    assert sorted(dataset.captions.values()) == ["one zorb", "zorb two", "zorb x"]
    items = [item for item in dataset.items if item.path == "a.png"]
    assert [dataset.captions[item.caption_id] for item in items] in (
        ["one zorb", "zorb two"],
        ["zorb two", "one zorb"],
    )
    assert {item.draw.picture for item in items} == {min(item.item_id for item in items)}
    assert all(item.draw.plain for item in dataset.items if item.path != "a.png")
    assert (dataset.statistics.items, dataset.statistics.captions, dataset.statistics.accepted) == (4, 3, 3)
    # An item is what it would be if its caption were the only one.
    alone = build(write(tmp_path, {"a.txt": "two"}), resolutions=(64,))
    assert set(ids(alone)) < set(ids(dataset))


def test_duplicates_with_variants_stay_pictures_of_their_own(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": png(), "a.txt": "x\ny", "b.png": png(), "b.txt": "y\nz"})
    dataset = build(tmp_path, captions="lines", resolutions=(64,))
    assert len(set(ids(dataset))) == 4
    assert {path: len(each) for path, each in drawn(dataset).items()} == {"a.png": 1, "b.png": 1}
    assert len({picture for each in drawn(dataset).values() for picture, _ in each}) == 2


def test_tags_make_caption_variants_that_hold_the_trigger(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": png(), "a.txt": "red, blue, green, black"})
    dataset = build(tmp_path, tags={"variants": 6}, resolutions=(64,))
    texts = list(dataset.captions.values())
    assert len(texts) == len(dataset.items) == 6
    assert all(text.startswith("zorb ") for text in texts)
    assert all(sorted(text[5:].split(", ")) == ["black", "blue", "green", "red"] for text in texts)
    assert ids(dataset) == ids(build(tmp_path, tags={"variants": 6}, resolutions=(64,)))


def test_repeats_count_by_the_last_pattern_that_matches_and_move_no_id(tmp_path: Path) -> None:
    write(tmp_path, {**GOOD, "faces/d.png": png(64, 80), "faces/d.txt": "d"})
    repeats = ({"pattern": "*.png", "times": 2}, {"pattern": "faces/*", "times": 5})
    dataset = build(tmp_path, repeats=repeats)
    times = {path: {count for _, count in each} for path, each in drawn(dataset).items()}
    assert times == {"a.png": {2}, "b.jpg": {1}, "c.webp": {1}, "faces/d.png": {5}}
    assert ids(dataset) == ids(build(tmp_path))
    assert all(item.draw.plain for item in build(tmp_path).items)


def test_patterns_that_match_no_picture_are_all_refused(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    with pytest.raises(BadConfig) as caught:
        build(
            tmp_path,
            repeats=({"pattern": "A.png", "times": 2}, {"pattern": "*", "times": 2}, {"pattern": "x/*", "times": 2}),
        )
    assert [fault.where for fault in caught.value.faults] == ["A.png", "x/*"]


def test_glance_gives_the_same_items_and_only_misses_damage_in_the_pixels(tmp_path: Path) -> None:
    config = msgspec.convert({"dataset": ".", "trigger": "zorb", "resolutions": (64, 128)}, Validate)
    whole = build_items(write(tmp_path, GOOD), config, 64, silent)
    assert build_items(tmp_path, config, 64, silent, look=Look(glance=True)) == whole
    data = png()
    write(tmp_path, {"a.png": data[:200] + bytes(20) + data[220:]})
    assert [fault.where for fault in build_items(tmp_path, config, 64, silent).faults] == ["a.png"]
    glanced = build_items(tmp_path, config, 64, silent, look=Look(glance=True))
    assert glanced.faults == []
    assert len(glanced.items) == len(whole.items)
