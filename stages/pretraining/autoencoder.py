"""The small autoencoder from nothing: its pictures, its loss, and what is done to its weights after training.

Letters: B batch, H W picture height and width, c latent channels before patchify, C = 4c after, h w = H/16 W/16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from schemas.pretrain import Autoencoder as Spec
from schemas.pretrain import Pool, Recipe
from stages.flux2.autoencoder import Autoencoder, patchify
from stages.flux2.variants import AutoencoderConfig
from stages.pretraining.pools import Schedule
from stages.pretraining.trainer import Draw, Loss
from stages.world.outlines import BASE
from stages.world.render import from_bytes, in_chunks
from stages.world.scenes import Scenes, draw_things, joined, scenes_of, wide_scenes

GROUPS = 8
STATISTICS = 500  # tells their pictures from those of the pools
RENDER_PIXELS = 1 << 23  # at a time
ENCODE_PIXELS = 1 << 21
MOST_LOGVAR = 10.0
# Deviations that the latent channels are given in turn, and the means in deviations: powers of two keep the weights'
# bits. Without them the whitening would change little, and forgetting it would hardly show.
DEVIATIONS = (0.25, 1.0, 4.0, 2.0)
MEANS = (2.0, -1.0, 1.0, -2.0, 0.5)


def config_of(spec: Spec) -> AutoencoderConfig:
    """Return the dimensions."""
    return AutoencoderConfig(
        latent_channels=spec.latent_channels,
        block_out_channels=spec.widths,
        layers_per_block=1,
        norm_num_groups=GROUPS,
    )


def pictures_of(spec: Spec, seed: int) -> list[mx.array]:
    """Return each pool's pictures [N, H, W, 3] uint8: things of the world, then wide scenes."""
    held = []
    for index, pool in enumerate(spec.pools):
        rng = np.random.default_rng((seed, index))
        wide = round(spec.wide * pool.count)
        held.append(rendered(_mixed(rng, pool.count - wide, wide), pool))
    return held


