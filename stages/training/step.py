"""One optimizer step: gradients of every micro-batch, accumulated, clipped, guarded and applied in one graph.

Nothing is read on the host inside. Determinism: a step is a function of the trainer's state and its batches, so
state saved and restored anywhere continues bit for bit on the same backend.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from schemas.errors import Damaged
from schemas.train import Train
from stages.flux2.transformer import Transformer
from stages.lora.formats.bfl import to_tensors
from stages.lora.layer import Factors
from stages.lora.merge import assign, draw_keys, dropping, limiter, portable, trainable
from stages.stores.tensors import Tensor, from_mlx
from stages.training.ema import initial_average, update_average
from stages.training.objective import Batch, loss
from stages.training.optimizers.choice import optimizer
from stages.training.optimizers.rule import State
from stages.training.profile import Profile
from stages.training.ranks import Ranks
from stages.training.schedules import learning_rate

# As torch.nn.utils.clip_grad_norm_: keeps the quotient finite for a norm of zero.
CLIP_EPS = 1e-6
LORA, OPTIMIZER, EMA, STEPS = "lora.", "optimizer.", "ema.", "steps"
LOSS, PRESERVATION = "loss", "loss_preservation"

Gradient = Callable[..., tuple[mx.array, Factors]]
Apply = Callable[..., tuple[Factors, State, State, mx.array, mx.array]]


@dataclass(frozen=True)
class StepResult:
    """What a step was: lazy scalars, read them late; a step that is not `finite` changed no factor.

    `preservation` is what the micro-batches that hold the class add to the loss; None where there were none.
    """

    loss: mx.array
    grad_norm: mx.array
    finite: mx.array
    learning_rate: float
    preservation: mx.array | None = None


class Trainer:
    """Trains the adapters on a transformer; the base weights are frozen and shared with whoever else uses them."""

    def __init__(self, transformer: Transformer, settings: Train, seed: int) -> None:
        transformer.checkpoint = settings.gradient_checkpointing
        self._transformer = transformer
        self._settings = settings
        self._seed = seed
        self._factors = trainable(transformer)
        self._rule = optimizer(settings.optimizer)
        self._optimizer = self._rule.initial(self._factors)
        self._average = {} if settings.ema is None else initial_average(self._factors)
        self.profile = Profile()
        self.ranks = Ranks()
        self._steps = 0
        self._running: list[mx.array] = []
        self._ended = 0.0
        self._gradient = _gradient(transformer, settings)
        self._apply = _apply(settings, limiter(transformer, settings.adapter.max_norm))

    @property
    def steps(self) -> int:
        """Optimizer steps taken so far, skipped ones included: the index of the next step."""
        return self._steps

    @property
    def ended(self) -> float:
        """When the step before the one launched last was over, as time.monotonic() says it."""
        return self._ended

    @property
    def transformer(self) -> Transformer:
        """The transformer in training; previews borrow it between steps."""
        return self._transformer

    @property
    def factors(self) -> Factors:
        """The adapters' float32 factors as of now, as they are to be saved: the optimizer may train on others."""
        return self._rule.evaluated(self._factors, self._optimizer)

    @property
    def ema_factors(self) -> Factors | None:
        """Their moving average; None when `ema` is off. Training goes on from the factors themselves."""
        return {name: self._average[name] for name in self._factors} if self._average else None

    def step(self, batches: Sequence[Batch], share: float = 1.0, *, held: int = 0) -> StepResult:
        """Take one optimizer step over a window of micro-batches, in which every sample counts the same.

        The last `held` of them hold the class: the loss says their part by itself. Of processes that train together
        each brings its own micro-batches, `share` of the step's samples.
        """
        settings = self._settings
        rate = learning_rate(settings.schedule, settings.peak_rate, self._steps, settings.steps)
        losses, gradients = self._accumulate(batches, share, held)
        total = losses[LOSS]
        factors, state, average, norm, finite = self._apply(
            total, gradients, self._factors, self._optimizer, self._average, mx.array(rate)
        )
        self._launch([*losses.values(), norm, finite, *factors.values(), *state.values(), *average.values()])
        # Only now: a step that found no memory has changed nothing.
        self._factors, self._optimizer, self._average = factors, state, average
        self._steps += 1
        assign(self._transformer, self._factors)
        return StepResult(total, norm, finite, rate, losses.get(PRESERVATION))

    def skip(self, steps: int = 1) -> None:
        """Count `steps` that were not taken, after `step` raised; a negative number takes skipped ones back."""
        self._steps += steps
        assign(self._transformer, self._factors)

    def state(self) -> dict[str, mx.array]:
        """Return everything a later step depends on: float32 factors, optimizer state, average, step count."""
        return {
            **{f"{LORA}{name}": factor for name, factor in self._factors.items()},
            **{f"{OPTIMIZER}{name}": array for name, array in self._optimizer.items()},
            **{f"{EMA}{name}": array for name, array in self._average.items()},
            STEPS: mx.array(self._steps, dtype=mx.uint64),
        }

    def load_state(self, state: dict[str, mx.array], where: str = "") -> None:
        """Continue from what `state` returned. Raises `Damaged` unless names, shapes and types are the same.

        `where` names the file that it comes from.
        """
        expected = {name: (array.shape, array.dtype) for name, array in self.state().items()}
        found = {name: (array.shape, array.dtype) for name, array in state.items()}
        if wrong := sorted(name for name, _ in expected.items() ^ found.items()):
            raise Damaged(
                "checkpoint.state",
                "the checkpoint is not of this training",
                where=where,
                why=f"{len(set(wrong))} tensors are missing, unexpected or of another shape, first {wrong[0]}",
                fix="delete its folder; training resumes from the checkpoint before",
            )
        self._factors = {name: state[f"{LORA}{name}"] for name in self._factors}
        self._optimizer = {name: state[f"{OPTIMIZER}{name}"] for name in self._optimizer}
        self._average = {name: state[f"{EMA}{name}"] for name in self._average}
        self._steps = int(np.array(state[STEPS]))
        assign(self._transformer, self._factors)

    def _accumulate(self, batches: Sequence[Batch], share: float, held: int) -> tuple[dict[str, mx.array], Factors]:
        samples = sum(batch.latents.shape[0] for batch in batches)
        parts = [batch._replace(weights=batch.weights * (batch.latents.shape[0] / samples)) for batch in batches]
        total, gradients = self._gradient(self._factors, self._draw_keys(0), *parts[0])
        values = [total]
        for index, part in enumerate(parts[1:], 1):
            # Tied behind the micro-batch before: else the graph may keep the activations of several at once.
            latents = mx.depends([part.latents], [total, *gradients.values()])[0]
            value, found = self._gradient(self._factors, self._draw_keys(index), *part._replace(latents=latents))
            total = total + value
            values.append(value)
            gradients = {name: gradients[name] + found[name] for name in gradients}
        losses = {LOSS: total, **({PRESERVATION: mx.stack(values[-held:]).sum()} if held else {})}
        gradients = self.ranks.total({**gradients, **losses}, share)
        return {name: gradients.pop(name) for name in losses}, gradients

    def lora_file(self, factors: Factors) -> dict[str, Tensor]:
        """Return factors of these adapters as the tensors of the file that people use, of type `save_dtype`."""
        tensors = to_tensors(portable(self._transformer, factors), dtype=getattr(mx, self._settings.save_dtype))
        return {name: from_mlx(array) for name, array in tensors.items()}

    def _draw_keys(self, micro_batch: int) -> dict[str, mx.array]:
        spec = self._settings.adapter
        place = self.ranks.place(micro_batch)
        return draw_keys(self._transformer, spec, seed=self._seed, step=self._steps, micro_batch=place)

    def _launch(self, arrays: list[mx.array]) -> None:
        # The one evaluation point of a step. The step before must end first, so that two never share the memory;
        # this one then runs while the host prepares and builds the next.
        with self.profile.computing():
            mx.eval(self._running)
            self._ended = time.monotonic()
            mx.async_eval(arrays)
        self._running = arrays


