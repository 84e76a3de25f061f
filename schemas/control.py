"""What is asked of a training under way, and what it answers: two small files in its run folder."""

from __future__ import annotations

from typing import Literal

from schemas.base import Strict

Action = Literal["pause", "resume", "stop", "checkpoint", "preview"]
ACTIONS: tuple[Action, ...] = ("pause", "resume", "stop", "checkpoint", "preview")


class Request(Strict, frozen=True):
    """What to do between two steps; `id` tells a request from the one before, and need not be given by hand."""

    action: Action
    id: str = ""


class Answer(Strict, frozen=True):
    """What was done about the request of that id, after which step, in words."""

    id: str
    step: int
    said: str
