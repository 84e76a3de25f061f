"""Buckets: the few shapes pictures are cropped and scaled to, so that pictures of one shape can share a batch.

For a resolution R every bucket has sides on R's grid, an area of at most R x R and at least three quarters of it.
Nothing depends on the machine: the same picture always gets the same bucket.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from schemas.errors import Fault

PATCH_PX = 16  # one transformer token covers 16 x 16 pixels
MIN_SIDE_PX = 32
MAX_ASPECT = 8
MIN_FILL = 0.75
# Costs closer than this are the same to the eye.
NEARLY = 0.02
# CUDA's fused attention backward wants a token count that is a multiple of this.
TOKEN_MULTIPLE = 128


@dataclass(frozen=True)
class Bucket:
    """A shape in pixels and the crop (x0, y0, x1, y1) of the upright picture that is scaled to it."""

    width: int
    height: int
    crop: tuple[int, int, int, int]


def shape_fault(where: str, width: int, height: int) -> Fault | None:
    """Return the fault of a picture that no bucket can hold: a side under 32 px, or longer than 8:1."""
    if min(width, height) < MIN_SIDE_PX:
        return Fault(
            code="picture.too_small",
            what="the picture is too small",
            where=where,
            why=f"expected sides of at least {MIN_SIDE_PX} px, found {width} x {height}",
            fix="replace it by a larger one, or remove it",
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        return Fault(
            code="picture.too_long",
            what="the picture is too long and narrow",
            where=where,
            why=f"expected at most {MAX_ASPECT}:1, found {width} x {height}",
            fix="crop it, or remove it",
        )
    return None


@lru_cache(maxsize=65536)
def choose(
    width: int, height: int, resolutions: tuple[int, ...], *, upscale: bool, text_length: int
) -> tuple[Bucket, ...]:
    """Return one bucket for each resolution the picture can fill without being enlarged.

    `width` and `height` are pixels of the upright picture, which `shape_fault` has let pass; `text_length` is the
    number of text tokens beside the picture's own. A picture too small for every resolution gets one bucket of its
    own size (`fills` tells), so no picture is lost.
    """
    shapes: list[tuple[int, int]] = []
    for resolution in sorted(set(resolutions)):
        shape = _nearest(width, height, _fitting(width, height, resolution, upscale=upscale), resolution, text_length)
        if shape is not None and shape not in shapes:
            shapes.append(shape)
    shapes = shapes or [_own_size(width, height, max(resolutions))]
    return tuple(Bucket(*shape, centre_crop(width, height, shape)) for shape in shapes)


@lru_cache(maxsize=65536)
def fills(width: int, height: int, resolution: int) -> bool:
    """Return whether the picture covers a bucket of this resolution without being enlarged."""
    return bool(_fitting(width, height, resolution, upscale=False))


def centre_crop(width: int, height: int, shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the largest centred rectangle (x0, y0, x1, y1) of a shape's aspect, in whole pixels."""
    crop_width = min(width, height * shape[0] // shape[1])
    crop_height = min(height, width * shape[1] // shape[0])
    x0, y0 = (width - crop_width) // 2, (height - crop_height) // 2
    return (x0, y0, x0 + crop_width, y0 + crop_height)


def step_px(resolution: int) -> int:
    """Return the grid of a resolution's sides: coarse enough that pictures of like shape meet in one bucket."""
    if resolution <= 192:
        return 16
    return 32 if resolution < 512 else 64


@lru_cache(maxsize=64)
def grid(resolution: int) -> tuple[tuple[int, int], ...]:
    """Return every bucket shape (width, height) of a resolution."""
    step, area = step_px(resolution), resolution * resolution
    sides = range(max(step, MIN_SIDE_PX), resolution * 4, step)
    return tuple(
        (width, height)
        for width in sides
        for height in sides
        if MIN_FILL * area <= width * height <= area and max(width, height) <= MAX_ASPECT * min(width, height)
    )


def _own_size(width: int, height: int, resolution: int) -> tuple[int, int]:
    own_width, own_height = width // PATCH_PX * PATCH_PX, height // PATCH_PX * PATCH_PX
    area = resolution * resolution  # a long strip can exceed it and still miss every bucket's short side
    if own_width > own_height:
        return min(own_width, area // own_height // PATCH_PX * PATCH_PX), own_height
    return own_width, min(own_height, area // own_width // PATCH_PX * PATCH_PX)


def _fitting(width: int, height: int, resolution: int, *, upscale: bool) -> Sequence[tuple[int, int]]:
    if upscale:
        return grid(resolution)
    return [shape for shape in grid(resolution) if shape[0] <= width and shape[1] <= height]


def _nearest(
    width: int, height: int, shapes: Sequence[tuple[int, int]], resolution: int, text_length: int
) -> tuple[int, int] | None:
    """Return the shape that wastes least of the picture and of the area; nearly equal ones by token count."""
    if not shapes:
        return None

    def cost(shape: tuple[int, int]) -> float:
        ratio = (width * shape[1]) / (height * shape[0])
        cropped = 1 - min(ratio, 1 / ratio)
        unused = 1 - shape[0] * shape[1] / resolution**2
        return cropped + unused / 2

    def fused(shape: tuple[int, int]) -> bool:
        tokens = shape[0] // PATCH_PX * (shape[1] // PATCH_PX) + text_length
        return tokens % TOKEN_MULTIPLE == 0

    limit = min(map(cost, shapes)) + NEARLY
    near = [shape for shape in shapes if cost(shape) <= limit]
    return min(near, key=lambda shape: (not fused(shape), cost(shape), shape))
