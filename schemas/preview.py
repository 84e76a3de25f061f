"""`[preview]`: the pictures drawn from a saved LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, ClassVar

from msgspec import Meta

from schemas.base import TEXT, Strict

Prompt = Annotated[str, Meta(min_length=1, max_length=65536, pattern=TEXT)]


class Preview(Strict, frozen=True):
    """`steps` and `guidance` default by the variant drawn with when absent; `ema` draws with the moving average.

    `distilled` is a model, named as `model.source` is: the distilled sibling whose transformer the preview stage
    draws with. Training draws nothing then.
    """

    NEUTRAL: ClassVar[Mapping[str, object]] = MappingProxyType({"ema": False, "distilled": None})

    prompts: Annotated[tuple[Prompt, ...], Meta(max_length=64)] = ()
    seed: Annotated[int, Meta(ge=0, lt=2**32)] = 42
    size: Annotated[int, Meta(ge=32, le=2048, multiple_of=16)] = 512
    steps: Annotated[int, Meta(ge=1, le=200)] | None = None
    guidance: Annotated[float, Meta(ge=0.0, le=30.0)] | None = None
    ema: bool = False
    distilled: Annotated[str, Meta(min_length=1, max_length=4096)] | None = None
    during_training: bool = True
