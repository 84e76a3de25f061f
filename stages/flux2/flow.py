"""Rectified flow: x_t = (1 - t) z + t e from latent z (t = 0) to noise e (t = 1); the velocity is e - z.

Also the noise levels of inference, which depend on the number of image tokens and of steps, as
black-forest-labs/flux2 `src/flux2/sampling.py` and diffusers compute them.
Letters: B batch, C channels, h x w latent grid, S = h * w tokens.
"""

from __future__ import annotations

import math

import mlx.core as mx

# Lines fitted by BFL through mu over tokens at 10 steps and at 200 steps: (slope, intercept).
MU_10_STEPS = (8.73809524e-05, 1.89833333)
MU_200_STEPS = (0.00016927, 0.45666666)
# Above this many tokens the reference takes the second line for any number of steps: a jump, and kept.
JUMP_TOKENS = 4300


def inference_mu(tokens: int, steps: int) -> float:
    """Return the shift exponent BFL's sampler uses for `tokens` image tokens and `steps` steps."""
    at_200 = MU_200_STEPS[0] * tokens + MU_200_STEPS[1]
    if tokens > JUMP_TOKENS:
        return at_200
    at_10 = MU_10_STEPS[0] * tokens + MU_10_STEPS[1]
    slope = (at_200 - at_10) / 190
    return slope * (steps - 200) + at_200


def sigmas(tokens: int, steps: int) -> list[float]:
    """Return the steps + 1 noise levels of inference, from 1.0 down to 0.0."""
    shift = math.exp(inference_mu(tokens, steps))
    levels = [1 - step / steps for step in range(steps)]
    return [*(shift / (shift + 1 / level - 1) for level in levels), 0.0]


def training_mu(tokens: int) -> float:
    """Return the shift exponent for training: 0.5 at 256 tokens, 1.15 at 4096 (musubi's flux2_shift)."""
    return 0.5 + (tokens - 256) * 0.65 / 3840


def interpolate(latents: mx.array, noise: mx.array, timesteps: mx.array) -> mx.array:
    """Return x_t [B, ...] for latents and noise [B, ...] at timesteps [B]."""
    t = timesteps.reshape(-1, *[1] * (latents.ndim - 1))
    return (1 - t) * latents + t * noise


def velocity(latents: mx.array, noise: mx.array) -> mx.array:
    """Return the target of training, noise - latents."""
    return noise - latents


def pack(latents: mx.array) -> mx.array:
    """Turn [B, C, h, w] into tokens [B, S, C], row by row."""
    return latents.flatten(2).swapaxes(1, 2)


def unpack(tokens: mx.array, height: int, width: int) -> mx.array:
    """Turn tokens [B, S, C] back into [B, C, h, w]."""
    return tokens.swapaxes(1, 2).reshape(tokens.shape[0], -1, height, width)
