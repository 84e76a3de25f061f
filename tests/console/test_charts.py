from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages.console.charts import PAPER, contact_sheet, grid, save_png, smoothed, training_curves

LONG = "a photograph of blue_cat wearing a tiny red hat in a field of sunflowers at golden hour, 85 mm, very sharp"


def metrics(steps: int) -> list[dict[str, object]]:
    return [
        {
            "step": step,
            "loss": 1.0 / step,
            "learning_rate": 1e-4,
            "grad_norm": 0.5,
            "seconds": 0.1,
            "peak_bytes": 14_000_000_000,
        }
        for step in range(1, steps + 1)
    ]


def picture(height: int, width: int, color: tuple[int, int, int] = (200, 30, 40)) -> np.ndarray:
    return np.full((height, width, 3), color, np.uint8)


def ink(image: Image.Image) -> np.ndarray:
    return (np.asarray(image) < 128).all(axis=2)


# Curves


def test_curves_are_the_same_bytes_for_the_same_run(tmp_path: Path):
    for name in ("one.png", "two.png"):
        training_curves(metrics(50), tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert set(Image.open(tmp_path / "one.png").info) <= {"dpi"}


def test_curves_show_the_values(tmp_path: Path):
    training_curves(metrics(50), tmp_path / "one.png")
    training_curves([*metrics(49), {**metrics(50)[-1], "loss": 0.9}], tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "two.png").read_bytes()


def test_validation_losses_are_drawn_where_there_are_some(tmp_path: Path):
    lines = metrics(50)
    lines[5]["validation_loss"], lines[20]["validation_loss"] = 0.7, 0.5
    training_curves(lines, tmp_path / "with.png")
    training_curves([{**line, "validation_loss": None} for line in lines], tmp_path / "without.png")
    drawn, left_out = (ink(Image.open(tmp_path / name).convert("RGB")) for name in ("with.png", "without.png"))
    changed = drawn != left_out
    # The panel of the loss alone, the upper left one.
    assert changed[:340, :600].any()
    assert not changed[:, 620:].any()


@pytest.mark.parametrize(
    "lines",
    [
        [],
        metrics(1),
        [{"step": 1}, {"step": 2, "loss": None}],
        [{**line, "loss": value} for line, value in zip(metrics(3), [1.0, math.nan, math.inf], strict=True)],
    ],
)
def test_curves_of_little_or_odd_data_are_drawn(tmp_path: Path, lines):
    training_curves(lines, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size == (1210, 715)


def test_a_constant_stays_constant_when_smoothed():
    assert smoothed(np.full(100, 3.0)) == pytest.approx(np.full(100, 3.0))


def test_smoothing_averages_noise_away():
    noise = np.random.default_rng(0).standard_normal(2000)
    assert smoothed(noise)[500:].std() < 0.15
    assert smoothed(np.array([2.0]))[0] == 2.0


# Grids


@pytest.mark.parametrize(
    ("count", "columns", "shape"), [(1, None, (1, 1)), (5, None, (2, 3)), (3, 3, (1, 3)), (2, 9, (1, 2))]
)
def test_a_grid_has_the_rows_and_columns_it_needs(count: int, columns: int | None, shape: tuple[int, int]):
    sheet = grid([picture(140, 140)] * count, ["a"] * count, columns)
    assert sheet.width == shape[1] * 152 + 12
    assert round(sheet.height / (140 + 24 + 16)) == shape[0]


@pytest.mark.parametrize("size", [64, 512])
def test_labels_are_legible_and_stay_below_their_picture(size: int):
    sheet = grid([picture(size, size), picture(size, size)], [LONG, "b"], 2)
    drawn = ink(sheet)
    column = max(size, 128)
    assert not drawn[: 12 + size].any()
    assert drawn[:, 12 : 12 + column].sum() > 300
    assert not drawn[:, :6].any()
    assert not drawn[:, 12 + column + 2 : 12 + column + 10].any()
    assert not drawn[-4:].any()


def test_a_long_label_is_cut_and_a_long_word_is_broken():
    cut, whole = (grid([picture(64, 64)], [label]) for label in ("word " * 200, "word " * 12))
    assert cut.height == whole.height
    broken = grid([picture(64, 64)], ["x" * 60])
    assert not ink(broken)[:, :6].any()
    assert broken.height > grid([picture(64, 64)], ["x"]).height


def test_pictures_of_several_sizes_are_centred():
    sheet = np.asarray(grid([picture(200, 200), picture(100, 160)], ["", ""], 2))
    red = (sheet == (200, 30, 40)).all(axis=2)
    assert red[:, 12:212].sum() == 200 * 200
    rows, columns = np.nonzero(red[:, 224:])
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (12 + 50, 12 + 149, 20, 179)
    assert tuple(sheet[0, 0]) == PAPER


def test_a_label_from_outside_is_escaped():
    assert grid([picture(64, 64)], ["\x1b\u202e"]).tobytes() == grid([picture(64, 64)], ["\\x1b\\u202e"]).tobytes()


def test_contact_sheet_puts_titles_over_rows_of_small_pictures():
    rows = [("a red cat", [picture(512, 512)] * 3), (LONG, [picture(300, 512)] * 3)]
    sheet = contact_sheet(rows, ["step 0", "step 10", "step 20"])
    assert sheet.width == 3 * (256 + 12) + 12
    red = (np.asarray(sheet) == (200, 30, 40)).all(axis=2)
    assert red.sum() == 3 * 256 * 256 + 3 * 150 * 256
    assert ink(sheet)[:24].any()


@pytest.mark.parametrize(("side", "times"), [(256, 1), (160, 1), (128, 2), (96, 2), (64, 4)])
def test_contact_sheet_enlarges_small_pictures_by_a_whole_number(side: int, times: int):
    small = np.random.default_rng(0).integers(1, 250, (side // 2, side, 3), np.uint8)
    sheet = contact_sheet([("a red cat", [small])], ["step 0"])
    shown = np.repeat(np.repeat(small, times, axis=0), times, axis=1)
    middle = (sheet.width - shown.shape[1]) // 2
    column = np.asarray(sheet)[:, middle : middle + shown.shape[1]]
    assert any(np.array_equal(column[top : top + len(shown)], shown) for top in range(len(column) - len(shown)))


@pytest.mark.parametrize(("pictures", "labels"), [([], []), ([picture(8, 8)], [])])
def test_pictures_and_labels_come_in_pairs(pictures, labels):
    with pytest.raises(ValueError, match="labels"):
        grid(pictures, labels)


# Files


def test_a_picture_comes_back_with_its_text(tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    text = {"prompt": "猫 on a couch", "seed": "42"}
    save_png(pixels, tmp_path / "a.png", text)
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(np.asarray(image), pixels)
        assert image.text == text
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_picture_is_the_same_bytes_whatever_the_order_of_its_text(tmp_path: Path):
    save_png(picture(8, 8), tmp_path / "a.png", {"a": "1", "b": "2"})
    save_png(Image.fromarray(picture(8, 8)), tmp_path / "b.png", {"b": "2", "a": "1"})
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_text_is_readable_without_any_library(tmp_path: Path):
    save_png(picture(8, 8), tmp_path / "a.png", {"seed": "42"})
    assert b"tEXtseed\x0042" in (tmp_path / "a.png").read_bytes()


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 4), (3, 8, 8)])
def test_what_is_no_rgb_picture_is_refused(tmp_path: Path, shape):
    with pytest.raises(ValueError, match="a picture is uint8"):
        save_png(np.zeros(shape, np.uint8), tmp_path / "a.png", {})
    with pytest.raises(ValueError, match="a picture is uint8"):
        save_png(np.zeros((8, 8, 3), np.float32), tmp_path / "a.png", {})
    assert not list(tmp_path.iterdir())


def test_a_transparent_image_is_stored_as_rgb(tmp_path: Path):
    save_png(Image.new("RGBA", (4, 4), (1, 2, 3, 255)), tmp_path / "a.png", {})
    with Image.open(io.BytesIO((tmp_path / "a.png").read_bytes())) as image:
        assert image.mode == "RGB"
        assert image.getpixel((0, 0)) == (1, 2, 3)
