"""Where on the way from picture to noise an item is trained: t in 0..1, 1 is pure noise.

Drawn on the host, so that a step's graph waits for nothing. Every kind is a quantile function Q and its inverse: a
window is a sub-interval of the uniform number that goes in, so t is restricted, never clamped. Sources: logit-normal
and mode from Esser et al. 2024 (arXiv 2403.03206), the shift from musubi-tuner's `flux2_shift`, content and style
from ai-toolkit's `content_or_style`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple, assert_never

import numpy as np

from schemas.errors import BadConfig
from schemas.timesteps import (
    Balanced,
    Content,
    LogitNormal,
    Mode,
    Shift,
    Sigmoid,
    Style,
    Timesteps,
    Uniform,
    Weighted,
)
from stages.flux2.flow import training_mu
from stages.training.randomness import integer, uniform

STRATA = 16
# A window with a smaller share of the distribution is a mistake, and its quantiles are rounding errors.
LEAST_PROBABILITY = 1e-6
BISECTIONS = 60  # more than a float64 has digits


class Moment(NamedTuple):
    """When a batch is drawn: the run's seed, the optimizer step, and the number of its first place in the run.

    Places are counted as if every batch were full: (step * micro-batches + micro-batch) * batch size. Only
    stratified draws depend on them.
    """

    seed: int
    step: int
    place: int = 0


def draw(spec: Timesteps, moment: Moment, item_ids: Sequence[str], tokens: int) -> np.ndarray:
    """Return t [B] float32 for the items of a batch whose pictures have `tokens` image tokens.

    Raises BadConfig for a window that the distribution practically never reaches.
    """
    low, high = window(spec, tokens)
    numbers = [_number(spec, moment, item_id, place) for place, item_id in enumerate(item_ids, moment.place)]
    drawn = [quantile(spec, low + number * (high - low), tokens) for number in numbers]
    # Only what rounding leaves outside.
    return np.clip(np.array(drawn, dtype=np.float32), np.float32(spec.minimum), np.float32(spec.maximum))


def window(spec: Timesteps, tokens: int) -> tuple[float, float]:
    """Return the probabilities of a draw below the window of `spec`, and below its end, at `tokens` image tokens.

    Raises BadConfig for a window that the distribution practically never reaches.
    """
    low, high = probability(spec, spec.minimum, tokens), probability(spec, spec.maximum, tokens)
    if high - low < LEAST_PROBABILITY:
        raise BadConfig(
            "timesteps.empty_window",
            "this kind of timestep never falls into its window",
            where="train.timesteps",
            why=f"a share of {high - low:.1e} lies in {spec.minimum}..{spec.maximum}, expected {LEAST_PROBABILITY}",
            fix="widen train.timesteps.minimum and maximum, or take another kind",
        )
    return low, high


def _number(spec: Timesteps, moment: Moment, item_id: str, place: int) -> float:
    """Return a place's uniform number; stratified, each stratum gets one of sixteen successive places."""
    number = uniform(moment.seed, moment.step, item_id, "timestep")
    if not spec.stratified:
        return number
    block, position = divmod(place, STRATA)
    order = sorted(range(STRATA), key=lambda stratum: integer(moment.seed, block, str(stratum), "stratum"))
    return (order[position] + number) / STRATA


def quantile(spec: Timesteps, probability: float, tokens: int) -> float:
    """Return the t below which a draw falls with `probability`, strictly between 0 and 1."""
    match spec:
        case Uniform() | Balanced() | Weighted():
            return probability
        case LogitNormal() | Sigmoid() | Shift():
            return _sigmoid(_logit(spec, tokens).inv_cdf(probability))
        case Mode(scale=scale):
            return _mode(probability, scale)
        case Content():
            return 1 - (1 - probability) ** 3
        case Style():
            return probability**3
        case _:
            assert_never(spec)


def probability(spec: Timesteps, t: float, tokens: int) -> float:
    """Return the probability that a draw without a window is below t in 0..1: the inverse of `quantile`."""
    if t in (0.0, 1.0):
        return t
    match spec:
        case Uniform() | Balanced() | Weighted():
            return t
        case LogitNormal() | Sigmoid() | Shift():
            return _logit(spec, tokens).cdf(math.log(t / (1 - t)))
        case Mode(scale=scale):
            return _inverse_mode(t, scale)
        case Content():
            return 1 - (1 - t) ** (1 / 3)
        case Style():
            return t ** (1 / 3)
        case _:
            assert_never(spec)


def _logit(spec: LogitNormal | Sigmoid | Shift, tokens: int) -> NormalDist:
    """Return the distribution of log(t / (1 - t))."""
    match spec:
        case LogitNormal(mean=mean, std=std):
            return NormalDist(mean, std)
        case Sigmoid(scale=scale):
            return NormalDist(0.0, scale)
        case Shift(mean=mean, std=std):
            # Shifting by e^mu adds mu to the logit.
            return NormalDist(mean + training_mu(tokens), std)
        case _:
            assert_never(spec)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _mode(u: float, scale: float) -> float:
    return u + scale * (math.cos(math.pi / 2 * u) ** 2 - 1 + u)


def _inverse_mode(t: float, scale: float) -> float:
    """Bisect: the map has no inverse in closed form, and grows all the way."""
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if _mode(middle, scale) < t else (low, middle)
    return (low + high) / 2
