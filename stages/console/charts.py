"""Pictures for the person: training curves, labelled grids of previews, PNG files with text in them.

Everything is drawn without a display and to the same bytes for the same input. Letters: H, W pixels; C is 3 (RGB).
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from schemas.errors import printable
from stages.contract.publish import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL import Image, ImageFont

DOTS_PER_INCH = 110
# Smoothing over this share of the run, but never over fewer steps.
SMOOTH_SHARE = 0.05
SMOOTH_STEPS = 10
# This share of outliers, at either end, neither sets the axis nor moves the smoothed line.
OUTLIERS_PERCENT = 0.5

MARGIN_PX = 12
LABEL_LINES = 4
# Narrower columns hold no legible label, whatever the size of their pictures.
LEAST_COLUMN_PX = 128
# The pictures and titles of a contact sheet.
SMALL_PX = 256
TITLE_PX = 16
PAPER, INK = (255, 255, 255), (24, 24, 24)


@dataclass(frozen=True)
class Curve:
    """One panel: the field of a metrics line, its title, the factor it is shown with.

    `dotted` is a second field, of few lines, that is drawn over it and so named.
    """

    field: str
    title: str
    color: str
    factor: float = 1.0
    smooth: bool = False
    dotted: str = ""


CURVES = (
    Curve("loss", "loss (faint: each step)", "tab:blue", smooth=True, dotted="validation_loss"),
    Curve("learning_rate", "learning rate", "tab:orange"),
    Curve("grad_norm", "gradient norm (faint: each step)", "tab:green", smooth=True),
    Curve("peak_bytes", "peak memory, GB", "tab:red", factor=1e-9),
)


def training_curves(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the lines of metrics.jsonl: loss, learning rate, gradient norm and peak memory over steps, as a PNG.

    A value that is absent, null or not finite leaves a gap. Loss and gradient norm are shown raw and smoothed.
    """
    from matplotlib import rc_context, rcParamsDefault

    # A person's own style file would change the bytes.
    with rc_context(rcParamsDefault):
        write_file(path, _curves_png(metrics))


def _curves_png(metrics: Sequence[Mapping[str, Any]]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.5), dpi=DOTS_PER_INCH)
    # Fixed margins: a layout solved for each chart takes as long again as drawing it.
    figure.subplots_adjust(left=0.06, right=0.985, top=0.95, bottom=0.08, wspace=0.17, hspace=0.14)
    FigureCanvasAgg(figure)
    steps = np.array([line["step"] for line in metrics], dtype=float)
    panels = figure.subplots(2, 2, sharex=True)
    for axes, curve in zip(panels.flat, CURVES, strict=True):
        _draw_curve(axes, curve, steps, _values(metrics, curve.field) * curve.factor)
        if curve.dotted:
            _draw_dots(axes, curve.dotted, steps, _values(metrics, curve.dotted) * curve.factor)
    for axes in panels[1]:
        axes.set_xlabel("step")
    data = io.BytesIO()
    # The library's version would otherwise stand in the file.
    figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


def _values(metrics: Sequence[Mapping[str, Any]], field: str) -> np.ndarray:
    return np.array([_number(line.get(field)) for line in metrics], dtype=float)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def _draw_curve(axes: Axes, curve: Curve, steps: np.ndarray, values: np.ndarray) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(curve.title, loc="left", fontsize=11)
    axes.grid(visible=True, color="0.9", linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.yaxis.set_major_formatter("{x:.4g}")
    axes.spines[["top", "right"]].set_visible(False)
    known = np.isfinite(values)
    if not known.any():
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color="0.5")
        return
    mark = "." if known.sum() == 1 else ""
    if not curve.smooth:
        axes.plot(steps, values, color=curve.color, linewidth=1.6, marker=mark)
        axes.set_ylim(0, 1.15 * np.max(values[known]) or 1)
        return
    low, high = np.percentile(values[known], [OUTLIERS_PERCENT, 100 - OUTLIERS_PERCENT])
    axes.plot(steps, values, color=curve.color, linewidth=0.8, alpha=0.3, marker=mark)
    axes.plot(steps[known], smoothed(np.clip(values[known], low, high)), color=curve.color, linewidth=2.0)
    room = 0.08 * (high - low) or 0.1 * abs(high) or 0.1
    axes.set_ylim(low - room, high + room)


