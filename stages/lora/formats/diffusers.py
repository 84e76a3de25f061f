"""diffusers' layout: its own module names under `transformer.`, q, k and v apart."""

from __future__ import annotations

from stages.flux2.names import diffusers_modules
from stages.flux2.variants import TransformerConfig
from stages.lora.formats.places import Place, Spellings
from stages.lora.targets import linear_shapes

# peft's own prefix, and what some trainers write before diffusers' names.
READ_PREFIXES = ("transformer.", "base_model.model.", "diffusion_model.")


def spellings(config: TransformerConfig) -> Spellings:
    """Return the names this layout gives the linears."""
    return {f"{prefix}{name}": place for prefix in READ_PREFIXES for name, place in names(config).items()}


def names(config: TransformerConfig) -> Spellings:
    """Return diffusers' own names of the linears, without a prefix."""
    places: Spellings = {}
    for module in linear_shapes(config):
        sources = diffusers_modules(module)
        for position, source in enumerate(sources):
            places[source] = Place(module, position if len(sources) > 1 else None)
    return places
