"""The page of several runs side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stages.pages.curves import RUN_COLORS, shared_panels
from stages.pages.figures import Figures, duration, figures_of, number, size
from stages.pages.previews import Strip, preview_files, shown_steps, strips
from stages.pages.record import Record
from stages.pages.report import Page
from stages.pages.settings import differing
from stages.pages.template import render

HELD_OUT = "held_out"
ABSENT = "not recorded"


def compare_page(records: Sequence[Record]) -> tuple[Page, str]:
    """Return the page of runs, and its sentence on which of them is the better."""
    figures = [figures_of(record) for record in records]
    steps, grid, unreadable = _grid(records)
    settings, verdict = differing(records), better(records, figures)
    remarks = [f"{record.name}: {said}" for record in records for said in record.remarks] + unreadable
    drawn = shared_panels({record.name: record.metrics for record in records})
    data = render(
        "compare.html",
        records=records,
        colors={record.name: color for record, color in zip(records, RUN_COLORS, strict=False)},
        verdict=verdict,
        remarks=remarks,
        steps=steps,
        grid=grid,
        panels=drawn,
        figures=_table(figures),
        differing=settings,
        inputs=_other_inputs(records),
    )
    previews = sum(len(strip.shots) for _, cells in grid for _, strip in cells if strip)
    counts = {"runs": len(records), "previews": previews, "curves": len(drawn), "settings": len(settings)}
    return Page(data, counts, remarks), verdict


def better(records: Sequence[Record], figures: Sequence[Figures]) -> str:
    """Return what the validation losses say: only those on the same pictures can be compared."""
    measured = [(record, each.best) for record, each in zip(records, figures, strict=True) if each.best]
    if len(measured) < len(records):
        without = " and ".join(each.name for each in records if all(each is not record for record, _ in measured))
        return f"{without} measured no validation loss, so no number says which is better: look at the pictures."
    if len({_held_out(record) for record, _ in measured}) > 1:
        return "These runs hold out other pictures: their validation losses cannot be compared. Look at the pictures."
    ordered = sorted(measured, key=lambda each: each[1])
    (best, (least, step)), (second, (loss, _)) = ordered[:2]
    if least == loss:
        return f"{best.name} and {second.name} reach the same validation loss, {number(least)}."
    return (
        f"{best.name} is the better by validation loss: {number(least)} at step {step}, "
        f"{second.name} comes to {number(loss)}."
    )


def _held_out(record: Record) -> tuple[str | None, ...]:
    """Return what a validation loss is of: the pictures kept from training, their latents and captions."""
    inputs = record.training.inputs if record.training is not None else {}
    return tuple(inputs.get(role) for role in (HELD_OUT, "latents", "caption", "transformer"))


def _other_inputs(records: Sequence[Record]) -> list[str]:
    """Return what trainings read that is not the same for all, in words."""
    inputs: list[Mapping[str, str]] = [record.training.inputs if record.training else {} for record in records]
    roles = sorted({role for each in inputs for role in each})
    return [role.replace("_", " ") for role in roles if len({each.get(role) for each in inputs}) > 1]


def _grid(
    records: Sequence[Record],
) -> tuple[list[int], list[tuple[str, list[tuple[str, Strip | None]]]], list[str]]:
    """Return the steps, a row for each prompt with the strip of each run (None: not drawn), and remarks."""
    files = {record.name: preview_files(record) for record in records}
    steps = shown_steps(step for each in files.values() for by_step in each.values() for step in by_step)
    found: dict[str, dict[str, Strip]] = {}
    remarks: list[str] = []
    for name, each in files.items():
        films, unreadable = strips(each, shown_steps(step for by_step in each.values() for step in by_step))
        found[name] = {film.prompt: film for film in films}
        remarks += [f"{name}: {said}" for said in unreadable]
    prompts = dict.fromkeys(prompt for films in found.values() for prompt in films)
    return steps, [(prompt, [(name, found[name].get(prompt)) for name in found]) for prompt in prompts], remarks


def _table(figures: Sequence[Figures]) -> list[tuple[str, list[str]]]:
    """Return the rows of the figures that some run has."""
    rows = [
        ("steps", [f"{each.step} of {each.steps}" if each.steps else f"{each.step}" for each in figures]),
        ("loss, smoothed", [_or_none(each.loss, number) for each in figures]),
        ("validation loss", [_or_none(each.validation, number) for each in figures]),
        (
            "best validation loss",
            [f"{number(each.best[0])} at step {each.best[1]}" if each.best else ABSENT for each in figures],
        ),
        ("time in steps", [_or_none(each.seconds, duration) for each in figures]),
        ("a step", [_or_none(each.seconds_per_step, duration) for each in figures]),
        ("peak memory", [_or_none(each.peak_bytes, size) for each in figures]),
        ("LoRA file", [_or_none(each.lora_bytes, size) for each in figures]),
        ("trained on", [_or_none(each.device, str) for each in figures]),
    ]
    return [(name, values) for name, values in rows if set(values) != {ABSENT}]


def _or_none(value: Any, say: Callable[[Any], str]) -> str:
    return ABSENT if value is None else say(value)
