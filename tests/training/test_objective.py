from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import msgspec
import numpy as np
import pytest

from schemas.objective import Huber, Mask, Mse
from schemas.timesteps import Uniform, Weighted
from schemas.train import Train
from stages.flux2.flow import pack, velocity
from stages.flux2.transformer import Transformer
from stages.lora.layer import Factors
from stages.lora.merge import assign, attach, trainable
from stages.lora.targets import resolve
from stages.training.objective import (
    TRAINING_GUIDANCE,
    Batch,
    base_prediction,
    joined,
    loss,
    masked,
    pointwise,
    predict,
    prepare,
    preserving,
    silent_loss,
    with_prior,
)
from stages.training.step import Trainer
from stages.training.timesteps import Moment
from stages.training.weighting import weights
from tests.golden import tiny

# ||difference|| / ||gradient|| of every factor against peft 0.21.2 on torch 2.13, float32.
GRADIENT_BOUND = 3e-5


def golden_batch() -> Batch:
    golden = tiny.arrays("training")
    return Batch(*(golden[field] for field in Batch._fields[:5]))


def golden_factors() -> Factors:
    golden = tiny.arrays("training")
    return {name.removeprefix("factor."): array for name, array in golden.items() if name.startswith("factor.")}


@pytest.fixture
def model() -> Transformer:
    model = tiny.transformer("klein")
    attach(model, Train(rank=4, alpha=2.0), seed=1)
    return model


@pytest.mark.parametrize("checkpoint", [False, True])
def test_loss_and_gradients_of_every_target_are_those_of_peft(model: Transformer, *, checkpoint: bool) -> None:
    golden = tiny.arrays("training")
    factors = golden_factors()
    model.checkpoint = checkpoint

    def value(factors: Factors) -> mx.array:
        assign(model, factors)
        return loss(model, golden_batch())

    found, gradients = mx.value_and_grad(value)(factors)
    assert tiny.error(found, golden["loss"]) <= GRADIENT_BOUND
    assert len(gradients) == 2 * len(resolve(model.config, "blocks"))
    distances = {name: tiny.distance(gradients[name], golden[f"gradient.{name}"]) for name in gradients}
    assert max(distances.values()) <= GRADIENT_BOUND, distances


def test_loss_and_gradients_of_dev_are_those_of_peft_at_guidance_one() -> None:
    golden, dev = tiny.arrays("dev"), tiny.transformer("dev", tiny.DEV)
    attach(dev, Train(rank=4, alpha=2.0), seed=1)

    def value(factors: Factors) -> mx.array:
        assign(dev, factors)
        return loss(dev, golden_batch())

    found, gradients = mx.value_and_grad(value)(golden_factors())
    assert tiny.error(found, golden["loss"]) <= GRADIENT_BOUND
    assert len(gradients) == 2 * len(resolve(dev.config, "blocks"))
    distances = {name: tiny.distance(gradients[name], golden[f"gradient.{name}"]) for name in gradients}
    assert max(distances.values()) <= GRADIENT_BOUND, distances


def test_weights_scale_each_sample_alone(model: Transformer) -> None:
    batch = golden_batch()
    both, first, second = (
        loss(model, batch._replace(weights=mx.array(weights))) for weights in ([0.5, 1.5], [1.0, 0.0], [0.0, 1.0])
    )
    assert tiny.error(both, 0.5 * first + 1.5 * second) <= 1e-6


@pytest.mark.parametrize("kind", [Mse(), Huber(delta=0.3)])
def test_silent_loss_is_that_of_a_model_that_answers_zero(model: Transformer, kind: Mse | Huber) -> None:
    assign(model, golden_factors())
    mask = mx.random.uniform(shape=(2, 1, tiny.HEIGHT, tiny.WIDTH))
    batch = masked(model, golden_batch(), mask, Mask(outside=0.2, keep_base=True))
    one = Batch(*(array[:1] for array in golden_batch()[:5]))
    taking = Trainer(model, Train(loss=kind, gradient_checkpointing=False), 1)
    model.final_layer.linear.weight = mx.zeros_like(model.final_layer.linear.weight)
    assert mx.array_equal(loss(model, batch, kind), silent_loss([batch], kind))
    # Pictures count the same in a window, whatever the sizes of its batches.
    found = taking.step([batch, one]).loss
    assert tiny.error(silent_loss([batch, one], kind), found) <= 1e-6


def test_whitened_latents_of_any_noise_level_have_a_silent_loss_of_two() -> None:
    latents, noise = mx.random.normal((2, 4, 8, 32, 32), key=mx.random.key(5))
    batch = Batch(latents, noise, mx.zeros((4, 7, 24)), mx.array([0.01, 0.3, 0.7, 1.0]), mx.ones(4))
    assert silent_loss([batch]).item() == pytest.approx(2.0, abs=0.05)
    assert silent_loss([batch._replace(latents=3 * latents)]).item() == pytest.approx(10.0, abs=0.2)


