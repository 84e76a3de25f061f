"""What is checked before the model is loaded: that a step fits into memory, and the checkpoints onto the disk."""

from __future__ import annotations

import itertools
import math

from schemas.rotation import Rotation
from schemas.train import Train
from stages.contract.job import Job
from stages.contract.places import disk_of, require_room, require_writable
from stages.contract.publish import make_folder, no_resources
from stages.flux2.backend import Backend
from stages.flux2.identity import model_of
from stages.flux2.load import transformer_formats
from stages.flux2.variants import Variant
from stages.training.checkpoints import FOLDER
from stages.training.data import TrainingData
from stages.training.memory import Demand, Device, Packed, Sizes, device_bytes, require, sizes
from stages.training.timesteps import window

# Of metrics per step, all parts of a loss among them; every checkpoint holds those of all steps before it.
LINE_BYTES = 240


def preflight(job: Job, data: TrainingData, backend: Backend, steps_done: int) -> None:
    """Raise NoResources where the training of `job` would surely run out of memory or disk; warn where it may.

    Raises BadConfig for a window of timesteps that pictures of some size never fall into.
    """
    settings, model = job.config.train, model_of(job)
    for tokens in {height * width for _, (height, width) in data.buckets}:
        window(settings.timesteps, tokens)
    taken, items = settings.batch_size * settings.gradient_accumulation, len(data.buckets)
    if taken > items:
        job.warn(
            f"train.batch_size times train.gradient_accumulation is {taken}, more than the {items} items there are: "
            "a step takes fewer, or repeats some"
        )
    for line in beyond_the_end(settings):
        job.warn(line)
    require_disk(job, needs(settings, sizes(model.variant, settings, backend.compute_dtype), steps_done))
    require_memory(job, data, backend)


def beyond_the_end(settings: Train) -> list[str]:
    """Return what settings ask for at steps that are never taken: no error, for a training may be extended later."""
    steps, validation = settings.steps, settings.validation
    lines: list[str] = []
    if (warmup := settings.schedule.warmup_steps) > steps:
        share = 100 * steps / warmup
        lines.append(
            f"train.schedule.warmup_steps is {warmup}: the rate ends at {share:.0f} % of train.learning_rate"
        )
    for phase, after in itertools.pairwise(settings.resolutions):
        if phase.until is not None and phase.until >= steps:
            sizes = ", ".join(map(str, after.sizes))
            lines.append(
                f"train.resolutions has an until of {phase.until}: what follows it ({sizes}) is never trained"
            )
    if validation is not None and validation.every > steps:
        lines.append(f"train.validation.every is {validation.every}: the loss is measured once, before training")
    return [f"{line}, as train.steps is {steps}" for line in lines]


def require_memory(job: Job, data: TrainingData, backend: Backend) -> None:
    """Raise NoResources where a step of the training of `job` would surely run out of memory; warn where it may."""
    settings, model = job.config.train, model_of(job)
    parts = sizes(model.variant, settings, backend.compute_dtype)
    tokens = max(height * width for _, (height, width) in data.buckets)
    packed = transformer_formats(model, job.config.model.quantize)
    demand = demand_of(model.variant, settings, backend.device, parts, (tokens, packed))
    require(demand, device_bytes(backend), job.warn)


def demand_of(variant: Variant, settings: Train, device: Device, parts: Sizes, held: tuple[int, Packed]) -> Demand:
    """Return what a step needs; `held` are the tokens of the largest picture and the quantized modules."""
    return Demand(
        config=variant.transformer,
        device=device,
        sizes=parts,
        tokens=held[0],
        text_tokens=variant.text_encoder.length,
        batch=settings.batch_size,
        rank=settings.rank,
        checkpointing=settings.gradient_checkpointing,
        packed=held[1],
    )


def needs(settings: Train, parts: Sizes, steps_done: int) -> tuple[int, int]:
    """Return the bytes that the checkpoints still to come will take, in the store and in the run folder."""
    every = settings.checkpoint_every
    coming = settings.steps // every - steps_done // every + (settings.steps % every > 0)
    count = min(coming, math.inf if settings.rotation is None else most_kept(settings.rotation, settings))
    files = parts.file * (1 if settings.ema is None else 2)
    store = count * (parts.state + files + LINE_BYTES * settings.steps)
    # A rotation by size bounds the store's part; one more is written before anything is deleted.
    rotation = settings.rotation
    if rotation is not None and rotation.max_gigabytes is not None:
        store = min(store, rotation.max_gigabytes * 1e9 + parts.state + files)
    # The finished LoRA once more, in both places.
    return int(store) + files, int(count) * parts.file + files


def most_kept(rotation: Rotation, settings: Train) -> float:
    """Return how many checkpoints can be there at once, the one just written included."""
    if rotation.keep_last is None and rotation.keep_every is None:
        return math.inf
    multiples = settings.steps // rotation.keep_every if rotation.keep_every is not None else 0
    return (rotation.keep_last or 1) + multiples + len(rotation.pin) + rotation.keep_best + 1


def require_disk(job: Job, need_bytes: tuple[int, int]) -> None:
    """Raise NoResources unless store and run folder have room for so many bytes, together where they share a disk."""
    places = (job.store, job.run_folder)
    for place in places:
        with no_resources(place):
            make_folder(place)
            require_writable(place)
    checkpoints = job.store / FOLDER
    with no_resources(checkpoints):
        require_writable(checkpoints)
    shared = disk_of(job.store) == disk_of(job.run_folder)
    wanted = [(job.store, sum(need_bytes))] if shared else list(zip(places, need_bytes, strict=True))
    for place, need in wanted:
        fix = "free some space, raise train.checkpoint_every, or set train.rotation.keep_last"
        require_room(place, need, why="for the checkpoints of this training", fix=fix)
