"""`[validate]`: the folder of pictures and how each becomes a training item."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from schemas.base import Strict

Resolution = Annotated[int, Meta(ge=32, le=4096, multiple_of=16)]
Colour = Annotated[str, Meta(pattern=r"^#[0-9a-fA-F]{6}$")]


class Validate(Strict, frozen=True):
    """Keyed as a whole except `dataset` (a path; the contents are keyed instead)."""

    dataset: str
    trigger: Annotated[str, Meta(max_length=64)] = ""
    resolutions: Annotated[tuple[Resolution, ...], Meta(min_length=1, max_length=8)] = (512,)
    upscale: bool = False
    background: Colour = "#ffffff"
    max_megapixels: Annotated[float, Meta(gt=0, le=500)] = 64.0
    allow_empty_captions: bool = False
    skip_bad: bool = False
