"""The adapter beside a frozen linear, and its plain kind: y = W x + scale * B A x.

Everywhere in the project a set of adapters is one flat dict, `Factors`: "<module>.<factor>", modules by their BFL
names and factors by those of files: lora_A [r, in], lora_B [out, r] and what the other kinds have, float32. It is
what is trained, saved and loaded. Letters: r rank.
"""

from __future__ import annotations

import math
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from stages.contract.digests import digest_of
from stages.lora.dropout import KEEP_ALL

Factors = dict[str, mx.array]
Parts = dict[str, mx.array]  # one module's factors, without the module's name

# Zero in a fresh adapter: as long as all of these are, nothing has been learnt.
ZERO_AT_FIRST = (".lora_B", ".lokr_w2", ".lokr_w2_b")


class Adapter(nn.Module):
    """A frozen linear of any kind, quantized ones too, and trained arrays beside it: its direct children.

    The factors are float32 and are rounded to the type of the stream where they are used: float32 factors would
    promote every bfloat16 activation behind them. Gradients come back as float32, from products accumulated in it.
    """

    # The factors whose product is the change of the weight.
    product: ClassVar[tuple[str, ...]] = ()

    def __init__(self, base: nn.Module, scale: float) -> None:
        super().__init__()
        self.base = base
        self.scale = scale
        self.draw = KEEP_ALL

    @property
    def parts(self) -> Parts:
        """The factors by name."""
        return {name: value for name, value in self.items() if isinstance(value, mx.array) and name[0] != "_"}

    def portable(self, parts: Parts) -> Parts:
        """Return `parts` as a file holds them: relative to the base's own weight, the scale folded in."""
        raise NotImplementedError

    def norm(self, parts: Parts) -> mx.array:
        """Return the Frobenius norm of the change of the weight, a scalar."""
        raise NotImplementedError


class LoRALinear(Adapter):
    """The plain low-rank adapter."""

    product = ("lora_A", "lora_B")

    def __init__(self, base: nn.Module, lora_A: mx.array, lora_B: mx.array, scale: float) -> None:
        super().__init__(base, scale)
        self.lora_A = lora_A
        self.lora_B = lora_B

    def __call__(self, x: mx.array) -> mx.array:
        """Map x [..., in] to [..., out] in the type of x."""
        y = self.base(x)
        return self.draw.module(mx.addmm(y, self._low(x), self._up().astype(x.dtype).T, alpha=self.scale), y)

    def portable(self, parts: Parts) -> Parts:
        """Return A, and B times the scale."""
        return {"lora_A": parts["lora_A"], "lora_B": parts["lora_B"] * self.scale}

    def norm(self, parts: Parts) -> mx.array:
        """Return ||scale * B A|| without forming the product."""
        return self.scale * product_norm(parts["lora_B"], parts["lora_A"])

    def _low(self, x: mx.array) -> mx.array:
        return self._down(self.draw.inputs(x))

    def _down(self, seen: mx.array) -> mx.array:
        return self.draw.ranks(seen @ self.lora_A.astype(seen.dtype).T)

    def _up(self) -> mx.array:
        return self.lora_B


class PiSSALinear(LoRALinear):
    """A LoRA that starts at the principal part of the weight: y = W x + scale * (B A - B0 A0) x.

    That is PiSSA (Meng et al. 2024), whose base is W - scale * B0 A0 and whose adapter starts at A0, B0, without
    writing the base: no second copy of it, no rounding of the rest to the base's type, and it may be quantized.
    """

    def __init__(self, base: nn.Module, lora_A: mx.array, lora_B: mx.array, scale: float) -> None:
        super().__init__(base, lora_A, lora_B, scale)
        # Copies: mx.compile refuses a function that holds an array it is also given. Evaluated one linear at a time,
        # so that the float32 weight they come from is freed before the next.
        self._start_A = mx.array(lora_A)
        self._start_B = mx.array(lora_B)
        mx.eval(self._start_A, self._start_B)

    def portable(self, parts: Parts) -> Parts:
        """Return a plain LoRA of twice the rank that is the same on the untouched base, as peft converts PiSSA."""
        return {
            "lora_A": mx.concatenate([parts["lora_A"], self._start_A], axis=0),
            "lora_B": mx.concatenate([parts["lora_B"], -self._start_B], axis=1) * self.scale,
        }

    def _low(self, x: mx.array) -> mx.array:
        return mx.concatenate([super()._low(x), x @ self._start_A.astype(x.dtype).T], axis=-1)

    def _up(self) -> mx.array:
        return mx.concatenate([self.lora_B, -self._start_B], axis=1)


def product_norm(left: mx.array, right: mx.array) -> mx.array:
    """Return the Frobenius norm of left [n, r] @ right [r, m] from two r x r products."""
    return mx.sqrt(mx.maximum(((left.T @ left) * (right @ right.T)).sum(), 0.0))


def limited(layer: Adapter, parts: Parts, most: float) -> Parts:
    """Shrink the factors of the product equally until its norm is at most `most`; as kohya's scale_weight_norms."""
    norm = layer.norm(parts)
    # Not 1 where the norm is within bounds but exactly 1: such an adapter keeps its bits.
    ratio = mx.where(norm > most, most / norm, 1.0)
    product = [name for name in layer.product if name in parts]
    share = ratio ** (1 / len(product))
    return {name: part * share if name in product else part for name, part in parts.items()}


def learnt(factors: Factors) -> bool:
    """Return whether the adapters do anything at all; reads on the host."""
    return any(factor.any().item() for name, factor in factors.items() if name.endswith(ZERO_AT_FIRST))


def by_module(factors: Factors) -> dict[str, Parts]:
    """Return each module's parts."""
    modules: dict[str, Parts] = {}
    for name, factor in factors.items():
        module, _, part = name.rpartition(".")
        modules.setdefault(module, {})[part] = factor
    return modules


def dense(base: nn.Module) -> mx.array:
    """Return a linear's weight [out, in] as float32, also that of a quantized one."""
    if isinstance(base, nn.QuantizedLinear):
        how = {"group_size": base.group_size, "bits": base.bits, "mode": base.mode}
        return mx.dequantize(base.weight, base.scales, base.biases, **how).astype(mx.float32)
    return base["weight"].astype(mx.float32)


def uniform(shape: tuple[int, ...], seed: int, module: str) -> mx.array:
    """Return float32 in +-1/sqrt(columns): kaiming-uniform with a = sqrt(5), as peft and ai-toolkit start."""
    bound = 1 / math.sqrt(shape[1])
    return mx.random.uniform(-bound, bound, shape, mx.float32, start_key(seed, module))


def start_key(seed: int, module: str) -> mx.array:
    """Return the key of a module's first values: of seed and name, not of which other modules are adapted."""
    return mx.random.key(int(digest_of("lora-init", [seed, module])[:16], 16))
