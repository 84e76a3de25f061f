"""Rotary position tables: where each token stands on the axes time, row, column and text position.

Section (b) 4 of FLUX.2's forward: adjacent pairs of a head's features are rotated by `position * theta^(-2k/axis)`.
Letters: T = L + S tokens (text first, then h * w image tokens row by row), d = features of a head.
"""

from __future__ import annotations

from functools import lru_cache
from typing import cast

import mlx.core as mx
import numpy as np

from stages.flux2.variants import TransformerConfig

Rope = tuple[mx.array, mx.array]


def rope(config: TransformerConfig, text_length: int, height: int, width: int) -> Rope:
    """Return the tables (cos, sin), each [T, 1, d] float32, for `text_length` tokens before a height x width grid.

    Every pair's cosine stands twice; the sine stands with the signs a rotation needs, (-sin, sin), see `rotate`.
    """
    return _tables(config.axes_dims_rope, config.rope_theta, text_length, height, width)


@lru_cache(maxsize=32)
def _tables(axes: tuple[int, ...], theta: float, text_length: int, height: int, width: int) -> Rope:
    angles = np.concatenate(
        [
            np.outer(positions, theta ** (-np.arange(0, axis, 2, dtype=np.float64) / axis))
            for positions, axis in zip(_positions(text_length, height, width), axes, strict=True)
        ],
        axis=1,
    )
    sin = np.sin(angles)
    signed = np.stack([-sin, sin], axis=-1).reshape(len(sin), 1, -1)
    cos = np.repeat(np.cos(angles), 2, axis=1)[:, None]
    return mx.array(cos.astype(np.float32)), mx.array(signed.astype(np.float32))


def _positions(text_length: int, height: int, width: int) -> np.ndarray:
    """Return [4, T]: text tokens are (0, 0, 0, index), image tokens (0, row, column, 0)."""
    rows, columns = np.divmod(np.arange(height * width), width)
    positions = np.zeros((4, text_length + height * width))
    positions[1, text_length:] = rows
    positions[2, text_length:] = columns
    positions[3, :text_length] = np.arange(text_length)
    return positions


def rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Rotate adjacent pairs of x [B, T, H, d] in float32 and return x's dtype.

    (a, b) -> (a cos - b sin, a sin + b cos), written as x * cos + (b, a) * (-sin, sin): one strided copy instead of
    four slices and a stack. 8 heads x 768 x 128 on one EPYC core, 2026-11-21: 0.75 ms against 1.54, with gradient
    1.05 ms against 2.62.
    """
    return cast(mx.array, _rotate(x, cos, sin))


@mx.custom_function
def _rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    swapped = x.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape)
    return (x * cos + swapped * sin).astype(x.dtype)


@_rotate.vjp
def _rotate_back(primals: tuple[mx.array, ...], cotangent: mx.array, _: mx.array) -> tuple[mx.array, ...]:
    """The gradient of a rotation is the rotation back; the tables get none."""
    _, cos, sin = primals
    return rotate(cotangent, cos, -sin), mx.zeros_like(cos), mx.zeros_like(sin)
