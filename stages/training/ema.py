"""Averages of the factors over the training: one kept along with it, one made of saved checkpoints afterwards.

The average is of A and of B, each for itself, as is usual; it is no average of the products B A.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from schemas.ema import Ema
from schemas.errors import BadConfig
from stages.lora.layer import Factors

STEP = "step"
# From here on the power function rises backwards, to early steps.
MOST_SIGMA_REL = 1 / math.sqrt(12)


def initial_average(factors: Factors) -> Factors:
    """Return the average before the first step: the factors themselves, and "step", the updates taken."""
    return factors | {STEP: mx.array(0, mx.uint64)}


def update_average(spec: Ema, average: Factors, factors: Factors) -> Factors:
    """Return the average with the factors after one more step taken in; after n updates by (1 + n) / (10 + n)."""
    count = average[STEP].astype(mx.float32)
    decay = mx.minimum(spec.decay, (1 + count) / (10 + count)) if spec.warmup else mx.array(spec.decay)
    moved = {name: average[name] + (1 - decay) * (factor - average[name]) for name, factor in factors.items()}
    return moved | {STEP: average[STEP] + 1}


def post_hoc(saved: Sequence[tuple[int, Factors]], *, sigma_rel: float) -> Factors:
    """Return the power-function average (Karras et al. 2024) of factors saved at rising steps.

    The exact average weighs the factors of step t by t^gamma; here each saved one stands for the steps since the one
    before. `sigma_rel`, in (0, 0.288], is the width of that profile as a share of the whole training. Raises
    BadConfig for another width, and for no factors, steps that do not rise or factors that do not match.
    """
    steps = [step for step, _ in saved]
    if not saved or steps[0] < 1 or any(later <= earlier for earlier, later in itertools.pairwise(steps)):
        raise BadConfig(
            "ema.steps",
            "averaging needs checkpoints of rising steps",
            why=f"expected steps from 1 upwards, found {steps}",
            fix="name checkpoints of one training, earliest first",
        )
    last = saved[-1][1]
    shapes = {name: factor.shape for name, factor in last.items()}
    if other := [step for step, own in saved if {name: factor.shape for name, factor in own.items()} != shapes]:
        raise BadConfig(
            "ema.factors",
            "the checkpoints are of different adapters",
            why=f"those of steps {other} have other names or shapes than that of step {steps[-1]}",
            fix="name checkpoints of one training",
        )
    weights = _shares(steps, _gamma(sigma_rel))
    return {
        name: mx.stack([weight * own[name] for weight, (_, own) in zip(weights, saved, strict=True)]).sum(axis=0)
        for name in last
    }


def _shares(steps: Sequence[int], gamma: float) -> list[float]:
    """Return the integrals of t^gamma from one step to the next, divided by the whole."""
    reached = (np.array([0, *steps]) / steps[-1]) ** (gamma + 1)
    return np.diff(reached).tolist()


def _gamma(sigma_rel: float) -> float:
    """Solve sigma_rel = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)) for the largest gamma."""
    if not 0 < sigma_rel <= MOST_SIGMA_REL:
        raise BadConfig(
            "ema.sigma_rel",
            "a width that no rising profile has",
            why=f"expected 0 < sigma_rel <= {MOST_SIGMA_REL:.3f}, found {sigma_rel}",
            fix="use 0.05 to 0.2",
        )
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())
