"""The training loop: windows of batches in, a checkpoint every N steps and one metrics line per step out.

Losses are read one step late, so that the host prepares a step while the one before computes.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import assert_never

import mlx.core as mx
import numpy as np

from schemas.errors import NoResources, Stopped
from schemas.objective import Output, Prior
from schemas.train import Train
from stages.contract.memory import is_out_of_memory
from stages.dataset.order import PhasedOrder
from stages.training import objective
from stages.training.control import LOOK_SECONDS, Control
from stages.training.data import Batch, Sample, TrainingData, ahead
from stages.training.guards import INITIAL_STEPS, SILENT, Guards, Line
from stages.training.interruption import Interruption
from stages.training.objective import joined, masked, prepare, preserving, silent_loss, with_prior
from stages.training.profile import BUILD, READ, RECORD, SAVE, Profile
from stages.training.randomness import distinct, dropped, uniform
from stages.training.step import PRESERVATION, StepResult, Trainer
from stages.training.timesteps import Moment

# In a row: another program may want the memory, or fill the disk, for a while.
MOST_STARVED = 3
MOST_UNSAVED = 3
DATA = "loss_data"


@dataclass(frozen=True)
class Window:
    """The micro-batches of one optimizer step: their places in it, the names their draws go by, their content.

    They are `share` of the step's samples: of processes that train together each has its own.
    """

    places: list[int]
    names: list[list[str]]
    batches: list[Batch]
    share: float


def _never(_: int) -> bool:
    """Let the next step be taken first."""
    return False


def _unheard(_: str) -> None:
    """Warn nobody."""


@dataclass
class Loop:
    """A training under way. `on_line` hears every metrics line, `on_checkpoint` (step, public) when one is due.

    `at_once(step)` says whether a step's line is to be heard before the next step is taken. `control` is where
    requests come from between steps; `warn` takes a line for the person. `history` are the lines of the steps before
    the trainer's, as its checkpoint has them. A step that finds no memory changes nothing
    but still counts: the steps after it draw what they would have drawn.
    """

    trainer: Trainer
    data: TrainingData
    settings: Train
    seed: int
    on_line: Callable[[Line], None]
    on_checkpoint: Callable[[int, bool], None]
    at_once: Callable[[int], bool] = _never
    control: Control | None = None
    warn: Callable[[str], None] = _unheard
    profile: Profile = field(default_factory=Profile)
    history: Sequence[Mapping[str, float | None]] = ()
    interruption: Interruption | None = None

    def run(self) -> None:
        """Train from the trainer's step to `settings.steps`.

        Raises Stopped after a durable checkpoint when a signal or a request to stop came, Diverged after three steps
        in a row that were not finite or when nothing was learnt, NoResources after three in a row without memory or
        three checkpoints that could not be saved.
        """
        order = self.data.order(self.settings, self.seed)
        start, stop = self.trainer.steps, self.settings.steps
        self._guards = Guards(self.trainer.factors, self.warn, self.history)
        self._late: tuple[int, StepResult, dict[str, mx.array]] | None = None
        self._saved = (start, True)
        self._unsaved = self._starved = 0
        self._paused = False
        self._began = time.monotonic()
        self.trainer.profile = self.profile
        with self.interruption or Interruption(follows=self.trainer.ranks.follows) as self._interruption:
            windows = self.profile.waits(ahead(lambda step: self._read(order, step), start, stop))
            for step, window in enumerate(windows, start):
                self._take(window, step)
                done = step + 1
                if done == stop:
                    self._save(done, public=True)
                elif done % self.settings.checkpoint_every == 0 and self._starved == 0:
                    self._try_to_save(done)
                self._attend(done)
                if self._interruption.signal_number is not None and done < stop:
                    self._stop(done, self._interruption.signal_number)
                self.profile.next_step()

    def _take(self, window: Window, step: int) -> None:
        """Take optimizer step `step` (from 0); read the numbers of the one before while it runs."""
        try:
            with self.profile.phase(BUILD):
                prepared = self._prepared(window, step)
                result = self.trainer.step(prepared, window.share, held=len(prepared) - len(window.batches))
                initial = {SILENT: silent_loss(prepared, self.settings.loss)} if step < INITIAL_STEPS else {}
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            why = str(error)
        else:
            # Not now: on a CPU, launching this step took as long as computing it.
            self._settle(self.trainer.ended)
            self._late = (step + 1, result, initial)
            self._starved = 0
            if self.at_once(step + 1):
                self._settle()
            return
        # Only here is what the failed step held let go of: the exception kept it.
        self._starve(step + 1, why)

    def _starve(self, step: int, why: str) -> None:
        """Leave out a step that found no memory. Raises NoResources at the third in a row, after a checkpoint."""
        self._settle()
        mx.clear_cache()
        self._starved += 1
        self.trainer.skip()
        # Of processes that train together none can leave out a step that the others take.
        most = MOST_STARVED if self.trainer.ranks.size == 1 else 1
        if self._starved == most:
            # They are to be taken again once there is memory: the checkpoint is as of the step before them.
            self.trainer.skip(-most)
            self._save(step - most, public=False)
            raise NoResources(
                "memory.full",
                f"no memory for {most} training steps in a row, last step {step}",
                why=why,
                fix="set train.gradient_checkpointing = true, or lower train.batch_size or validate.resolutions, "
                "or close other programs; run the same command again to go on",
            )
        self.warn(f"step {step} found no memory and was left out: {why}")
        self._hand_on(self._line(step, math.nan, 0.0, math.nan))

    def _attend(self, step: int) -> None:
        """Do what is asked between two steps; while paused, wait for more."""
        self._obey(step)
        if self._paused and self.control is not None:
            mx.clear_cache()
            with self.control.paused("paused"):
                while self._paused and self._interruption.signal_number is None:
                    time.sleep(LOOK_SECONDS)
                    self._obey(step)
            self._paused = False
            self._began = time.monotonic()

    def _obey(self, step: int) -> None:
        """Do what is asked now, if anything. Raises Stopped when that is to stop."""
        request = None if self.control is None else self.control.request()
        if self.control is None or request is None:
            return
        match request.action:
            case "pause" | "resume":
                self._paused = request.action == "pause"
                # Whoever is answered finds the last step's line.
                self._settle()
                said = f"{'paused' if self._paused else 'going on'} after step {step}"
            case "checkpoint":
                said = self._try_to_save(step, public=False)
            case "preview":
                said = self._try_to_save(step)
            case "stop":
                self._save(step, public=False)
                said = f"stopped after step {step}; it is saved"
            case _:
                assert_never(request.action)
        self.control.answer(request, step, said)
        if request.action == "stop" and step < self.settings.steps:
            self._stop(step, signal.SIGTERM)

    def _stop(self, step: int, signal_number: int) -> None:
        """Raise Stopped once the step is saved."""
        self._save(step, public=False)
        raise Stopped(
            signal_number,
            f"stopped after step {step} of {self.settings.steps}; everything up to it is saved",
            fix="run the same command again to go on",
        )

    def _try_to_save(self, step: int, *, public: bool = True) -> str:
        """Save, or leave that to the next checkpoint when there is no room; say which.

        Raises NoResources at the third failure in a row. Nothing older is ever deleted to make room.
        """
        try:
            self._save(step, public=public)
        except NoResources as error:
            self._unsaved += 1
            if self._unsaved == MOST_UNSAVED:
                raise
            said = f"step {step} could not be saved, training goes on: {error.faults[0].line()}"
            self.warn(said)
            return said
        return f"step {step} is saved"

    def _save(self, step: int, *, public: bool) -> None:
        """Hand on a checkpoint unless it was already. Raises Diverged rather than keep a useless one."""
        if self._saved >= (step, public):
            return
        self._settle()
        self._guards.saving(self.trainer.state())
        if public:
            self._guards.progress(self.trainer.factors)
        with self.profile.phase(SAVE):
            self.on_checkpoint(step, public)
        self._began = time.monotonic()
        self._saved = (step, public)
        self._unsaved = 0

    def _read(self, order: PhasedOrder, step: int) -> Window:
        """Return the window of optimizer step `step` (from 0) as numpy; runs in the reading thread."""
        with self.profile.phase(READ):
            return self._window(order, step)

    def _window(self, order: PhasedOrder, step: int) -> Window:
        count = self.settings.gradient_accumulation
        ids = [order.at(step * count + index) for index in range(count)]
        names = iter(distinct([item for batch in ids for item in batch]))
        window = [[next(names) for _ in batch] for batch in ids]
        preservation = self.settings.preservation
        classes = isinstance(preservation, Output) and step % preservation.every == 0
        own = self.trainer.ranks.own(count)
        batches = [self.data.read(self._samples(ids[place], window[place], step), classes=classes) for place in own]
        share = sum(len(ids[place]) for place in own) / sum(len(batch) for batch in ids)
        return Window(own, [window[place] for place in own], batches, share)

    def _samples(self, ids: Sequence[str], names: Sequence[str], step: int) -> list[Sample]:
        drop = dropped(self.seed, step, names, self.settings.caption_dropout)
        flip = [self.data.flips and uniform(self.seed, step, name, "flip") < 0.5 for name in names]
        caption = [uniform(self.seed, step, name, "caption") for name in names]
        return [Sample(*each) for each in zip(ids, flip, drop, caption, strict=True)]

    def _prepared(self, window: Window, step: int) -> list[objective.Batch]:
        first = step * self.settings.gradient_accumulation
        moments = [Moment(self.seed, step, (first + place) * self.settings.batch_size) for place in window.places]
        prepared = [
            self._weighed(
                prepare(mx.array(batch.latents), mx.array(batch.text), names, settings=self.settings, moment=moment),
                batch,
            )
            for names, batch, moment in zip(window.names, window.batches, moments, strict=True)
        ]
        return joined(prepared, self._preserved(window, prepared))

    def _weighed(self, batch: objective.Batch, read: Batch) -> objective.Batch:
        """Return the batch with what masks and pictures of the class change."""
        if isinstance(self.settings.preservation, Prior):
            batch = with_prior(batch, read.prior, self.settings.preservation.weight)
        if self.settings.mask is None or read.masks is None:
            return batch
        return masked(self.trainer.transformer, batch, mx.array(read.masks), self.settings.mask)

    def _preserved(self, window: Window, prepared: Sequence[objective.Batch]) -> list[objective.Batch]:
        """Return the batches that hold the class as the base model has it, for what was read with class captions."""
        preservation = self.settings.preservation
        if not isinstance(preservation, Output):
            return []
        return [
            preserving(self.trainer.transformer, batch, mx.array(read.class_text), preservation.weight)
            for read, batch in zip(window.batches, prepared, strict=True)
            if read.class_text is not None
        ]

    def _settle(self, ended: float | None = None) -> None:
        """Read the numbers of the last step, which was over at `ended`, if that is known, else is now.

        Raises Diverged after too many that are not finite.
        """
        if self._late is None:
            return
        (step, result, initial), self._late = self._late, None
        loss, norm = float(np.array(result.loss)), float(np.array(result.grad_norm))
        line = self._line(step, loss, result.learning_rate, norm, ended)
        line |= self._parts(loss, result)
        line |= {name: float(np.array(value)) for name, value in initial.items()}
        self._guards.step(line, finite=bool(np.array(result.finite)))
        self._hand_on(line)

    def _parts(self, loss: float, result: StepResult) -> Line:
        """Return what of the loss, which the gradient is of, comes from the pictures and what from holding the class.

        Only where a training holds it at all; at steps that do not, all comes from the pictures.
        """
        if not isinstance(self.settings.preservation, Output):
            return {}
        if result.preservation is None:
            return {DATA: loss}
        held = float(np.array(result.preservation))
        return {DATA: loss - held, PRESERVATION: held}

    def _line(self, step: int, loss: float, rate: float, grad_norm: float, ended: float | None = None) -> Line:
        began, self._began = self._began, time.monotonic() if ended is None else ended
        return {
            "step": step,
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": grad_norm,
            "seconds": round(self._began - began, 4),
            "peak_bytes": mx.get_peak_memory(),
        }

    def _hand_on(self, line: Line) -> None:
        heard = time.monotonic()
        with self.profile.phase(RECORD):
            self.on_line(line)
        # What hearing it took is no part of the next step, which may run all the while.
        self._began += time.monotonic() - heard
