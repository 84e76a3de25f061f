"""Outlines of flat shapes as closed polygons: those with names, and random ones of many kinds.

An outline is an array of edges [E, 4]: x0, y0, x1, y1 in units of the shape's radius, y downwards. What lies inside
an odd number of loops is filled, so a hole is one more loop. Round lines are polygons of `ROUND` corners or fewer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

ROUND = 32
MOST_EDGES = 56  # of any outline: a ring's
Loop = Sequence[tuple[float, float]]


def edges_of(*loops: Loop) -> np.ndarray:
    """Return the edges [E, 4] float32 of closed loops of corners."""
    parts = [np.hstack([loop, np.roll(loop, -1, axis=0)]) for loop in map(np.asarray, loops)]
    return np.concatenate(parts).astype(np.float32)


def padded(outline: np.ndarray) -> np.ndarray:
    """Return the edges [MOST_EDGES, 4], filled up with edges of no length at the first corner, which draw nothing."""
    missing = MOST_EDGES - len(outline)
    if missing < 0:
        raise ValueError(f"an outline has at most {MOST_EDGES} edges, found {len(outline)}")
    return np.concatenate([outline, np.tile(outline[0, [0, 1, 0, 1]], (missing, 1))])


def _circle(radius: float = 1.0, corners: int = ROUND) -> Loop:
    return _arc(0.0, 2 * math.pi, radius, corners + 1)[:-1]


def _arc(start: float, stop: float, radius: float, corners: int) -> list[tuple[float, float]]:
    return [(radius * math.cos(angle), radius * math.sin(angle)) for angle in np.linspace(start, stop, corners)]


def _square(half: float) -> Loop:
    return [(-half, -half), (half, -half), (half, half), (-half, half)]


def _cross(arm: float = 0.34) -> Loop:
    quarter = [(-arm, -1.0), (arm, -1.0), (arm, -arm)]
    turned = [quarter]
    for _ in range(3):
        turned.append([(-y, x) for x, y in turned[-1]])
    return [corner for each in turned for corner in each]


def _star(points: int = 5, inner: float = 0.5) -> Loop:
    angles = -math.pi / 2 + math.pi / points * np.arange(2 * points)
    radii = np.where(np.arange(2 * points) % 2, inner, 1.0)
    return list(zip((radii * np.cos(angles)).tolist(), (radii * np.sin(angles)).tolist(), strict=True))


def _ell(stroke: float = 0.7) -> Loop:
    return [(-1, -1), (-1 + stroke, -1), (-1 + stroke, 1 - stroke), (1, 1 - stroke), (1, 1), (-1, 1)]


def _tee(stroke: float = 0.7) -> Loop:
    half, bar = stroke / 2, -1 + stroke
    return [(-1, -1), (1, -1), (1, bar), (half, bar), (half, 1), (-half, 1), (-half, bar), (-1, bar)]


def _hourglass(waist: float = 0.12) -> Loop:
    return [(-0.85, -1), (0.85, -1), (waist, 0), (0.85, 1), (-0.85, 1), (-waist, 0)]


def _arrow(head: float = 0.9, shaft: float = 0.36) -> Loop:
    neck = 1 - head
    return [(-1, -shaft), (neck, -shaft), (neck, -0.9), (1, 0), (neck, 0.9), (neck, shaft), (-1, shaft)]


def _heart() -> Loop:
    """The classic curve: x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t."""
    t = np.linspace(0, 2 * math.pi, ROUND, endpoint=False)
    x = np.sin(t) ** 3
    y = (13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / -16
    return list(zip(x.tolist(), y.tolist(), strict=True))


def _mouth(opening: float = 0.6) -> Loop:
    """A disc with a wedge cut out on the right, `opening` radians on each side."""
    return [(0.0, 0.0), *_arc(opening, 2 * math.pi - opening, 1.0, ROUND - 1)]


def _band(start: float, stop: float, inner: float) -> Loop:
    """A thick arc."""
    return [*_arc(start, stop, 1.0, 20), *_arc(stop, start, inner, 20)]


def _stroke(points: np.ndarray, half: float) -> Loop:
    """A thick line [N, 2] with mitred joints."""
    along = np.diff(points, axis=0)
    normals = np.stack([-along[:, 1], along[:, 0]], axis=1) / np.linalg.norm(along, axis=1, keepdims=True)
    joints = [normals[0], *(_mitre(a, b) for a, b in pairwise(normals)), normals[-1]]
    offset = half * np.array(joints)
    return [tuple(corner) for corner in np.concatenate([points + offset, (points - offset)[::-1]])]


def _mitre(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the offset at a joint of two normals, no longer than twice the half width."""
    middle = a + b
    return middle / max(float(middle @ middle) / 2, 0.5)


