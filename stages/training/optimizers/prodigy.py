"""Prodigy (Mishchenko and Defazio 2023): Adam whose step size d estimates the distance to the solution.

Arithmetic as in the authors' package `prodigyopt`. One d for all factors; it only ever grows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx

import schemas.optimizers as schema
from stages.lora.layer import Factors
from stages.training.optimizers.rule import STEP, Slots, State, bias_correction, flat, nested

D, D_MAX, NUMERATOR = "d", "d_max", "d_numerator"


@dataclass(frozen=True)
class Prodigy:
    """Slots: "m" and "v" are moments of d times the gradient, "s" its weighted sum, "start" the initial factor."""

    spec: schema.Prodigy

    def initial(self, factors: Factors) -> State:
        """Return the state before the first update; it remembers where every factor started."""
        slots = {
            name: {slot: mx.zeros_like(factor) for slot in "mvs"} | {"start": factor}
            for name, factor in factors.items()
        }
        counters = {STEP: mx.array(0, mx.uint64), NUMERATOR: mx.array(0.0)}
        return flat(slots) | counters | {D: mx.array(self.spec.d0), D_MAX: mx.array(self.spec.d0)}

    def update(self, gradients: Factors, factors: Factors, state: State, rate: mx.array) -> tuple[Factors, State]:
        """Return factors and state after one more step."""
        slots, d = nested(state), state[D]
        step = state[STEP] + 1
        length = d * rate * self._bias_correction(step)
        new_slots = {name: self._moments(gradients[name], slots[name], d, length) for name in factors}
        estimate = self._estimate(gradients, factors, state, new_slots, length)
        new_factors = {
            name: factor * (1 - self.spec.weight_decay * length)
            - length * new_slots[name]["m"] / (mx.sqrt(new_slots[name]["v"]) + estimate[D] * self.spec.eps)
            for name, factor in factors.items()
        }
        return new_factors, flat(new_slots) | estimate | {STEP: step}

    def evaluated(self, factors: Factors, state: State) -> Factors:
        """Return the factors as they are."""
        return factors

    @property
    def _beta3(self) -> float:
        return math.sqrt(self.spec.beta2) if self.spec.beta3 is None else self.spec.beta3

    def _bias_correction(self, step: mx.array) -> mx.array | float:
        if not self.spec.use_bias_correction:
            return 1.0
        second, first = (bias_correction(beta, step) for beta in (self.spec.beta2, self.spec.beta1))
        return mx.sqrt(second) / first

    def _moments(self, gradient: mx.array, slots: Slots, d: mx.array, length: mx.array) -> Slots:
        beta1, beta2 = self.spec.beta1, self.spec.beta2
        # Relative to d0: else the sum of tiny numbers would be too small for float32.
        weight = d / self.spec.d0 * (d if self.spec.safeguard_warmup else length)
        return {
            "m": beta1 * slots["m"] + (1 - beta1) * d * gradient,
            "v": beta2 * slots["v"] + (1 - beta2) * mx.square(d * gradient),
            "s": self._beta3 * slots["s"] + weight * gradient,
            "start": slots["start"],
        }

    def _estimate(
        self, gradients: Factors, factors: Factors, state: State, slots: dict[str, Slots], length: mx.array
    ) -> State:
        """Return d, the greatest estimate so far, and the numerator of the next."""
        spec, d = self.spec, state[D]
        progress = [(gradients[name] * (slots[name]["start"] - factors[name])).sum() for name in factors]
        numerator = self._beta3 * state[NUMERATOR] + d / spec.d0 * length * mx.stack(progress).sum()
        denominator = mx.stack([mx.abs(own["s"]).sum() for own in slots.values()]).sum()
        # No gradient at all yet: no estimate either.
        found = mx.where(denominator > 0, spec.d_coef * numerator / denominator, 0.0)
        greatest = mx.maximum(state[D_MAX], found)
        d = mx.where(d == spec.d0, mx.maximum(d, found), d)
        d = greatest if spec.growth_rate is None else mx.minimum(greatest, d * spec.growth_rate)
        return {D: d, D_MAX: greatest, NUMERATOR: numerator}
