"""One optimizer step: gradients of every micro-batch, accumulated, clipped, guarded and applied in one graph.

Nothing is read on the host inside. Determinism: a step is a function of the trainer's state and its batches, so
state saved and restored anywhere continues bit for bit on the same backend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from schemas.errors import Damaged
from schemas.objective import Loss
from schemas.train import Train
from stages.flux2.transformer import Transformer
from stages.lora.layer import Factors
from stages.lora.merge import assign, trainable
from stages.training.objective import Batch, loss
from stages.training.optimizers import State, initial_state, updater
from stages.training.schedules import learning_rate

# As torch.nn.utils.clip_grad_norm_: keeps the quotient finite for a norm of zero.
CLIP_EPS = 1e-6
LORA, OPTIMIZER, STEPS = "lora.", "optimizer.", "steps"

Gradient = Callable[..., tuple[mx.array, Factors]]
Apply = Callable[..., tuple[Factors, State, mx.array, mx.array]]


@dataclass(frozen=True)
class StepResult:
    """What a step was: lazy scalars, read them late; a step that is not `finite` changed no factor."""

    loss: mx.array
    grad_norm: mx.array
    finite: mx.array
    learning_rate: float


class Trainer:
    """Trains the adapters on a transformer; the base weights are frozen and shared with whoever else uses them."""

    def __init__(self, transformer: Transformer, settings: Train) -> None:
        transformer.checkpoint = settings.gradient_checkpointing
        self._transformer = transformer
        self._settings = settings
        self._factors = trainable(transformer)
        self._optimizer = initial_state(settings.optimizer, self._factors)
        self._steps = 0
        self._running: list[mx.array] = []
        self._gradient = _gradient(transformer, settings.loss, compiled=settings.compile)
        self._apply = _apply(settings)

    @property
    def steps(self) -> int:
        """Optimizer steps taken so far, skipped ones included: the index of the next step."""
        return self._steps

    @property
    def transformer(self) -> Transformer:
        """The transformer in training; previews borrow it between steps."""
        return self._transformer

    @property
    def factors(self) -> Factors:
        """The adapters' float32 factors as of now."""
        return self._factors

    def step(self, batches: Sequence[Batch]) -> StepResult:
        """Take one optimizer step over a window of micro-batches, in which every sample counts the same."""
        rate = learning_rate(self._settings.schedule, self._settings.learning_rate, self._steps)
        total, gradients = self._accumulate(batches)
        self._factors, self._optimizer, norm, finite = self._apply(
            total, gradients, self._factors, self._optimizer, mx.array(rate)
        )
        self._steps += 1
        assign(self._transformer, self._factors)
        self._launch([total, norm, finite, *self._factors.values(), *self._optimizer.values()])
        return StepResult(total, norm, finite, rate)

    def state(self) -> dict[str, mx.array]:
        """Return everything a later step depends on: float32 factors, optimizer state, the step count."""
        return {
            **{f"{LORA}{name}": factor for name, factor in self._factors.items()},
            **{f"{OPTIMIZER}{name}": array for name, array in self._optimizer.items()},
            STEPS: mx.array(self._steps, dtype=mx.uint64),
        }

    def load_state(self, state: dict[str, mx.array]) -> None:
        """Continue from what `state` returned. Raises `Damaged` unless names, shapes and types are the same."""
        expected = {name: (array.shape, array.dtype) for name, array in self.state().items()}
        found = {name: (array.shape, array.dtype) for name, array in state.items()}
        if wrong := sorted(name for name, _ in expected.items() ^ found.items()):
            raise Damaged(
                "checkpoint.state",
                "the checkpoint is not of this training",
                why=f"{len(set(wrong))} tensors are missing, unexpected or of another shape, first {wrong[0]}",
                fix="remove this checkpoint; training continues from the one before",
            )
        self._factors = {name: state[f"{LORA}{name}"] for name in self._factors}
        self._optimizer = {name: state[f"{OPTIMIZER}{name}"] for name in self._optimizer}
        self._steps = int(np.array(state[STEPS]))
        assign(self._transformer, self._factors)

    def _accumulate(self, batches: Sequence[Batch]) -> tuple[mx.array, Factors]:
        samples = sum(batch.latents.shape[0] for batch in batches)
        shares = [batch._replace(weights=batch.weights * (batch.latents.shape[0] / samples)) for batch in batches]
        total, gradients = self._gradient(self._factors, *shares[0])
        for share in shares[1:]:
            # Tied behind the micro-batch before: else the graph may keep the activations of several at once.
            latents = mx.depends([share.latents], [total, *gradients.values()])[0]
            value, found = self._gradient(self._factors, *share._replace(latents=latents))
            total = total + value
            gradients = {name: gradients[name] + found[name] for name in gradients}
        return total, gradients

    def _launch(self, arrays: list[mx.array]) -> None:
        # The one evaluation point of a step. The step before must end first, so that two never share the memory;
        # this one then runs while the host prepares and builds the next.
        mx.eval(self._running)
        mx.async_eval(arrays)
        self._running = arrays


def _gradient(transformer: Transformer, kind: Loss, *, compiled: bool) -> Gradient:
    """Return gradient(factors, *batch) -> (loss, gradients); a closure of its own per trainer.

    `mx.compile` remembers traces by function and shapes: one trace per bucket, never one of another configuration.
    """

    def value(factors: Factors, *batch: mx.array | None) -> mx.array:
        assign(transformer, factors)
        return loss(transformer, Batch(*batch), kind)

    gradient = mx.value_and_grad(value)
    return mx.compile(gradient) if compiled else gradient


def _apply(settings: Train) -> Apply:
    """Return apply(loss, gradients, factors, state, rate) -> (factors, state, norm, finite)."""
    update = updater(settings.optimizer)

    def apply(
        total: mx.array, gradients: Factors, factors: Factors, state: State, rate: mx.array
    ) -> tuple[Factors, State, mx.array, mx.array]:
        norm = mx.sqrt(mx.stack([mx.square(gradient).sum() for gradient in gradients.values()]).sum())
        clip = mx.minimum(1.0, settings.clip_norm / (norm + CLIP_EPS))
        clipped = {name: gradient * clip for name, gradient in gradients.items()}
        new_factors, new_state = update(clipped, factors, state, rate)
        finite = mx.isfinite(total) & mx.isfinite(norm)
        return (
            {name: mx.where(finite, new, factors[name]) for name, new in new_factors.items()},
            {name: mx.where(finite, new, state[name]) for name, new in new_state.items()},
            norm,
            finite,
        )

    return mx.compile(apply) if settings.compile else apply
