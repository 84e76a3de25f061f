"""preview: pictures from every saved LoRA of the run, drawn once each; what training drew already is only placed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Never

import msgspec

from schemas import results
from schemas.manifest import Manifest
from schemas.rotation import Rotation
from stages.contract.artifacts import Built, Plan, holder, keyed, restore_file
from stages.contract.digests import digest_of, is_unknown, read_proved, unknown
from stages.contract.job import Job
from stages.contract.runner import upstream
from stages.flux2.identity import decoder_digest, drawing_model_of, model_of, quantization, transformer_digest

if TYPE_CHECKING:
    from stages.training.previews import Painter, Scene

INDEX = "index.json"


# The LoRA of a step that training has not reached.
NOT_YET = unknown("lora")


class Picture(msgspec.Struct, frozen=True):
    """One picture: its place in the run folder and below the store."""

    step: int
    prompt: str
    file: str
    fragment: str


class Shot(msgspec.Struct, frozen=True):
    """The LoRA of one step: its tensor digest, and its file (None: the model without a LoRA)."""

    step: int
    lora: str
    path: Path | None


class Preview:
    """Reads saved LoRAs and prompt embeddings; pictures are fragments, its artifact lists them."""

    name = "preview"
    version = 1

    def plan(self, job: Job) -> Plan:
        """Key the settings, the prompts' embeddings, the weights, and the LoRA of every step shown."""
        model, drawing = model_of(job), drawing_model_of(job)
        text, _ = upstream(job, "encode-text")
        settings = {**keyed(job.config.preview), **quantization(job)}
        del settings["during_training"]
        if "distilled" in settings:
            # Where the sibling lies is in no key: its weights are.
            settings["distilled"] = True
        settings["steps"] = settings["steps"] or drawing.variant.preview_steps
        if settings["guidance"] is None:
            settings["guidance"] = drawing.variant.preview_guidance
        inputs = {
            "prompt": text.roles["prompt"],
            "empty": text.roles["empty"],
            "transformer": transformer_digest(job, drawing),
            "decoder": decoder_digest(job, model),
            **{f"lora {shot.step}": shot.lora for shot in shots(job)},
        }
        return Plan(settings, inputs)

    def build(self, job: Job, plan: Plan, work: Path) -> Built:
        """Draw what no store has yet, and list all pictures."""
        from stages.console.progress import progress
        from stages.flux2.backend import prepare
        from stages.flux2.load import load_autoencoder, load_transformer
        from stages.flux2.prequantized import prequantized
        from stages.training.previews import Painter, scene_of, write_grid, write_sheet

        scene = scene_of(job)
        model, drawing = model_of(job), drawing_model_of(job)
        backend, packed = prepare(), partial(prequantized, job, drawing, "transformer")
        painter = Painter(
            job.stores,
            scene,
            transformer=cache(lambda: load_transformer(packed(), backend.compute_dtype, job.config.model.quantize)),
            decoder=cache(lambda: load_autoencoder(model, encoder=False, decoder=True)),
        )
        wanted = shots(job)
        missing = _missing(painter, wanted)
        with progress(self.name, total=missing * scene.sampling.steps, quiet=job.flags.quiet) as bar:
            rendered = sum(painter.paint(shot.path, shot.lora, on_step=lambda _: bar.advance(1)) for shot in wanted)
        pictures = _pictures(scene, wanted)
        (work / INDEX).write_bytes(msgspec.json.format(msgspec.json.encode(pictures)) + b"\n")
        for shot in wanted if len(scene.prompts) > 1 else ():
            write_grid(job.stores, scene, shot.lora, work / results.preview(shot.step))
        columns = [(shot.step, shot.lora) for shot in wanted]
        write_sheet(job.stores, scene, columns, work / results.PREVIEWS, complete=True)
        return Built(
            roles={"pictures": digest_of("pictures", [[each.file, each.fragment] for each in pictures])},
            counts=_counts(len(pictures), rendered),
            fragments={each.fragment: holder(each.fragment, job.stores) for each in pictures},
            device=backend.name if rendered else "",
        )

    def foresee(self, job: Job, plan: Plan, work: Path) -> Built:
        """Count the pictures of every step to be shown, and those that training will not have drawn by then."""
        from stages.training.previews import Painter, scene_of

        scene, known = scene_of(job), shots(job)
        painter = Painter(job.stores, scene, transformer=_undrawn, decoder=_undrawn)
        shown, drawn = _steps_to_come(job, known)
        images = len(shown) * len(scene.prompts)
        missing = _missing(painter, [shot for shot in known if shot.step in shown - drawn])
        # One of a step not trained yet: as many as there are different prompts.
        missing += len(set(scene.keys(NOT_YET))) * len(shown - drawn - {shot.step for shot in known})
        return Built(roles={"pictures": unknown("pictures")}, counts=_counts(images, missing))

    def reused(self, manifest: Manifest) -> Mapping[str, int]:
        """All pictures were there."""
        return _counts(manifest.counts["images"], 0)

    def restore(self, job: Job, folder: Path, manifest: Manifest) -> None:
        """Put every step's picture, and the latest, into the run folder. Raises Damaged for a changed one."""
        from stages.training.copies import know_together, restore_proved

        for name, entry in manifest.files.items():
            if name != INDEX:
                restore_proved(job, folder / name, entry, job.run_folder / name, self.name)
        listed = read_proved(folder / INDEX, manifest.files[INDEX].sha256)
        pictures = msgspec.json.decode(listed, type=list[Picture])
        placed = [(each, holder(each.fragment, job.stores) / each.fragment) for each in pictures]
        know_together(job, (path for each, source in placed for path in (source, job.run_folder / each.file)))
        for each, source in placed:
            restore_proved(job, source, manifest.fragments[each.fragment], job.run_folder / each.file, self.name)
        if pictures:
            latest = job.run_folder / results.preview(max(each.step for each in pictures))
            restore_file(latest, job.run_folder / results.LATEST_PREVIEW, job.digests)


