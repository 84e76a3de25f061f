from __future__ import annotations

import mlx.core as mx
from mlx import nn

from stages.lora.layer import LoRALinear
from tests.golden import tiny
from tests.lora.velocity import random


def test_adapter_adds_the_scaled_low_rank_product() -> None:
    base = nn.Linear(8, 5, bias=False)
    x, a, b = random(1, 2, 3, 8), random(2, 4, 8), random(3, 5, 4)
    expected = x @ (base.weight + 0.5 * b @ a).T
    assert tiny.error(LoRALinear(base, a, b, 0.5)(x), expected) <= 1e-6


def test_float32_factors_do_not_promote_a_bfloat16_stream() -> None:
    base = nn.Linear(8, 5, bias=False)
    base.set_dtype(mx.bfloat16)
    layer = LoRALinear(base, random(2, 4, 8), random(3, 5, 4), 0.5)
    assert layer(random(1, 2, 8).astype(mx.bfloat16)).dtype == mx.bfloat16


def test_gradients_of_a_bfloat16_stream_are_float32_and_near() -> None:
    base = nn.Linear(8, 5, bias=False)

    def gradients(dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        base.set_dtype(dtype)
        x = random(1, 2, 8).astype(dtype)
        return mx.grad(lambda a, b: mx.square(LoRALinear(base, a, b, 0.5)(x).astype(mx.float32)).sum(), (0, 1))(
            random(2, 4, 8), random(3, 5, 4)
        )

    for exact, rounded in zip(gradients(mx.float32), gradients(mx.bfloat16), strict=True):
        assert rounded.dtype == mx.float32
        assert tiny.distance(rounded, exact) <= 0.02  # measured 0.008


def test_adapter_works_beside_a_quantized_linear() -> None:
    quantized = nn.QuantizedLinear.from_linear(nn.Linear(64, 32, bias=False), group_size=32, bits=8)
    x, a, b = random(1, 2, 64), random(2, 4, 64), random(3, 32, 4)
    assert tiny.error(LoRALinear(quantized, a, b, 1.0)(x) - quantized(x), x @ a.T @ b.T) <= 1e-5
