"""kohya's layout, as musubi-tuner writes it: BFL names with underscores under `lora_unet_`, down, up and alpha."""

from __future__ import annotations

from stages.flux2.variants import TransformerConfig
from stages.lora.formats.places import Place, Spellings
from stages.lora.targets import linear_shapes


def spellings(config: TransformerConfig) -> Spellings:
    """Return the names this layout gives the linears of the blocks."""
    return {f"lora_unet_{name.replace('.', '_')}": Place(name) for name in linear_shapes(config)}
