"""The low-rank adapter beside a frozen linear: y = W x + scale * B A x.

Everywhere in the project a set of adapters is one flat dict, `Factors`: "<module>.lora_A" [r, in] and
"<module>.lora_B" [out, r] float32, modules by their BFL names. It is what is trained, saved and loaded.
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from stages.contract.digests import digest_of

Factors = dict[str, mx.array]


class LoRALinear(nn.Module):
    """A frozen linear with an adapter; the base may be any linear layer, quantized ones too.

    The factors are float32 and are rounded to the type of the stream where they are used: float32 factors would
    promote every bfloat16 activation behind them. Gradients come back as float32, from products accumulated in it.
    """

    def __init__(self, base: nn.Module, lora_A: mx.array, lora_B: mx.array, scale: float) -> None:
        super().__init__()
        self.base = base
        self.lora_A = lora_A
        self.lora_B = lora_B
        self.scale = scale

    def __call__(self, x: mx.array) -> mx.array:
        """Map x [..., in] to [..., out] in the type of x."""
        down, up = self.lora_A.astype(x.dtype), self.lora_B.astype(x.dtype)
        return mx.addmm(self.base(x), x @ down.T, up.T, alpha=self.scale)


def initial_factors(shapes: dict[str, tuple[int, ...]], rank: int, seed: int) -> Factors:
    """Return fresh factors for modules of the given (out, in): A uniform in +-1/sqrt(in), B zero.

    That is kaiming-uniform with a = sqrt(5), as peft and ai-toolkit start. A module's values depend only on the
    seed, its name and its size, not on which other modules are adapted.
    """
    factors: Factors = {}
    for name, (rows, columns) in shapes.items():
        bound = 1 / math.sqrt(columns)
        key = mx.random.key(int(digest_of("lora-init", [seed, name])[:16], 16))
        factors[f"{name}.lora_A"] = mx.random.uniform(-bound, bound, (rank, columns), mx.float32, key)
        factors[f"{name}.lora_B"] = mx.zeros((rows, rank), mx.float32)
    return factors
