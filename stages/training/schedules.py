"""The learning rate as a pure function of the step, after `get_*_schedule_with_warmup` of transformers.

The one difference: a warm-up of n steps reaches the peak at step n - 1, not n, so that no step has a rate of zero.
"""

from __future__ import annotations

import math
from typing import assert_never

from schemas.schedules import Constant, Cosine, CosineRestarts, Linear, Polynomial, Rex, Rising, Schedule


def learning_rate(schedule: Schedule, peak: float, step: int, total: int) -> float:
    """Return the rate of `step`, counted from 0, in a training of `total` steps; the lowest one from there on."""
    warmup = schedule.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    left = 1 - progress
    match schedule:
        case Constant():
            return peak
        case Linear(min_ratio=lowest):
            shape = left
        case Cosine(min_ratio=lowest):
            shape = _half_wave(progress)
        case CosineRestarts(min_ratio=lowest, cycles=cycles):
            shape = _half_wave(progress * cycles % 1.0 if progress < 1 else 1.0)
        case Polynomial(min_ratio=lowest, power=power):
            shape = left**power
        case Rex(min_ratio=lowest):
            shape = left / (0.5 + 0.5 * left)
        case Rising(min_ratio=lowest):
            return peak * lowest**left
        case _:
            assert_never(schedule)
    return peak * (lowest + (1 - lowest) * shape)


def depends_on_total(schedule: Schedule) -> bool:
    """Return whether the rate of a step changes with the number of steps asked for."""
    match schedule:
        case Constant():
            return False
        case Linear() | Cosine() | CosineRestarts() | Polynomial() | Rex() | Rising():
            return True
        case _:
            assert_never(schedule)


def _half_wave(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))
