"""`[train.schedule]`: how the learning rate goes over the steps, tagged by `kind`.

Every kind warms up linearly over `warmup_steps`. Those that decay do so over the rest of `train.steps`, down to
`min_ratio` of the peak; one rises.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from schemas.base import Strict

Warmup = Annotated[int, Meta(ge=0, le=10_000_000)]
MinRatio = Annotated[float, Meta(ge=0.0, le=1.0)]


class Constant(Strict, frozen=True, tag_field="kind", tag="constant"):
    """The same rate at every step after a linear warm-up of `warmup_steps`."""

    warmup_steps: Warmup = 0


class Linear(Strict, frozen=True, tag_field="kind", tag="linear"):
    """A straight line down."""

    warmup_steps: Warmup = 0
    min_ratio: MinRatio = 0.0


class Cosine(Strict, frozen=True, tag_field="kind", tag="cosine"):
    """Half a cosine wave down."""

    warmup_steps: Warmup = 0
    min_ratio: MinRatio = 0.0


class CosineRestarts(Strict, frozen=True, tag_field="kind", tag="cosine_restarts"):
    """`cycles` half waves down, each from the peak again."""

    warmup_steps: Warmup = 0
    min_ratio: MinRatio = 0.0
    cycles: Annotated[int, Meta(ge=1, le=10_000)] = 3


class Polynomial(Strict, frozen=True, tag_field="kind", tag="polynomial"):
    """What is left of the time to the power of `power`: above 1 falls early, below 1 late."""

    warmup_steps: Warmup = 0
    min_ratio: MinRatio = 0.0
    power: Annotated[float, Meta(gt=0.0, le=100.0)] = 2.0


class Rex(Strict, frozen=True, tag_field="kind", tag="rex"):
    """Reflected exponential (Chen et al. 2021): near the peak for long, then quickly down."""

    warmup_steps: Warmup = 0
    min_ratio: MinRatio = 0.0


class Rising(Strict, frozen=True, tag_field="kind", tag="rising"):
    """Up to the peak from `min_ratio` of it, by the same factor every step: how `find-lr` tries rates."""

    warmup_steps: Warmup = 0
    min_ratio: Annotated[float, Meta(gt=0.0, le=1.0)] = 1e-4


Schedule = Constant | Linear | Cosine | CosineRestarts | Polynomial | Rex | Rising
