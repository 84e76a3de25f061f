"""Recipes small enough for a test: real modules of a few thousand weights on pictures of 32 px."""

from __future__ import annotations

from typing import Any

from schemas.pretrain import Autoencoder, Evaluation, Pool, Recipe, Transformer
from stages.flux2.variants import TransformerConfig

POOLS = (
    Pool(height=32, width=32, count=24, batch_size=4, share=0.75),
    Pool(height=32, width=48, count=8, batch_size=2, share=0.25),
)
DIMENSIONS = TransformerConfig(1, 1, 1, 12, attention_head_dim=16, in_channels=8, axes_dims_rope=(4, 4, 4, 4))


def recipe(**changes: Any) -> Recipe:
    """Return a tiny recipe; `changes` are of the autoencoder's settings, or of the recipe's own by name."""
    own = {name: changes.pop(name) for name in ("seed", "dtype", "compile") if name in changes}
    return Recipe(
        autoencoder=Autoencoder(
            **{"steps": 4, "pools": POOLS, "latent_channels": 2, "widths": (8, 8, 8, 8), "warmup_steps": 0, **changes}
        ),
        transformer=Transformer(steps=4, pools=POOLS[:1]),
        evaluation=Evaluation(prompts=2, steps=(2,), pictures=2, of_each_new_shape=1),
        **{"dtype": "float32", **own},
    )