def test_loss_of_bfloat16_streams_is_float32() -> None:
    assert loss(tiny.transformer("klein", dtype=mx.bfloat16), golden_batch()).dtype == mx.float32


def test_variants_that_embed_guidance_train_at_one() -> None:
    model = tiny.transformer("dev", tiny.DEV)
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


@pytest.mark.parametrize("timesteps", [Uniform(minimum=0.2, maximum=0.4), Weighted()])
def test_prepared_batches_are_weighted_by_their_noise_levels(timesteps: Uniform | Weighted) -> None:
    bell = msgspec.convert({"timesteps": {"kind": "uniform"}, "weighting": {"kind": "bell"}}, Train).weighting
    settings = Train(timesteps=timesteps, weighting=bell if isinstance(timesteps, Uniform) else Train().weighting)
    batch = prepare(mx.zeros((2, 8, 3, 5)), mx.zeros((2, 7, 24)), ["a", "b"], settings=settings, moment=Moment(1, 2))
    assert batch.weights.tolist() == weights(bell, np.array(batch.timesteps)).tolist()
    assert len(set(batch.weights.tolist())) == 2


def test_noise_offset_moves_each_channel_of_the_autoencoder_as_a_whole() -> None:
    latents, text = mx.zeros((1, 8, 3, 5)), mx.zeros((1, 7, 24))
    plain, offset = (
        prepare(latents, text, ["a"], settings=Train(noise_offset=strength), moment=Moment(1, 2)).noise
        for strength in (0.0, 0.1)
    )
    moved = np.array(offset - plain)[0]
    assert moved == pytest.approx(np.broadcast_to(moved[:, :1, :1], moved.shape), abs=1e-6)
    channels = moved[:, 0, 0].reshape(2, 4)
    assert channels == pytest.approx(np.repeat(channels[:, :1], 4, axis=1), abs=1e-6)
    assert abs(channels[0, 0] - channels[1, 0]) > 1e-3


def test_noise_offset_has_the_asked_strength() -> None:
    latents, text = mx.zeros((64, 128, 1, 1)), mx.zeros((64, 1, 1))
    names = [str(index) for index in range(64)]
    plain, offset = (
        prepare(latents, text, names, settings=Train(noise_offset=strength), moment=Moment(1, 2)).noise
        for strength in (0.0, 0.1)
    )
    assert (offset - plain).std().item() == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize("delta", [0.1, 1.5])
def test_huber_is_twice_that_of_torch(delta: float) -> None:
    golden = tiny.arrays("objective")
    assert tiny.error(pointwise(Huber(delta=delta), golden["errors"]), 2 * golden[f"huber_{delta}"]) <= 1e-6


def test_huber_is_the_square_near_zero_and_pulls_with_constant_force_far_away() -> None:
    errors = mx.array([-0.3, 0.2, -40.0, 7.0])
    square, huber = (
        mx.grad(lambda error, kind=kind: pointwise(kind, error).sum())(errors) for kind in (Mse(), Huber(delta=0.5))
    )
    assert huber.tolist() == pytest.approx([*square[:2].tolist(), -1.0, 1.0])


def test_the_loss_takes_its_kind(model: Transformer) -> None:
    batch = golden_batch()
    wide, narrow = (loss(model, batch, Huber(delta=delta)) for delta in (100.0, 0.1))
    assert tiny.error(wide, loss(model, batch)) <= 1e-6
    assert narrow.item() < 0.5 * wide.item()


def cell_mask() -> mx.array:
    """Left two of five columns in, the third by half, the rest out; the second picture is all in."""
    mask = np.ones((2, 1, tiny.HEIGHT, tiny.WIDTH), dtype=np.float32)
    mask[0, 0, :, 2:] = [0.5, 0.0, 0.0]
    return mx.array(mask)


def test_equal_cells_change_nothing(model: Transformer) -> None:
    batch = golden_batch()
    cells = mx.full((2, 1, tiny.HEIGHT, tiny.WIDTH), 0.25)
    assert tiny.error(loss(model, batch._replace(cells=cells)), loss(model, batch)) <= 1e-6


def test_masked_loss_is_the_mean_of_the_cells_by_their_weights(model: Transformer) -> None:
    batch, mask = golden_batch(), cell_mask()
    found = loss(model, masked(model, batch, mask, Mask(outside=0.1)))
    error = np.array(mx.square(predict(model, batch) - pack(velocity(batch.latents, batch.noise))).mean(axis=2))
    cells = np.array(pack(mask + 0.1 * (1 - mask)))[..., 0]
    expected = np.mean(np.array(batch.weights) * np.average(error, axis=1, weights=cells))
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_a_picture_that_is_all_outside_counts_nothing_at_weight_zero(model: Transformer) -> None:
    batch = golden_batch()
    assert loss(model, masked(model, batch, mx.zeros_like(cell_mask()), Mask(outside=0.0))).item() == 0.0


