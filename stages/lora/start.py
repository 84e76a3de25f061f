"""How an adapter starts: fresh, at the weight's principal part, or where an existing LoRA file left off.

All but PiSSA start as the bare model. Letters: r rank.
"""

from __future__ import annotations

import math
from typing import assert_never

import mlx.core as mx
import mlx.nn as nn

from schemas.adapter import Adapter as Spec
from schemas.adapter import DoRA, LoKr, LoRA
from schemas.errors import BadConfig
from stages.flux2.variants import TransformerConfig
from stages.lora import lokr
from stages.lora.dora import DoRALinear
from stages.lora.layer import (
    Adapter,
    LoRALinear,
    Parts,
    PiSSALinear,
    dense,
    start_key,
    uniform,
)
from stages.lora.lokr import LoKrLinear
from stages.lora.targets import Size, linear_shapes, named

# Of the randomized singular value decomposition: columns beyond r, and rounds of subspace iteration.
OVERSAMPLING = 8
ROUNDS = 8


def scale_of(spec: Spec, size: Size) -> float:
    """Return the factor before the product: alpha / r, or alpha / sqrt(r) as rsLoRA (Kalajdzievski 2023) has it."""
    match spec:
        case LoRA(rslora=True) | DoRA(rslora=True):
            return size.alpha / math.sqrt(size.rank)
        case LoRA() | DoRA() | LoKr():
            return size.alpha / size.rank
        case _:
            assert_never(spec)


def fresh(spec: Spec, base: nn.Module, shape: tuple[int, ...], *, module: str, size: Size, seed: int) -> Adapter:
    """Return a new adapter for a linear of the given (out, in)."""
    scale = scale_of(spec, size)
    match spec:
        case LoRA(init="pissa"):
            a, b = principal(dense(base), size.rank, start_key(seed, module))
            root = math.sqrt(scale)
            return PiSSALinear(base, a / root, b / root, scale)
        case LoRA():
            return LoRALinear(base, *_zero_product(spec, shape, module=module, rank=size.rank, seed=seed), scale)
        case DoRA():
            return DoRALinear(base, *_zero_product(spec, shape, module=module, rank=size.rank, seed=seed), scale)
        case LoKr(factor=factor):
            return LoKrLinear(base, lokr.fresh_parts(shape, size.rank, factor, seed=seed, module=module), scale)
        case _:
            assert_never(spec)


def loaded(base: nn.Module, parts: Parts, scale: float = 1.0) -> Adapter:
    """Return the adapter that `parts` of a file mean (as `formats.read` gives them), as one of the given scale."""
    if "lokr_w1" in parts:
        return LoKrLinear(base, {**parts, "lokr_w1": parts["lokr_w1"] / scale}, scale)
    a, b = parts["lora_A"], parts["lora_B"] / scale
    if "lora_magnitude_vector" in parts:
        return DoRALinear(base, a, b, scale, parts["lora_magnitude_vector"])
    if "dora_scale" in parts:
        layer = DoRALinear(base, a, b, scale)
        layer.lora_magnitude_vector = layer.magnitude_of(parts["dora_scale"])
        return layer
    return LoRALinear(base, a, b, scale)


def principal(weight: mx.array, rank: int, key: mx.array) -> tuple[mx.array, mx.array]:
    """Return A [r, in] and B [out, r] with B A the best rank-r approximation of weight [out, in] float32.

    By randomized subspace iteration (Halko et al. 2011), A and B sharing the singular values' roots as PiSSA has
    it. One linear of [9216, 3072] takes 2 s on two CPU cores with OpenBLAS (rank 16), a full decomposition
    minutes; what this misses of the principal part simply stays in the base.
    """
    count = min(rank + OVERSAMPLING, *weight.shape)
    basis = _orthonormal(weight @ mx.random.normal((weight.shape[1], count), key=key))
    for _ in range(ROUNDS):
        basis = _orthonormal(weight @ _orthonormal(weight.T @ basis))
    small = basis.T @ weight
    squares, left = mx.linalg.eigh(small @ small.T, stream=mx.cpu)  # ascending
    left = left[:, ::-1][:, :rank]
    roots = mx.maximum(squares[::-1][:rank], 0.0) ** 0.25
    a = (left.T @ small) / mx.maximum(roots, 1e-12)[:, None]
    b = (basis @ left) * roots
    return a, b


def require_rank(spec: Spec, config: TransformerConfig, sizes: dict[str, Size]) -> None:
    """Raise BadConfig for ranks above the smaller side of their linear, which has no more directions than that.

    PiSSA, which starts with as many, can have none of them; of the others some linears may be small, but not all.
    """
    shapes = linear_shapes(config)
    small = {name: min(shapes[name]) for name, size in sizes.items() if size.rank > min(shapes[name])}
    pissa = isinstance(spec, LoRA) and spec.init == "pissa"
    if not small or isinstance(spec, LoKr) or not (pissa or len(small) == len(sizes)):
        return
    most = min(small.values()) if pissa else max(small.values())
    raise BadConfig(
        "train.rank_too_large",
        "PiSSA cannot start with a rank above a linear's size" if pissa else "no linear is as large as its rank",
        where="train.rank",
        why=f"{named(list(small))}: at most {most}",
        fix=f"set train.rank = {most} or less there",
    )


def _zero_product(
    spec: LoRA | DoRA, shape: tuple[int, ...], *, module: str, rank: int, seed: int
) -> tuple[mx.array, mx.array]:
    """Return a random A and a B of zeros."""
    down, up = (rank, shape[1]), mx.zeros((shape[0], rank))
    if spec.init == "gaussian":
        return mx.random.normal(down, scale=1 / rank, key=start_key(seed, module)), up
    return uniform(down, seed, module), up


def _orthonormal(matrix: mx.array) -> mx.array:
    return mx.linalg.qr(matrix, stream=mx.cpu)[0]
