"""Who is in the picture: shape, colour, size, place, texture and ground, read from the pixels alone.

The ground is the frame's commonest colour of the palette, the thing's colour the commonest of the others; the thing
is every pixel nearer to its colour than to the ground's two. Its shape and radius are those of the template that
covers it best, laid over its middle. A new shape is one more template. Letters: H W height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stages.world.outlines import padded
from stages.world.render import render
from stages.world.scenes import COLOURS, DOTTED, PLACES, PLAIN, SIZES, STRIPED, Scenes, Things, palette

FRAME_PX = 3
# Pixels further than this from every colour of the palette are mixtures at an edge (distance in RGB, 0..1 each).
PURE = 0.25
LEAST_PIXELS = 12
LEAST_OVERLAP = 0.6
RADII = np.geomspace(0.085, 0.25, 16)
# Share of the ground in its shade: none, a fifth in dots, half in stripes.
LEAST_SHADE, MOST_DOTS = 0.07, 0.34


@dataclass(frozen=True)
class Verdict:
    """What a picture shows. `shape` and `size` are None where no template fits; `overlap` is how well one does."""

    shape: str | None
    colour: int | None
    size: int | None
    place: int | None
    texture: int
    ground: int
    overlap: float


NOTHING = (None, None, None, None)


class Judge:
    """Judges pictures of one size by templates of the given outlines."""

    def __init__(self, outlines: Mapping[str, np.ndarray], height: int, width: int) -> None:
        self._names = list(outlines)
        self._size = np.array([width, height])
        shorter = min(height, width)
        # Just wide enough for the largest template wherever its mean lies.
        self._window = 2 * (int(shorter * RADII[-1]) + 2)
        self._templates = np.stack([_masks(outline, self._window, shorter) for outline in outlines.values()])
        self._areas = self._templates.sum(axis=(2, 3))
        axes = np.mgrid[0 : self._window, 0 : self._window][::-1] + 0.5
        # Where a template's mean lies, seen from the middle that it was drawn around.
        sums = [(self._templates * axis).sum(axis=(2, 3)) for axis in axes]
        self._means = np.stack(sums, axis=-1) / self._areas[..., None] - self._window / 2

    def judge(self, picture: np.ndarray) -> Verdict:
        """Return the verdict on a picture [H, W, 3] uint8."""
        away = _distances(picture.astype(np.float32) / 255)
        ground = _ground(away)
        colour = _colour(away, ground)
        if colour is None:
            return Verdict(*NOTHING, texture=PLAIN, ground=ground, overlap=0.0)
        thing = _without_specks(away[:, :, colour, 0] < np.minimum(away[:, :, ground, 0], away[:, :, ground, 1]))
        texture = _texture(away[:, :, ground], thing)
        if thing.sum() < LEAST_PIXELS:
            return Verdict(*NOTHING, texture=texture, ground=ground, overlap=0.0)
        shape, radius, middle, overlap = self._match(thing)
        place = int(np.linalg.norm(np.array(list(PLACES.values())) - middle, axis=1).argmin())
        size = int(np.abs(np.log(np.array(list(SIZES.values())) / RADII[radius])).argmin())
        known = overlap > LEAST_OVERLAP
        return Verdict(
            self._names[shape] if known else None, colour, size if known else None, place, texture, ground, overlap
        )

    def _match(self, thing: np.ndarray) -> tuple[int, int, np.ndarray, float]:
        """Return shape, radius, middle [2] in parts of the picture, and overlap of the best template."""
        area = int(thing.sum())
        mean = np.argwhere(thing)[:, ::-1].mean(axis=0) + 0.5
        framed = np.pad(thing, self._window)
        best = (0, 0, mean / self._size, 0.0)
        # Of two areas less alike than that, no overlap can be enough.
        alike = np.minimum(self._areas, area) > LEAST_OVERLAP * np.maximum(self._areas, area)
        for shape, radius in np.argwhere(alike):
            middle = mean - self._means[shape, radius]
            x, y = np.rint(middle + self._window / 2).astype(int)
            seen = framed[y : y + self._window, x : x + self._window]
            both = np.count_nonzero(seen & self._templates[shape, radius])
            overlap = both / (area + self._areas[shape, radius] - both)
            if overlap > best[3]:
                best = (int(shape), int(radius), middle / self._size, float(overlap))
        return best


@dataclass(frozen=True)
class Score:
    """Shares of pictures that are right in each respect; `all` in every one."""

    shape: float
    colour: float
    size: float
    place: float
    texture: float
    ground: float
    all: float


def score(verdicts: Sequence[Verdict], things: Things, shapes: Sequence[str]) -> Score:
    """Compare verdicts with what should be there; `shapes` are the names that the things' shapes count in."""
    right = {
        field: np.array(
            [
                getattr(verdict, field) == (shapes[wanted] if field == "shape" else wanted)
                for verdict, wanted in zip(verdicts, getattr(things, field).tolist(), strict=True)
            ]
        )
        for field in Things._fields
    }
    shares = {field: float(each.mean()) for field, each in right.items()}
    return Score(**shares, all=float(np.all(list(right.values()), axis=0).mean()))