def _gradient(transformer: Transformer, settings: Train) -> Gradient:
    """Return gradient(factors, keys, *batch) -> (loss, gradients); a closure of its own per trainer.

    `mx.compile` remembers traces by function and shapes: one trace per bucket, never one of another configuration.
    """

    def value(factors: Factors, *batch: Any) -> mx.array:
        assign(transformer, factors)
        return loss(transformer, Batch(*batch), settings.loss)

    def gradient(factors: Factors, keys: dict[str, mx.array], *batch: Any) -> tuple[mx.array, Factors]:
        with dropping(transformer, settings.adapter, keys):
            return mx.value_and_grad(value)(factors, *batch)

    return mx.compile(gradient) if settings.compile else gradient


def _apply(settings: Train, limit: Callable[[Factors], Factors]) -> Apply:
    """Return apply(loss, gradients, factors, state, average, rate) -> (factors, state, average, norm, finite)."""
    rule = optimizer(settings.optimizer)

    def apply(
        total: mx.array, gradients: Factors, factors: Factors, state: State, average: State, rate: mx.array
    ) -> tuple[Factors, State, State, mx.array, mx.array]:
        norm = mx.sqrt(mx.stack([mx.square(gradient).sum() for gradient in gradients.values()]).sum())
        clip = mx.minimum(1.0, settings.clip_norm / (norm + CLIP_EPS))
        clipped = {name: gradient * clip for name, gradient in gradients.items()}
        new_factors, new_state = rule.update(clipped, factors, state, rate)
        new_factors = limit(new_factors)
        new_average = (
            {}
            if settings.ema is None
            else update_average(settings.ema, average, rule.evaluated(new_factors, new_state))
        )
        finite = mx.isfinite(total) & mx.isfinite(norm)

        def guarded(new: State, old: State) -> State:
            return {name: mx.where(finite, array, old[name]) for name, array in new.items()}

        return (
            guarded(new_factors, factors),
            guarded(new_state, state),
            guarded(new_average, average),
            norm,
            finite,
        )

    return mx.compile(apply) if settings.compile else apply
