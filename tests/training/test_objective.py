from __future__ import annotations

import dataclasses

import mlx.core as mx
import pytest

from schemas.train import Train
from stages.flux2.transformer import Transformer
from stages.lora.layer import Factors
from stages.lora.merge import assign, attach
from stages.lora.targets import resolve
from stages.training.objective import TRAINING_GUIDANCE, Batch, loss, prepare
from stages.training.timesteps import Moment
from tests.golden import tiny

# ||difference|| / ||gradient|| of every factor against peft 0.21.2 on torch 2.13, float32.
GRADIENT_BOUND = 3e-5


def golden_batch() -> Batch:
    golden = tiny.arrays("training")
    return Batch(*(golden[field] for field in Batch._fields[:5]))


@pytest.fixture
def model() -> Transformer:
    model = tiny.transformer("klein")
    attach(model, resolve(model.config, "blocks"), rank=4, alpha=2.0, seed=1)
    return model


@pytest.mark.parametrize("checkpoint", [False, True])
def test_loss_and_gradients_of_every_target_are_those_of_peft(model: Transformer, *, checkpoint: bool) -> None:
    golden = tiny.arrays("training")
    factors = {name.removeprefix("factor."): array for name, array in golden.items() if name.startswith("factor.")}
    model.checkpoint = checkpoint

    def value(factors: Factors) -> mx.array:
        assign(model, factors)
        return loss(model, golden_batch())

    found, gradients = mx.value_and_grad(value)(factors)
    assert tiny.error(found, golden["loss"]) <= GRADIENT_BOUND
    assert len(gradients) == 2 * len(resolve(model.config, "blocks"))
    distances = {name: tiny.distance(gradients[name], golden[f"gradient.{name}"]) for name in gradients}
    assert max(distances.values()) <= GRADIENT_BOUND, distances


def test_weights_scale_each_sample_alone(model: Transformer) -> None:
    batch = golden_batch()
    both, first, second = (
        loss(model, batch._replace(weights=mx.array(weights))) for weights in ([0.5, 1.5], [1.0, 0.0], [0.0, 1.0])
    )
    assert tiny.error(both, 0.5 * first + 1.5 * second) <= 1e-6


def test_loss_of_bfloat16_streams_is_float32() -> None:
    assert loss(tiny.transformer("klein", dtype=mx.bfloat16), golden_batch()).dtype == mx.float32


def test_variants_that_embed_guidance_train_at_one() -> None:
    model = tiny.transformer("dev", dataclasses.replace(tiny.KLEIN, guidance_embeds=True))
    heard: list[mx.array] = []
    embed = model.guidance_in.in_layer
    model.guidance_in.in_layer = lambda x: heard.append(x) or embed(x)
    loss(model, golden_batch())
    assert TRAINING_GUIDANCE == 1.0
    assert mx.allclose(heard[0][:, 0], mx.cos(mx.array(1000.0)))


def test_prepared_batches_are_a_function_of_seed_step_and_items() -> None:
    latents, text, settings = mx.zeros((2, 8, 3, 5)), mx.zeros((2, 7, 24)), Train()
    batch = prepare(latents, text, ["a", "b"], settings=settings, moment=Moment(1, 2))
    again = prepare(latents[1:], text[1:], ["b"], settings=settings, moment=Moment(1, 2, place=7))
    later = prepare(latents, text, ["a", "b"], settings=settings, moment=Moment(1, 3))
    assert mx.array_equal(batch.noise[1:], again.noise)
    assert mx.array_equal(batch.timesteps[1:], again.timesteps)
    assert not mx.array_equal(batch.noise, later.noise)
    assert batch.weights.tolist() == [1.0, 1.0]
