"""The learning-rate range test (Smith 2015): train while the rate rises, and see where the loss falls and explodes.

The loss is that of `Validator`: a few pictures, fixed noise and noise levels. That of the steps themselves is mostly
noise, and hides what the rate does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from schemas.errors import Diverged, Stopped
from schemas.train import Train
from schemas.validation import Validation
from stages.training.data import TrainingData
from stages.training.loop import Line, Loop
from stages.training.step import Trainer
from stages.training.validation import Validator

# What is measured when the settings hold no pictures out: some of those trained on.
MEASURED_ITEMS = 2
MEASURED = Validation(sigmas=(0.2, 0.5, 0.8))
# Beyond this multiple of the first loss nothing more is to be learnt from higher rates. The loss of a model that an
# adapter wrecks stays bounded: a norm and the untrained last layer follow.
EXPLODED = 1.25
# A smaller fall of the loss is no learning.
LEAST_FALL = 1e-3
# Smoothed over this share of the sweep.
SMOOTH_SHARE = 0.08


@dataclass(frozen=True)
class Found:
    """What a sweep says: the rate to take, where the loss fell fastest, and where it rose above its start again."""

    suggested: float
    steepest: float
    diverged: float | None


@dataclass
class Sweep:
    """A range test under way; `losses[i]` is the loss after a step at `rates[i]`, `start` that before the first."""

    trainer: Trainer
    data: TrainingData
    validator: Validator
    rates: list[float] = field(default_factory=list[float])
    losses: list[float] = field(default_factory=list[float])
    start: float = math.nan

    def run(self, settings: Train, seed: int, on_step: Callable[[float, float], None]) -> None:
        """Train through the schedule of `settings`, or until the loss explodes; `on_step` hears (rate, loss)."""
        self.start = self._measured()

        def hear(line: Line) -> None:
            self.rates.append(line["learning_rate"])
            self.losses.append(self._measured())
            on_step(self.rates[-1], self.losses[-1])
            if not self.losses[-1] <= EXPLODED * self.start:
                raise _Exploded

        loop = Loop(self.trainer, self.data, settings, seed, hear, _keep_nothing, at_once=_always)
        try:
            loop.run()
        except (_Exploded, Diverged):
            # Where a sweep is meant to end.
            return
        except Stopped as error:
            fix = "run the same command again"
            raise Stopped(error.signal_number, "stopped; nothing is kept of a sweep", fix=fix) from error

    def _measured(self) -> float:
        return self.validator.loss(self.trainer.transformer, self.trainer.factors)


class _Exploded(Exception):
    """The sweep has seen enough."""


def found(rates: Sequence[float], losses: Sequence[float], start: float) -> Found:
    """Return what the losses after steps at rising `rates` say.

    Suggested is the rate of the steepest fall, or a tenth of the one that diverged if that is lower. Raises Diverged
    when the loss never fell below `start`.
    """
    curve = smoothed(losses)
    lowest = int(np.nanargmin(curve)) if np.isfinite(curve).any() else 0
    if len(rates) < 2 or not curve[lowest] < start * (1 - LEAST_FALL):
        raise Diverged(
            "find_lr.nothing_learnt",
            "the loss fell at no rate",
            why=f"it was {start:.4f} at first, and at best {curve[lowest] if len(rates) else start:.4f}",
            fix="try a higher --highest, or a lower --lowest, or more --steps",
        )
    slope = np.gradient(curve[: lowest + 1], np.log(rates[: lowest + 1])) if lowest else np.zeros(1)
    steepest = rates[int(np.argmin(slope))]
    over = [rate for rate, loss in zip(rates[lowest:], curve[lowest:], strict=True) if not loss <= start]
    suggested = min(steepest, over[0] / 10) if over else steepest
    return Found(suggested=float(f"{suggested:.1e}"), steepest=steepest, diverged=over[0] if over else None)


def smoothed(losses: Sequence[float]) -> np.ndarray:
    """Return the means [N] of each loss [N] and its neighbours; at the ends of as many as there are on both sides."""
    reach = max(1, round(SMOOTH_SHARE * len(losses) / 2))
    count = len(losses)
    reaches = [min(reach, place, count - 1 - place) for place in range(count)]
    return np.array([np.mean(losses[place - near : place + near + 1]) for place, near in enumerate(reaches)])


def _always(_: int) -> bool:
    """Hear every line before the next step."""
    return True


def _keep_nothing(_step: int, _public: bool) -> None:  # noqa: FBT001
    """Let go of what was trained."""
