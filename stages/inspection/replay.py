"""Training steps taken again, in memory: do they come to the losses and the weights that were recorded?

A checkpoint holds all that the steps after it depend on, so the steps from one to the next can be taken by
themselves, in any order. Where the same device computed them every bit comes back; another one comes near. Nothing is
written.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from schemas import results
from schemas.base import UNREADABLE
from schemas.errors import Damaged, Diverged, StageError, Stopped
from schemas.manifest import Manifest
from stages.console.progress import Progress, progress
from stages.contract.job import Job
from stages.flux2.identity import model_without_making
from stages.inspection.findings import Chain, Inspection
from stages.inspection.lineage import OUTSIDE, made_of
from stages.inspection.training import settings_of
from stages.lora.init_lora import ROLE, init_lora_inputs
from stages.training.checkpoints import Checkpoint, list_checkpoints, trajectory_of
from stages.training.sources import held_out_inputs, make_trainer, training_data

if TYPE_CHECKING:
    import numpy as np

    from stages.stores.tensors import Tensor
    from stages.training.data import TrainingData
    from stages.training.step import Trainer

    Tensors = Mapping[str, Tensor]

# Between backends: of a step's loss, and of weights relative to what the steps changed. Of 76 steps of the built-in
# model that a CPU took, taken again by an H200, the worst loss differs by 0.013, half by less than 0.003, and none
# the more for coming late; weights by 0.04 at most. In bfloat16 on the CPU: the worst loss by 0.016, weights by 0.096
# after the first 4 steps, by 0.026 after 60 (2026-11-21).
MOST_LOSS_DISTANCE = 0.05
MOST_CHANGE_DISTANCE = 0.3
# Of the numbers of a LoRA file that another backend makes of the same state: those of bfloat16 are 0.004 apart.
MOST_FILE_DISTANCE = 0.02
READ = ("encode-latents", "encode-text", "validate")
Lines = Mapping[int, Mapping[str, float | None]]


@dataclass(frozen=True)
class Stretch:
    """The steps after `start` (None: from the beginning) up to `end`; the first `count` are taken again."""

    start: Checkpoint | None
    end: Checkpoint
    count: int

    @property
    def first(self) -> int:
        """The step it goes on from."""
        return 0 if self.start is None else self.start.step

    @property
    def last(self) -> int:
        """The last step taken again."""
        return self.first + self.count


@dataclass(frozen=True)
class _Replay:
    """A training that can be taken up anywhere: `job` as it was made, `device` what computes now."""

    inspection: Inspection
    train: Manifest
    job: Job
    recorded: Lines
    device: str
    trainer: Trainer
    data: TrainingData


def check_steps(inspection: Inspection, chain: Chain) -> None:
    """Take a share of the training's steps again where the depth asks for it, and compare what they come to."""
    if not inspection.depth.recompute:
        return
    if "train" not in chain:
        inspection.leave_out("training steps made again: no training is finished")
        return
    train, folder = chain["train"]
    found = list_checkpoints(inspection.job.stores, trajectory_of(train.params, train.inputs))
    found = [each for each in found if each.step <= train.params["steps"]]
    recorded = _recorded(folder / results.METRICS)
    stretches = _chosen(found, inspection.depth.share(train.params["steps"]), recorded)
    if not stretches:
        inspection.leave_out("training steps made again: there are no metrics or no checkpoints to compare with")
        return
    try:
        job = _as_made(inspection.job, chain)
        if why := _hindrance(job, chain):
            inspection.leave_out(f"training steps made again: {why}")
            return
        _take_again(_prepared(inspection, train, job, recorded), found, stretches)
    except Stopped as error:
        fix = "run the same command again"
        raise Stopped(error.signal_number, "stopped; verify keeps nothing", fix=fix) from None
    except StageError as error:
        # Damage that other checks met as well is not told twice.
        if isinstance(error, Damaged) and not any(issubclass(kind, Damaged) for kind, _ in inspection.errors):
            inspection.failed(error)
        inspection.leave_out(f"training steps made again: {error.faults[0].what}")


def _recorded(path: Path) -> Lines:
    """Return the lines of metrics by step; none where they cannot be read."""
    try:
        lines = [msgspec.json.decode(line, type=dict[str, float | None]) for line in path.read_bytes().splitlines()]
        return {int(line["step"] or 0): line for line in lines}
    except (OSError, KeyError, OverflowError, ValueError, *UNREADABLE):
        return {}


def _as_made(job: Job, chain: Chain) -> Job:
    """Return the job of the training that was, on the records that the run has; it writes nothing.

    What is in no key, since inputs stand for it, is as it is now.
    """
    train, now = chain["train"][0], job.config
    settings = msgspec.structs.replace(
        settings_of(train), init_lora=now.train.init_lora, validation=now.train.validation
    )
    config = msgspec.structs.replace(
        now,
        run=msgspec.structs.replace(now.run, seed=train.params["seed"]),
        model=msgspec.structs.replace(now.model, quantize=train.params.get("quantize", "none")),
        train=settings,
    )
    made = {stage: chain[stage] for stage in READ if stage in chain}
    return replace(job, config=config, upstream=made, look_only=True)