def rendered(scenes: Scenes, pool: Pool) -> mx.array:
    """Return the pictures [N, H, W, 3] uint8 of scenes in the pool's size."""
    return in_chunks(scenes, pool.height, pool.width, max(1, RENDER_PIXELS // (pool.height * pool.width)))


def measured_pictures(recipe: Recipe, count: int) -> mx.array:
    """Return the pictures [N, H, W, 3] uint8 that the whitening is measured on: things, in the transformer's size."""
    rng = np.random.default_rng((recipe.seed, STATISTICS))
    pool = recipe.transformer.pools[0]
    return rendered(scenes_of(draw_things(rng, min(count, pool.count)), BASE, rng), pool)


def _mixed(rng: np.random.Generator, base: int, wide: int) -> Scenes:
    if not wide:
        return scenes_of(draw_things(rng, base), BASE, rng)
    if not base:
        return wide_scenes(rng, wide)
    return joined(scenes_of(draw_things(rng, base), BASE, rng), wide_scenes(rng, wide))


def loss_of(autoencoder: Autoencoder, spec: Spec, dtype: mx.Dtype) -> Loss:
    """Return loss(key, pictures [B, H, W, 3] uint8) -> float32 scalar, as `schemas.pretrain.Autoencoder` says."""

    def loss(key: mx.array, pictures: mx.array) -> mx.array:
        wanted = from_bytes(pictures)
        moments = autoencoder.encoder(wanted.astype(dtype)).astype(mx.float32)
        mean, logvar = mx.split(moments, 2, axis=-1)
        logvar = mx.clip(logvar, -30, MOST_LOGVAR)
        sampled = mean + mx.exp(logvar / 2) * mx.random.normal(mean.shape, key=key)
        error = autoencoder.decoder(sampled.astype(dtype)).astype(mx.float32) - wanted
        kl = 0.5 * (mx.square(mean) + mx.exp(logvar) - 1 - logvar).mean()
        down, across = error[:, 1:] - error[:, :-1], error[:, :, 1:] - error[:, :, :-1]
        edges = mx.abs(down).mean() + mx.abs(across).mean()
        return mx.abs(error).mean() + mx.square(error).mean() + spec.edges * edges + spec.kl * kl

    return loss


def draws(schedule: Schedule, held: Sequence[mx.array]) -> Draw:
    """Return draw(pool, step) -> the pictures of a step."""
    return lambda pool, step: (held[pool][mx.array(schedule.rows(step, pool))],)


def finish(autoencoder: Autoencoder, pictures: mx.array) -> list[float]:
    """Turn trained weights into those that are kept: spread, rounded to bfloat16, then the statistics measured.

    `pictures` [N, H, W, 3] uint8 are what the statistics are of. Returns the deviations [c] of the latent channels
    before that: those near zero carry nothing.
    """
    deviations = _moments(autoencoder, pictures)[1]
    spread(autoencoder, deviations)
    halves = {"encoder": autoencoder.encoder, "decoder": autoencoder.decoder}
    for half in halves.values():
        half.update(tree_map(lambda array: array.astype(mx.bfloat16).astype(mx.float32), half.parameters()))
    mean, deviation = _moments(autoencoder, pictures, patches=True)
    autoencoder.bn.running_mean, autoencoder.bn.running_var = mean, mx.square(deviation)
    mx.eval(autoencoder.parameters())
    return np.array(deviations).tolist()


def spread(autoencoder: Autoencoder, deviations: mx.array) -> None:
    """Give every latent channel a deviation and a mean of its own, exactly undone by the decoder's first layer.

    A channel z of deviation `deviations` [c] becomes a * z + b; the log-variances move with it.
    """
    channels = autoencoder.config.latent_channels
    wanted = np.resize(DEVIATIONS, channels)
    factor = 2.0 ** np.round(np.log2(wanted / np.maximum(np.array(deviations), 1e-6)))
    offset = np.round(np.resize(MEANS, channels) * wanted * 4) / 4
    a, b = mx.array(factor.astype(np.float32)), mx.array(offset.astype(np.float32))
    last, first = autoencoder.encoder.quant_conv, autoencoder.decoder.post_quant_conv
    rows = mx.concatenate([a, mx.ones_like(a)])
    last.weight = last.weight * rows[:, None, None, None]
    last.bias = last.bias * rows + mx.concatenate([b, 2 * mx.log(a)])
    first.weight = first.weight / a
    first.bias = first.bias - (first.weight[:, 0, 0] * b).sum(axis=1)


def encoded(autoencoder: Autoencoder, pictures: mx.array) -> mx.array:
    """Return the whitened latents [N, C, h, w] float32 of pictures [N, H, W, 3] uint8, some at a time."""
    return _in_parts(lambda part: autoencoder.encode(from_bytes(part).transpose(0, 3, 1, 2)), pictures, 1)


def decoded(autoencoder: Autoencoder, latents: mx.array) -> mx.array:
    """Return the pictures [N, H, W, 3] float32 of latents [N, C, h, w], some at a time."""
    rows = latents.transpose(0, 2, 3, 1)
    return _in_parts(lambda part: autoencoder.decode(part.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1), rows, 16)


def _moments(autoencoder: Autoencoder, pictures: mx.array, *, patches: bool = False) -> tuple[mx.array, mx.array]:
    """Return mean and deviation of each latent channel [c], or after patchify [C]."""

    def raw(part: mx.array) -> mx.array:
        latents = autoencoder.encoder(from_bytes(part))[..., : autoencoder.config.latent_channels]
        return patchify(latents).transpose(0, 2, 3, 1) if patches else latents

    latents = _in_parts(raw, pictures, 1)
    axes = (0, 1, 2)
    return latents.mean(axis=axes), mx.sqrt(latents.var(axis=axes))


def _in_parts(function: Callable[[mx.array], mx.array], arrays: mx.array, cell_px: int) -> mx.array:
    """Apply `function` to arrays [N, y, x, ...], of cells `cell_px` wide, so many pixels at a time."""
    size = max(1, ENCODE_PIXELS // (arrays.shape[1] * arrays.shape[2] * cell_px**2))
    parts = []
    for start in range(0, len(arrays), size):
        parts.append(function(arrays[start : start + size]))
        mx.eval(parts[-1])
    return mx.concatenate(parts)
