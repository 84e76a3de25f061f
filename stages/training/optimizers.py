"""Optimizers as pure functions of (gradients, factors, state), over MLX's own.

The state is one flat dict of arrays, "<factor>.<slot>" and "step", so that it is saved and restored bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import assert_never

import mlx.core as mx
import mlx.optimizers

from schemas.train import AdamW
from stages.lora.layer import Factors

State = dict[str, mx.array]
Update = Callable[[Factors, Factors, State, mx.array], tuple[Factors, State]]
STEP = "step"


def initial_state(spec: AdamW, factors: Factors) -> State:
    """Return the state before the first update."""
    optimizer = _optimizer(spec)
    optimizer.init(factors)
    return _flat(optimizer.state, factors)


def updater(spec: AdamW) -> Update:
    """Return update(gradients, factors, state, learning rate) -> (factors, state); nothing changes in place."""

    def update(gradients: Factors, factors: Factors, state: State, learning_rate: mx.array) -> tuple[Factors, State]:
        optimizer = _optimizer(spec)
        optimizer.state = _nested(state) | {"learning_rate": learning_rate}
        return optimizer.apply_gradients(gradients, factors), _flat(optimizer.state, factors)

    return update


def _optimizer(spec: AdamW) -> mlx.optimizers.Optimizer:
    match spec:
        case AdamW(beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay):
            # Without bias correction, MLX's default, the first steps are up to ten times too long.
            return mlx.optimizers.AdamW(0.0, [beta1, beta2], eps, weight_decay, bias_correction=True)
        case _:
            assert_never(spec)


def _flat(state: dict, factors: Factors) -> State:
    slots = {f"{name}.{slot}": array for name in factors for slot, array in state[name].items()}
    return {STEP: state[STEP], **slots}


def _nested(state: State) -> dict:
    nested: dict = {STEP: state[STEP]}
    for path, array in state.items():
        name, _, slot = path.rpartition(".")
        if name:
            nested.setdefault(name, {})[slot] = array
    return nested
