"""Scenes to pixels, on whatever device MLX computes: exact distances to polygons, edges smooth over one pixel.

Letters: N pictures, K layers, E edges, H W height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import mlx.core as mx
import numpy as np

from stages.world.scenes import DOTTED, GRADIENT, STRIPED, Scenes

PERIODS = 8  # of stripes and dots along the shorter side
FAR = 1e9
Step = Callable[..., tuple[mx.array, mx.array]]


def render(scenes: Scenes, height: int, width: int) -> mx.array:
    """Return the pictures [N, H, W, 3] float32 in [-1, 1]."""
    x = (mx.arange(width) + 0.5)[None, None, :]
    y = (mx.arange(height) + 0.5)[None, :, None]
    picture = _painted(mx.array(scenes.grounds), mx.array(scenes.ground_kinds), x, y)
    for layer in range(scenes.radii.shape[1]):
        used = np.flatnonzero(scenes.radii[:, layer])
        if len(used):
            cover = _coverage(scenes, used, layer, (x, y))[..., None]
            paints, kinds = mx.array(scenes.paints[used, layer]), mx.array(scenes.kinds[used, layer])
            rows = mx.array(used)
            below = picture[rows]
            picture[rows] = below + cover * (_painted(paints, kinds, x, y) - below)
    return 2 * picture - 1


def in_chunks(scenes: Scenes, height: int, width: int, chunk: int) -> mx.array:
    """Return the pictures [N, H, W, 3] uint8, rendered `chunk` at a time: what a pool in memory holds."""
    parts = []
    for start in range(0, len(scenes.radii), chunk):
        parts.append(to_bytes(render(scenes.part(start, start + chunk), height, width)))
        mx.eval(parts[-1])
    return mx.concatenate(parts)


def to_bytes(pictures: mx.array) -> mx.array:
    """Return pictures in [-1, 1] as uint8; what lies outside is cut."""
    return mx.round(mx.clip(pictures.astype(mx.float32) + 1, 0, 2) * 127.5).astype(mx.uint8)


def from_bytes(pictures: mx.array) -> mx.array:
    """Return uint8 pictures as float32 in [-1, 1]."""
    return pictures.astype(mx.float32) / 127.5 - 1


def _coverage(scenes: Scenes, used: np.ndarray, layer: int, pixels: tuple[mx.array, mx.array]) -> mx.array:
    """Return how much of each pixel a layer's shape covers, [n, H, W], for the pictures `used` [n]."""
    x, y = pixels
    size = np.array([x.shape[2], y.shape[1]], np.float32)
    scale = (scenes.radii[used, layer] * size.min())[:, None, None]
    middle = np.tile(scenes.centres[used, layer] * size, 2)[:, None]
    outline = scenes.edges[used, layer] * scale + middle
    nearest = mx.full((len(used), y.shape[1], x.shape[2]), FAR)
    inside = mx.zeros(nearest.shape, mx.bool_)
    step = _edge_step()
    for index in np.flatnonzero((outline[..., :2] != outline[..., 2:]).any(axis=(0, 2))):
        corners = (mx.array(corner)[:, None, None] for corner in outline[:, index].T)
        nearest, inside = step(nearest, inside, x, y, *corners)
    distance = mx.sqrt(nearest)
    return mx.clip(0.5 - mx.where(inside, -distance, distance), 0, 1)


@lru_cache(maxsize=1)
def _edge_step() -> Step:
    # Fused, one kernel instead of twenty passes over the pixels; on the CPU a compiler would run.
    return _with_edge if mx.default_device() == mx.Device(mx.cpu) else mx.compile(_with_edge)


def _with_edge(nearest: mx.array, inside: mx.array, x: mx.array, y: mx.array, *corners: mx.array) -> tuple:
    """Take one edge into the squared distance and, where a ray to the right crosses it, into inside or outside."""
    x0, y0, x1, y1 = corners
    dx, dy, px, py = x1 - x0, y1 - y0, x - x0, y - y0
    along = mx.clip((px * dx + py * dy) / mx.maximum(dx * dx + dy * dy, 1e-12), 0, 1)
    nearest = mx.minimum(nearest, mx.square(px - along * dx) + mx.square(py - along * dy))
    # Multiplied out, so that a level edge divides by nothing: the crossing lies to the right of the pixel.
    right = (px * dy < py * dx) == (dy > 0)
    return nearest, inside != (((y0 > y) != (y1 > y)) & right)


def _painted(paints: mx.array, kinds: mx.array, x: mx.array, y: mx.array) -> mx.array:
    """Return [n, H, W, 3] for paints [n, 2, 3] mixed as their kinds [n] say."""
    height, width = y.shape[1], x.shape[2]
    period = min(height, width) / PERIODS
    u, v = x % period, y % period
    stripes = mx.clip(0.5 - (mx.abs(v - period / 4) - period / 4), 0, 1)
    dots = mx.clip(0.5 - (mx.sqrt(mx.square(u - period / 2) + mx.square(v - period / 2)) - period / 4), 0, 1)
    kinds = kinds[:, None, None]
    share = mx.where(kinds == STRIPED, stripes, mx.zeros((1, height, width)))
    share = mx.where(kinds == DOTTED, dots, share)
    share = mx.where(kinds == GRADIENT, (x / width + y / height) / 2, share)[..., None]
    first, second = (paints[:, None, None, index] for index in range(2))
    return first + share * (second - first)
