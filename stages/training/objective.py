"""What is minimised: the error of the velocity in float32, weighted by noise level, by picture and by cell.

A `Batch` says where the model is asked and what it should answer; masks and preservation only change those answers
and weights, so all of it is one loss. Letters: B batch, C channels, h x w latent grid (its places are cells), S = h*w
tokens, L text tokens, J features of a text embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, assert_never

import mlx.core as mx

from schemas.objective import Huber, Loss, Mask, Mse
from schemas.train import Train
from stages.flux2.flow import interpolate, pack, unpack, velocity
from stages.flux2.positions import rope
from stages.flux2.transformer import Transformer
from stages.lora.merge import applied
from stages.training.randomness import noise
from stages.training.timesteps import Moment, draw
from stages.training.weighting import resolved, weights

TRAINING_GUIDANCE = 1.0  # what variants that embed guidance are fed in training
PATCH = 4  # neighbours in a 2x2 patch, successive channels of a latent
# Keeps the quotient finite where a picture has no cell that counts.
LEAST_CELLS = 1e-6


class Batch(NamedTuple):
    """One micro-batch: latents, noise [B, C, h, w], text [B, L, J], timesteps, weights [B]; all but text float32.

    `cells` [B, 1, h, w] weights the places of each picture among themselves, absent: alike. `target` [B, C, h, w] is
    the velocity to learn, absent: noise - latents.
    """

    latents: mx.array
    noise: mx.array
    text: mx.array
    timesteps: mx.array
    weights: mx.array
    cells: mx.array | None = None
    target: mx.array | None = None


def prepare(latents: mx.array, text: mx.array, item_ids: Sequence[str], *, settings: Train, moment: Moment) -> Batch:
    """Draw noise and timesteps for latents [B, C, h, w] and text [B, L, J], and weigh each by its noise level.

    `item_ids` name the window's places, see `randomness.distinct`.
    """
    _, channels, height, width = latents.shape
    timesteps = draw(settings.timesteps, moment, item_ids, height * width)
    drawn = noise(moment.seed, moment.step, item_ids, (channels, height, width))
    if settings.noise_offset:
        # One offset per channel of the autoencoder: its four neighbours in a patch go up and down together.
        offset = noise(moment.seed, moment.step, item_ids, (channels // PATCH, 1, 1), "noise_offset")
        drawn = drawn + settings.noise_offset * mx.repeat(offset, PATCH, axis=1)
    counted = weights(resolved(settings.weighting, settings.timesteps), timesteps)
    return Batch(latents.astype(mx.float32), drawn, text, mx.array(timesteps), mx.array(counted))


def loss(transformer: Transformer, batch: Batch, kind: Loss | None = None) -> mx.array:
    """Return the mean over the batch of weight * error, a float32 scalar.

    A picture's error is the mean over its cells, by their weights, of the mean over channels of the pointwise loss of
    prediction - target; `kind` absent is the square.
    """
    return _mean_error(batch, predict(transformer, batch), kind)


def silent_loss(batches: Sequence[Batch], kind: Loss | None = None) -> mx.array:
    """Return the loss of a window's batches for a model that answers zero everywhere, a float32 scalar.

    With whitened latents and no weights it is about E|noise - latents|^2 = 2, whatever the noise levels.
    """
    counts = [batch.latents.shape[0] for batch in batches]
    errors = [_mean_error(batch, mx.zeros((1, 1, 1)), kind) for batch in batches]
    return mx.array(sum(count * error for count, error in zip(counts, errors, strict=True)) / sum(counts))


def _mean_error(batch: Batch, prediction: mx.array, kind: Loss | None) -> mx.array:
    target = velocity(batch.latents, batch.noise) if batch.target is None else batch.target
    errors = pointwise(kind or Mse(), prediction - pack(target))
    if batch.cells is None:
        return (batch.weights * errors.mean(axis=(1, 2))).mean()
    cells = pack(batch.cells)[..., 0]
    total = (cells * errors.mean(axis=2)).sum(axis=1)
    return (batch.weights * total / mx.maximum(cells.sum(axis=1), LEAST_CELLS)).mean()


def predict(transformer: Transformer, batch: Batch) -> mx.array:
    """Return the velocity [B, S, C] float32 that the model answers."""
    count, _, height, width = batch.latents.shape
    noisy = pack(interpolate(batch.latents, batch.noise, batch.timesteps))
    guidance = mx.full((count,), TRAINING_GUIDANCE)
    tables = rope(transformer.config, batch.text.shape[1], height, width)
    return transformer(noisy, batch.text, batch.timesteps, guidance, tables).astype(mx.float32)


def pointwise(kind: Loss, error: mx.array) -> mx.array:
    """Return the loss of each element of `error`.

    Huber is error^2 up to delta and the tangent 2 delta |error| - delta^2 beyond: twice torch's, so that delta sets
    only where it leaves the square.
    """
    match kind:
        case Mse():
            return mx.square(error)
        case Huber(delta=delta):
            inside = mx.minimum(mx.abs(error), delta)
            return mx.square(inside) + 2 * delta * (mx.abs(error) - inside)
        case _:
            assert_never(kind)


def base_prediction(transformer: Transformer, batch: Batch) -> mx.array:
    """Return what the model without adapters answers, [B, C, h, w] float32: a constant to every gradient."""
    with applied(transformer, {}):
        predicted = mx.stop_gradient(predict(transformer, batch))
    return unpack(predicted, *batch.latents.shape[2:])


def masked(transformer: Transformer, batch: Batch, mask: mx.array, settings: Mask) -> Batch:
    """Return the batch with cells weighted by mask [B, 1, h, w] in 0..1 and by `outside` where it is 0.

    With `keep_base` the target outside is what the base model answers. Between, the two squared errors of a cell are
    one to the mean of both targets, up to a constant.
    """
    outside = settings.outside * (1 - mask)
    cells = mask + outside
    if not settings.keep_base:
        return batch._replace(cells=cells)
    mixed = mask * velocity(batch.latents, batch.noise) + outside * base_prediction(transformer, batch)
    return batch._replace(cells=cells, target=mixed / cells)


def with_prior(batch: Batch, prior: Sequence[bool], weight: float) -> Batch:
    """Return the batch with the pictures of the class, flagged in `prior` [B], counting `weight` times."""
    return batch._replace(weights=batch.weights * mx.array([weight if flag else 1.0 for flag in prior]))


def preserving(transformer: Transformer, batch: Batch, class_text: mx.array, weight: float) -> Batch:
    """Return the batch that asks the same pictures under captions of their class to be as without adapters.

    class_text [B, L, J] embeds each caption with the class word in the trigger's place. The base model answers once,
    here; as long as the adapters change nothing the loss and its gradient are zero.
    """
    plain = mx.full(batch.weights.shape, weight)
    asked = batch._replace(text=class_text, weights=plain, cells=None, target=None)
    return asked._replace(target=base_prediction(transformer, asked))


def joined(batches: Sequence[Batch], extra: Sequence[Batch]) -> list[Batch]:
    """Return one window whose loss is that of `batches` plus that of `extra`.

    A trainer takes the mean over all samples of a window; the weights undo what the other part adds to their number.
    """
    counts = [sum(batch.latents.shape[0] for batch in part) for part in (batches, extra)]
    return [
        batch._replace(weights=batch.weights * (sum(counts) / count))
        for part, count in zip((batches, extra), counts, strict=True)
        for batch in part
    ]
