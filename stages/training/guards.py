"""What ends a training that goes wrong, or warns of it.

Steps that are not finite, weights that are not, standing still, a base model that is of no use from the beginning,
and a validation loss that collapses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx
import numpy as np

from schemas.errors import GIVEN, Diverged
from schemas.validation import Validation
from stages.lora.layer import Factors, learnt

# A rate that is too high shows in a few steps; one bad batch does not end a run.
MOST_NOT_FINITE = 3
# The adapters start as nothing and have learnt next to nothing by then: the mean of these losses is the base model's.
INITIAL_STEPS = 10
# In the lines of these steps: the loss that a model has which answers nothing.
SILENT = "silent_loss"
DEEP = f"look at the records: flux2-lora verify {GIVEN} --deep"
NO_PROGRESS_FIX = "raise train.learning_rate, or look at the losses in metrics.jsonl"

Line = dict[str, float]


class Guards:
    """Watches a training that starts with `factors`; `warn` takes a line for the person.

    `history` are the lines of the steps before, as a checkpoint holds them.
    """

    def __init__(
        self, factors: Factors, warn: Callable[[str], None], history: Sequence[Mapping[str, float | None]] = ()
    ) -> None:
        self._warn = warn
        self._initial: list[Line] = []
        self._not_finite = _not_finite_at_the_end(history)
        self._moved = False
        self._print = fingerprint(factors)

    def step(self, line: Line, *, finite: bool) -> None:
        """Take a step's line; warn after the first ten when the base model is of no use.

        Raises Diverged at the third in a row that was not finite.
        """
        if SILENT in line:
            self._initial.append(line)
            self._begun()
        self._moved |= finite and line["learning_rate"] > 0
        self._not_finite = 0 if finite else self._not_finite + 1
        if self._not_finite >= MOST_NOT_FINITE:
            fix = "lower train.learning_rate and run again; the checkpoints before are whole"
            if self._not_finite == line["step"]:
                fix = f"no step was finite, so a lower rate cannot help: get the model's files anew, and {DEEP}"
            raise Diverged(
                "train.not_finite",
                f"loss or gradient was not finite in {MOST_NOT_FINITE} steps in a row, last step {line['step']}",
                why=f"loss {line['loss']}, gradient norm {line['grad_norm']}",
                fix=fix,
            )

    def _begun(self) -> None:
        """Compare the initial loss with that of the same steps for a model that answers zero.

        Noise levels, weights, the kind of loss and the latents are in both alike, so this holds for any of them.
        """
        if len(self._initial) != INITIAL_STEPS:
            return
        loss, silent = (float(np.mean([line[name] for line in self._initial])) for name in ("loss", SILENT))
        if not loss < silent:
            self._warn(
                f"the loss of the first {INITIAL_STEPS} steps is {loss:.3g}, and {silent:.3g} for a model that "
                "answers nothing: usually the base is another model's, latents are not whitened as it wants them, "
                "or the target is wrong"
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
        require_learnt(factors)
        if before == self._print:
            raise Diverged("train.no_progress", "nothing was learnt since the last checkpoint", fix=NO_PROGRESS_FIX)


def require_learnt(factors: Factors) -> None:
    """Raise Diverged when the adapters do nothing."""
    if not learnt(factors):
        what = "nothing was learnt: every up-matrix is still zero"
        raise Diverged("train.no_progress", what, fix=NO_PROGRESS_FIX)


def _not_finite_at_the_end(history: Sequence[Mapping[str, float | None]]) -> int:
    """Return in how many steps in a row up to now loss or gradient was not finite: a file says None of them.

    A step that found no memory was not taken, and says a rate of 0.
    """
    taken = [line for line in history if "loss" in line and line["learning_rate"] != 0.0]
    whole = (line["loss"] is not None and line["grad_norm"] is not None for line in reversed(taken))
    return next((count for count, finite in enumerate(whole) if finite), len(taken))


class Collapse:
    """Watches the validation loss, which is comparable from step to step."""

    def __init__(self, settings: Validation, warn: Callable[[str], None]) -> None:
        self._factor, self._patience = settings.collapse_factor, settings.collapse_patience
        self._warn = warn
        self._best, self._best_step = math.inf, 0
        self._above = 0

    def measured(self, step: int, loss: float) -> None:
        """Take a validation loss; warn of the first that is far above the best so far.

        Raises Diverged at the last that patience allows in a row.
        """
        if loss < self._best:
            self._best, self._best_step = loss, step
        if math.isfinite(loss) and loss <= self._factor * self._best:
            self._above = 0
            return
        self._above += 1
        why = f"loss {loss:.4g}, best {self._best:.4g} at step {self._best_step}"
        what = f"the validation loss is above {self._factor} times its best"
        if self._above >= self._patience:
            raise Diverged(
                "train.collapsed",
                f"{what} for {self._above} measurements in a row, last step {step}",
                why=why,
                fix="take the checkpoint before it rose, or lower train.learning_rate and run again; to go on in "
                "spite of it raise train.validation.collapse_factor",
            )
        if self._above == 1:
            self._warn(f"{what} after step {step}: {why}")


def fingerprint(factors: Factors) -> list[int]:
    """Return the sum of every factor's bits, read as integers: cheap, and another after any change."""
    sums = [factor.astype(mx.float32).view(mx.uint32).sum() for factor in factors.values()]
    return np.array(mx.stack(sums)).tolist()
