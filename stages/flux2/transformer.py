"""The FLUX.2 transformer: noisy image tokens and text embeddings to a velocity (noise - latent).

Parameter names are those of black-forest-labs/flux2 `src/flux2/model.py` (v. Dec 2025), so that
`tree_flatten(transformer.parameters())` is the table of a BFL file. Letters as in `blocks.py`; C latent channels,
J features of a text embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.nn.utils import checkpoint

from stages.flux2.blocks import DoubleBlock, Modulation, SingleBlock, modulate
from stages.flux2.positions import Rope
from stages.flux2.variants import TransformerConfig

MAX_PERIOD = 10_000.0
TIME_SCALE = 1000.0  # of timesteps in 0..1 and of guidance alike


class VectorEmbedder(nn.Module):
    """Two linears that make a vector of the step from a scalar's embedding."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.in_layer = nn.Linear(config.timestep_guidance_channels, config.inner_dim, bias=False)
        self.out_layer = nn.Linear(config.inner_dim, config.inner_dim, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """Map an embedded scalar [B, channels] to [B, D]."""
        return self.out_layer(nn.silu(self.in_layer(x)))


class SharedModulation(nn.Module):
    """Shift, scale and gate of `count` branches, shared by all blocks of a kind."""

    def __init__(self, config: TransformerConfig, count: int) -> None:
        super().__init__()
        self.count = count
        self.lin = nn.Linear(config.inner_dim, 3 * count * config.inner_dim, bias=False)

    def __call__(self, vec: mx.array) -> list[Modulation]:
        """Map vec [B, D] to `count` modulations."""
        parts = mx.split(self.lin(nn.silu(vec))[:, None], 3 * self.count, axis=-1)
        return [Modulation(*parts[3 * branch : 3 * branch + 3]) for branch in range(self.count)]


class FinalLayer(nn.Module):
    """Modulated norm and projection to velocities."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.linear = nn.Linear(config.inner_dim, config.in_channels, bias=False)
        self.adaLN_modulation = [nn.SiLU(), nn.Linear(config.inner_dim, 2 * config.inner_dim, bias=False)]

    def __call__(self, x: mx.array, vec: mx.array) -> mx.array:
        """Map x [B, S, D] to [B, S, C]; BFL's rows are shift first, then scale."""
        silu, lin = self.adaLN_modulation
        shift, scale = mx.split(lin(silu(vec))[:, None], 2, axis=-1)
        return self.linear(modulate(x, shift, scale, self.eps))


class Transformer(nn.Module):
    """Double blocks, then single blocks; `checkpoint` trades time for memory in training.

    With `checkpoint` each block's activations are recomputed in the backward pass; gradients are the same.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint = False
        self.img_in = nn.Linear(config.in_channels, config.inner_dim, bias=False)
        self.txt_in = nn.Linear(config.joint_attention_dim, config.inner_dim, bias=False)
        self.time_in = VectorEmbedder(config)
        if config.guidance_embeds:
            self.guidance_in = VectorEmbedder(config)
        self.double_stream_modulation_img = SharedModulation(config, 2)
        self.double_stream_modulation_txt = SharedModulation(config, 2)
        self.single_stream_modulation = SharedModulation(config, 1)
        self.double_blocks = [DoubleBlock(config) for _ in range(config.num_layers)]
        self.single_blocks = [SingleBlock(config) for _ in range(config.num_single_layers)]
        self.final_layer = FinalLayer(config)

    @property
    def dtype(self) -> mx.Dtype:
        """The type the streams are computed in: that of the time embedder's weights, which nothing adapts."""
        return self.time_in.in_layer.weight.dtype

    def __call__(
        self, img: mx.array, txt: mx.array, timesteps: mx.array, guidance: mx.array | None, rope: Rope
    ) -> mx.array:
        """Return the velocity [B, S, C] of img [B, S, C] given txt [B, L, J].

        timesteps [B] float32 in 0..1, 1 is pure noise; guidance [B] float32 (4.0, say) only where the variant
        embeds it; rope as `positions.rope` returns it for L and the grid of S.
        """
        vec = self._step_vector(timesteps, guidance)
        img_modulation = tuple(self.double_stream_modulation_img(vec))
        txt_modulation = tuple(self.double_stream_modulation_txt(vec))
        (joint_modulation,) = self.single_stream_modulation(vec)
        img, txt = self.img_in(img.astype(self.dtype)), self.txt_in(txt.astype(self.dtype))
        for block in self.double_blocks:
            img, txt = self._runner(block)(img, txt, img_modulation, txt_modulation, rope)
        stream = mx.concatenate([txt, img], axis=1)
        for block in self.single_blocks:
            stream = self._runner(block)(stream, joint_modulation, rope)
        return self.final_layer(stream[:, txt.shape[1] :], vec)

    def _runner(self, block: nn.Module) -> Callable:
        # The block's trainable factors are explicit inputs there, else a checkpoint would cut their gradient.
        return checkpoint(block) if self.checkpoint else block

    def _step_vector(self, timesteps: mx.array, guidance: mx.array | None) -> mx.array:
        vec = self.time_in(self._embed(timesteps))
        if not self.config.guidance_embeds:
            return vec
        if guidance is None:
            raise ValueError("this variant embeds guidance: pass guidance [B]")
        return vec + self.guidance_in(self._embed(guidance))

    def _embed(self, values: mx.array) -> mx.array:
        """Embed values [B] as [B, channels]: cosines first, then sines, computed in float32."""
        frequencies = mx.array(_frequencies(self.config.timestep_guidance_channels // 2))
        angles = TIME_SCALE * values.astype(mx.float32)[:, None] * frequencies
        return mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=-1).astype(self.dtype)


@lru_cache(maxsize=4)
def _frequencies(count: int) -> np.ndarray:
    # Rounded as torch rounds them: guidance 4.0 makes angles of 4000, where one more ulp here shows in the velocity
    # (1e-5 of its maximum with numpy's float32 exp, 3e-6 so).
    exponents = -math.log(MAX_PERIOD) * np.arange(count, dtype=np.float32) / count
    return np.exp(exponents.astype(np.float64)).astype(np.float32)
