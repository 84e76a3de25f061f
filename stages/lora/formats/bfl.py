"""The file this project writes: BFL names under `diffusion_model.`, no alpha, the scale folded into B.

It is the one layout that ComfyUI, diffusers, ai-toolkit, mflux and the Swift app all load as it is.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from schemas.errors import BadConfig
from stages.flux2.variants import TransformerConfig
from stages.lora.formats.places import Place, Spellings
from stages.lora.layer import Factors
from stages.lora.targets import linear_shapes

PREFIX = "diffusion_model."
PLAIN, WEIGHT, DORA_SCALE = (".lora_A", ".lora_B"), ".weight", ".dora_scale"
# base_model.model. is peft's own.
READ_PREFIXES = (PREFIX, "base_model.model.")
MAX_METADATA_BYTES = 64 * 1024


def spellings(config: TransformerConfig) -> Spellings:
    """Return the names this layout gives the linears."""
    return {f"{prefix}{name}": Place(name) for prefix in READ_PREFIXES for name in linear_shapes(config)}


def to_tensors(factors: Factors, *, dtype: mx.Dtype) -> dict[str, mx.array]:
    """Return the file's tensors of portable factors, rounded once to dtype.

    `dora_scale` becomes [out, 1] float32, whatever dtype is: it multiplies the base's rows, and rounded to bfloat16
    it would change them by more than most LoRAs do.
    """
    tensors: dict[str, mx.array] = {}
    for name, factor in factors.items():
        if name.endswith(DORA_SCALE):
            tensors[f"{PREFIX}{name}"] = factor[:, None].astype(mx.float32)
        else:
            tensors[f"{PREFIX}{name}{WEIGHT if name.endswith(PLAIN) else ''}"] = factor.astype(dtype)
    return tensors


def metadata(rank: int, provenance: Mapping[str, str]) -> dict[str, str]:
    """Return the file's metadata; alpha equals rank because the scale is already in B.

    `lora_adapter_metadata` is left out on purpose: diffusers would apply its alpha a second time.
    Raises `BadConfig` above 64 KiB, where some readers stop.
    """
    fields = {**provenance, "format": "pt", "lora_rank": str(rank), "lora_alpha": str(rank)}
    size = sum(len(part.encode()) for item in fields.items() for part in item)
    if size > MAX_METADATA_BYTES:
        raise BadConfig(
            "lora.metadata_too_long",
            "the LoRA file's metadata is too long",
            why=f"expected at most {MAX_METADATA_BYTES} bytes, found {size}",
            fix="shorten the settings, prompts first",
        )
    return fields
