"""Draw the demo's captioned pictures: `python pipelines/demo/draw.py`.

`zorb/` shows a made-up thing, an L, which the built-in model knows neither by name nor by sight. Colours, places,
sizes and backgrounds are the world's own and are named in the captions, so that the shape is all that is left for the
trigger word to mean. `shapes/` shows things that the model knows; they are trained alongside, lest it forgets them.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image

from stages.world.outlines import BASE, NEW
from stages.world.render import render, to_bytes
from stages.world.scenes import COLOURS, PLACES, SIZES, TEXTURES, Things, scenes_of

SIDE_PX = 128
ZORB = "[trigger]"
OUTLINES = {ZORB: NEW["ell"], **BASE}
WHOLE = "a {size} {colour} {shape} at the {place} on a {texture} {ground} background"
SHORT = "a {colour} {shape}"
# Every fourth zorb is described in short, so that short prompts work too.
SHORT_EVERY = 4

Row = tuple[str, str, str, str, str, str]
ZORBS: list[Row] = [
    ("large", "red", ZORB, "center", "plain", "white"),
    ("small", "blue", ZORB, "top left", "plain", "yellow"),
    ("large", "yellow", ZORB, "bottom right", "striped", "purple"),
    ("large", "green", ZORB, "left", "plain", "black"),
    ("small", "white", ZORB, "top", "dotted", "red"),
    ("large", "purple", ZORB, "top right", "plain", "cyan"),
    ("small", "cyan", ZORB, "bottom", "plain", "blue"),
    ("large", "black", ZORB, "bottom left", "striped", "green"),
    ("small", "red", ZORB, "right", "striped", "blue"),
    ("large", "blue", ZORB, "bottom", "dotted", "white"),
    ("small", "green", ZORB, "bottom left", "plain", "purple"),
    ("large", "white", ZORB, "top", "plain", "green"),
]
SHAPES: list[Row] = [
    ("large", "blue", "circle", "top left", "plain", "white"),
    ("small", "red", "circle", "bottom right", "striped", "cyan"),
    ("large", "white", "square", "right", "plain", "purple"),
    ("small", "yellow", "square", "top left", "dotted", "blue"),
    ("large", "cyan", "triangle", "bottom left", "plain", "red"),
    ("small", "purple", "triangle", "center", "plain", "yellow"),
    ("large", "red", "diamond", "top right", "dotted", "white"),
    ("small", "black", "diamond", "bottom left", "plain", "green"),
    ("large", "green", "cross", "top", "striped", "yellow"),
    ("small", "white", "cross", "center", "plain", "black"),
    ("large", "yellow", "ring", "bottom right", "plain", "blue"),
    ("small", "blue", "ring", "top left", "striped", "red"),
]


def pictures(rows: list[Row]) -> np.ndarray:
    """Return the pictures [N, 128, 128, 3] uint8; sizes and places are a little off, as in the world."""
    words = [list(SIZES), list(COLOURS), list(OUTLINES), list(PLACES), list(TEXTURES), list(COLOURS)]
    indices = [[names.index(word) for names, word in zip(words, row, strict=True)] for row in rows]
    scenes = scenes_of(Things(*np.array(indices).T), OUTLINES, np.random.default_rng(1))
    return np.array(to_bytes(render(scenes, SIDE_PX, SIDE_PX)))


def captions(rows: list[Row], short_every: int) -> list[str]:
    """Return a sentence for each picture."""
    return [
        (WHOLE if number % short_every else SHORT).format(**dict(zip(Things._fields, row, strict=True)))
        for number, row in enumerate(rows, 1)
    ]


def write(folder: Path, rows: list[Row], short_every: int) -> None:
    """Write pictures and captions into the folder."""
    folder.mkdir(exist_ok=True)
    for number, (picture, caption) in enumerate(zip(pictures(rows), captions(rows, short_every), strict=True), 1):
        Image.fromarray(picture).save(folder / f"{number:02}.png", optimize=True)
        (folder / f"{number:02}.txt").write_text(f"{caption}\n", encoding="utf-8")


def main() -> None:
    """Write both folders beside this file."""
    # Another device may round otherwise.
    mx.set_default_device(mx.Device(mx.cpu))
    folder = Path(__file__).parent
    write(folder / "zorb", ZORBS, SHORT_EVERY)
    write(folder / "shapes", SHAPES, len(SHAPES) + 1)


if __name__ == "__main__":
    main()
