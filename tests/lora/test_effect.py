"""How far a LoRA moves the velocity: nothing by zeros, in proportion by small factors, the same every time."""

from __future__ import annotations

import mlx.core as mx
import pytest

from stages.flux2.transformer import Transformer
from stages.flux2.variants import MICRO
from stages.lora.effect import velocity_moved

MODULE = "single_blocks.0.linear1"


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    mx.random.seed(1)
    return Transformer(MICRO.transformer)


def factors(transformer: Transformer, scale: float) -> dict[str, mx.array]:
    rows, columns = transformer.single_blocks[0].linear1.weight.shape
    keys = mx.random.split(mx.random.key(3))
    return {
        f"{MODULE}.lora_A": mx.random.normal((2, columns), key=keys[0]) * 0.1,
        f"{MODULE}.lora_B": mx.random.normal((rows, 2), key=keys[1]) * scale,
    }


def test_adapter_of_zeros_moves_nothing(transformer: Transformer) -> None:
    assert velocity_moved(transformer, factors(transformer, 0.0)) == 0.0


def test_twice_the_adapter_moves_about_twice_as_far_and_always_the_same(transformer: Transformer) -> None:
    once, twice = (velocity_moved(transformer, factors(transformer, scale)) for scale in (1e-3, 2e-3))
    assert once == velocity_moved(transformer, factors(transformer, 1e-3)) > 0
    assert twice == pytest.approx(2 * once, rel=0.05)
