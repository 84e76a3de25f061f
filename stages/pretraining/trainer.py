"""Trains every weight of a module as one float32 vector, forward and backward in a type of choice.

One vector because the optimizer, clipping and averaging are then thirty operations in all, not for each of hundreds
of tensors. P numbers in it. Nothing is read on the host inside a step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from schemas.ema import Ema
from schemas.optimizers import AdamW
from schemas.pretrain import Fit, Recipe
from schemas.schedules import Cosine
from stages.pretraining.pools import Schedule
from stages.training.ema import initial_average, update_average
from stages.training.optimizers.choice import optimizer
from stages.training.schedules import learning_rate
from stages.training.step import CLIP_EPS

VECTOR = "vector"
# Steps between two looks at the loss and the clock; in between the host only queues.
LOOK_STEPS = 50
# Measured before a fit: what the first steps take is compiling and memory.
WARM_STEPS, TIMED_STEPS = 3, 5
# A plan is an estimate; this much over the ceiling and the fit ends.
OVERRUN = 1.15

Loss = Callable[..., mx.array]
State = tuple[dict[str, mx.array], ...]
Draw = Callable[[int, int], Sequence[mx.array]]  # of pool and step


class Vector:
    """The trained tensors of a module, end to end in one vector; `frozen` names those that stay as they are."""

    def __init__(self, module: nn.Module, frozen: str) -> None:
        tensors = cast(list[tuple[str, mx.array]], tree_flatten(module.parameters()))
        self._shapes = {name: array.shape for name, array in tensors if not name.startswith(frozen)}
        self._module = module

    def read(self) -> mx.array:
        """Return the module's tensors as they are now, [P] float32."""
        own = dict(cast(list[tuple[str, mx.array]], tree_flatten(self._module.parameters())))
        return mx.concatenate([own[name].reshape(-1).astype(mx.float32) for name in self._shapes])

    def split(self, vector: mx.array) -> dict[str, mx.array]:
        """Return the tensors in a vector [P]."""
        parts, start = {}, 0
        for name, shape in self._shapes.items():
            stop = start + math.prod(shape)
            parts[name] = vector[start:stop].reshape(shape)
            start = stop
        return parts

    def join(self, parts: dict[str, mx.array]) -> mx.array:
        """Return the tensors as one vector [P] float32."""
        return mx.concatenate([parts[name].reshape(-1).astype(mx.float32) for name in self._shapes])

    def assign(self, parts: dict[str, mx.array]) -> None:
        """Let the module compute with these tensors."""
        self._module.update(cast(Any, tree_unflatten(list(parts.items()))))


class Trainer:
    """Trains `module` on `loss(key, *batch)`, which computes with the module's present weights."""

    def __init__(self, module: nn.Module, loss: Loss, spec: Fit, recipe: Recipe) -> None:
        self.spec = spec
        self.schedule = Schedule(spec.pools, recipe.seed)
        self._seed = recipe.seed
        self.vector = Vector(module, frozen="bn.")
        self._rule = optimizer(AdamW(beta2=0.99, weight_decay=spec.weight_decay))
        weights = {VECTOR: self.vector.read()}
        self._state: State = (weights, self._rule.initial(weights), initial_average(weights))
        advance = self._stepper(loss, getattr(mx, recipe.dtype))
        self._advance = mx.compile(advance) if recipe.compile else advance
        self._running: list[mx.array] = []

    def assign_average(self) -> None:
        """Let the module compute with the moving average of its weights, until the next step."""
        self.vector.assign(self.vector.split(self._state[2][VECTOR]))

    def step(self, rate: float, key: mx.array, batch: Sequence[mx.array]) -> mx.array:
        """Take one step; return its loss, a lazy scalar."""
        loss, state = self._advance(self._state, mx.array(rate), key, *batch)
        arrays = [loss, *(array for part in state for array in part.values())]
        # The step before must end first, so that two never share the memory.
        mx.eval(self._running)
        mx.async_eval(arrays)
        self._state, self._running = state, arrays
        return loss

    def measure(self, draw: Draw, pool: int) -> tuple[float, float]:
        """Return the seconds of the first step on a pool, and of one when warm; weights stay as they are."""
        saved, times = self._state, []
        for step in range(WARM_STEPS + TIMED_STEPS):
            began = time.perf_counter()
            mx.eval(self.step(0.0, mx.random.key(step), draw(pool, step)))
            mx.synchronize()
            times.append(time.perf_counter() - began)
        self._state, self._running = saved, []
        return times[0], sorted(times[WARM_STEPS:])[TIMED_STEPS // 2]

    def fit(self, draw: Draw, steps: int) -> Iterator[tuple[int, float]]:
        """Take `steps`; yield (steps taken, mean loss of the last ones) every `LOOK_STEPS` and at the end.

        Ends early when its own time is far over the ceiling. What the caller does between costs nothing.
        """
        spent, began, losses = 0.0, time.monotonic(), []
        schedule = Cosine(warmup_steps=min(self.spec.warmup_steps, steps // 5))
        keys = mx.random.split(mx.random.key(self._seed), steps)
        for step in range(steps):
            rate = learning_rate(schedule, self.spec.learning_rate, step, steps)
            losses.append(self.step(rate, keys[step], draw(self.schedule.pool(step), step)))
            if (step + 1) % LOOK_STEPS == 0 or step + 1 == steps:
                mean = cast(float, mx.stack(losses).mean().item())
                spent += time.monotonic() - began
                yield step + 1, mean
                began, losses = time.monotonic(), []
                if spent > OVERRUN * self.spec.seconds:
                    return

    def _stepper(self, loss: Loss, dtype: mx.Dtype) -> Callable[..., tuple[mx.array, State]]:
        vector, rule, spec = self.vector, self._rule, self.spec

        def value(parts: dict[str, mx.array], key: mx.array, *batch: mx.array) -> mx.array:
            vector.assign(parts)
            return loss(key, *batch)

        def advance(state: State, rate: mx.array, key: mx.array, *batch: mx.array) -> tuple[mx.array, State]:
            weights, slots, average = state
            parts = vector.split(weights[VECTOR].astype(dtype))
            total, gradients = mx.value_and_grad(value)(parts, key, *batch)
            gradient = vector.join(gradients)
            norm = mx.sqrt(mx.square(gradient).sum())
            # A step that is not finite changes nothing.
            clip = mx.where(mx.isfinite(norm), mx.minimum(1.0, spec.clip_norm / (norm + CLIP_EPS)), 0.0)
            clipped = {VECTOR: mx.where(mx.isfinite(norm), gradient, 0.0) * clip}
            weights, slots = rule.update(clipped, weights, slots, rate)
            return total, (weights, slots, update_average(Ema(decay=spec.ema), average, weights))

        return advance
