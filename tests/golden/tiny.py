"""The tiny random transformers that diffusers saved, loaded here, and the values it computed with them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import mlx.core as mx
import numpy as np

from stages.flux2 import names, weights
from stages.flux2.shapes import transformer_shapes
from stages.flux2.transformer import Transformer
from stages.flux2.variants import TransformerConfig

GOLDEN = Path(__file__).parent
WEIGHTS = Path("transformer") / "diffusion_pytorch_model.safetensors"
KLEIN = TransformerConfig(
    num_layers=2,
    num_single_layers=2,
    num_attention_heads=2,
    joint_attention_dim=24,
    attention_head_dim=16,
    in_channels=8,
    axes_dims_rope=(4, 4, 4, 4),
)
DEV = dataclasses.replace(KLEIN, guidance_embeds=True)
TEXT_LENGTH, HEIGHT, WIDTH = 7, 3, 5


def transformer(name: str, config: TransformerConfig = KLEIN, dtype: mx.Dtype = mx.float32) -> Transformer:
    """Load `tiny-<name>`, strictly."""
    layout = weights.resolve([GOLDEN / f"tiny-{name}" / WEIGHTS], transformer_shapes(config), names.TRANSFORMER)
    model = Transformer(config)
    model.load_weights(list(weights.load(layout, dtype)))
    return model


def arrays(name: str) -> dict[str, mx.array]:
    """Load `<name>.npz`."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: mx.array(file[key]) for key in file.files}


def error(found: mx.array, expected: mx.array) -> float:
    """Return max|found - expected| / max|expected|."""
    return (mx.abs(found - expected).max() / mx.abs(expected).max()).item()


def distance(found: mx.array, expected: mx.array) -> float:
    """Return ||found - expected|| / ||expected||."""
    return (mx.linalg.norm((found - expected).flatten()) / mx.linalg.norm(expected.flatten())).item()
