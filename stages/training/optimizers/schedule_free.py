"""Schedule-free AdamW (Defazio et al. 2024), arithmetic as in the authors' package `schedulefree`.

Gradients are taken at y = beta1 x + (1 - beta1) z: z takes Adam's steps, x is the weighted average of all z. The
factors of the training are y, the state keeps z, and x, which is what people use, follows from both.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

import schemas.optimizers as schema
from stages.lora.layer import Factors
from stages.training.optimizers.rule import STEP, Slots, State, bias_correction, flat, nested, rate_of

WEIGHT_SUM, MAX_RATE = "weight_sum", "max_rate"


@dataclass(frozen=True)
class ScheduleFree:
    """Slots: "z" and the second moment "v"; there is no first moment."""

    spec: schema.ScheduleFree

    def initial(self, factors: Factors) -> State:
        """Return the state before the first update: x, y and z are the same."""
        slots = {name: {"z": factor, "v": mx.zeros_like(factor)} for name, factor in factors.items()}
        return flat(slots) | {STEP: mx.array(0, mx.uint64), WEIGHT_SUM: mx.array(0.0), MAX_RATE: mx.array(0.0)}

    def update(self, gradients: Factors, factors: Factors, state: State, rate: mx.array) -> tuple[Factors, State]:
        """Return y and the state after one more step."""
        slots, step = nested(state), state[STEP] + 1
        greatest = mx.maximum(state[MAX_RATE], rate)
        # LoRA+ multiplies every weight and their sum alike: the share is the same for A and B.
        weight = mx.power(step.astype(mx.float32), self.spec.r) * mx.power(greatest, self.spec.weight_lr_power)
        weight_sum = state[WEIGHT_SUM] + weight
        share = weight / weight_sum
        new_factors: Factors = {}
        new_slots: dict[str, Slots] = {}
        for name, y in factors.items():
            v = self.spec.beta2 * slots[name]["v"] + (1 - self.spec.beta2) * mx.square(gradients[name])
            scale = mx.sqrt(v / bias_correction(self.spec.beta2, step)) + self.spec.eps
            change = rate_of(name, rate, self.spec.lora_plus_ratio) * (
                gradients[name] / scale + self.spec.weight_decay * y
            )
            z = slots[name]["z"]
            new_factors[name] = y + share * (z - y) + (self.spec.beta1 * (1 - share) - 1) * change
            new_slots[name] = {"z": z - change, "v": v}
        return new_factors, flat(new_slots) | {STEP: step, WEIGHT_SUM: weight_sum, MAX_RATE: greatest}

    def evaluated(self, factors: Factors, state: State) -> Factors:
        """Return x: y = beta1 x + (1 - beta1) z solved for it."""
        slots = nested(state)
        return {name: y + (1 - 1 / self.spec.beta1) * (slots[name]["z"] - y) for name, y in factors.items()}
