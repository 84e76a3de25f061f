"""train: latents, embeddings and the frozen transformer become a LoRA; a re-run resumes from the last checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

from schemas import results
from schemas.errors import Damaged, Stale
from schemas.manifest import Manifest
from schemas.objective import Output
from stages.contract.artifacts import Built, Plan, keyed, restore_file
from stages.contract.digests import unknown
from stages.contract.job import Job
from stages.contract.runner import differences, upstream
from stages.flux2.folder import require_trainable
from stages.flux2.identity import model_of, quantization, transformer_digest
from stages.lora.init_lora import ROLE, init_lora_inputs
from stages.training.sources import held_out_inputs

if TYPE_CHECKING:
    from stages.flux2.backend import Backend
    from stages.training.checkpoints import Checkpoint
    from stages.training.ranks import Ranks
    from stages.training.step import Trainer

LORA, EMA = "lora.safetensors", "ema.safetensors"
# Of `validation` only the pictures it keeps from training, of `init_lora` what is in the file.
UNKEYED = ("checkpoint_every", "init_lora", "rotation", "tracking", "validation")


class Train:
    """Reads both encoders' records; its roles `lora` and `ema` are the tensor digests of the results."""

    name = "train"
    version = 1

    def plan(self, job: Job) -> Plan:
        """Key the settings but those of UNKEYED, the seed, and the content of everything a step reads."""
        model = model_of(job)
        require_trainable(model, allow_distilled=job.config.model.allow_distilled)
        settings = {name: value for name, value in keyed(job.config.train).items() if name not in UNKEYED}
        settings |= {"seed": job.config.run.seed, **quantization(job)}
        latents, _ = upstream(job, "encode-latents")
        text, _ = upstream(job, "encode-text")
        dataset, _ = upstream(job, "validate")
        inputs = {
            "items": dataset.roles["items"],
            "latents": latents.roles["latents"],
            "caption": text.roles["caption"],
            "empty": text.roles["empty"],
            "transformer": transformer_digest(job, model),
            **init_lora_inputs(job),
            **held_out_inputs(job),
        }
        if job.config.train.mask is not None:
            inputs["masks"] = latents.roles["masks"]
        if isinstance(job.config.train.preservation, Output):
            inputs["class"] = text.roles["class"]
        return Plan(settings, inputs)

    def build(self, job: Job, plan: Plan, work: Path) -> Built:
        """Go on from the newest checkpoint of this trajectory, or start; publish the LoRA of the last step."""
        from stages.console.charts import training_curves
        from stages.training.checkpoints import metrics_lines, newest, trajectory_of
        from stages.training.rotation import rotate

        steps = job.config.train.steps
        trajectory = trajectory_of(plan.params, plan.inputs)
        start = None if job.flags.force else newest(job.stores, trajectory, steps, job.warn)
        _announce(job, plan, start)
        last = start if start is not None and start.step == steps else _train(job, plan, start)
        restore_file(last.lora, work / LORA, job.digests)
        roles = {"lora": last.manifest.lora}
        if last.ema is not None and last.manifest.ema is not None:
            restore_file(last.ema, work / EMA, job.digests)
            roles["ema"] = last.manifest.ema
        metrics = last.metrics()
        if job.config.train.rotation is not None:
            # Of a process that died between its last checkpoint and this, nobody else would.
            rotate(job.store, job.run_folder, job.config.train.rotation, last, metrics)
        (work / results.METRICS).write_bytes(metrics_lines(metrics))
        training_curves(metrics, work / results.CURVES)
        return Built(
            roles=roles,
            counts={"steps": steps, "resumed_from": start.step if start is not None else 0},
            device="; ".join(last.manifest.computed_on),
        )

    def foresee(self, job: Job, plan: Plan, work: Path) -> Built:
        """Find the checkpoint that training would go on from; the LoRA is known when that is its end."""
        from stages.training.checkpoints import newest, trajectory_of

        steps = job.config.train.steps
        start = newest(job.stores, trajectory_of(plan.params, plan.inputs), steps, job.warn)
        roles = {"lora": unknown("lora")}
        if job.config.train.ema is not None:
            roles["ema"] = unknown("ema")
        if start is not None and start.step == steps:
            roles = {
                "lora": start.manifest.lora,
                **({} if start.manifest.ema is None else {"ema": start.manifest.ema}),
            }
        return Built(roles, {"steps": steps, "resumed_from": start.step if start is not None else 0})

    def follow(self, job: Job) -> None:
        """Take this process's part in the trainings of the one it was launched with."""
        from stages.training.checkpoints import trajectory_of
        from stages.training.ranks import ranks

        company = ranks()
        company.check(job.config.train)
        plan = self.plan(job)
        while company.listen(trajectory_of(plan.params, plan.inputs)):
            _follow(job, plan, company)

    def dismiss(self) -> None:
        """Let the processes launched with this one go."""
        from stages.training.ranks import ranks

        ranks().end()

    def reused(self, manifest: Manifest) -> Mapping[str, int]:
        """The run is complete."""
        return manifest.counts

    def restore(self, job: Job, folder: Path, manifest: Manifest) -> None:
        """Put the LoRA, its checkpoints, metrics and curves into the run folder. Raises Damaged."""
        from stages.training.checkpoints import public_checkpoints
        from stages.training.copies import know_together, restore_proved
        from stages.training.note import write_note

        targets = {LORA: results.lora(job.run), EMA: results.ema(job.run)}
        for name, entry in manifest.files.items():
            restore_proved(job, folder / name, entry, job.run_folder / targets.get(name, name), self.name)
        found, unreadable = public_checkpoints(job.stores, manifest, job.config.train.checkpoint_every)
        for error in unreadable.values():
            job.warn(error.faults[0].line())
        shown = [(checkpoint, job.run_folder / results.checkpoint(checkpoint.step)) for checkpoint in found]
        know_together(job, (path for checkpoint, target in shown for path in (checkpoint.lora, target)))
        for checkpoint, target in shown:
            try:
                restore_proved(job, checkpoint.lora, checkpoint.manifest.files[LORA], target, self.name)
            except Damaged as error:
                # The training is complete without it; only resuming from there is lost.
                job.warn(error.faults[0].line())
        write_note(job.run_folder, manifest.params, manifest.inputs)


