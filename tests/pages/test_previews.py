"""Previews in a page: which steps, at what size, to the bit where they are small."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image

from stages.pages.previews import MOST_STEPS, PREVIEW_PX, shown_steps, strips


def picture(path: Path, side: int) -> np.ndarray:
    pixels = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def embedded(src: str) -> Image.Image:
    head, _, data = src.partition(",")
    assert head == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(data, validate=True)))


def test_small_picture_is_kept_to_the_bit(tmp_path: Path) -> None:
    pixels = picture(tmp_path / "a.png", 64)
    [strip], remarks = strips({"a cat": {0: tmp_path / "a.png"}}, [0])
    assert remarks == []
    np.testing.assert_array_equal(np.asarray(embedded(strip.shots[0].src).convert("RGB")), pixels)


def test_large_picture_is_scaled_down(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 1024)
    [strip], _ = strips({"a cat": {0: tmp_path / "a.png"}}, [0])
    assert (strip.shots[0].width, strip.shots[0].height) == (PREVIEW_PX, PREVIEW_PX)
    assert embedded(strip.shots[0].src).size == (PREVIEW_PX, PREVIEW_PX)


def test_file_that_is_no_picture_is_a_remark(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 32)
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:500])
    found, remarks = strips(
        {"a cat": {0: tmp_path / "a.png", 1: tmp_path / "b.png", 2: tmp_path / "c.png"}}, [0, 1, 2]
    )
    assert [shot.step for shot in found[0].shots] == [0]
    assert remarks == ["Previews that cannot be read: b.png, c.png."]


def test_of_many_steps_some_are_shown_with_the_first_and_the_last() -> None:
    assert shown_steps([4, 0, 2, 2]) == [0, 2, 4]
    steps = shown_steps(range(0, 10_000, 10))
    assert len(steps) == MOST_STEPS
    assert (steps[0], steps[-1]) == (0, 9990)
    gaps = np.diff(steps)
    assert gaps.max() - gaps.min() <= 10
