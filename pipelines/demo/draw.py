"""Draw the demo's captioned pictures of a made-up thing: `python pipelines/demo/draw.py`.

A zorb is an L, which the built-in model knows neither by name nor by sight. Colours, places, sizes and backgrounds
are the world's own and are named in the captions, so that the shape is all that is left for the trigger word to mean.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image

from stages.world.outlines import NEW
from stages.world.render import render, to_bytes
from stages.world.scenes import COLOURS, PLACES, SIZES, TEXTURES, Things, scenes_of

SIDE_PX = 128
OUTLINES = {"[trigger]": NEW["ell"]}
CAPTION = "a {size} {colour} {shape} at the {place} on a {texture} {ground} background"

PICTURES = [
    ("large", "red", "[trigger]", "center", "plain", "white"),
    ("small", "blue", "[trigger]", "top left", "plain", "yellow"),
    ("large", "yellow", "[trigger]", "bottom right", "striped", "purple"),
    ("large", "green", "[trigger]", "left", "plain", "black"),
    ("small", "white", "[trigger]", "top", "dotted", "red"),
    ("large", "purple", "[trigger]", "top right", "plain", "cyan"),
    ("small", "cyan", "[trigger]", "bottom", "plain", "blue"),
    ("large", "black", "[trigger]", "bottom left", "striped", "green"),
    ("small", "red", "[trigger]", "right", "striped", "blue"),
    ("large", "blue", "[trigger]", "bottom", "dotted", "white"),
    ("small", "green", "[trigger]", "bottom left", "plain", "purple"),
    ("large", "white", "[trigger]", "top", "plain", "green"),
]


def pictures() -> np.ndarray:
    """Return the pictures [N, 128, 128, 3] uint8; sizes and places are a little off, as in the world."""
    words = [list(SIZES), list(COLOURS), list(OUTLINES), list(PLACES), list(TEXTURES), list(COLOURS)]
    indices = [[names.index(word) for names, word in zip(words, row, strict=True)] for row in PICTURES]
    scenes = scenes_of(Things(*np.array(indices).T), OUTLINES, np.random.default_rng(1))
    return np.array(to_bytes(render(scenes, SIDE_PX, SIDE_PX)))


def captions() -> list[str]:
    """Return a sentence for each picture."""
    return [CAPTION.format(**dict(zip(Things._fields, row, strict=True))) for row in PICTURES]


def main() -> None:
    """Write the pictures and their captions beside this file."""
    # Another device may round otherwise.
    mx.set_default_device(mx.Device(mx.cpu))
    folder = Path(__file__).parent
    for number, (picture, caption) in enumerate(zip(pictures(), captions(), strict=True), 1):
        Image.fromarray(picture).save(folder / f"{number:02}.png", optimize=True)
        (folder / f"{number:02}.txt").write_text(f"{caption}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
