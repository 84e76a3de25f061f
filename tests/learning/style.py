"""A style to learn instead of a thing: grounds that turn from their colour to its shade across the picture.

No texture of the world does so; the word stands where a texture's name stands.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from stages.world.captions import full_captions
from stages.world.outlines import BASE
from stages.world.render import render, to_bytes
from stages.world.scenes import GRADIENT, PLAIN, Things, draw_things, palette, scenes_of

FRAME_PX = 4  # nothing but ground, wherever the thing is
LEAST_CORRELATION, LEAST_SLOPE = 0.9, 0.5


def sentences(things: Things, word: str) -> list[str]:
    """Return the sentences of things on grounds of the style `word`."""
    plain = things._replace(texture=np.full_like(things.texture, PLAIN))
    return [caption.replace(" plain ", f" {word} ") for caption in full_captions(plain)]


def write_pictures(folder: Path, count: int, size: int, word: str) -> None:
    """Write `count` captioned pictures in the style into a folder."""
    rng = np.random.default_rng(12)
    things = draw_things(rng, count)
    styled = things._replace(texture=np.full_like(things.texture, GRADIENT))
    pictures = np.array(to_bytes(render(scenes_of(styled, BASE, rng), size, size)))
    folder.mkdir(parents=True)
    for number, (picture, caption) in enumerate(zip(pictures, sentences(things, word), strict=True)):
        Image.fromarray(picture).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)


def shows(picture: np.ndarray, ground: int) -> bool:
    """Whether a picture's frame [H, W, 3] uint8 turns from the ground's colour to its shade, corner to corner."""
    colour, shade = palette()[ground]
    height, width = picture.shape[:2]
    y, x = np.mgrid[0:height, 0:width]
    frame = np.minimum(np.minimum(x, width - 1 - x), np.minimum(y, height - 1 - y)) < FRAME_PX
    towards = shade - colour
    found = ((picture[frame] / 255 - colour) @ towards) / (towards @ towards)
    wanted = (x / width + y / height)[frame] / 2
    slope = np.cov(found, wanted)[0, 1] / wanted.var()
    return bool(slope > LEAST_SLOPE and np.corrcoef(found, wanted)[0, 1] > LEAST_CORRELATION)