def _masks(outline: np.ndarray, window: int, shorter: int) -> np.ndarray:
    """Return the outline's pixels in the middle of a window at every radius, bool [radii, window, window].

    Radii are parts of `shorter` pixels.
    """
    count = len(RADII)
    scenes = Scenes(
        edges=np.tile(padded(outline), (count, 1, 1, 1)),
        centres=np.full((count, 1, 2), 0.5, np.float32),
        radii=(RADII * shorter / window)[:, None].astype(np.float32),
        paints=np.ones((count, 1, 2, 3), np.float32),
        kinds=np.zeros((count, 1), np.int32),
        grounds=np.zeros((count, 2, 3), np.float32),
        ground_kinds=np.zeros(count, np.int32),
    )
    return np.array(render(scenes, window, window))[..., 0] > 0


def _distances(pixels: np.ndarray) -> np.ndarray:
    """Return how far pixels [H, W, 3] are from every colour and its shade, [H, W, colours, 2]."""
    colours = palette()
    flat = colours.reshape(-1, 3)
    # (p - c)^2 multiplied out: one small matrix product for all.
    squares = np.square(pixels).sum(axis=-1)[..., None] - 2 * pixels @ flat.T + np.square(flat).sum(axis=-1)
    return np.sqrt(np.maximum(squares, 0)).reshape(*pixels.shape[:2], *colours.shape[:2])


def _ground(away: np.ndarray) -> int:
    """Return the commonest colour of the frame, shades counted with their colours; away [H, W, colours, 2]."""
    nearest = np.minimum(away[..., 0], away[..., 1]).argmin(axis=-1)
    frame = np.ones(nearest.shape, bool)
    frame[FRAME_PX:-FRAME_PX, FRAME_PX:-FRAME_PX] = False
    return int(np.bincount(nearest[frame], minlength=len(COLOURS)).argmax())


def _colour(away: np.ndarray, ground: int) -> int | None:
    """Return the commonest pure colour that is not the ground's, or None without any; things have no shades."""
    flat = away.reshape(*away.shape[:2], -1)
    nearest = flat.argmin(axis=-1)
    pure = (
        (np.take_along_axis(flat, nearest[..., None], axis=-1)[..., 0] < PURE)
        & (nearest % 2 == 0)
        & (nearest // 2 != ground)
    )
    counts = np.bincount(nearest[pure] // 2, minlength=len(COLOURS))
    return int(counts.argmax()) if counts.max() >= LEAST_PIXELS else None


def _texture(away: np.ndarray, thing: np.ndarray) -> int:
    """Tell plain, dots and stripes by the share of the ground that is nearer to its shade; away [H, W, 2]."""
    shade = (away[..., 1] < away[..., 0])[~thing].mean()
    return PLAIN if shade < LEAST_SHADE else DOTTED if shade < MOST_DOTS else STRIPED


def _without_specks(mask: np.ndarray) -> np.ndarray:
    """Return the mask without pixels that have fewer than three of eight neighbours in it."""
    framed = np.pad(mask, 1).astype(np.int8)
    height, width = mask.shape
    around = sum(framed[dy : dy + height, dx : dx + width] for dy in range(3) for dx in range(3)) - mask
    return mask & (around >= 3)
