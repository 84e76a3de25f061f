"""Mistral Small 3's language model as far as FLUX.2 dev needs it: three hidden states of its first 30 layers.

Mirrors what `pipeline_flux2.py` of diffusers computes with transformers' SDPA. B batch, L sequence length, D hidden
size, n tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import mlx.core as mx
from mlx import nn

from stages.flux2.text.decoder import DecoderLayer, DecoderStack
from stages.flux2.variants import TextEncoderConfig


class Mistral3(nn.Module):
    """Token ids to text embeddings. Activations are `compute_dtype`, whatever the weights are stored in.

    Pads are on the left, so none of them sees a key: attention answers zero there, and a pad's embedding is the same
    wherever it stands and whatever the prompt is. It is computed once, for a single token, and no prompt computes
    more than its own tokens. (MLX's attention would answer a mean of the values, or NaN, for a row without a key.)
    """

    def __init__(self, config: TextEncoderConfig, compute_dtype: mx.Dtype = mx.float32) -> None:
        super().__init__()
        self.model = DecoderStack(config)
        self._hidden_states = config.layers
        self._compute_dtype = compute_dtype
        # By the id of the pad token; the underscore says that these are no weights.
        self._pads: dict[int, mx.array] = {}

    def __call__(self, ids: mx.array, counts: mx.array) -> mx.array:
        """Return the embeddings [B, L, 3D] of ids [B, L] int32, of which the last counts [B] int32 are a prompt's."""
        rows, lengths = cast(list[list[int]], ids.tolist()), cast(list[int], counts.tolist())
        return mx.stack([self._padded(row, length) for row, length in zip(rows, lengths, strict=True)])

    def _padded(self, ids: list[int], length: int) -> mx.array:
        """Return the embedding [L, 3D] of ids [L]; rotary positions are relative, so the prompt's begin at 0."""
        pads = len(ids) - length
        prompt = self._states(ids[pads:], lambda layer, x: layer(x, "causal"))
        if not pads:
            return prompt
        if ids[0] not in self._pads:
            self._pads[ids[0]] = self._states(ids[:1], DecoderLayer.unseeing)
        return mx.concatenate([mx.broadcast_to(self._pads[ids[0]], (pads, prompt.shape[1])), prompt])

    def _states(self, ids: list[int], step: Callable[[DecoderLayer, mx.array], mx.array]) -> mx.array:
        embedded = self.model.embed_tokens(mx.array([ids])).astype(self._compute_dtype)
        return self.model.states(embedded, self._hidden_states, step)[0]
