"""The loss on pictures that are not trained on: fixed noise, fixed noise levels, nothing dropped or mirrored.

The number is comparable from step to step and between trainings that hold out the same pictures, whatever their
timesteps, weights and losses: it is the plain mean square of the velocity's error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import numpy as np

from schemas.validation import Validation
from stages.flux2.transformer import Transformer
from stages.lora.layer import Factors
from stages.lora.merge import assign, trainable
from stages.training.data import Sample, TrainingData
from stages.training.objective import Batch, loss
from stages.training.randomness import noise


class Validator:
    """Measures a transformer with adapters on held-out items; it changes neither."""

    def __init__(self, data: TrainingData, item_ids: Sequence[str], spec: Validation) -> None:
        self._data = data
        self._item_ids = sorted(item_ids)
        self._spec = spec

    def due(self, step: int) -> bool:
        """Whether the loss after `step` steps is wanted."""
        return step % self._spec.every == 0

    def loss(self, transformer: Transformer, factors: Factors) -> float:
        """Return the mean loss over items and noise levels with the adapters at `factors`.

        One forward pass of one picture at a time: less memory than a training step.
        """
        with _set(transformer, factors):
            batches = (batch for item in self._item_ids for batch in self._batches(item))
            losses = [np.array(loss(transformer, batch)) for batch in batches]
        return float(np.mean(losses))

    def _batches(self, item_id: str) -> Iterator[Batch]:
        read = self._data.read([Sample(item_id, flip=False, dropped=False)])
        latents, text = mx.array(read.latents), mx.array(read.text)
        drawn = noise(self._spec.seed, 0, [item_id], latents.shape[1:])
        for sigma in self._spec.sigmas:
            yield Batch(latents, drawn, text, mx.array([sigma]), mx.array([1.0]))


@contextmanager
def _set(transformer: Transformer, factors: Factors) -> Iterator[None]:
    before = trainable(transformer)
    assign(transformer, factors)
    try:
        yield
    finally:
        assign(transformer, before)
