"""How much a noise level counts in the loss.

Sources: sigma_sqrt and cosmap as diffusers' `training_utils.compute_loss_weighting_for_sd3`; the bell from
ai-toolkit's table of 1000 measured weights, of which every fiftieth stands here, linear in between: its steep ends
are so off by up to 8 %, and the mean over t is 0.996 instead of 1.
"""

from __future__ import annotations

import math
from typing import assert_never

import numpy as np

from schemas.objective import Bell, Cosmap, SigmaSqrt, Unweighted, Weighting
from schemas.timesteps import Timesteps, Weighted

# At t = 0, .05, ... 1.
BELL = np.array(
    [
        [0.447, 0.582, 0.716, 0.729, 0.716, 0.715, 0.731],
        [0.762, 0.805, 0.860, 0.925, 1.000, 1.083, 1.172],
        [1.264, 1.355, 1.441, 1.507, 1.507, 1.375, 0.906],
    ]
).ravel()
BELL_LEVELS = np.linspace(0, 1, len(BELL))
# diffusers' lowest noise level; below, t^-2 would let a single draw outweigh a run.
LEAST_SIGMA = 1e-3


def resolved(weighting: Weighting, timesteps: Timesteps) -> Weighting:
    """Return the weighting that applies: timesteps of the kind `weighted` bring the bell with them."""
    return Bell() if isinstance(timesteps, Weighted) else weighting


def weights(weighting: Weighting, timesteps: np.ndarray) -> np.ndarray:
    """Return the weight [B] float32 of the loss at timesteps [B] in 0..1, 1 is pure noise."""
    t = timesteps.astype(np.float64)
    match weighting:
        case Unweighted():
            found = np.ones_like(t)
        case Bell():
            found = np.interp(t, BELL_LEVELS, BELL)
        case SigmaSqrt():
            found = np.maximum(t, LEAST_SIGMA) ** -2.0
        case Cosmap():
            found = 2 / (math.pi * (1 - 2 * t + 2 * t**2))
        case _:
            assert_never(weighting)
    return found.astype(np.float32)