# The words of the world; everything else is new to a model that was trained on it.
BASE: dict[str, np.ndarray] = {
    "circle": edges_of(_circle()),
    "square": edges_of(_square(0.86)),
    "triangle": edges_of([(0, -1), (1, 0.85), (-1, 0.85)]),
    "diamond": edges_of([(0, -1), (0.8, 0), (0, 1), (-0.8, 0)]),
    "cross": edges_of(_cross()),
    "ring": edges_of(_circle(), _circle(0.55, 24)),
}
NEW: dict[str, np.ndarray] = {
    "ell": edges_of(_ell()),
    "tee": edges_of(_tee()),
    "hourglass": edges_of(_hourglass()),
    "star": edges_of(_star()),
    "holed star": edges_of(_star(), _circle(0.3, 20)),
    "frame": edges_of(_square(0.9), _square(0.45)),
    "arrow": edges_of(_arrow()),
    "heart": edges_of(_heart()),
    "mouth": edges_of(_mouth()),
    "arc": edges_of(_band(math.pi, 2 * math.pi, 0.5)),
}


def random_outline(rng: np.random.Generator) -> np.ndarray:
    """Return the edges of one shape out of many kinds, with random proportions, turned and stretched."""
    kinds = list(RANDOM.values())
    outline = edges_of(*kinds[rng.integers(len(kinds))](rng)).reshape(-1, 2)
    # A third stand upright, as named shapes do.
    angle = rng.choice([0.0, rng.integers(4) * math.pi / 2, rng.uniform(0, 2 * math.pi)])
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    stretched = outline @ turn.T * np.array([1.0, rng.choice([1.0, rng.uniform(0.5, 1.0)])])
    return (stretched / np.abs(stretched).max()).reshape(-1, 4).astype(np.float32)


def _random_blob(rng: np.random.Generator) -> list[Loop]:
    corners = int(rng.integers(3, 10))
    angles = np.sort(2 * math.pi * (np.arange(corners) + rng.uniform(0.1, 0.9, corners)) / corners)
    radii = rng.uniform(0.45, 1.0, corners)
    return [list(zip((radii * np.cos(angles)).tolist(), (radii * np.sin(angles)).tolist(), strict=True))]


def _random_star(rng: np.random.Generator) -> list[Loop]:
    inner = rng.uniform(0.35, 0.75)
    loops: list[Loop] = [_star(int(rng.integers(4, 9)), inner)]
    if rng.random() < 0.5:
        loops.append(_circle(rng.uniform(0.4, 0.75) * inner, 20))
    return loops


def _random_stroke(rng: np.random.Generator) -> list[Loop]:
    points = [np.zeros(2)]
    angle = rng.uniform(0, 2 * math.pi)
    for _ in range(int(rng.integers(1, 4))):
        points.append(points[-1] + rng.uniform(0.7, 1.4) * np.array([math.cos(angle), math.sin(angle)]))
        angle += rng.uniform(-1.9, 1.9)
    centred = np.array(points) - np.mean(points, axis=0)
    return [_stroke(centred, rng.uniform(0.12, 0.35))]


def _random_band(rng: np.random.Generator) -> list[Loop]:
    start = rng.uniform(0, 2 * math.pi)
    return [_band(start, start + rng.uniform(1.0, 5.5), rng.uniform(0.4, 0.8))]


RANDOM: dict[str, Callable[[np.random.Generator], list[Loop]]] = {
    "disc": lambda _: [_circle()],
    "ring": lambda rng: [_circle(), _circle(rng.uniform(0.3, 0.8), 24)],
    "box": lambda _: [_square(1.0)],
    "frame": lambda rng: [_square(1.0), _square(rng.uniform(0.3, 0.7))],
    "blob": _random_blob,
    "holed blob": lambda rng: [*_random_blob(rng), _circle(rng.uniform(0.1, 0.3), 20)],
    "star": _random_star,
    "stroke": _random_stroke,
    "band": _random_band,
    "cross": lambda rng: [_cross(rng.uniform(0.2, 0.45))],
    "ell": lambda rng: [_ell(rng.uniform(0.4, 0.9))],
    "tee": lambda rng: [_tee(rng.uniform(0.4, 0.9))],
    "hourglass": lambda rng: [_hourglass(rng.uniform(0.04, 0.3))],
    "arrow": lambda rng: [_arrow(rng.uniform(0.6, 1.2), rng.uniform(0.2, 0.5))],
    "heart": lambda _: [_heart()],
    "mouth": lambda rng: [_mouth(rng.uniform(0.3, 1.6))],
}