def _announce(job: Job, plan: Plan, start: Checkpoint | None) -> None:
    """Say how this training begins; a changed setting is a new trajectory, shown field by field.

    Raises Stale with `--resume-only` when there is nothing to resume.
    """
    from stages.training.checkpoints import trajectory_of
    from stages.training.copies import copies_of_others

    changes = _changes(job, plan)
    if start is None and job.flags.resume_only:
        raise Stale(
            "train.new_trajectory",
            "there is no checkpoint to resume from",
            where=job.run,
            why="; ".join(changes) or "this training never saved one",
            fix="restore the old settings, or leave out --resume-only",
        )
    if changes and not job.flags.quiet:
        job.say("settings changed: a new trajectory, the old one keeps its checkpoints")
        for line in changes:
            job.say(f"  {line}")
    if start is not None:
        job.say(f"resuming from step {start.step}")
    if others := copies_of_others(job, {trajectory_of(plan.params, plan.inputs)}):
        job.say(f"LoRAs of an older training stay in the run folder unless this one replaces them: {others}")


def _changes(job: Job, plan: Plan) -> list[str]:
    """Return what differs from the training begun before; its steps only where they make it another."""
    from stages.training.checkpoints import timeless
    from stages.training.note import read_note

    try:
        before = read_note(job.run_folder)
    except Damaged:
        # What was begun cannot be told; what begins now replaces it.
        return []
    if before is None:
        return []
    continued = timeless(before.params) and timeless(plan.params)
    lines = differences(before.params, before.inputs, plan)
    return [line for line in lines if not (continued and line.startswith("steps:"))]