def test_keeping_the_base_needs_a_weight_outside() -> None:
    with pytest.raises(msgspec.ValidationError, match="outside"):
        msgspec.convert({"outside": 0.0, "keep_base": True}, Mask)


def gradients(model: Transformer, factors: Factors, value: Callable[[], mx.array]) -> Factors:
    def of(factors: Factors) -> mx.array:
        assign(model, factors)
        return value()

    return mx.grad(of)(factors)


def test_keeping_the_base_outside_a_mask_pulls_as_two_losses_do(model: Transformer) -> None:
    """The picture's target by the mask and the base model's answer by the rest, written out as two terms."""
    batch, mask, factors = golden_batch(), cell_mask(), golden_factors()
    kept = masked(model, batch, mask, Mask(outside=0.2, keep_base=True))
    inside, outside = pack(mask), pack(0.2 * (1 - mask))
    base, target = pack(base_prediction(model, batch)), pack(velocity(batch.latents, batch.noise))

    def two() -> mx.array:
        predicted = predict(model, batch)
        errors = inside * mx.square(predicted - target) + outside * mx.square(predicted - base)
        by_picture = errors.mean(axis=2).sum(axis=1) / (inside + outside).sum(axis=(1, 2))
        return (batch.weights * by_picture).mean()

    found, expected = gradients(model, factors, lambda: loss(model, kept)), gradients(model, factors, two)
    assert max(tiny.distance(found[name], expected[name]) for name in found) <= 1e-5


def test_pictures_of_the_class_count_by_their_own_weight(model: Transformer) -> None:
    batch = golden_batch()._replace(weights=mx.ones(2))
    subject, prior = (
        loss(model, batch._replace(weights=mx.array(alone))).item() for alone in ([1.0, 0.0], [0.0, 1.0])
    )
    found = loss(model, with_prior(batch, [False, True], 0.3))
    assert found.item() == pytest.approx(subject + 0.3 * prior, rel=1e-6)


def class_text() -> mx.array:
    return golden_batch().text[::-1]


def test_fresh_adapters_have_nothing_to_preserve(model: Transformer) -> None:
    fresh = trainable(model)
    batch = preserving(model, golden_batch(), class_text(), 1.0)
    assert loss(model, batch).item() == 0.0
    found = gradients(model, fresh, lambda: loss(model, batch))
    assert all(not mx.any(gradient).item() for gradient in found.values())


def test_preservation_is_the_change_under_the_class_captions_by_its_weight(model: Transformer) -> None:
    assign(model, golden_factors())
    batch = golden_batch()._replace(text=class_text())
    base = pack(base_prediction(model, batch))
    change = mx.square(predict(model, batch) - base).mean()
    assert change.item() > 0.01
    assert tiny.error(loss(model, preserving(model, golden_batch(), class_text(), 0.7)), 0.7 * change) <= 1e-6


def test_the_base_prediction_is_that_of_the_model_without_adapters(model: Transformer) -> None:
    assign(model, golden_factors())
    found = pack(base_prediction(model, golden_batch()))
    assert tiny.error(found, predict(tiny.transformer("klein"), golden_batch())) <= 1e-6
    assert not mx.allclose(found, predict(model, golden_batch()), atol=1e-2)


def test_preservation_draws_trained_adapters_back(model: Transformer) -> None:
    assign(model, golden_factors())
    settings = Train(learning_rate=1e-2, gradient_checkpointing=False)
    trainer = Trainer(model, settings, 1)
    batch = preserving(model, golden_batch(), class_text(), 1.0)
    losses = [trainer.step([batch]).loss.item() for _ in range(12)]
    assert losses[-1] < 0.5 * losses[0]


def test_the_base_model_answers_once_however_often_its_answer_is_used(model: Transformer) -> None:
    calls: list[int] = []
    embed = model.txt_in
    model.txt_in = lambda x: calls.append(1) or embed(x)
    batch = preserving(model, golden_batch(), class_text(), 1.0)
    assert len(calls) == 1
    for _ in range(2):
        gradients(model, golden_factors(), lambda: loss(model, batch))
    assert len(calls) == 3


def test_a_joined_window_has_the_loss_of_both_parts(model: Transformer) -> None:
    assign(model, golden_factors())
    batch = golden_batch()
    single = Batch(*(array[:1] for array in batch[:5]))
    extra = preserving(model, single, class_text()[:1], 2.0)
    held = loss(model, extra)
    expected = loss(model, batch) + held
    mx.eval(expected)
    result = Trainer(model, Train(gradient_checkpointing=False), 1).step(joined([batch], [extra]), held=1)
    assert tiny.error(result.loss, expected) <= 1e-6
    assert result.preservation is not None
    assert tiny.error(result.preservation, held) <= 1e-6


def test_a_window_without_extra_batches_stays_as_it_is() -> None:
    batch = golden_batch()
    assert joined([batch], [])[0].weights.tolist() == batch.weights.tolist()
