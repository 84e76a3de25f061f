"""The Qwen3 language model as far as FLUX.2 klein needs it: three hidden states of its first layers.

Mirrors `modeling_qwen3.py` of transformers and its parameter names; the layers past the last hidden state, the final
norm and the head are left out. B batch, L sequence length, D hidden size, H heads, K key and value heads, d head
size.
"""

from __future__ import annotations

import mlx.core as mx
from mlx import nn

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

        The states after the configured layers side by side, lowest first, never normalised. Pads are on the right;
        a query attends to the prompt's tokens up to its own position, so a pad's embedding depends on the prompt.
        """
        x = self.model.embed_tokens(ids).astype(self._compute_dtype)
        positions = mx.arange(ids.shape[1])
        causal = positions[None, :] <= positions[:, None]
        mask = causal[None, None] & (positions < counts[:, None])[:, None, None, :]
        states: list[mx.array] = []
        for index, layer in enumerate(self.model.layers, start=1):
            x = layer(x, mask)
            if index in self._hidden_states:
                states.append(x)
        return mx.concatenate(states, axis=-1)


class DecoderStack(nn.Module):
    """The embeddings and the first layers, no more than the highest hidden state asked for."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config) for _ in range(max(config.layers))]


class DecoderLayer(nn.Module):
    """Attention and a gated MLP, each on the normalised stream and added to it."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        """Keep the shape [B, L, D]; mask [B, 1, L, L] bool is True where a query sees a key."""
        x = x + self.self_attn(self.input_layernorm(x), mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys and half-split rotary positions 0..L-1."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        size, hidden = config.head_dim, config.hidden_size
        self._head_dim = size
        self._rope_theta = config.rope_theta
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * size, bias=False)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * size, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * size, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * size, hidden, bias=False)
        self.q_norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(size, eps=config.rms_norm_eps)

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        """Keep the shape [B, L, D]."""
        q = self._rotate(self.q_norm(self._heads(self.q_proj(x))))
        k = self._rotate(self.k_norm(self._heads(self.k_proj(x))))
        v = self._heads(self.v_proj(x))
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
