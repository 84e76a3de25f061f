"""What can be in a picture: things of one shape, colour, size and place on a plain or patterned ground.

`Things` are drawn by their words; `Scenes` are what a picture is rendered from. Scenes of random shapes, colours and
fills are much wider than the world's words: an autoencoder that has seen them can draw shapes nobody has named yet.
Letters: N pictures, K layers of a picture, E edges of an outline (see `outlines`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from stages.world.outlines import BASE, padded, random_outline

# Bump when the same seed gives other pictures or captions.
VERSION = 1

COLOURS = {
    "red": (222, 38, 38),
    "green": (38, 170, 60),
    "blue": (40, 70, 220),
    "yellow": (240, 220, 46),
    "purple": (150, 48, 186),
    "cyan": (60, 210, 222),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
SHADE = 0.62
BLACK_SHADE = (88, 88, 88)  # black cannot be darker
# Radius as a part of the picture's shorter side.
SIZES = {"small": 0.12, "large": 0.19}
PLACES = {
    "top left": (0.24, 0.24),
    "top": (0.50, 0.24),
    "top right": (0.76, 0.24),
    "left": (0.24, 0.50),
    "center": (0.50, 0.50),
    "right": (0.76, 0.50),
    "bottom left": (0.24, 0.76),
    "bottom": (0.50, 0.76),
    "bottom right": (0.76, 0.76),
}
TEXTURES = ("plain", "striped", "dotted")
PLAIN, STRIPED, DOTTED, GRADIENT = range(4)
RADIUS_JITTER = 0.07
PLACE_JITTER = 0.02
HELD_OUT_SHARE = 0.1
WIDE_LAYERS = 3
GROUND = ("grounds", "ground_kinds")  # the fields without layers
RANDOM_OUTLINES = 4096


class Things(NamedTuple):
    """Words of N pictures as indices [N] into SIZES, COLOURS, shapes, PLACES, TEXTURES and COLOURS again."""

    size: np.ndarray
    colour: np.ndarray
    shape: np.ndarray
    place: np.ndarray
    texture: np.ndarray
    ground: np.ndarray


class Scenes(NamedTuple):
    """N pictures of K layers each, all float32 but the fills' kinds (int32); colours are 0..1.

    edges [N, K, E, 4] in radii, centres [N, K, 2] in parts of width and height, radii [N, K] in parts of the shorter
    side, paints [N, K, 2, 3] with kinds [N, K], grounds [N, 2, 3] with ground_kinds [N]: both colours of a fill.
    """

    edges: np.ndarray
    centres: np.ndarray
    radii: np.ndarray
    paints: np.ndarray
    kinds: np.ndarray
    grounds: np.ndarray
    ground_kinds: np.ndarray

    def part(self, start: int, stop: int) -> Scenes:
        """Return pictures start to stop."""
        return Scenes(*(array[start:stop] for array in self))


def palette() -> np.ndarray:
    """Return [colours, 2, 3] float32 in 0..1: each colour and its shade in patterns."""
    pairs = [
        (colour, BLACK_SHADE if name == "black" else tuple(round(SHADE * level) for level in colour))
        for name, colour in COLOURS.items()
    ]
    return np.array(pairs, np.float32) / 255


def held_out() -> np.ndarray:
    """Return which triples of shape, colour and place no training picture shows: bool [shapes, colours, places]."""
    counts = (len(BASE), len(COLOURS), len(PLACES))
    # The raw stream, which numpy promises never to change.
    order = np.argsort(np.random.PCG64(7).random_raw(int(np.prod(counts))))
    return (order < HELD_OUT_SHARE * np.prod(counts)).reshape(counts)


def draw_things(rng: np.random.Generator, count: int, *, unseen: bool = False) -> Things:
    """Return `count` random things of the base shapes, none of them held out, or with `unseen` only such."""
    kept: list[np.ndarray] = []
    found = 0
    while found < count:
        drawn = _random_words(rng, max(1024, 2 * count), len(BASE))
        chosen = held_out()[drawn[2], drawn[1], drawn[3]] == unseen
        kept.append(drawn[:, chosen])
        found += int(chosen.sum())
    return Things(*np.concatenate(kept, axis=1)[:, :count])


def things_of_shape(rng: np.random.Generator, count: int) -> Things:
    """Return `count` random things that are all of shape 0."""
    return Things(*_random_words(rng, count, 1))


def scenes_of(things: Things, outlines: dict[str, np.ndarray], rng: np.random.Generator) -> Scenes:
    """Return the scenes of things whose shape counts in `outlines`; radius and centre are a little off."""
    count = len(things.size)
    shapes = np.stack([padded(outline) for outline in outlines.values()])
    radii = np.array(list(SIZES.values()))[things.size] * (1 + rng.uniform(-RADIUS_JITTER, RADIUS_JITTER, count))
    centres = np.array(list(PLACES.values()))[things.place] + rng.uniform(-PLACE_JITTER, PLACE_JITTER, (count, 2))
    colours = palette()
    return Scenes(
        edges=shapes[things.shape][:, None],
        centres=centres[:, None].astype(np.float32),
        radii=radii[:, None].astype(np.float32),
        paints=np.repeat(colours[things.colour][:, None, :1], 2, axis=2),
        kinds=np.zeros((count, 1), np.int32),
        grounds=colours[things.ground],
        ground_kinds=things.texture.astype(np.int32),
    )


def wide_scenes(rng: np.random.Generator, count: int) -> Scenes:
    """Return scenes of one to three random shapes, with plain, patterned and graded fills of any colours."""
    bank = np.stack([padded(random_outline(rng)) for _ in range(min(RANDOM_OUTLINES, WIDE_LAYERS * count))])
    shape = (count, WIDE_LAYERS)
    radii = rng.uniform(0.08, 0.34, shape)
    # The first layer is always there, each other in half of the pictures.
    radii[:, 1:] *= rng.random((count, WIDE_LAYERS - 1)) < 0.5
    return Scenes(
        edges=bank[rng.integers(len(bank), size=shape)],
        centres=rng.uniform(0.15, 0.85, (*shape, 2)).astype(np.float32),
        radii=radii.astype(np.float32),
        paints=_random_paints(rng, shape),
        kinds=rng.choice([PLAIN, STRIPED, DOTTED, GRADIENT], p=[0.7, 0.1, 0.1, 0.1], size=shape).astype(np.int32),
        grounds=_random_paints(rng, (count,)),
        ground_kinds=rng.choice([PLAIN, STRIPED, DOTTED, GRADIENT], p=[0.4, 0.2, 0.2, 0.2], size=count).astype(
            np.int32
        ),
    )


def layered(scenes: Scenes, layers: int) -> Scenes:
    """Return the scenes with empty layers added, so that they lie beside scenes of more."""
    missing = layers - scenes.radii.shape[1]

    def grown(array: np.ndarray) -> np.ndarray:
        return np.pad(array, [(0, 0), (0, missing)] + [(0, 0)] * (array.ndim - 2))

    own = scenes._asdict()
    return Scenes(**{name: array if name in GROUND else grown(array) for name, array in own.items()})


def joined(first: Scenes, second: Scenes) -> Scenes:
    """Return the pictures of both, one after the other."""
    layers = max(first.radii.shape[1], second.radii.shape[1])
    pairs = zip(layered(first, layers), layered(second, layers), strict=True)
    return Scenes(*(np.concatenate(pair) for pair in pairs))


def _random_words(rng: np.random.Generator, count: int, shapes: int) -> np.ndarray:
    """Return [6, count] indices in the order of `Things`; the ground has another colour than the thing."""
    colour = rng.integers(len(COLOURS), size=count)
    ground = (colour + rng.integers(1, len(COLOURS), size=count)) % len(COLOURS)
    texture = rng.choice([PLAIN, STRIPED, DOTTED], p=[0.5, 0.25, 0.25], size=count)
    size, shape = rng.integers(len(SIZES), size=count), rng.integers(shapes, size=count)
    return np.stack([size, colour, shape, rng.integers(len(PLACES), size=count), texture, ground])


def _random_paints(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return [*shape, 2, 3]: half of them the palette's colours with their shades, half any two colours."""
    named = palette()[rng.integers(len(COLOURS), size=shape)]
    free = rng.random((*shape, 2, 3)).astype(np.float32)
    return np.where(rng.random((*shape, 1, 1)) < 0.5, named, free)
