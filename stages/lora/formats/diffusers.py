"""diffusers' layout: its own module names under `transformer.`, q, k and v apart."""

from __future__ import annotations

import mlx.core as mx

from schemas.errors import BadConfig
from stages.flux2.names import diffusers_modules
from stages.flux2.variants import TransformerConfig
from stages.lora.formats.places import Place, Spellings
from stages.lora.layer import Factors
from stages.lora.targets import linear_shapes

PREFIX = "transformer."
# peft's own prefix, and what some trainers write before diffusers' names.
READ_PREFIXES = (PREFIX, "base_model.model.", "diffusion_model.")


def spellings(config: TransformerConfig) -> Spellings:
    """Return the names this layout gives the linears."""
    return {f"{prefix}{name}": place for prefix in READ_PREFIXES for name, place in names(config).items()}


def to_tensors(factors: Factors, config: TransformerConfig, *, dtype: mx.Dtype) -> dict[str, mx.array]:
    """Return the file's tensors; q, k and v share A's values and take a third of B's rows each: the same function.

    Raises `BadConfig` for DoRA and LoKr, which have no place in this layout.
    """
    if other := [name for name in factors if not name.endswith((".lora_A", ".lora_B"))]:
        raise BadConfig(
            "lora.layout_plain_only",
            "the diffusers layout holds plain LoRAs only",
            why=f"{len(other)} factors are of another kind, first {other[0]}",
            fix="use the file as it is: ComfyUI reads it, and diffusers too if it is a LoKr",
        )
    tensors: dict[str, mx.array] = {}
    for name, (module, third) in names(config).items():
        if f"{module}.lora_A" in factors:
            up = factors[f"{module}.lora_B"]
            rows = up if third is None else mx.split(up, 3, axis=0)[third]
            tensors[f"{PREFIX}{name}.lora_A.weight"] = factors[f"{module}.lora_A"].astype(dtype)
            tensors[f"{PREFIX}{name}.lora_B.weight"] = rows.astype(dtype)
    return tensors


def names(config: TransformerConfig) -> Spellings:
    """Return diffusers' own names of the linears, without a prefix."""
    places: Spellings = {}
    for module in linear_shapes(config):
        sources = diffusers_modules(module)
        for position, source in enumerate(sources):
            places[source] = Place(module, position if len(sources) > 1 else None)
    return places
