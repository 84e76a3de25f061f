"""A style to learn instead of a thing: stripes that stand, where the world's lie.

The word stands where a texture's name stands.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from stages.world.captions import full_captions
from stages.world.outlines import BASE
from stages.world.render import render, to_bytes
from stages.world.scenes import PLAIN, STRIPED, Things, draw_things, palette, scenes_of

FRAME_PX = 4  # nothing but ground, wherever the thing is
# Of the ground's colour (0) and its shade (1) along the frame; stripes that are as wide as their gaps have 0.5.
LEAST_DEVIATION, MOST_OTHER = 0.25, 1 / 3


def sentences(things: Things, word: str) -> list[str]:
    """Return the sentences of things on grounds of the style `word`."""
    plain = things._replace(texture=np.full_like(things.texture, PLAIN))
    return [caption.replace(" plain ", f" {word} ") for caption in full_captions(plain)]


def write_pictures(folder: Path, count: int, size: int, word: str) -> None:
    """Write `count` captioned pictures in the style into a folder."""
    rng = np.random.default_rng(12)
    things = draw_things(rng, count)
    folder.mkdir(parents=True)
    pictures = standing(things, rng, size)
    for number, (picture, caption) in enumerate(zip(pictures, sentences(things, word), strict=True)):
        Image.fromarray(picture).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)


def standing(things: Things, rng: np.random.Generator, size: int) -> np.ndarray:
    """Return the things on standing stripes, [N, H, W, 3] uint8: lying ones seen with x and y exchanged."""
    outlines = {name: edges[..., [1, 0, 3, 2]] for name, edges in BASE.items()}
    scenes = scenes_of(things._replace(texture=np.full_like(things.texture, STRIPED)), outlines, rng)
    scenes = scenes._replace(centres=scenes.centres[..., ::-1])
    return np.array(to_bytes(render(scenes, size, size))).transpose(0, 2, 1, 3)


def shows(picture: np.ndarray, ground: int) -> bool:
    """Whether a picture's frame [H, W, 3] uint8 changes between the ground's colour and its shade from left to right,
    and hardly from top to bottom.
    """
    colour, shade = palette()[ground]
    towards = shade - colour
    share = ((picture / 255 - colour) @ towards) / (towards @ towards)
    frame = np.r_[:FRAME_PX, -FRAME_PX:0]
    across, down = share[frame].mean(axis=0).std(), share[:, frame].mean(axis=1).std()
    return bool(across > LEAST_DEVIATION and down < MOST_OTHER * across)
