"""What is minimised: the squared error of the velocity, in float32.

Letters: B batch, C channels, h x w latent grid, L text tokens, J features of a text embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from stages.flux2.flow import interpolate, pack, velocity
from stages.flux2.positions import rope
from stages.flux2.transformer import Transformer
from stages.training.randomness import noise
from stages.training.timesteps import Timesteps, draw

TRAINING_GUIDANCE = 1.0  # what variants that embed guidance are fed in training


class Batch(NamedTuple):
    """One micro-batch: latents, noise [B, C, h, w], text [B, L, J], timesteps, weights [B]; all but text float32."""

    latents: mx.array
    noise: mx.array
    text: mx.array
    timesteps: mx.array
    weights: mx.array


def prepare(
    latents: mx.array, text: mx.array, item_ids: Sequence[str], *, spec: Timesteps, seed: int, step: int
) -> Batch:
    """Draw noise and timesteps for latents [B, C, h, w] and text [B, L, J]; every weight is 1.

    `item_ids` name the window's places, see `randomness.distinct`.
    """
    count, _, height, width = latents.shape
    timesteps = draw(spec, seed, step, item_ids, height * width)
    weights = np.ones(count, dtype=np.float32)
    drawn = noise(seed, step, item_ids, tuple(latents.shape[1:]))
    return Batch(latents.astype(mx.float32), drawn, text, mx.array(timesteps), mx.array(weights))


def loss(transformer: Transformer, batch: Batch) -> mx.array:
    """Return the mean over the batch of weight * mean((prediction - (noise - latents))^2), a float32 scalar."""
    count, _, height, width = batch.latents.shape
    noisy = pack(interpolate(batch.latents, batch.noise, batch.timesteps))
    guidance = mx.full((count,), TRAINING_GUIDANCE)
    tables = rope(transformer.config, batch.text.shape[1], height, width)
    predicted = transformer(noisy, batch.text, batch.timesteps, guidance, tables).astype(mx.float32)
    error = mx.square(predicted - pack(velocity(batch.latents, batch.noise))).mean(axis=(1, 2))
    return (batch.weights * error).mean()
