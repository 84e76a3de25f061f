"""`[[train.resolutions]]`: which of validate's resolutions train, by step; absent, all of them all the time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from msgspec import Meta

from schemas.base import Strict
from schemas.validate import Resolution


class Phase(Strict, frozen=True):
    """The resolutions drawn up to step `until`; the last phase has no end.

    A picture too small for one of `sizes` is drawn at the largest size it has below.
    """

    sizes: Annotated[tuple[Resolution, ...], Meta(min_length=1, max_length=8)]
    until: Annotated[int, Meta(ge=1, le=10_000_000)] | None = None


def check(phases: Sequence[Phase]) -> None:
    """Raise ValueError unless each phase ends after the one before, and only the last one does not end."""
    ends = [phase.until for phase in phases]
    if ends and ends[-1] is not None:
        raise ValueError("the last phase of resolutions must not have `until`: it lasts to the end")
    steps = [end or 0 for end in ends[:-1]]
    if 0 in steps or steps != sorted(set(steps)):
        raise ValueError("each phase of resolutions but the last needs an `until` above the one before")
