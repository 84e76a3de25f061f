"""Where on the way from picture to noise an item is trained: t in 0..1, 1 is pure noise.

Drawn on the host, so that a step's graph waits for nothing. Sources: logit-normal from Esser et al. 2024
(arXiv 2403.03206), the shift from musubi-tuner's `flux2_shift`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import assert_never

import numpy as np

from schemas.train import LogitNormal, Shift, Uniform
from stages.flux2.flow import training_mu
from stages.training.randomness import uniform

Timesteps = Uniform | LogitNormal | Shift


def draw(spec: Timesteps, seed: int, step: int, item_ids: Sequence[str], tokens: int) -> np.ndarray:
    """Return t [B] float32 for the items of a batch whose pictures have `tokens` image tokens."""
    numbers = [uniform(seed, step, item_id, "timestep") for item_id in item_ids]
    return np.array([_timestep(spec, number, tokens) for number in numbers], dtype=np.float32)


def _timestep(spec: Timesteps, number: float, tokens: int) -> float:
    """Map a uniform number to t by the inverse of the distribution function."""
    match spec:
        case Uniform():
            return number
        case LogitNormal(mean=mean, std=std):
            return _sigmoid(NormalDist(mean, std).inv_cdf(number))
        case Shift(mean=mean, std=std):
            # Shifting by e^mu adds mu to the logit.
            return _sigmoid(NormalDist(mean, std).inv_cdf(number) + training_mu(tokens))
        case _:
            assert_never(spec)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))
