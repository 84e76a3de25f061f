"""The decoder layers that Qwen3 and Mistral share, as far as FLUX.2 needs them.

Mirrors `modeling_qwen3.py` and `modeling_mistral.py` of transformers and their parameter names; the layers past the
last hidden state, the final norm and the head are left out. B batch, L sequence length, D hidden size, H heads, K key
and value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal, Protocol

import mlx.core as mx
from mlx import nn

from stages.flux2.variants import TextEncoderConfig

# Where a query sees a key: bool [B, 1, L, L], or every key up to its own position.
Mask = mx.array | Literal["causal"]


class TextEncoder(Protocol):
    """What turns a prompt's tokens into the embedding that conditions the transformer, whatever model does it."""

    def __call__(self, ids: mx.array, counts: mx.array) -> mx.array:
        """Return the embeddings [B, L, 3D] of ids [B, L] int32, of which counts [B] int32 are a prompt's.

        The others are pads, on the side where the template of the model puts them; they have embeddings too. The
        states after the configured layers side by side, lowest first, never normalised.
        """
        ...


class DecoderStack(nn.Module):
    """The embeddings and the first layers, no more than the highest hidden state asked for."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config) for _ in range(max(config.layers))]

    def states(
        self, x: mx.array, kept: Collection[int], step: Callable[[DecoderLayer, mx.array], mx.array]
    ) -> mx.array:
        """Take x [B, L, D] through each layer by `step`; return the states [B, L, 3D] after those `kept` (from 1)."""
        states: list[mx.array] = []
        for index, layer in enumerate(self.layers, start=1):
            x = step(layer, x)
            if index in kept:
                states.append(x)
        return mx.concatenate(states, axis=-1)


class DecoderLayer(nn.Module):
    """Attention and a gated MLP, each on the normalised stream and added to it."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array, mask: Mask) -> mx.array:
        """Keep the shape [B, L, D]."""
        return self.unseeing(x + self.self_attn(self.input_layernorm(x), mask))

    def unseeing(self, x: mx.array) -> mx.array:
        """Keep the shape [B, L, D] of tokens that see no key, not even themselves: attention adds nothing to them."""
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    """Grouped-query attention with half-split rotary positions 0..L-1; Qwen3 normalises queries and keys."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        size, hidden = config.head_dim, config.hidden_size
        self._head_dim = size
        self._rope_theta = config.rope_theta
        self._normalises = config.normalises_queries
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * size, bias=False)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * size, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * size, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * size, hidden, bias=False)
        if self._normalises:
            self.q_norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(size, eps=config.rms_norm_eps)

    def __call__(self, x: mx.array, mask: Mask) -> mx.array:
        """Keep the shape [B, L, D]."""
        q, k, v = (self._heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self._normalises:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self._rotate(q), self._rotate(k)
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=self._head_dim**-0.5, mask=mask)
        return self.o_proj(y.swapaxes(1, 2).flatten(2))

    def _heads(self, x: mx.array) -> mx.array:
        return x.reshape(*x.shape[:2], -1, self._head_dim).swapaxes(1, 2)

    def _rotate(self, x: mx.array) -> mx.array:
        return mx.fast.rope(x, self._head_dim, traditional=False, base=self._rope_theta, scale=1.0, offset=0)


class MLP(nn.Module):
    """silu(gate) * up, projected down."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """Keep the shape [B, L, D]."""
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))
