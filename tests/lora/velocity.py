"""What LoRA tests share: the tiny model's velocity, golden LoRA files, keyed random arrays."""

from __future__ import annotations

import mlx.core as mx

from stages.flux2.positions import rope
from stages.flux2.transformer import Transformer
from stages.lora.layer import Factors
from stages.lora.merge import applied
from stages.stores import tensors as store
from tests.golden import tiny


def velocity(model: Transformer, factors: Factors | None = None) -> mx.array:
    """Return the velocity of the golden inputs, with the factors of a file in place of what is on the model."""
    golden = tiny.arrays("transformer")
    tables = rope(model.config, tiny.TEXT_LENGTH, tiny.HEIGHT, tiny.WIDTH)
    given = (golden["hidden_states"], golden["encoder_hidden_states"], golden["timestep"], None, tables)
    if factors is None:
        return model(*given)
    with applied(model, factors):
        return model(*given)


def load(name: str) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Return tensors and metadata of a golden LoRA file."""
    file = store.load(tiny.GOLDEN / f"{name}.safetensors")
    return {key: store.to_mlx(tensor) for key, tensor in file.tensors.items()}, file.metadata


def random(seed: int, *shape: int) -> mx.array:
    """Return standard normal numbers."""
    return mx.random.normal(shape, key=mx.random.key(seed))


def equal(left: Factors, right: Factors) -> bool:
    """Return whether both hold the same names and bits."""
    return left.keys() == right.keys() and all(mx.array_equal(left[name], right[name]).item() for name in left)
