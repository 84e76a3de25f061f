"""AdamW with moments that rest in 8 bits: blocks of 256 values, each with its greatest magnitude as scale.

A value x of a block with scale s is held as the code c = round(L (|x| / s)^(1/5)) with the sign of x, and is worth
s (c / L)^5: at L = 127 codes reach 3e-11 s, because values of one block lie decades apart and a small value that
reads as zero never moves its weight. The second moment is held by its square root, with L = 255.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from stages.training.optimizers.mlx_rules import MlxRule
from stages.training.optimizers.rule import Slots

BLOCK = 256
SIGNED, UNSIGNED = 127, 255
ROOT = 5


@dataclass(frozen=True)
class EightBit:
    """An Adam whose slots "m" and "v" are coded after each update and decoded before the next."""

    adam: MlxRule

    def initial(self, factor: mx.array) -> Slots:
        """Return codes and scales of zeros."""
        return _coded(self.adam.initial(factor))

    def update(
        self, gradient: mx.array, factor: mx.array, slots: Slots, rate: mx.array, step: mx.array
    ) -> tuple[mx.array, Slots]:
        """Return factor and coded slots after one update, which itself sees the moments before they are rounded."""
        moments = {
            "m": decode(slots["m"], slots["m_scale"], SIGNED, factor.shape),
            "v": mx.square(decode(slots["v"], slots["v_scale"], UNSIGNED, factor.shape)),
        }
        new, moments = self.adam.update(gradient, factor, moments, rate, step)
        return new, _coded(moments)


def encode(values: mx.array, levels: int) -> tuple[mx.array, mx.array]:
    """Return codes [blocks, 256] float32, whole numbers in [-levels, levels], and scales [blocks, 1] float32."""
    padding = -values.size % BLOCK
    blocks = mx.pad(values.flatten(), (0, padding)).reshape(-1, BLOCK)
    scales = mx.abs(blocks).max(axis=1, keepdims=True)
    shares = mx.abs(blocks) / mx.where(scales > 0, scales, 1.0)
    return mx.sign(blocks) * mx.round(levels * mx.power(shares, 1 / ROOT)), scales


def decode(codes: mx.array, scales: mx.array, levels: int, shape: tuple[int, ...]) -> mx.array:
    """Return what `encode` was given, up to rounding: float32 of `shape`."""
    shares = codes.astype(mx.float32) / levels
    # As products: pow of a negative number is not defined on every backend.
    squares = shares * shares
    values = (squares * squares * shares * scales).flatten()
    size = 1
    for dimension in shape:
        size *= dimension
    return values[:size].reshape(shape)


def _coded(moments: Slots) -> Slots:
    m, m_scale = encode(moments["m"], SIGNED)
    v, v_scale = encode(mx.sqrt(moments["v"]), UNSIGNED)
    # A second moment rounded to zero would leave eps alone as divisor.
    v = mx.maximum(v, (v_scale > 0).astype(mx.float32))
    return {"m": m.astype(mx.int8), "m_scale": m_scale, "v": v.astype(mx.uint8), "v_scale": v_scale}
