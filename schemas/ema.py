"""`[train.ema]`: a second LoRA, the exponential moving average of the trained one; absent is off."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from schemas.base import Strict


class Ema(Strict, frozen=True):
    """`warmup` lowers the decay at first to (1 + n) / (10 + n), or the average would keep the start for long."""

    decay: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.99
    warmup: bool = True
