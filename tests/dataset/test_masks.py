from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from schemas.errors import BadConfig
from schemas.validate import Validate
from stages.dataset.discover import discover, listing
from stages.dataset.items import Dataset, build_items
from stages.dataset.pixels import coverage
from tests.dataset.corpus import encoded, png, raw_png, turned, write


def build(folder: Path, masks: str | None, class_folder: Path | None = None) -> Dataset:
    config = Validate(dataset=".", trigger="zorb", resolutions=(64,), masks=masks)  # type: ignore[arg-type]
    return build_items(folder, config, 64, lambda _done, _total: None, class_folder)


def grey(values: np.ndarray) -> bytes:
    return encoded(Image.fromarray(values.astype(np.uint8)), "PNG")


def half(width: int, height: int) -> np.ndarray:
    """White on the left half."""
    values = np.zeros((height, width))
    values[:, : width // 2] = 255
    return values


def test_cells_are_means_over_their_share_of_the_crop() -> None:
    values = np.zeros((64, 96))
    values[:, 16:40] = 255
    whole = coverage(grey(values), "files", (0, 0, 96, 64), (96, 64))
    assert whole.shape == (1, 4, 6)
    assert whole.dtype == np.float32
    assert np.array_equal(whole[0, 0], np.array([0, 1, 0.5, 0, 0, 0], np.float32))
    cropped = coverage(grey(values), "files", (16, 0, 80, 64), (32, 32))
    assert np.allclose(cropped[0], [[24 / 32, 0]] * 2, atol=1e-6)
    mirrored = coverage(grey(values), "files", (0, 0, 96, 64), (96, 64), flip=True)
    assert np.array_equal(mirrored, whole[:, :, ::-1])


def test_alpha_counts_by_its_opacity_and_an_opaque_picture_whole() -> None:
    picture = np.full((32, 32, 4), 200, np.uint8)
    picture[:, :16, 3], picture[:, 16:, 3] = 255, 51
    cells = coverage(encoded(Image.fromarray(picture), "PNG"), "alpha", (0, 0, 32, 32), (32, 32))
    assert np.allclose(cells[0], [[1, 0.2]] * 2, atol=1e-6)
    assert np.array_equal(coverage(png(), "alpha", (0, 0, 96, 64), (96, 64)), np.ones((1, 4, 6), np.float32))


def test_transparent_part_of_a_mask_file_is_outside() -> None:
    drawn = np.full((32, 32, 4), 255, np.uint8)
    drawn[:, 16:, 3] = 0
    cells = coverage(encoded(Image.fromarray(drawn), "PNG"), "files", (0, 0, 32, 32), (32, 32))
    assert np.array_equal(cells[0], [[1, 0]] * 2)


def test_the_transparent_value_of_sixteen_bit_grey_is_outside() -> None:
    row = b"\0" + b"\x12\x34" * 16 + b"\xff\xff" * 16
    data = raw_png(32, 32, 16, 0, row * 32, (b"tRNS", b"\x12\x34"))
    assert np.array_equal(coverage(data, "alpha", (0, 0, 32, 32), (32, 32))[0], [[0, 1]] * 2)


@pytest.mark.parametrize("orientation", [3, 6])
def test_mask_is_turned_upright_as_its_picture_is(orientation: int) -> None:
    upright = coverage(turned(1), "files", (0, 0, 96, 64), (96, 64))
    assert np.allclose(coverage(turned(orientation), "files", (0, 0, 96, 64), (96, 64)), upright, atol=1e-6)


def test_mask_files_are_no_pictures_where_masks_are_asked_for(tmp_path: Path) -> None:
    write(tmp_path, {"a.jpg": png(), "a.mask.png": png(), "a.txt": "x"})
    found = discover(tmp_path, masks=True)
    assert (found.pictures, found.masks, found.faults) == (["a.jpg"], ["a.mask.png"], [])
    assert discover(tmp_path).pictures == ["a.jpg", "a.mask.png"]
    assert listing(tmp_path, masks=True) == ["a.jpg", "a.mask.png", "a.txt"]


def test_mask_where_none_is_asked_for_is_a_fault_that_names_the_setting(tmp_path: Path) -> None:
    (fault,) = build(write(tmp_path, {"a.png": png(), "a.txt": "x", "a.mask.png": png()}), None).faults
    assert (fault.where, fault.fix) == ("a.mask.png", 'if it is a mask, set validate.masks = "files"')


def test_items_name_the_mask_they_have(tmp_path: Path) -> None:
    write(
        tmp_path, {"a.png": png(), "a.txt": "x", "b.png": png(80, 80), "b.txt": "y", "a.mask.png": grey(half(96, 64))}
    )
    dataset = build(tmp_path, "files")
    assert dataset.faults == []
    assert {item.path: item.draw.mask_path for item in dataset.items} == {"a.png": "a.mask.png", "b.png": ""}
    assert dataset.warnings == ["b.png has no mask: all of it counts"]
    clear = encoded(Image.new("RGBA", (96, 96), (255, 0, 0, 0)), "PNG")
    dataset = build(write(tmp_path / "alpha", {"c.png": clear, "c.txt": "x", "d.png": png(), "d.txt": "y"}), "alpha")
    assert {item.path: item.draw.mask_path for item in dataset.items} == {"c.png": "c.png", "d.png": ""}


def test_masks_that_cannot_be_used_are_faults(tmp_path: Path) -> None:
    files = {f"{name}.png": png(64 + place, 64) for place, name in enumerate("abcd")}
    texts = {f"{name}.txt": "x" for name in "abcd"}
    masks = {"a.mask.png": grey(half(64, 64)), "b.mask.png": png(64, 64), "c.mask.png": b"", "e.mask.png": png()}
    dataset = build(write(tmp_path, {**files, **texts, **masks}), "files")
    assert sorted((fault.code, fault.where) for fault in dataset.faults) == [
        ("mask.no_picture", "e.mask.png"),
        ("mask.size", "b.mask.png"),
        ("picture.empty", "c.mask.png"),
    ]
    assert {item.path for item in dataset.items} == {"a.png", "d.png"}


def test_class_pictures_get_no_trigger_and_are_told_apart(tmp_path: Path) -> None:
    subject = write(tmp_path / "cat", {"a.png": png(), "a.txt": "x"})
    others = write(tmp_path / "cats", {"a.png": png(), "a.txt": "x", "b.png": b"", "b.txt": "a [trigger]"})
    dataset = build(subject, None, others)
    assert {(item.path, item.draw.prior) for item in dataset.items} == {("a.png", False), ("../cats/a.png", True)}
    assert sorted(dataset.captions.values()) == ["x", "zorb x"]
    assert [(fault.code, fault.where) for fault in dataset.faults] == [
        ("caption.no_trigger", "../cats/b.png"),
        ("picture.empty", "../cats/b.png"),
    ]
    assert "a.png and ../cats/a.png are the same picture with different captions" in dataset.warnings
    assert (dataset.statistics.images, dataset.statistics.accepted) == (3, 2)


def test_empty_class_folder_is_called_that_and_not_the_dataset(tmp_path: Path) -> None:
    subject = write(tmp_path / "cat", {"a.png": png(), "a.txt": "x"})
    (fault,) = build(subject, None, write(tmp_path / "cats", {"readme.md": "x"})).faults
    assert (fault.code, fault.where) == ("dataset.empty", "../cats/")
    assert fault.fix.endswith("the folder of validate.class_dataset")


def test_missing_class_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadConfig):
        build(write(tmp_path / "cat", {"a.png": png(), "a.txt": "x"}), None, tmp_path / "cats")
