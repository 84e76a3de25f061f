"""LoKr: the change of a weight as a Kronecker product, kron(w1, w2), as LyCORIS and peft define it.

w1 is [p, m], w2 [q, n] for a weight [p q, m n]; w2 may be w2_a [q, r] @ w2_b [r, n]. The product is never formed:
x [..., m n] as a matrix X [m, n] maps to w1 X w2'.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from stages.lora.layer import Adapter, Parts, product_norm, uniform


class LoKrLinear(Adapter):
    """A linear with a Kronecker change; `parts` are lokr_w1 and either lokr_w2 or lokr_w2_a and lokr_w2_b."""

    product = ("lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b")

    def __init__(self, base: nn.Module, parts: Parts, scale: float) -> None:
        super().__init__(base, scale)
        for name, part in parts.items():
            self[name] = part

    def __call__(self, x: mx.array) -> mx.array:
        """Map x [..., in] to [..., out] in the type of x."""
        parts = {name: part.astype(x.dtype) for name, part in self.parts.items()}
        w1 = parts.pop("lokr_w1")
        matrix = self.draw.inputs(x).reshape(*x.shape[:-1], w1.shape[1], -1)
        for name in ("lokr_w2", "lokr_w2_b", "lokr_w2_a"):
            if name in parts:
                matrix = matrix @ parts[name].T
        y = self.base(x)
        return self.draw.module(y + self.scale * (w1 @ matrix).flatten(-2), y)

    def portable(self, parts: Parts) -> Parts:
        """Return the parts with w1 times the scale: readers apply one of their own only where a file has alpha."""
        return {**parts, "lokr_w1": parts["lokr_w1"] * self.scale}

    def norm(self, parts: Parts) -> mx.array:
        """Return ||scale * kron(w1, w2)|| = scale ||w1|| ||w2||."""
        w1 = mx.linalg.norm(parts["lokr_w1"])
        if "lokr_w2" in parts:
            return self.scale * w1 * mx.linalg.norm(parts["lokr_w2"])
        return self.scale * w1 * product_norm(parts["lokr_w2_a"], parts["lokr_w2_b"])


def split(size: int, factor: int) -> tuple[int, int]:
    """Return (p, q) with p q = size: p is `factor` where that divides, else the largest divisor up to it.

    A factor of -1 asks for p and q as near to each other as can be, p the smaller one.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = int(size**0.5) if factor < 0 else min(factor, int(size**0.5))
    first = max((divisor for divisor in range(1, most + 1) if size % divisor == 0), default=1)
    return first, size // first


def fresh_parts(shape: tuple[int, ...], rank: int, factor: int, *, seed: int, module: str) -> Parts:
    """Return LyCORIS' start for a weight [out, in]: w1 (and w2_a) kaiming-uniform, the last factor zero."""
    (p, q), (m, n) = split(shape[0], factor), split(shape[1], factor)
    w1 = uniform((p, m), seed, f"{module}.w1")
    if rank >= max(q, n) / 2:
        return {"lokr_w1": w1, "lokr_w2": mx.zeros((q, n))}
    w2_a = uniform((q, rank), seed, f"{module}.w2_a")
    return {"lokr_w1": w1, "lokr_w2_a": w2_a, "lokr_w2_b": mx.zeros((rank, n))}
