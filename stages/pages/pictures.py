"""Pictures inside a page: WebP in data URIs, so that the page needs no other file."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

# Up to this side a picture is kept to the bit: its pixels can be counted.
EXACT_PX = 128


def data_uri(picture: Picture, quality: int) -> str:
    """Return an RGB picture as a WebP in a data URI; a very small one without any loss."""
    data = io.BytesIO()
    picture.save(data, "WEBP", quality=quality, lossless=max(picture.size) <= EXACT_PX, method=4)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