def _train(job: Job, plan: Plan, start: Checkpoint | None) -> Checkpoint:
    """Train to the last step and return its checkpoint. Raises Stopped, Diverged, Damaged."""
    from stages.console.progress import progress
    from stages.stores.tensors import to_mlx
    from stages.training.checkpoints import STATE, trajectory_of
    from stages.training.control import Control
    from stages.training.interruption import Interruption
    from stages.training.loop import Loop
    from stages.training.note import write_note
    from stages.training.preflight import preflight
    from stages.training.profile import profiling
    from stages.training.ranks import ranks
    from stages.training.recorder import Instruments, Recorder
    from stages.training.sources import make_trainer, training_data, validator
    from stages.training.trackers import tracked

    settings, company = job.config.train, ranks()
    backend = _ready(job, company)
    data = training_data(job)
    preflight(job, data, backend, start.step if start is not None else 0)
    company.begin(trajectory_of(plan.params, plan.inputs))
    trainer = make_trainer(job, settings, backend.compute_dtype, plan.inputs.get(ROLE))
    if start is not None:
        trainer.load_state({name: to_mlx(each) for name, each in start.state().items()}, str(start.folder / STATE))
    _join(trainer, company)
    # Not before: settings that are refused are no training begun.
    write_note(job.run_folder, plan.params, plan.inputs)
    steps_done = trainer.steps
    with (
        company.together(),
        progress("train", total=settings.steps, done=steps_done, quiet=job.flags.quiet) as bar,
        Control(job.run_folder, paused=bar.paused, say=job.say, warn=job.warn) as control,
        profiling(job.flags.profile, job.run_folder) as profile,
        tracked(settings.tracking, job.run_folder, steps_done) as trackers,
    ):
        interruption = Interruption(follows=company.follows)
        instruments = Instruments(validator(job), profile, trackers, interruption)
        recorder = Recorder(job, plan, trainer, bar, instruments, company.named(backend.name))
        recorder.begin(start)
        hears = (recorder.line, recorder.checkpoint, recorder.measures)
        places = {"control": control, "warn": job.warn, "profile": profile, "interruption": interruption}
        history = start.metrics() if start is not None else ()
        Loop(trainer, data, settings, job.config.run.seed, *hears, **places, history=history).run()
    # The loop ends with a checkpoint of its last step.
    return cast("Checkpoint", recorder.last)


def _ready(job: Job, company: Ranks) -> Backend:
    """Return what computes, once all is told and refused that settings alone tell; nothing large is loaded yet."""
    from stages.flux2.backend import prepare
    from stages.lora.targets import portability, sizes
    from stages.training.trackers import require_packages

    settings = job.config.train
    company.check(settings)
    require_packages(settings.tracking)
    backend = prepare()
    job.say(backend.line())
    for line in portability(settings.adapter, sizes(model_of(job).variant.transformer, settings)):
        job.warn(line)
    if job.config.validate.masks is not None and settings.mask is None:
        job.warn("validate.masks prepares masks that nothing reads: add [train.mask], or leave validate.masks out")
    return backend


def _follow(job: Job, plan: Plan, company: Ranks) -> None:
    """Compute this process's micro-batches of a training that another process leads."""
    from stages.flux2.backend import prepare
    from stages.training.loop import Loop
    from stages.training.sources import make_trainer, training_data

    backend = prepare()
    job.say(f"process {company.rank} of {company.size}: {backend.line()}")
    settings = job.config.train
    trainer = make_trainer(job, settings, backend.compute_dtype, plan.inputs.get(ROLE))
    _join(trainer, company)
    with company.together():
        Loop(trainer, training_data(job), settings, job.config.run.seed, lambda _: None, lambda *_: None).run()


def _join(trainer: Trainer, company: Ranks) -> None:
    """Let the trainer go on, with those of the other processes, from the state that the first one has."""
    trainer.ranks = company
    if company.size > 1:
        trainer.load_state(company.from_first(trainer.state()))


STAGE = Train()
