"""train: latents, embeddings and the frozen transformer become a LoRA; a re-run resumes from the last checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from schemas import results
from schemas.errors import Stale
from schemas.manifest import Manifest
from schemas.version import VERSION
from stages.contract.artifacts import Built, Plan, keyed, restore_file
from stages.contract.digests import canonical_json, digest_of
from stages.contract.job import Job
from stages.contract.publish import write_file
from stages.contract.runner import differences, upstream
from stages.flux2.folder import require_trainable
from stages.flux2.identity import model_of, transformer_digest

if TYPE_CHECKING:
    from stages.console.progress import Progress
    from stages.training.checkpoints import Checkpoint
    from stages.training.data import TrainingData
    from stages.training.loop import Line
    from stages.training.step import Trainer

LORA = "lora.safetensors"


class Train:
    """Reads both encoders' records; its role `lora` is the tensor digest of the result."""

    name = "train"
    version = 1

    def plan(self, job: Job) -> Plan:
        """Key all settings but `checkpoint_every`, the seed, and the content of everything a step reads."""
        model = model_of(job)
        require_trainable(model, allow_distilled=job.config.model.allow_distilled)
        settings = {**keyed(job.config.train), "seed": job.config.run.seed}
        del settings["checkpoint_every"]
        latents, _ = upstream(job, "encode-latents")
        text, _ = upstream(job, "encode-text")
        dataset, _ = upstream(job, "validate")
        inputs = {
            "items": dataset.roles["items"],
            "latents": latents.roles["latents"],
            "caption": text.roles["caption"],
            "empty": text.roles["empty"],
            "transformer": transformer_digest(job, model),
        }
        return Plan(settings, inputs)

    def build(self, job: Job, plan: Plan, work: Path) -> Built:
        """Go on from the newest checkpoint of this trajectory, or start; publish the LoRA of the last step."""
        from stages.console.charts import training_curves
        from stages.training.checkpoints import metrics_lines, newest, trajectory_of

        steps = job.config.train.steps
        trajectory = trajectory_of(plan.params, plan.inputs)
        start = None if job.flags.force else newest(job.stores, trajectory, steps, job.warn)
        _announce(job, plan, trajectory, start)
        last = start if start is not None and start.step == steps else _train(job, plan, start)
        restore_file(last.lora, work / LORA, job.digests)
        metrics = last.metrics()
        (work / results.METRICS).write_bytes(metrics_lines(metrics))
        training_curves(metrics, work / results.CURVES)
        return Built(
            roles={"lora": last.manifest.lora},
            counts={"steps": steps, "resumed_from": start.step if start is not None else 0},
        )

    def reused(self, manifest: Manifest) -> Mapping[str, int]:
        """The run is complete."""
        return manifest.counts

    def restore(self, job: Job, folder: Path, manifest: Manifest) -> None:
        """Put the LoRA, its checkpoints, metrics and curves into the run folder."""
        from stages.training.checkpoints import public_checkpoints

        restore_file(folder / LORA, job.run_folder / results.lora(job.run), job.digests)
        for name in (results.METRICS, results.CURVES):
            restore_file(folder / name, job.run_folder / name, job.digests)
        for checkpoint in public_checkpoints(job.stores, manifest, job.config.train.checkpoint_every):
            target = job.run_folder / results.checkpoint(checkpoint.step)
            restore_file(checkpoint.lora, target, job.digests)


def _announce(job: Job, plan: Plan, trajectory: str, start: Checkpoint | None) -> None:
    """Say how this training begins; a changed setting is a new trajectory, shown field by field.

    Raises Stale with `--resume-only` when there is nothing to resume.
    """
    path = job.run_folder / results.TRAJECTORY
    changes = _changes(path, plan)
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
    note = {"trajectory": trajectory, "params": plan.params, "inputs": plan.inputs}
    write_file(path, msgspec.json.format(canonical_json(note)) + b"\n")


def _changes(path: Path, plan: Plan) -> list[str]:
    try:
        before = msgspec.json.decode(path.read_bytes())
        return [
            line for line in differences(before["params"], before["inputs"], plan) if not line.startswith("steps:")
        ]
    except (OSError, msgspec.DecodeError, KeyError, TypeError):
        return []


def _train(job: Job, plan: Plan, start: Checkpoint | None) -> Checkpoint:
    """Train to the last step and return its checkpoint. Raises Stopped, Diverged, Damaged."""
    from stages.console.progress import progress
    from stages.flux2.backend import prepare
    from stages.flux2.load import load_transformer
    from stages.lora.merge import attach
    from stages.lora.targets import resolve
    from stages.stores.tensors import to_mlx
    from stages.training.loop import Loop
    from stages.training.step import Trainer

    settings = job.config.train
    backend = prepare()
    job.say(backend.line())
    names = resolve(model_of(job).variant.transformer, settings.targets)
    data = _data(job)
    transformer = load_transformer(model_of(job), backend.compute_dtype)
    attach(transformer, names, rank=settings.rank, alpha=settings.alpha, seed=job.config.run.seed)
    trainer = Trainer(transformer, settings)
    metrics: list[Line] = []
    if start is not None:
        trainer.load_state({name: to_mlx(tensor) for name, tensor in start.state().items()})
        metrics = start.metrics()
    with progress("train", total=settings.steps, done=trainer.steps, quiet=job.flags.quiet) as bar:
        recorder = _Recorder(job, plan, trainer, bar)
        recorder.begin(metrics)
        loop = Loop(trainer, data, settings, job.config.run.seed, recorder.line, recorder.checkpoint, metrics)
        loop.run()
    return recorder.last