def _hindrance(job: Job, chain: Chain) -> str:
    """Return in words which input of the training is not there any more; "" when all are."""
    from stages.flux2.load import transformer_digest

    if not all(made_of("train", stage, chain) for stage in READ):
        return "it was made of other records than there are"
    inputs = chain["train"][0].inputs
    model = model_without_making(job)
    now = {**init_lora_inputs(job), **held_out_inputs(job), "transformer": transformer_digest(model)}
    changed = [role.replace("_", " ") for role in OUTSIDE["train"] if now.get(role) != inputs.get(role)]
    return f"its {', '.join(changed)} changed since" if changed else ""


def _chosen(found: Sequence[Checkpoint], budget: int, recorded: Lines) -> list[Stretch]:
    """Return stretches of `budget` steps in all, drawn at random; each as far as its steps are on record."""
    pairs = list(itertools.pairwise([None, *found]))
    random.SystemRandom().shuffle(pairs)
    chosen: list[Stretch] = []
    for start, end in pairs:
        assert end is not None
        whole = Stretch(start, end, end.step - (0 if start is None else start.step))
        usable = itertools.takewhile(lambda step: _taken(recorded.get(step)), range(whole.first + 1, end.step + 1))
        count = min(sum(1 for _ in usable), budget)
        budget -= count
        if count:
            chosen.append(replace(whole, count=count))
    return chosen


def _taken(line: Mapping[str, float | None] | None) -> bool:
    """Whether a line tells of a step: one that found no memory was left out, and might find some now."""
    return line is not None and (_finite(line.get("loss")) or line.get("learning_rate") != 0.0)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _prepared(inspection: Inspection, train: Manifest, job: Job, recorded: Lines) -> _Replay:
    """Load the model and everything else that a training needs. Raises what a training raises."""
    from stages.flux2.backend import prepare
    from stages.training.preflight import require_memory

    backend, data = prepare(), training_data(job)
    inspection.job.say(backend.line())
    require_memory(job, data, backend)
    trainer = make_trainer(job, job.config.train, backend.compute_dtype, train.inputs.get(ROLE))
    return _Replay(inspection, train, job, recorded, backend.name, trainer, data)


def _take_again(replay: _Replay, found: Sequence[Checkpoint], stretches: Sequence[Stretch]) -> None:
    """Take the steps of each stretch again and compare; look at what people use of every checkpoint too."""
    inspection, steps = replay.inspection, replay.train.params["steps"]
    beginning = _state(replay.trainer) if any(stretch.start is None for stretch in stretches) else {}
    for checkpoint in found:
        _compare_files(replay, checkpoint)
    count = sum(stretch.count for stretch in stretches)
    with progress("replay", total=count, quiet=inspection.job.flags.quiet) as bar:
        for stretch in stretches:
            before = beginning if stretch.start is None else stretch.start.state()
            try:
                _compare(replay, stretch, _again(replay, before, stretch.last, bar), before)
            except Diverged as error:
                inspection.count_again("steps", "other", stretch.count)
                _differs(replay, stretch, error.faults[0].what)
    if count < steps:
        inspection.leave_out(f"{steps - count} of {steps} training steps")
    reached = {stretch.end.step for stretch in stretches if stretch.last == stretch.end.step}
    if others := [str(each.step) for each in found if each.step not in reached]:
        more = "a greater --recompute reaches more"
        inspection.leave_out(f"whether the steps before come to the weights saved at {', '.join(others)} ({more})")


def _again(replay: _Replay, state: Tensors, until: int, bar: Progress) -> list[dict[str, float]]:
    """Train from `state` to step `until` and return the lines. Raises what a training raises."""
    from stages.stores.tensors import to_mlx
    from stages.training.loop import Loop

    lines: list[dict[str, float]] = []

    def heard(line: dict[str, float]) -> None:
        lines.append(line)
        bar.advance()

    replay.trainer.load_state({name: to_mlx(tensor) for name, tensor in state.items()})
    settings = msgspec.structs.replace(replay.job.config.train, steps=until)
    Loop(replay.trainer, replay.data, settings, replay.job.config.run.seed, heard, lambda *_: None).run()
    return lines


def _compare(replay: _Replay, stretch: Stretch, lines: Sequence[Mapping[str, float]], before: Tensors) -> None:
    """Note the first thing in which a stretch comes to something else than was recorded."""
    inspection, exact = replay.inspection, stretch.end.manifest.computed_on == (replay.device,)
    if short := next((line for line in lines if not _taken(line)), None):
        inspection.leave_out(f"training steps from {int(short['step'])}: there was no memory for them")
        return
    whole = stretch.last == stretch.end.step
    after, made = (stretch.end.state(), _state(replay.trainer)) if whole else ({}, {})
    faults = [*_other_lines(replay.recorded, lines, exact=exact), *_other_weights(made, after, before, exact=exact)]
    same = not any(True for _ in _other_lines(replay.recorded, lines, exact=True)) and _same(made, after)
    inspection.count_again("steps", "other" if faults else "equal" if same else "close", len(lines))
    for what in faults[:1]:
        _differs(replay, stretch, what)


