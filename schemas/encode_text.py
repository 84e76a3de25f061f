"""`[encode_text]`: how text embeddings are computed and stored."""

from __future__ import annotations

from typing import Literal

from schemas.base import Strict
from schemas.quantize import Quantize


class EncodeText(Strict, frozen=True):
    """`dtype` is the stored type of the embeddings, `quantize` how the text encoder's layers are held."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    quantize: Quantize = "none"
