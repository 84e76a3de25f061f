"""What an optimizer is: a pure function of (gradients, factors, state, rate), all float32, in the step's graph.

The state is one flat dict of arrays, "<factor>.<slot>" and a few names without a dot such as "step", so that it is
saved and restored bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from stages.lora.layer import Factors

State = dict[str, mx.array]
Slots = dict[str, mx.array]
STEP = "step"
UP_MATRIX = ".lora_B"


class Optimizer(Protocol):
    """Nothing changes in place."""

    def initial(self, factors: Factors) -> State:
        """Return the state before the first update."""
        ...

    def update(self, gradients: Factors, factors: Factors, state: State, rate: mx.array) -> tuple[Factors, State]:
        """Return the factors that are trained on and the state, one update later; `rate` is a float32 scalar."""
        ...

    def evaluated(self, factors: Factors, state: State) -> Factors:
        """Return the factors to be saved and drawn: for most optimizers those that are trained on."""
        ...


class Rule(Protocol):
    """The update of one factor, which looks at no other factor."""

    def initial(self, factor: mx.array) -> Slots:
        """Return the factor's slots before the first update."""
        ...

    def update(
        self, gradient: mx.array, factor: mx.array, slots: Slots, rate: mx.array, step: mx.array
    ) -> tuple[mx.array, Slots]:
        """Return the factor and its slots after update number `step`, counted from 1."""
        ...


@dataclass(frozen=True)
class PerFactor:
    """An optimizer that treats each factor by the same rule, B at `lora_plus_ratio` times the rate of A."""

    rule: Rule
    lora_plus_ratio: float

    def initial(self, factors: Factors) -> State:
        """Return the state before the first update."""
        return flat({name: self.rule.initial(factor) for name, factor in factors.items()}) | {
            STEP: mx.array(0, mx.uint64)
        }

    def update(self, gradients: Factors, factors: Factors, state: State, rate: mx.array) -> tuple[Factors, State]:
        """Return factors and state after one more step."""
        step, slots = state[STEP] + 1, nested(state)
        new_factors: Factors = {}
        new_slots: dict[str, Slots] = {}
        for name, factor in factors.items():
            own = rate_of(name, rate, self.lora_plus_ratio)
            new_factors[name], new_slots[name] = self.rule.update(gradients[name], factor, slots[name], own, step)
        return new_factors, flat(new_slots) | {STEP: step}

    def evaluated(self, factors: Factors, state: State) -> Factors:
        """Return the factors as they are."""
        return factors


def rate_of(name: str, rate: mx.array, lora_plus_ratio: float) -> mx.array:
    """Return the rate of a factor: LoRA+ gives B its own."""
    return rate * lora_plus_ratio if name.endswith(UP_MATRIX) else rate


def bias_correction(beta: float, step: mx.array) -> mx.array:
    """Return 1 - beta^step, what an average that starts at zero lacks after `step` updates."""
    # Written so, because 1 - 0.999 has five right digits in float32.
    return -mx.expm1(step.astype(mx.float32) * math.log(beta)) if beta > 0 else mx.array(1.0)


def flat(slots: dict[str, Slots]) -> State:
    """Return {factor: {slot: array}} as {"factor.slot": array}."""
    return {f"{name}.{slot}": array for name, own in slots.items() for slot, array in own.items()}


def nested(state: State) -> dict[str, Slots]:
    """Return the slots of a state by factor, its names without a dot left out."""
    found: dict[str, Slots] = {}
    for path, array in state.items():
        name, _, slot = path.rpartition(".")
        if name:
            found.setdefault(name, {})[slot] = array
    return found
