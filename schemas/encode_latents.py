"""`[encode_latents]`: how latents are computed and stored."""

from __future__ import annotations

from typing import Literal

from schemas.base import Strict


class EncodeLatents(Strict, frozen=True):
    """`dtype` is the stored type (the autoencoder computes in float32); `flip` adds a mirrored twin of each item."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    flip: bool = False
