"""Which checkpoints stay: the rule as a pure function, and the deletion of what it names.

Deleted are only whole checkpoints of this trajectory in our own store, and their copies in the run folder where the
bytes are still the same. Damaged folders, other trajectories and other stores are never touched. Another run of the
same trajectory in the same store shares these checkpoints, and so their loss.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from schemas import results
from schemas.rotation import Rotation
from stages.contract.artifacts import MANIFEST
from stages.contract.digests import sha256_file
from stages.contract.publish import workspace
from stages.training.checkpoints import LORA, Checkpoint, list_checkpoints

VALIDATION = "validation_loss"
# Losses of single steps are mostly noise level: compared are means over the last so many.
SMOOTH_STEPS = 100
DAY_SECONDS = 86_400


@dataclass(frozen=True)
class Saved:
    """A checkpoint as far as rotation goes; `loss` is comparable between those of one list, None is unknown."""

    step: int
    size_bytes: int
    age_days: float
    loss: float | None = None


def plan_rotation(rotation: Rotation, saved: Sequence[Saved], current: int) -> list[int]:
    """Return the steps whose checkpoints go; `current` is the one saved just now, which stays like the newest."""
    always = {current, *rotation.pin}
    if saved:
        always.add(max(each.step for each in saved))
    known = [each for each in saved if each.loss is not None and math.isfinite(each.loss)]
    if rotation.keep_best and known:
        always.add(min(known, key=lambda each: (each.loss, -each.step)).step)
    chosen = _chosen(rotation, [each.step for each in saved]) | always
    staying = [each for each in sorted(saved, key=lambda each: each.step) if each.step in chosen]
    if rotation.max_age_days is not None:
        most = rotation.max_age_days
        staying = [each for each in staying if each.step in always or each.age_days <= most]
    if rotation.max_gigabytes is not None:
        staying = _fitting(staying, always, rotation.max_gigabytes * 1e9)
    left = {each.step for each in staying}
    return sorted(each.step for each in saved if each.step not in left)


def _chosen(rotation: Rotation, steps: Sequence[int]) -> set[int]:
    """Return the steps that `keep_last` and `keep_every` keep; with neither, all."""
    if rotation.keep_last is None and rotation.keep_every is None:
        return set(steps)
    last = sorted(steps)[-rotation.keep_last :] if rotation.keep_last is not None else []
    every = rotation.keep_every
    return {*last, *(step for step in steps if every is not None and step % every == 0)}


def _fitting(staying: Sequence[Saved], always: set[int], most_bytes: float) -> list[Saved]:
    """Leave out the oldest, but none of `always`, until the rest is small enough."""
    total = sum(each.size_bytes for each in staying)
    kept: list[Saved] = []
    for each in staying:
        if total > most_bytes and each.step not in always:
            total -= each.size_bytes
        else:
            kept.append(each)
    return kept


def losses(metrics: Sequence[Mapping[str, float | None]], steps: Sequence[int]) -> dict[int, float]:
    """Return the loss each step's checkpoint is judged by: the last validation loss, else the mean training loss.

    Where there are validation losses, steps before the first have none; the mean is over the last steps up to it.
    """
    name = VALIDATION if any(line.get(VALIDATION) is not None for line in metrics) else "loss"
    count = 1 if name == VALIDATION else SMOOTH_STEPS
    found: dict[int, float] = {}
    for step in steps:
        values = [line.get(name) for line in metrics if (line["step"] or 0) <= step]
        finite = [value for value in values if value is not None and math.isfinite(value)][-count:]
        if finite:
            found[step] = sum(finite) / len(finite)
    return found


def rotate(
    store: Path, run_folder: Path, rotation: Rotation, current: Checkpoint, metrics: Sequence[Mapping[str, float]]
) -> list[int]:
    """Delete what the rotation leaves out, now that `current` is durable; return its steps. Raises NoResources."""
    found = {each.step: each for each in list_checkpoints([store], current.manifest.trajectory)}
    judged = losses(metrics, list(found))
    saved = [
        Saved(step, _size_bytes(checkpoint), _age_days(checkpoint), judged.get(step))
        for step, checkpoint in found.items()
    ]
    doomed = plan_rotation(rotation, saved, current.step)
    if doomed:
        with workspace(store) as space:
            for step in doomed:
                _remove_copy(run_folder, found[step])
                # Gone in one rename; what is left of it lies where litter is swept.
                found[step].folder.rename(space / str(step))
    return doomed


def _remove_copy(run_folder: Path, checkpoint: Checkpoint) -> None:
    copy = run_folder / results.checkpoint(checkpoint.step)
    if copy.is_file() and sha256_file(copy) == checkpoint.manifest.files[LORA].sha256:
        copy.unlink()


def _size_bytes(checkpoint: Checkpoint) -> int:
    return sum(entry.size for entry in checkpoint.manifest.files.values())


def _age_days(checkpoint: Checkpoint) -> float:
    return (time.time() - (checkpoint.folder / MANIFEST).stat().st_mtime) / DAY_SECONDS
