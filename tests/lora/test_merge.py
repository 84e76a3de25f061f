from __future__ import annotations

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from schemas.train import Train
from stages.flux2.transformer import Transformer
from stages.lora.layer import Factors
from stages.lora.merge import adapters, applied, assign, attach, trainable
from stages.lora.targets import resolve
from tests.golden import tiny
from tests.lora.velocity import velocity


def shifted(factors: Factors, by: float) -> Factors:
    return {name: factor + by for name, factor in factors.items()}


@pytest.fixture
def model() -> Transformer:
    return tiny.transformer("klein")


def test_a_fresh_adapter_leaves_the_velocity_as_it_was(model: Transformer) -> None:
    before = velocity(model)
    attach(model, Train(targets="blocks", rank=4, alpha=4.0), seed=1)
    assert mx.array_equal(velocity(model), before)


def test_only_factors_are_trainable(model: Transformer) -> None:
    attach(model, Train(targets="attention", rank=4, alpha=4.0), seed=1)
    found = tree_flatten(model.trainable_parameters(), destination={})
    assert (
        set(found)
        == set(trainable(model))
        == {f"{name}.{factor}" for name in resolve(model.config, "attention") for factor in ("lora_A", "lora_B")}
    )


def test_assigned_factors_are_those_computed_with(model: Transformer) -> None:
    attach(model, Train(targets="blocks", rank=4, alpha=4.0), seed=1)
    before = velocity(model)
    assign(model, shifted(trainable(model), 0.1))
    assert tiny.error(velocity(model), before) > 1e-3


def test_an_applied_lora_replaces_the_training_adapters_and_gives_them_back(model: Transformer) -> None:
    bare = velocity(model)
    attach(model, Train(targets="attention", rank=4, alpha=2.0), seed=1)
    assign(model, shifted(trainable(model), 0.1))
    layers, factors, training = adapters(model), trainable(model), velocity(model)
    saved = {name: factor * (0.5 if name.endswith("lora_B") else 1) for name, factor in factors.items()}
    with applied(model, saved):
        assert tiny.error(velocity(model), training) <= 1e-6
    with applied(model, {}):
        assert mx.array_equal(velocity(model), bare)
    assert all(adapters(model)[name] is layer for name, layer in layers.items())
    assert all(trainable(model)[name] is factor for name, factor in factors.items())


def test_a_failing_preview_gives_the_training_adapters_back(model: Transformer) -> None:
    attach(model, Train(targets="attention", rank=4, alpha=2.0), seed=1)
    layers = adapters(model)
    with pytest.raises(KeyboardInterrupt), applied(model, {}):
        raise KeyboardInterrupt
    assert all(adapters(model)[name] is layer for name, layer in layers.items())
