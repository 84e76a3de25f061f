"""The scale that a file's metadata asks for: peft's configuration, as diffusers applies it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from schemas.errors import Damaged

ADAPTER_METADATA = "lora_adapter_metadata"


def adapter_scale(metadata: Mapping[str, str], where: str, fix: str) -> float:
    """Return alpha / rank, alpha / sqrt(rank) for rsLoRA, of peft's configuration; 1 where the file carries none.

    Raises `Damaged` when it is unreadable or gives modules scales of their own.
    """
    if ADAPTER_METADATA not in metadata:
        return 1.0
    try:
        fields = json.loads(metadata[ADAPTER_METADATA])
        rank = fields["transformer.r"]
        scale = fields["transformer.lora_alpha"] / (math.sqrt(rank) if fields.get("transformer.use_rslora") else rank)
        plain = not (fields.get("transformer.alpha_pattern") or fields.get("transformer.rank_pattern"))
        if not math.isfinite(scale):
            raise ValueError(f"a scale of {scale}")
    except (ValueError, KeyError, TypeError, ArithmeticError, AttributeError, RecursionError) as error:
        raise Damaged(
            "lora.metadata", f"{ADAPTER_METADATA} is unreadable", where=where, why=repr(error), fix=fix
        ) from error
    if not plain:
        raise Damaged("lora.metadata", "a scale of its own per module is not supported", where=where, fix=fix)
    return scale
