"""How much a LoRA does: what it changes of the velocity that the model predicts for one fixed input."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from stages.flux2.positions import rope
from stages.flux2.transformer import Transformer
from stages.lora.layer import Factors
from stages.lora.merge import applied

# A latent of 256 px and a short text, both noise: the same for every file, so that numbers can be compared.
SEED, GRID, TEXT_TOKENS = 7, 16, 32
NOISE_LEVEL, GUIDANCE = 0.5, 1.0


def velocity_moved(transformer: Transformer, factors: Factors) -> float:
    """Return |v' - v| / |v|, the norms over a velocity [1, S, C] without and with `factors`."""
    config = transformer.config
    keys = mx.random.split(mx.random.key(SEED))
    img = mx.random.normal((1, GRID * GRID, config.in_channels), key=keys[0])
    txt = mx.random.normal((1, TEXT_TOKENS, config.joint_attention_dim), key=keys[1])
    guidance = mx.array([GUIDANCE]) if config.guidance_embeds else None
    table = rope(config, TEXT_TOKENS, GRID, GRID)

    def velocity() -> mx.array:
        found = transformer(img, txt, mx.array([NOISE_LEVEL]), guidance, table).astype(mx.float32)
        mx.eval(found)
        return found

    without = velocity()
    with applied(transformer, factors):
        moved = velocity()
    return float(np.array(mx.linalg.norm(moved - without) / mx.linalg.norm(without)))
