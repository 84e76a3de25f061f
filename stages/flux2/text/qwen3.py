"""The Qwen3 language model as far as FLUX.2 klein needs it: three hidden states of its first 27 layers.

B batch, L sequence length, D hidden size.
"""

from __future__ import annotations

import mlx.core as mx
from mlx import nn

from stages.flux2.text.decoder import DecoderStack
from stages.flux2.variants import TextEncoderConfig


class Qwen3(nn.Module):
    """Token ids to text embeddings. Activations are `compute_dtype`, whatever the weights are stored in."""

    def __init__(self, config: TextEncoderConfig, compute_dtype: mx.Dtype = mx.float32) -> None:
        super().__init__()
        self.model = DecoderStack(config)
        self._hidden_states = config.layers
        self._compute_dtype = compute_dtype

    def __call__(self, ids: mx.array, counts: mx.array) -> mx.array:
        """Return the embeddings [B, L, 3D] of ids [B, L] int32, of which the first counts [B] int32 are a prompt's.

        Pads are on the right; a query attends to the prompt's tokens up to its own position, so a pad's embedding
        depends on the prompt.
        """
        positions = mx.arange(ids.shape[1])
        causal = positions[None, :] <= positions[:, None]
        mask = causal[None, None] & (positions < counts[:, None])[:, None, None, :]
        embedded = self.model.embed_tokens(ids).astype(self._compute_dtype)
        return self.model.states(embedded, self._hidden_states, lambda layer, x: layer(x, mask))