def shots(job: Job) -> list[Shot]:
    """Return step 0 without a LoRA, every public checkpoint, and the finished LoRA; with `ema` their averages.

    Raises Damaged for a checkpoint that cannot be read: its step would be missing from the pictures unsaid.
    """
    from stages.training.checkpoints import public_checkpoints

    manifest, folder = upstream(job, "train")
    steps = manifest.params["steps"]
    found, unreadable = public_checkpoints(job.stores, manifest, job.config.train.checkpoint_every)
    for step, error in unreadable.items():
        # Of the last step there is the finished LoRA.
        if step < steps:
            raise error
    ema = job.config.preview.ema
    before = [(each.step, *each.shown(ema=ema)) for each in found if each.step < steps]
    kind = "ema" if ema else "lora"
    last = (steps, folder / f"{kind}.safetensors", manifest.roles[kind])
    return [Shot(0, "none", None), *(Shot(step, digest, path) for step, path, digest in (*before, last))]


def _missing(painter: Painter, wanted: Sequence[Shot]) -> int:
    """Return how many pictures of the shots no store has."""
    return sum(len(painter.missing(shot.lora)) for shot in wanted)


def _steps_to_come(job: Job, known: Sequence[Shot]) -> tuple[set[int], set[int]]:
    """Return the steps to be shown once training is done, and those of which it draws the pictures."""
    manifest, _ = upstream(job, "train")
    settings, start = job.config.preview, manifest.counts["resumed_from"]
    if not is_unknown(manifest.roles["lora"]):
        return {shot.step for shot in known}, set()
    train = job.config.train
    coming = {*range(train.checkpoint_every, train.steps, train.checkpoint_every), train.steps}
    coming = {step for step in coming if step > start}
    draws = settings.during_training and settings.distilled is None
    saved = {shot.step for shot in known if shot.path is not None} | coming
    return {0, *_staying(train.rotation, saved)}, {0, *coming} if draws else set()


def _staying(rotation: Rotation | None, saved: set[int]) -> set[int]:
    """Return the steps of `saved` whose checkpoints a rotation leaves, at most: sizes and losses are to come."""
    from stages.training.rotation import Saved, plan_rotation

    if rotation is None:
        return saved
    staying: set[int] = set()
    for step in sorted(saved):
        staying.add(step)
        staying -= {*plan_rotation(rotation, [Saved(each, 0, 0.0) for each in staying], step)}
    # The best may be any of those that are not kept for another reason.
    best = sorted(saved - staying)[:1] if rotation.keep_best else []
    return {*staying, *best}


def _undrawn() -> Never:
    raise AssertionError("a look ahead draws nothing")


def _pictures(scene: Scene, wanted: list[Shot]) -> list[Picture]:
    from stages.training.previews import picture_name

    return [
        Picture(shot.step, text, name, picture_name(key))
        for shot in wanted
        for name, key, (text, _) in zip(
            results.previews(shot.step, len(scene.prompts)), scene.keys(shot.lora), scene.prompts, strict=True
        )
    ]


def _counts(images: int, rendered: int) -> dict[str, int]:
    return {"images": images, "rendered": rendered, "reused": images - rendered}


STAGE = Preview()
