"""What is kept while training goes on: live metrics, checkpoints, their LoRA files and pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import msgspec

from schemas import results
from schemas.errors import Damaged, Diverged, NoResources
from schemas.version import VERSION
from stages.console.charts import training_curves
from stages.console.progress import Measures, Progress
from stages.contract.artifacts import Plan, restore_file
from stages.contract.digests import canonical_json, digest_of
from stages.contract.job import Job
from stages.contract.publish import no_resources, write_file
from stages.flux2.identity import model_of
from stages.flux2.load import load_autoencoder
from stages.flux2.quantize import held_as
from stages.lora.formats.bfl import metadata
from stages.lora.init_lora import ROLE
from stages.lora.targets import saved_rank
from stages.stores.tensors import from_mlx
from stages.training.checkpoints import (
    Checkpoint,
    Snapshot,
    list_checkpoints,
    metrics_lines,
    trajectory_of,
    write_checkpoint,
)
from stages.training.guards import Collapse, require_learnt
from stages.training.interruption import Interruption
from stages.training.loop import Line
from stages.training.objective import TRAINING_GUIDANCE
from stages.training.previews import NO_LORA, Painter, place, scene_of, write_sheet
from stages.training.profile import DRAW, VALIDATE, Profile
from stages.training.rotation import rotate
from stages.training.step import Trainer
from stages.training.trackers import Tracker
from stages.training.validation import Validator


@dataclass(frozen=True)
class Instruments:
    """What looks at a training and changes nothing of it."""

    validator: Validator | None
    profile: Profile
    trackers: Sequence[Tracker]
    interruption: Interruption


class _Asked(Exception):
    """Raised while a picture is drawn when the training is asked to stop."""


class Recorder:
    """What is kept while training goes on: live metrics, checkpoints, their LoRA files and pictures."""

    def __init__(
        self, job: Job, plan: Plan, trainer: Trainer, bar: Progress, instruments: Instruments, device: str
    ) -> None:
        self._job = job
        self._plan = plan
        self._trainer = trainer
        self._bar = bar
        self._validator = instruments.validator
        validation = job.config.train.validation
        self._collapse = None if validation is None else Collapse(validation, job.warn)
        self._profile = instruments.profile
        self._trackers = instruments.trackers
        self._interruption = instruments.interruption
        self._device = device
        # Lines since the last checkpoint, which holds all before it: memory does not grow with the training.
        self._recent: list[Line] = []
        self._live = job.run_folder / results.METRICS
        self._shown = True
        self._shots: list[tuple[int, str]] = []
        self.last: Checkpoint | None = None

    def begin(self, start: Checkpoint | None) -> None:
        """Go on after `start`; measure and draw the model as it is."""
        self.last = start
        if not self._trainer.steps and self.measures(0):
            self._recent.append({"step": 0, **self._measured(0)})
            self._tell(self._recent[-1])
        history = self._history(self._trainer.steps)
        write_file(self._live, metrics_lines(history))
        for line in history:
            self._watch(line)
        self._shots = [(0, NO_LORA), *self._shots_before()]
        self._draw(None, 0, NO_LORA)

    def measures(self, step: int) -> bool:
        """Whether the line of `step` must be handed over before the next step is taken: it will be measured."""
        return self._validator is not None and self._validator.due(step)

    def line(self, line: Line) -> None:
        """Add to a step's line what is measured at that step, append it to the file, and show it."""
        line.update(self._measured(int(line["step"])))
        self._recent.append(line)
        self._show(line)
        self._tell(line)
        self._bar.measure(Measures(line["loss"], line["learning_rate"], int(line["peak_bytes"])))
        self._bar.advance(1)
        self._watch(line)

    def _show(self, line: Line) -> None:
        """Append the line to the live file; while there is no room for it, training goes on without.

        Nothing is lost: checkpoints hold all lines, and the next that fits brings the missing ones with it.
        """
        try:
            with no_resources(self._live):
                if self._shown:
                    with self._live.open("ab") as file:
                        file.write(msgspec.json.encode(line) + b"\n")
                else:
                    write_file(self._live, metrics_lines(self._history(int(line["step"]))))
                self._shown = True
        except NoResources as error:
            if self._shown:
                self._job.warn(f"{error.faults[0].line()} (training goes on)")
            self._shown = False

    def checkpoint(self, step: int, public: bool) -> None:  # noqa: FBT001
        """Publish the state; a public one also gives its LoRA file and pictures.

        Raises Diverged for a finished LoRA that does nothing, whatever the reason that no step changed it.
        """
        settings = self._job.config.train
        if step == settings.steps:
            require_learnt(self._trainer.factors)
        average = self._trainer.ema_factors
        history = self._history(step)
        snapshot = Snapshot(
            step=step,
            public=public,
            state={name: from_mlx(array) for name, array in self._trainer.state().items()},
            lora=self._trainer.lora_file(self._trainer.factors),
            ema=None if average is None else self._trainer.lora_file(average),
            metadata=metadata(saved_rank(settings), self._provenance(step)),
            metrics=history,
            computed_on=self._computed_on(),
        )
        self.last = write_checkpoint(self._job.store, trajectory_of(self._plan.params, self._plan.inputs), snapshot)
        self._recent = [line for line in self._recent if line["step"] > step]
        if public:
            target = self._job.run_folder / results.checkpoint(step)
            restore_file(self.last.lora, target, self._job.digests)
            if step < self._job.config.train.steps:
                # Those of the last step are a part of what the stage makes.
                training_curves(history, self._job.run_folder / results.CURVES)
            lora, digest = self.last.shown(ema=self._job.config.preview.ema)
            self._shots.append((step, digest))
            try:
                with no_resources(self._job.run_folder):
                    self._draw(lora, step, digest)
            except (Damaged, Diverged, NoResources) as error:
                # A picture is not worth a training: the preview stage draws what is missing, or says what is wrong.
                self._job.warn(f"no pictures of step {step}, training goes on: {error.faults[0].line()}")
        if settings.rotation is not None:
            rotate(self._job.store, self._job.run_folder, settings.rotation, self.last, history)

    def _computed_on(self) -> tuple[str, ...]:
        before = (self._device,) if self.last is None else self.last.manifest.computed_on
        return (*before, self._device) if before and self._device not in before else before

    def _provenance(self, step: int) -> dict[str, str]:
        held = held_as(self._trainer.transformer)
        return {**_provenance(self._job, self._plan, step), "base_quantization": held}

    def _history(self, step: int) -> list[Line]:
        """Return the lines up to `step`: those of the last checkpoint, proved by it, and those since."""
        before = self.last.metrics() if self.last is not None else []
        return [line for line in [*before, *self._recent] if line["step"] <= step]

    def _tell(self, line: Line) -> None:
        for tracker in self._trackers:
            tracker.line(int(line["step"]), {name: value for name, value in line.items() if name != "step"})

    def _measured(self, step: int) -> Line:
        if self._validator is None or not self._validator.due(step):
            return {}
        with self._profile.phase(VALIDATE), self._bar.paused(f"validating step {step}"):
            return {"validation_loss": self._validator.loss(self._trainer.transformer, self._trainer.factors)}

    def _watch(self, line: Line) -> None:
        """Raise Diverged when a line's validation loss, if it has one, ends the training."""
        if self._collapse is not None and "validation_loss" in line:
            loss = line["validation_loss"]
            # What was not finite comes back from a file as nothing.
            self._collapse.measured(int(line["step"]), math.nan if loss is None else loss)

    def _shots_before(self) -> list[tuple[int, str]]:
        """Return the steps already shown, each with the digest of its LoRA."""
        every, done, ema = self._job.config.train.checkpoint_every, self._trainer.steps, self._job.config.preview.ema
        found = list_checkpoints(self._job.stores, trajectory_of(self._plan.params, self._plan.inputs))
        return [(each.step, each.shown(ema=ema)[1]) for each in found if each.step <= done and each.step % every == 0]

    def _draw(self, lora: Path | None, step: int, digest: str) -> None:
        """Draw the previews of a saved LoRA on the transformer in memory, unless they are wanted later."""
        settings = self._job.config.preview
        if not (settings.during_training and settings.prompts) or settings.distilled is not None:
            return
        scene = scene_of(self._job)
        model = model_of(self._job)
        painter = Painter(
            self._job.stores,
            scene,
            transformer=lambda: self._trainer.transformer,
            decoder=lambda: load_autoencoder(model, encoder=False, decoder=True),
        )
        try:
            with self._profile.phase(DRAW), self._bar.paused(f"drawing previews of step {step}"):
                painter.paint(lora, digest, on_step=self._go_on)
                place(self._job, scene, digest, step)
                write_sheet(self._job.stores, scene, self._shots, self._job.run_folder / results.PREVIEWS)
        except _Asked:
            # All is saved that is to be; what is not drawn yet is left to preview.
            return
        finally:
            # The decoder and the sampler's buffers would otherwise stay in MLX's cache beside the training's.
            mx.clear_cache()
        for tracker in self._trackers:
            tracker.picture(step, self._job.run_folder / results.preview(step))

    def _go_on(self, _: int) -> None:
        """Raise _Asked between two steps of a picture when the training is to stop: a large one takes minutes."""
        if self._interruption.signal_number is not None:
            raise _Asked


def _provenance(job: Job, plan: Plan, step: int) -> dict[str, str]:
    """What the LoRA file says of how it was made: settings and digests, no path or name of a person."""
    variant = model_of(job).variant
    guidance = {"training_guidance": str(TRAINING_GUIDANCE)} if variant.transformer.guidance_embeds else {}
    inputs = {name: digest for name, digest in plan.inputs.items() if name not in ("transformer", ROLE)}
    return {
        "software": f"flux2-lora {VERSION}",
        "base_model": variant.name,
        "base_model_digest": plan.inputs["transformer"],
        "dataset_digest": digest_of("training-data", inputs),
        "trajectory": trajectory_of(plan.params, plan.inputs),
        "step": str(step),
        **guidance,
        "config": canonical_json(plan.params).decode(),
    }