def _data(job: Job) -> TrainingData:
    from schemas.tables import DATASET, EMBEDDING_INDEX, LATENT_INDEX
    from stages.stores.tables import read_table
    from stages.training.data import TrainingData

    items = read_table(upstream(job, "validate")[1] / "dataset.parquet", DATASET)
    latents = read_table(upstream(job, "encode-latents")[1] / "index.parquet", LATENT_INDEX)
    embeddings = read_table(upstream(job, "encode-text")[1] / "index.parquet", EMBEDDING_INDEX)
    return TrainingData(job.stores, items, latents, embeddings)


class _Recorder:
    """What is kept while training goes on: live metrics, checkpoints, their LoRA files and pictures."""

    def __init__(self, job: Job, plan: Plan, trainer: Trainer, bar: Progress) -> None:
        self._job = job
        self._plan = plan
        self._trainer = trainer
        self._bar = bar
        self._metrics: list[Line] = []
        self._live = job.run_folder / results.METRICS
        self.last: Checkpoint

    def begin(self, metrics: list[Line]) -> None:
        """Start from the lines of the steps already done; draw the model without a LoRA."""
        from stages.training.checkpoints import metrics_lines

        self._metrics = metrics
        write_file(self._live, metrics_lines(metrics))
        self._draw(None, 0)

    def line(self, line: Line) -> None:
        """Append a step's line, and show it."""
        from stages.console.progress import Measures

        with self._live.open("ab") as file:
            file.write(msgspec.json.encode(line) + b"\n")
        self._bar.measure(Measures(line["loss"], line["learning_rate"], int(line["peak_bytes"])))
        self._bar.advance(1)

    def checkpoint(self, step: int, public: bool) -> None:  # noqa: FBT001
        """Publish the state; a public one also gives its LoRA file and pictures."""
        import mlx.core as mx

        from stages.lora.formats.bfl import metadata, to_tensors
        from stages.stores.tensors import from_mlx
        from stages.training.checkpoints import Snapshot, trajectory_of, write_checkpoint

        settings = self._job.config.train
        scale, dtype = settings.alpha / settings.rank, getattr(mx, settings.save_dtype)
        lora = to_tensors(self._trainer.factors, scale=scale, dtype=dtype)
        snapshot = Snapshot(
            step=step,
            public=public,
            state={name: from_mlx(array) for name, array in self._trainer.state().items()},
            lora={name: from_mlx(array) for name, array in lora.items()},
            metadata=metadata(settings.rank, _provenance(self._job, self._plan, step)),
            metrics=self._metrics,
        )
        self.last = write_checkpoint(self._job.store, trajectory_of(self._plan.params, self._plan.inputs), snapshot)
        if public:
            target = self._job.run_folder / results.checkpoint(step)
            restore_file(self.last.lora, target, self._job.digests)
            self._draw(self.last, step)

    def _draw(self, checkpoint: Checkpoint | None, step: int) -> None:
        """Draw the previews of a saved LoRA on the transformer in memory, unless they are wanted later."""
        if not (self._job.config.preview.during_training and self._job.config.preview.prompts):
            return
        from stages.flux2.load import load_autoencoder
        from stages.training.previews import NO_LORA, Painter, place, scene_of

        scene = scene_of(self._job)
        model = model_of(self._job)
        painter = Painter(
            self._job.stores,
            scene,
            transformer=lambda: self._trainer.transformer,
            decoder=lambda: load_autoencoder(model, encoder=False, decoder=True),
        )
        lora, digest = (None, NO_LORA) if checkpoint is None else (checkpoint.lora, checkpoint.manifest.lora)
        with self._bar.paused(f"drawing previews of step {step}"):
            painter.paint(lora, digest)
        place(self._job, scene, digest, step)


def _provenance(job: Job, plan: Plan, step: int) -> dict[str, str]:
    """What the LoRA file says of how it was made: settings and digests, no path or name of a person."""
    from stages.training.checkpoints import trajectory_of

    inputs = {name: digest for name, digest in plan.inputs.items() if name != "transformer"}
    return {
        "software": f"flux2-lora {VERSION}",
        "base_model": model_of(job).variant.name,
        "base_model_digest": plan.inputs["transformer"],
        "dataset_digest": digest_of("training-data", inputs),
        "trajectory": trajectory_of(plan.params, plan.inputs),
        "step": str(step),
        "config": canonical_json(plan.params).decode(),
    }


STAGE = Train()
