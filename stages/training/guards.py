"""What ends a training that goes wrong: steps that are not finite, weights that are not, and standing still."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from schemas.errors import Diverged
from stages.lora.layer import Factors, learnt

# A rate that is too high shows in a few steps; one bad batch does not end a run.
MOST_NOT_FINITE = 3

Line = dict[str, float]


class Guards:
    """Watches a training that starts with `factors`."""

    def __init__(self, factors: Factors) -> None:
        self._not_finite = 0
        self._moved = False
        self._print = fingerprint(factors)

    def step(self, line: Line, *, finite: bool) -> None:
        """Take a step's line. Raises Diverged at the third in a row that was not finite."""
        self._moved |= finite and line["learning_rate"] > 0
        self._not_finite = 0 if finite else self._not_finite + 1
        if self._not_finite >= MOST_NOT_FINITE:
            raise Diverged(
                "train.not_finite",
                f"loss or gradient was not finite in {MOST_NOT_FINITE} steps in a row, last step {line['step']}",
                why=f"loss {line['loss']}, gradient norm {line['grad_norm']}",
                fix="lower train.learning_rate and run again; the checkpoints before are whole",
            )

    def saving(self, state: Mapping[str, mx.array]) -> None:
        """Raise Diverged rather than let a state be saved that is not finite: no training could go on from it."""
        floats = {name: array for name, array in state.items() if mx.issubdtype(array.dtype, mx.floating)}
        finite = np.array(mx.stack([mx.isfinite(array).all() for array in floats.values()]))
        if wrong := [name for name, whole in zip(floats, finite, strict=True) if not whole]:
            raise Diverged(
                "train.weights_not_finite",
                "the training state is no longer finite; it is not saved",
                why=f"{len(wrong)} of {len(floats)} tensors, first {wrong[0]}",
                fix="lower train.learning_rate and run again; the checkpoints before are whole",
            )

    def progress(self, factors: Factors) -> None:
        """Raise Diverged when steps were taken since the last call and `factors` are the same, or do nothing.

        Steps at a rate of zero, and those that were left out, are expected to change nothing.
        """
        if not self._moved:
            return
        before, self._print, self._moved = self._print, fingerprint(factors), False
        fix = "raise train.learning_rate, or look at the losses in metrics.jsonl"
        if not learnt(factors):
            raise Diverged("train.no_progress", "nothing was learnt: every up-matrix is still zero", fix=fix)
        if before == self._print:
            raise Diverged("train.no_progress", "nothing was learnt since the last checkpoint", fix=fix)


def fingerprint(factors: Factors) -> list[int]:
    """Return the sum of every factor's bits, read as integers: cheap, and another after any change."""
    sums = [factor.astype(mx.float32).view(mx.uint32).sum() for factor in factors.values()]
    return np.array(mx.stack(sums)).tolist()
