"""The training loop: windows of batches in, a checkpoint every N steps and one metrics line per step out.

Losses are read one step late, so that the host prepares a step while the one before computes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from schemas.errors import Diverged, Stopped
from schemas.train import Train
from stages.dataset.order import PhasedOrder
from stages.lora.layer import learnt
from stages.training import objective
from stages.training.data import Batch, Sample, TrainingData, ahead
from stages.training.interruption import Interruption
from stages.training.objective import joined, prepare, preserving
from stages.training.randomness import distinct, dropped, uniform
from stages.training.step import StepResult, Trainer
from stages.training.timesteps import Moment

Line = dict[str, float]
# A rate that is too high shows in a few steps; one bad batch does not end a run.
MOST_NOT_FINITE = 3


@dataclass(frozen=True)
class Window:
    """The micro-batches of one optimizer step, and the names their draws go by."""

    names: list[list[str]]
    batches: list[Batch]


@dataclass
class Loop:
    """A training under way. `on_line` hears every metrics line, `on_checkpoint` (step, public) when one is due."""

    trainer: Trainer
    data: TrainingData
    settings: Train
    seed: int
    on_line: Callable[[Line], None]
    on_checkpoint: Callable[[int, bool], None]
    metrics: list[Line] = field(default_factory=list[Line])

    def run(self) -> None:
        """Train from the trainer's step to `settings.steps`.

        Raises Stopped after a durable checkpoint when a signal came, Diverged after three steps in a row that were
        not finite or when nothing was learnt.
        """
        order = self.data.order(self.settings, self.seed)
        start, stop = self.trainer.steps, self.settings.steps
        self._not_finite = 0
        with Interruption() as interruption:
            late: tuple[int, StepResult] | None = None
            self._began = time.monotonic()
            for step, window in enumerate(ahead(lambda step: self._read(order, step), start, stop), start):
                result = self.trainer.step(self._prepared(window, step))
                if late is not None:
                    self._record(*late)
                late = (step + 1, result)
                due = (step + 1) % self.settings.checkpoint_every == 0 or step + 1 == stop
                if due or interruption.signal_number is not None:
                    self._record(*late)
                    late = None
                    self._check_progress()
                    self.on_checkpoint(step + 1, due)
                if interruption.signal_number is not None and step + 1 < stop:
                    raise Stopped(
                        interruption.signal_number,
                        f"stopped after step {step + 1} of {stop}; everything up to it is saved",
                        fix="run the same command again to go on",
                    )

    def _read(self, order: PhasedOrder, step: int) -> Window:
        """Return the window of optimizer step `step` (from 0) as numpy; runs in the reading thread."""
        count = self.settings.gradient_accumulation
        ids = [order.at(step * count + index) for index in range(count)]
        names = iter(distinct([item for batch in ids for item in batch]))
        window = [[next(names) for _ in batch] for batch in ids]
        preservation = self.settings.preservation
        classes = preservation is not None and step % preservation.every == 0
        batches = [
            self.data.read(self._samples(batch, named, step), classes=classes)
            for batch, named in zip(ids, window, strict=True)
        ]
        return Window(window, batches)

    def _samples(self, ids: Sequence[str], names: Sequence[str], step: int) -> list[Sample]:
        drop = dropped(self.seed, step, names, self.settings.caption_dropout)
        flip = [self.data.flips and uniform(self.seed, step, name, "flip") < 0.5 for name in names]
        caption = [uniform(self.seed, step, name, "caption") for name in names]
        return [Sample(*each) for each in zip(ids, flip, drop, caption, strict=True)]

    def _prepared(self, window: Window, step: int) -> list[objective.Batch]:
        first = step * len(window.batches)
        moments = [
            Moment(self.seed, step, (first + index) * self.settings.batch_size)
            for index in range(len(window.batches))
        ]
        prepared = [
            prepare(mx.array(batch.latents), mx.array(batch.text), names, settings=self.settings, moment=moment)
            for names, batch, moment in zip(window.names, window.batches, moments, strict=True)
        ]
        return joined(prepared, self._preserved(window, prepared))

    def _preserved(self, window: Window, prepared: Sequence[objective.Batch]) -> list[objective.Batch]:
        """Return the batches that hold the class as the base model has it, for what was read with class captions."""
        preservation = self.settings.preservation
        if preservation is None:
            return []
        return [
            preserving(self.trainer.transformer, batch, mx.array(read.class_text), preservation.weight)
            for read, batch in zip(window.batches, prepared, strict=True)
            if read.class_text is not None
        ]

    def _record(self, step: int, result: StepResult) -> None:
        """Read a step's numbers and hand on its line. Raises Diverged after too many that are not finite."""
        line = {
            "step": step,
            "loss": result.loss.item(),
            "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm.item(),
            "seconds": round(time.monotonic() - self._began, 4),
            "peak_bytes": mx.get_peak_memory(),
        }
        self._began = time.monotonic()
        self._not_finite = 0 if result.finite.item() else self._not_finite + 1
        if self._not_finite >= MOST_NOT_FINITE:
            raise Diverged(
                "train.not_finite",
                f"loss or gradient was not finite in {MOST_NOT_FINITE} steps in a row, last step {step}",
                why=f"loss {line['loss']}, gradient norm {line['grad_norm']}",
                fix="lower train.learning_rate and run again; the checkpoints before are whole",
            )
        self.metrics.append(line)
        self.on_line(line)

    def _check_progress(self) -> None:
        """Raise Diverged when every up-matrix is still zero: the LoRA would do nothing."""
        if not learnt(self.trainer.factors):
            raise Diverged(
                "train.no_progress",
                "nothing was learnt: every up-matrix is still zero",
                fix="raise train.learning_rate, or look at the losses in metrics.jsonl",
            )
