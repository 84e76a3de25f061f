"""The rules MLX has: AdamW, Adafactor, Lion and Muon, each update by a fresh optimizer of mlx.optimizers.

An update there is a function of gradient, factor and slots given the optimizer's step and rate, which are set here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.optimizers

from schemas.optimizers import Adafactor, AdamW, AdamW8bit, Lion, Muon
from stages.training.optimizers.rule import STEP, Slots

# Added to squared gradients, and the least RMS `scale_parameter` goes by: both as in Adafactor's paper.
ADAFACTOR_EPS = (1e-30, 1e-3)


@dataclass(frozen=True)
class MlxRule:
    """`make` builds the optimizer; `weight_decay` is decay before the update where MLX's own would be another."""

    make: Callable[[], mlx.optimizers.Optimizer]
    weight_decay: float = 0.0

    def initial(self, factor: mx.array) -> Slots:
        """Return what the optimizer starts with."""
        slots: Slots = {}
        self.make().init_single(factor, slots)
        return slots

    def update(
        self, gradient: mx.array, factor: mx.array, slots: Slots, rate: mx.array, step: mx.array
    ) -> tuple[mx.array, Slots]:
        """Return factor and slots after one update."""
        optimizer, slots = self.make(), dict(slots)
        optimizer.state = {STEP: step, "learning_rate": rate}
        if self.weight_decay:
            factor = factor * (1 - rate * self.weight_decay)
        return optimizer.apply_single(gradient, factor, slots), slots


def adamw(spec: AdamW | AdamW8bit) -> MlxRule:
    """Return AdamW, as torch.optim.AdamW."""
    betas = [spec.beta1, spec.beta2]
    # Without bias correction, MLX's default, the first steps are up to ten times too long.
    return MlxRule(
        lambda: mlx.optimizers.AdamW(0.0, betas, spec.eps, spec.weight_decay, bias_correction=True),
    )


def adafactor(spec: Adafactor) -> MlxRule:
    """Return Adafactor, as transformers' with relative_step off: there the learning rate would do nothing."""
    return MlxRule(
        lambda: mlx.optimizers.Adafactor(
            0.0,
            ADAFACTOR_EPS,
            spec.clip_threshold,
            spec.decay_rate,
            spec.beta1 or None,
            spec.weight_decay,
            scale_parameter=spec.scale_parameter,
            relative_step=False,
        )
    )


def lion(spec: Lion) -> MlxRule:
    """Return Lion, as its paper's."""
    return MlxRule(lambda: mlx.optimizers.Lion(0.0, [spec.beta1, spec.beta2], spec.weight_decay))


def muon(spec: Muon) -> MlxRule:
    """Return Muon with decoupled decay, as torch.optim.Muon but for its bfloat16 iteration."""
    # MLX adds decay to the gradient. Made orthogonal, that is a step of full length whatever the decay, and in the
    # first step A has no other gradient: B is zero.
    return MlxRule(
        lambda: mlx.optimizers.Muon(0.0, spec.momentum, 0.0, nesterov=spec.nesterov, ns_steps=spec.ns_steps),
        spec.weight_decay,
    )