def _differs(replay: _Replay, stretch: Stretch, what: str) -> None:
    """Note that a stretch does not come to what was recorded."""
    job = replay.inspection.job
    text = f"training again from step {stretch.first} to {stretch.last}: {what}"
    replay.inspection.error(Damaged, "train.replayed", text, stretch.end.folder, f"{job.remedy('train')} --force")


def _other_lines(recorded: Lines, lines: Sequence[Mapping[str, float]], *, exact: bool) -> Iterator[str]:
    """Yield in words what lines say otherwise than was recorded; another backend's gradients say too little."""
    for line in lines:
        expected = recorded[int(line["step"])]
        for name in ("loss", "grad_norm") if exact else ("loss",):
            apart = _apart(line[name], expected.get(name))
            if apart > (0.0 if exact else MOST_LOSS_DISTANCE):
                yield f"step {line['step']} has the {name} {line[name]:.7g}, recorded is {expected.get(name)}"


def _apart(found: float, expected: float | None) -> float:
    """Return the relative difference; numbers that are not finite are the same ones."""
    if expected is None or not math.isfinite(expected) or not math.isfinite(found):
        return 0.0 if _finite(found) == _finite(expected) else math.inf
    return abs(found - expected) / max(abs(found), abs(expected)) if found != expected else 0.0


def _other_weights(made: Tensors, after: Tensors, before: Tensors, *, exact: bool) -> Iterator[str]:
    """Yield in words how the state a stretch ends with is another than the one saved."""
    from stages.training.step import LORA

    if _same(made, after):
        return
    factors = [name for name in made if name.startswith(LORA)]
    scale = _distance(after, before, factors)
    apart = _distance(made, after, factors) / scale if scale else math.inf
    if exact or not apart <= MOST_CHANGE_DISTANCE:
        other = sum(not _equal(made.get(name), after.get(name)) for name in {*made, *after})
        yield (
            f"{other} of {len(after)} tensors of the state are not those saved: the weights are off by "
            f"{apart:.2g} of what the steps changed"
        )


def _compare_files(replay: _Replay, checkpoint: Checkpoint) -> None:
    """Compare the LoRA files of a checkpoint with what its state makes, and with what its manifest tells of them."""
    from stages.stores.tensors import load, tensor_digest, to_mlx

    inspection, trainer = replay.inspection, replay.trainer
    trainer.load_state({name: to_mlx(tensor) for name, tensor in checkpoint.state().items()})
    exact = checkpoint.manifest.computed_on == (replay.device,)
    average = trainer.ema_factors
    for path, factors in ((checkpoint.lora, trainer.factors), (checkpoint.ema, average)):
        if path is None or factors is None:
            continue
        made, saved = trainer.lora_file(factors), load(path).tensors
        apart = _distance(made, saved, sorted(saved)) / (_distance(saved, {}, sorted(saved)) or math.inf)
        told = checkpoint.manifest.lora if path == checkpoint.lora else checkpoint.manifest.ema
        if tensor_digest(saved) != told or (not _same(made, saved) if exact else not apart <= MOST_FILE_DISTANCE):
            what = f"the LoRA of step {checkpoint.step} is not what its state makes: they differ by {apart:.2g}"
            inspection.error(Damaged, "checkpoint.lora", what, path, f"{inspection.job.remedy('train')} --force")


def _state(trainer: Trainer) -> dict[str, Tensor]:
    from stages.stores.tensors import from_mlx

    return {name: from_mlx(array) for name, array in trainer.state().items()}


def _same(made: Tensors, saved: Tensors) -> bool:
    return made.keys() == saved.keys() and all(_equal(made[name], saved[name]) for name in made)


def _equal(made: Tensor | None, saved: Tensor | None) -> bool:
    """Whether two tensors are the same to the bit."""
    if made is None or saved is None:
        return False
    return (made.dtype, made.shape, made.data.tobytes()) == (saved.dtype, saved.shape, saved.data.tobytes())


def _distance(one: Tensors, other: Tensors, names: Sequence[str]) -> float:
    """Return the L2 distance over all of `names`, float64; infinite between different shapes. Nothing is zero."""
    import numpy as np

    total = 0.0
    for name in names:
        if name not in one or (name in other and one[name].shape != other[name].shape):
            return math.inf
        off = _values(one[name]) - (_values(other[name]) if name in other else 0.0)
        total += float(np.square(off).sum())
    return math.sqrt(total)


def _values(tensor: Tensor) -> np.ndarray:
    import numpy as np

    from stages.training.data import widened

    return widened(tensor.data, "bfloat16" if tensor.dtype == "BF16" else tensor.dtype).astype(np.float64)
