"""The two kinds of block of the FLUX.2 transformer, named as in black-forest-labs/flux2 `src/flux2/model.py`.

No linear has a bias; shifts, scales and gates come from outside, one set for all blocks of a kind.
Letters: B batch, S image tokens, L text tokens, T = L + S (text first), D width, H heads, d features of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from stages.flux2.positions import Rope, rotate
from stages.flux2.variants import TransformerConfig

Layer = Callable[[mx.array], mx.array]


class Modulation(NamedTuple):
    """What one vector of the step does to one branch of a block: each [B, 1, D]."""

    shift: mx.array
    scale: mx.array
    gate: mx.array


class HeadNorm(nn.Module):
    """Root-mean-square norm over the features of a head, with a learned scale [d]."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.scale = mx.ones((config.attention_head_dim,))
        self.eps = config.eps

    def __call__(self, x: mx.array) -> mx.array:
        """Norm the last axis of x [..., d]."""
        return mx.fast.rms_norm(x, self.scale, self.eps)


class QueryKeyNorm(nn.Module):
    """The norms of queries and keys."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.count = config.num_attention_heads
        self.query_norm = HeadNorm(config)
        self.key_norm = HeadNorm(config)

    def heads(self, qkv: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Split qkv [B, N, 3D] into q, k, v [B, N, H, d], q and k normed."""
        q, k, v = mx.split(qkv.reshape(*qkv.shape[:2], 3 * self.count, -1), 3, axis=2)
        return self.query_norm(q), self.key_norm(k), v


class StreamAttention(nn.Module):
    """One stream's side of the joint attention."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.qkv = nn.Linear(config.inner_dim, 3 * config.inner_dim, bias=False)
        self.norm = QueryKeyNorm(config)
        self.proj = nn.Linear(config.inner_dim, config.inner_dim, bias=False)

    def heads(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Map x [B, N, D] to this stream's q, k, v [B, N, H, d]."""
        return self.norm.heads(self.qkv(x))


class SwiGLU(nn.Module):
    """silu(first half) * second half."""

    def __call__(self, x: mx.array) -> mx.array:
        """Map x [..., 2n] to [..., n]."""
        gate, value = mx.split(x, 2, axis=-1)
        return nn.silu(gate) * value


def gated_mlp(config: TransformerConfig) -> list[Layer]:
    """Return the layers of a double block's MLP; a plain list gives the names `img_mlp.0` and `img_mlp.2`."""
    return [
        nn.Linear(config.inner_dim, 2 * config.mlp_dim, bias=False),
        SwiGLU(),
        nn.Linear(config.mlp_dim, config.inner_dim, bias=False),
    ]


class DoubleBlock(nn.Module):
    """Image and text streams with their own weights, joined in one attention."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.img_attn = StreamAttention(config)
        self.img_mlp = gated_mlp(config)
        self.txt_attn = StreamAttention(config)
        self.txt_mlp = gated_mlp(config)

    def __call__(
        self,
        img: mx.array,
        txt: mx.array,
        img_modulation: tuple[Modulation, Modulation],
        txt_modulation: tuple[Modulation, Modulation],
        rope: Rope,
    ) -> tuple[mx.array, mx.array]:
        """Map img [B, S, D] and txt [B, L, D] to the same shapes."""
        eps = self.config.eps
        (img_first, img_second), (txt_first, txt_second) = img_modulation, txt_modulation
        img_qkv = self.img_attn.heads(modulate(img, img_first.shift, img_first.scale, eps))
        txt_qkv = self.txt_attn.heads(modulate(txt, txt_first.shift, txt_first.scale, eps))
        q, k, v = (mx.concatenate(list(pair), axis=1) for pair in zip(txt_qkv, img_qkv, strict=True))
        attended = attention(q, k, v, rope)
        length = txt.shape[1]
        img = img + img_first.gate * self.img_attn.proj(attended[:, length:])
        txt = txt + txt_first.gate * self.txt_attn.proj(attended[:, :length])
        img = img + img_second.gate * run(self.img_mlp, modulate(img, img_second.shift, img_second.scale, eps))
        txt = txt + txt_second.gate * run(self.txt_mlp, modulate(txt, txt_second.shift, txt_second.scale, eps))
        return img, txt


class SingleBlock(nn.Module):
    """Attention and MLP side by side on the joint stream."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.linear1 = nn.Linear(config.inner_dim, 3 * config.inner_dim + 2 * config.mlp_dim, bias=False)
        self.linear2 = nn.Linear(config.inner_dim + config.mlp_dim, config.inner_dim, bias=False)
        self.norm = QueryKeyNorm(config)
        self.activation = SwiGLU()

    def __call__(self, stream: mx.array, modulation: Modulation, rope: Rope) -> mx.array:
        """Map stream [B, T, D] to the same shape."""
        joint = self.linear1(modulate(stream, modulation.shift, modulation.scale, self.config.eps))
        qkv, mlp = mx.split(joint, [3 * self.config.inner_dim], axis=-1)
        attended = attention(*self.norm.heads(qkv), rope)
        out = self.linear2(mx.concatenate([attended, self.activation(mlp)], axis=-1))
        return stream + modulation.gate * out


def modulate(x: mx.array, shift: mx.array, scale: mx.array, eps: float) -> mx.array:
    """Return (1 + scale) * LayerNorm(x) + shift; the norm has no weights of its own."""
    return (1 + scale) * mx.fast.layer_norm(x, None, None, eps) + shift


def attention(q: mx.array, k: mx.array, v: mx.array, rope: Rope) -> mx.array:
    """Attend without a mask over all tokens: q, k, v [B, T, H, d] -> [B, T, D]."""
    q, k = rotate(q, *rope), rotate(k, *rope)
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)
    return out.transpose(0, 2, 1, 3).flatten(2)


def run(layers: list[Layer], x: mx.array) -> mx.array:
    """Apply layers one after the other."""
    for layer in layers:
        x = layer(x)
    return x
