"""The few numbers that say how a run went."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from schemas import results
from stages.console.charts import smoothed
from stages.pages.record import Record


@dataclass(frozen=True)
class Figures:
    """How a run went: None for what was not recorded. Losses are plain numbers, sizes are in bytes.

    `loss` is smoothed; `validation` is the last one, `best` the least and the step it was measured at; `device` is
    what trained.
    """

    step: int
    steps: int | None
    loss: float | None
    validation: float | None
    best: tuple[float, int] | None
    seconds: float | None
    seconds_per_step: float | None
    peak_bytes: int | None
    lora_bytes: int | None
    device: str | None


def figures_of(record: Record) -> Figures:
    """Return the figures of a run."""
    losses, seconds = _column(record, "loss"), _column(record, "seconds")
    validation, peaks = _column(record, "validation_loss"), _column(record, "peak_bytes")
    lora = record.folder / results.lora(record.name)
    least = min(validation, key=lambda each: each[1], default=None)
    return Figures(
        step=record.step,
        steps=record.training.params.get("steps") if record.training is not None else None,
        loss=float(smoothed(np.array([value for _, value in losses]))[-1]) if losses else None,
        validation=validation[-1][1] if validation else None,
        best=(least[1], least[0]) if least else None,
        seconds=sum(value for _, value in seconds) if seconds else None,
        seconds_per_step=float(np.median([value for _, value in seconds])) if seconds else None,
        peak_bytes=int(max(value for _, value in peaks)) if peaks else None,
        lora_bytes=lora.stat().st_size if lora.is_file() else None,
        device=record.made["train"].provenance.get("device") if "train" in record.made else None,
    )


def _column(record: Record, field: str) -> list[tuple[int, float]]:
    """Return (step, value) of every line with a finite value."""
    found = [(line["step"], line.get(field)) for line in record.metrics]
    return [(step, float(value)) for step, value in found if isinstance(value, int | float) and math.isfinite(value)]


def duration(seconds: float) -> str:
    """Return a time as a person says it."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def size(count: int) -> str:
    """Return a number of bytes as a person says it, in decimal units."""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def number(value: float) -> str:
    """Return a number with four figures."""
    return f"{value:.4g}"
