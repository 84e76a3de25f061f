"""The text encoder of a small model: random, and the same bytes on every machine.

Numbers come from PCG64's raw 64-bit stream, which numpy guarantees, not from its normal distribution, which it does
not; each tensor's stream is seeded by its name alone.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np

from stages.flux2.variants import TextEncoderConfig

# Four 16-bit integers add up to about a normal number (Irwin-Hall) with exactly this mean and deviation.
SUM_MEAN = 4 * 65535 / 2
SUM_DEVIATION = math.sqrt(4 * (65536**2 - 1) / 12)

Weights = dict[str, np.ndarray]
_LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")


def text_encoder_weights(config: TextEncoderConfig) -> Weights:
    """Return every tensor of the language model as float32, in Hugging Face's names; the head is the embedding."""
    hidden, inner, size = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
    embedding = "model.embed_tokens.weight"
    weights = {embedding: normal(embedding, config.vocab_size, hidden, deviation=1.0)}
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        weights |= _linears(
            {
                f"{layer}.self_attn.q_proj": (queries, hidden, 1.0),
                f"{layer}.self_attn.k_proj": (keys, hidden, 1.0),
                f"{layer}.self_attn.v_proj": (keys, hidden, 1.0),
                f"{layer}.self_attn.o_proj": (hidden, queries, 0.5),
                f"{layer}.mlp.gate_proj": (inner, hidden, 1.0),
                f"{layer}.mlp.up_proj": (inner, hidden, 1.0),
                f"{layer}.mlp.down_proj": (hidden, inner, 0.5),
            }
        )
        weights |= {f"{layer}.self_attn.{norm}.weight": np.ones(size, np.float32) for norm in ("q_norm", "k_norm")}
        weights |= {f"{layer}.{norm}.weight": np.ones(hidden, np.float32) for norm in _LAYER_NORMS}
    return weights | {"model.norm.weight": np.ones(hidden, np.float32)}


def normal(name: str, *shape: int, deviation: float) -> np.ndarray:
    """Return float32 numbers of mean 0 and the given deviation, within 3.5 deviations, for the tensor `name`."""
    stream = np.random.PCG64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little"))
    raw = stream.random_raw(math.prod(shape)).astype("<u8").view("<u2").reshape(-1, 4)
    sums = raw.sum(axis=1, dtype=np.int64)
    return ((sums - SUM_MEAN) * (deviation / SUM_DEVIATION)).astype(np.float32).reshape(shape)


def _linears(shapes: dict[str, tuple[int, int, float]]) -> Weights:
    """Return weights [outputs, inputs] that map unit variance to variance gain squared; shapes end with the gain."""
    return {
        f"{name}.weight": normal(f"{name}.weight", outputs, inputs, deviation=gain / math.sqrt(inputs))
        for name, (outputs, inputs, gain) in shapes.items()
    }
