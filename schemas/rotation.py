"""`[train.rotation]`: which checkpoints stay; absent, all do."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from schemas.base import Strict

Step = Annotated[int, Meta(ge=1, le=10_000_000)]
Positive = Annotated[float, Meta(gt=0.0, le=1e9)]


class Rotation(Strict, frozen=True):
    """What goes is decided after every checkpoint, once that one is durable.

    Always kept: the newest checkpoint, the steps in `pin` and, with `keep_best`, the best one. Of the others
    `keep_last` keeps the newest so many and `keep_every` the multiples of so many steps; with neither, all stay.
    `max_age_days` and `max_gigabytes` (of one training in the store, oldest first) then thin those out.
    """

    keep_last: Annotated[int, Meta(ge=1, le=100_000)] | None = None
    keep_every: Step | None = None
    max_age_days: Positive | None = None
    max_gigabytes: Positive | None = None
    pin: Annotated[tuple[Step, ...], Meta(max_length=1000)] = ()
    keep_best: bool = True
