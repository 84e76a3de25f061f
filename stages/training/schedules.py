"""The learning rate as a function of the step."""

from __future__ import annotations

from typing import assert_never

from schemas.train import Constant

Schedule = Constant


def learning_rate(schedule: Schedule, peak: float, step: int) -> float:
    """Return the rate of a step, counted from 0; a warm-up of n steps reaches `peak` at step n - 1."""
    match schedule:
        case Constant(warmup_steps=warmup_steps):
            return peak * min(1.0, (step + 1) / max(1, warmup_steps))
        case _:
            assert_never(schedule)