def _draw_dots(axes: Axes, field: str, steps: np.ndarray, values: np.ndarray) -> None:
    """Draw the few values there are over a panel, which makes room for them."""
    known = np.isfinite(values)
    if not known.any():
        return
    name = field.replace("_", " ")
    axes.plot(steps[known], values[known], color="black", linewidth=1.0, marker="o", markersize=3.5, label=name)
    low, high = axes.get_ylim()
    room = 0.05 * (high - low)
    axes.set_ylim(min(low, values[known].min() - room), max(high, values[known].max() + room))
    axes.legend(frameon=False, fontsize=9)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Return the exponential moving average [N] of finite `values` [N], without the pull of a start value."""
    decay = 1.0 - 1.0 / max(SMOOTH_STEPS, SMOOTH_SHARE * len(values))
    total = weight = 0.0
    averages = []
    for value in values.tolist():
        total, weight = decay * total + value, decay * weight + 1.0
        averages.append(total / weight)
    return np.array(averages)


def grid(
    pictures: Sequence[np.ndarray | Image.Image], labels: Sequence[str], columns: int | None = None
) -> Image.Image:
    """Return the pictures in rows, each over its label, wrapped to the column and cut after four lines.

    Pictures are RGB, uint8 [H, W, 3] or images, of any sizes; without `columns` the grid is about square.
    Raises ValueError unless there is one label per picture, and a picture.
    """
    from PIL import Image, ImageDraw

    if not pictures or len(pictures) != len(labels):
        raise ValueError(f"{len(pictures)} pictures, {len(labels)} labels")
    images = [_image(picture) for picture in pictures]
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    tall = max(image.height for image in images)
    wide = max(LEAST_COLUMN_PX, *(image.width for image in images))
    font = _font(max(12, min(20, wide // 24)))
    wrapped = [wrap(printable(label), font, wide) for label in labels]
    line_px = math.ceil(1.3 * font.size)
    cell_px = (wide + MARGIN_PX, tall + max(map(len, wrapped)) * line_px + 2 * MARGIN_PX)
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * cell_px[0] + MARGIN_PX, rows * cell_px[1] + MARGIN_PX), PAPER)
    draw = ImageDraw.Draw(sheet)
    for place, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        left = MARGIN_PX + place % columns * cell_px[0]
        top = MARGIN_PX + place // columns * cell_px[1]
        sheet.paste(image, (left + (wide - image.width) // 2, top + (tall - image.height) // 2))
        for number, text in enumerate(lines):
            middle = left + wide / 2
            draw.text((middle, top + tall + MARGIN_PX // 2 + number * line_px), text, INK, font, anchor="ma")
    return sheet


def contact_sheet(rows: Sequence[tuple[str, Sequence[np.ndarray]]], labels: Sequence[str]) -> Image.Image:
    """Return rows of small pictures, each row under its title; `labels` name the columns.

    Pictures are RGB, uint8 [H, W, 3]; the longer side is shown with 256 pixels or fewer. Small ones are enlarged by a
    whole number, so that every pixel stays a square.
    """
    from PIL import Image, ImageDraw

    strips = [grid([_small(picture) for picture in pictures], labels, len(labels)) for _, pictures in rows]
    wide = max(strip.width for strip in strips)
    font = _font(TITLE_PX)
    titles = [wrap(printable(title), font, wide - 2 * MARGIN_PX) for title, _ in rows]
    line_px = math.ceil(1.3 * TITLE_PX)
    heads = [len(lines) * line_px + MARGIN_PX for lines in titles]
    sheet = Image.new("RGB", (wide, sum(heads) + sum(strip.height for strip in strips)), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = 0
    for head, lines, strip in zip(heads, titles, strips, strict=True):
        for number, text in enumerate(lines):
            draw.text((MARGIN_PX, top + MARGIN_PX + number * line_px), text, INK, font)
        sheet.paste(strip, (0, top + head))
        top += head + strip.height
    return sheet


def _small(picture: np.ndarray) -> Image.Image:
    from PIL import Image

    image = _image(picture)
    times = SMALL_PX // max(image.size)
    if times > 1:
        return image.resize((times * image.width, times * image.height), Image.Resampling.NEAREST)
    image.thumbnail((SMALL_PX, SMALL_PX))
    return image


def wrap(text: str, font: ImageFont.FreeTypeFont, width_px: int) -> list[str]:
    """Return `text` as at most four lines no wider than `width_px`; a word that is too wide is broken."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width_px:
            lines[-1] = joined
            continue
        for piece in _pieces(word, font, width_px):
            lines = [*lines, piece] if lines[-1] else [piece]
    if len(lines) > LABEL_LINES:
        last = lines[LABEL_LINES - 1]
        while font.getlength(f"{last}…") > width_px:
            last = last[:-1]
        lines = [*lines[: LABEL_LINES - 1], f"{last}…"]
    return lines


def _pieces(word: str, font: ImageFont.FreeTypeFont, width_px: int) -> list[str]:
    pieces = [""]
    for char in word:
        if pieces[-1] and font.getlength(pieces[-1] + char) > width_px:
            pieces.append("")
        pieces[-1] += char
    return pieces


def save_png(picture: np.ndarray | Image.Image, path: Path, text: Mapping[str, str]) -> None:
    """Write an RGB picture, uint8 [H, W, 3] or an image, as a PNG with `text` in it, the same bytes every time.

    The file is written aside, synced and renamed. Text outside Latin-1 becomes an international text chunk.
    """
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    for key, value in sorted(text.items()):
        chunks.add_text(key, value)
    data = io.BytesIO()
    _image(picture).save(data, "PNG", pnginfo=chunks, compress_level=6)
    write_file(path, data.getvalue())


def _image(picture: np.ndarray | Image.Image) -> Image.Image:
    from PIL import Image

    if not isinstance(picture, np.ndarray):
        return picture.convert("RGB")
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"a picture is uint8 [H, W, 3], not {picture.dtype} {picture.shape}")
    return Image.fromarray(np.ascontiguousarray(picture))


def _font(size_px: int) -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans, which comes with matplotlib and knows more scripts than Pillow's own font."""
    from matplotlib import get_data_path
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size_px)
