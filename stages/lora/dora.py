"""DoRA (Liu et al. 2024): a LoRA whose output rows have trained lengths.

y = magnitude / ||W + scale * B A|| * (W + scale * B A) x, norms over the inputs of each row and, as section 4.3 of
the paper says and peft does, without a gradient of their own.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from stages.lora.layer import LoRALinear, Parts, dense


class DoRALinear(LoRALinear):
    """A linear with a low-rank change and a magnitude [out] per row; a fresh one changes nothing.

    ||W + scale * B A||^2 is computed as ||W||^2 + 2 scale B . (W A') + scale^2 B . (B A A'), row by row: W + B A,
    as large as the weight, is never formed.
    """

    def __init__(
        self, base: nn.Module, lora_A: mx.array, lora_B: mx.array, scale: float, magnitude: mx.array | None = None
    ) -> None:
        super().__init__(base, lora_A, lora_B, scale)
        self._squares = mx.square(dense(base)).sum(axis=1)
        # Evaluated at once: else the float32 weights of all modules would be alive together.
        mx.eval(self._squares)
        self.lora_magnitude_vector = self._lengths(self.parts, mx.float32) if magnitude is None else magnitude

    def __call__(self, x: mx.array) -> mx.array:
        """Map x [..., in] to [..., out] in the type of x."""
        y = self.base(x)
        seen = self.draw.inputs(x)
        kept = y if seen is x else self.base(seen)
        changed = mx.addmm(kept, self._down(seen), self.lora_B.astype(x.dtype).T, alpha=self.scale)
        gain = self.lora_magnitude_vector / mx.stop_gradient(self._lengths(self.parts, x.dtype))
        # gain - 1 is rounded, not gain: it is small, and bfloat16 resolves only 1/128 around one.
        turned = changed + (gain - 1).astype(x.dtype) * changed
        # Dropped features are missing from what the adapter adds, never from W x; as in peft.
        return self.draw.module(turned if seen is x else y + (turned - kept), y)

    def portable(self, parts: Parts) -> Parts:
        """Return a LoRA and `dora_scale` [out], which readers apply as dora_scale / ||W|| * (W + B A).

        ComfyUI divides by the length of the bare rows, not of the changed ones.
        """
        ratio = mx.sqrt(self._squares) / self._lengths(parts, mx.float32)
        return {**super().portable(parts), "dora_scale": parts["lora_magnitude_vector"] * ratio}

    def magnitude_of(self, dora_scale: mx.array) -> mx.array:
        """Return the magnitude [out] at which these factors mean what `dora_scale` [out] means in a file."""
        return dora_scale * self._lengths(self.parts, mx.float32) / mx.sqrt(self._squares)

    def _lengths(self, parts: Parts, dtype: mx.Dtype) -> mx.array:
        """Return ||W + scale * B A|| of each row [out] float32; the base computes W A' in dtype."""
        a, b = parts["lora_A"], parts["lora_B"]
        cross = self.base(a.astype(dtype)).astype(mx.float32).T
        change = 2 * (b * cross).sum(axis=1) + self.scale * ((b @ (a @ a.T)) * b).sum(axis=1)
        return mx.sqrt(mx.maximum(self._squares + self.scale * change, 0.0))
