"""What a stage tells the `run` that started it: one JSON line each on stderr, when FLUX2_LORA_EVENTS is 1."""

from __future__ import annotations

from typing import Literal

from schemas.base import Strict

VARIABLE = "FLUX2_LORA_EVENTS"


class Reached(Strict, frozen=True, tag="reached", tag_field="event"):
    """How far a stage is. `total` and `seconds_left` are null while nobody knows."""

    stage: str
    done: int
    total: int | None
    seconds: float
    seconds_left: float | None
    note: str


class Said(Strict, frozen=True, tag="said", tag_field="event"):
    """A line for the person."""

    level: Literal["info", "warning", "error"]
    text: str


Event = Reached | Said
