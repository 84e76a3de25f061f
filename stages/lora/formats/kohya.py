"""Names with underscores: kohya's and musubi-tuner's BFL names, and LyCORIS' diffusers names."""

from __future__ import annotations

from stages.flux2.variants import TransformerConfig
from stages.lora.formats import diffusers
from stages.lora.formats.places import Place, Spellings
from stages.lora.targets import linear_shapes


def spellings(config: TransformerConfig) -> Spellings:
    """Return the names these layouts give the linears."""
    kohya = {f"lora_unet_{name.replace('.', '_')}": Place(name) for name in linear_shapes(config)}
    lycoris = {f"lycoris_{name.replace('.', '_')}": place for name, place in diffusers.names(config).items()}
    return kohya | lycoris
