"""Drawing a latent: Euler steps along the velocity, from noise to picture.

Letters: C channels, h x w latent grid, L text tokens, J features of a text embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from stages.flux2.flow import pack, sigmas, unpack
from stages.flux2.positions import rope
from stages.flux2.transformer import Transformer

Velocity = Callable[[mx.array, mx.array], mx.array]


@dataclass(frozen=True)
class Sampling:
    """How a latent is drawn; `distilled` variants ignore guidance, `dev` embeds it, others pay a second pass."""

    steps: int
    guidance: float
    distilled: bool


def initial_noise(seed: int, channels: int, height: int, width: int) -> mx.array:
    """Return the standard normal noise [1, C, h, w] float32 of a seed; a pure function of its arguments."""
    return mx.random.normal((1, channels, height, width), key=mx.random.key(seed))


def uses_empty_prompt(transformer: Transformer, sampling: Sampling) -> bool:
    """Whether drawing needs the empty prompt: true guidance in two passes."""
    return sampling.guidance > 1 and not sampling.distilled and not transformer.config.guidance_embeds


def sample(
    transformer: Transformer,
    noise: mx.array,
    txt: mx.array,
    empty_txt: mx.array | None,
    sampling: Sampling,
    on_step: Callable[[int], None] | None = None,
) -> mx.array:
    """Return the latent [1, C, h, w] float32 drawn from noise [1, C, h, w] for txt [1, L, J].

    empty_txt [1, L, J] is the empty prompt's embedding, needed where `uses_empty_prompt`. `on_step` hears the
    number of finished steps. Euler in float32.
    """
    _, _, height, width = noise.shape
    levels = sigmas(height * width, sampling.steps)
    velocity = _velocity(transformer, (txt, empty_txt), sampling, (height, width))
    x = pack(noise.astype(mx.float32))
    for step in range(sampling.steps):
        x = x + (levels[step + 1] - levels[step]) * velocity(x, mx.array([levels[step]]))
        mx.eval(x)  # one step's graph at a time: bounds memory, and progress is true
        if on_step is not None:
            on_step(step + 1)
    return unpack(x, height, width)


def _velocity(
    transformer: Transformer,
    prompts: tuple[mx.array, mx.array | None],
    sampling: Sampling,
    grid: tuple[int, int],
) -> Velocity:
    """Return velocity(x [1, S, C] float32, t [1]) -> [1, S, C] float32, guided as the variant asks."""
    txt, empty_txt = prompts
    guidance = mx.array([sampling.guidance])

    def conditional(x: mx.array, t: mx.array, prompt: mx.array) -> mx.array:
        tables = rope(transformer.config, prompt.shape[1], *grid)
        return transformer(x, prompt, t, guidance, tables).astype(mx.float32)

    if not uses_empty_prompt(transformer, sampling):
        return lambda x, t: conditional(x, t, txt)
    if empty_txt is None:
        raise ValueError("guidance above 1 needs the empty prompt's embedding")

    def guided(x: mx.array, t: mx.array) -> mx.array:
        plain = conditional(x, t, empty_txt)
        return plain + sampling.guidance * (conditional(x, t, txt) - plain)

    return guided
