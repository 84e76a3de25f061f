"""The previews of a run, by prompt and step, as a page shows them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from schemas.base import UNREADABLE
from stages.dataset.captions import prompt_with_trigger
from stages.dataset.pixels import DECODER_ERRORS
from stages.pages.pictures import data_uri
from stages.pages.record import Record

PREVIEW_PX = 768
PREVIEW_QUALITY = 90
# Of longer trainings, evenly spread steps.
MOST_STEPS = 24
SINGLE = re.compile(r"preview_(\d{1,9})(?:_(\d{1,3}))?\.png")


@dataclass(frozen=True)
class Shot:
    """One picture in the page: the step it shows, its data URI and its size there in pixels."""

    step: int
    src: str
    width: int
    height: int


@dataclass(frozen=True)
class Strip:
    """A prompt's pictures by step."""

    prompt: str
    shots: Sequence[Shot]


class _Index(msgspec.Struct):
    step: int
    prompt: str
    file: str


def preview_files(record: Record) -> dict[str, dict[int, Path]]:
    """Return the previews of a run: prompt -> step -> file.

    The finished preview lists them; before, they are those that training put into the run folder.
    """
    training, artifact = record.training, record.artifacts.get("preview")
    if artifact is not None and training is not None and training.finished:
        try:
            listed = msgspec.json.decode((artifact / "index.json").read_bytes(), type=list[_Index])
        except (OSError, *UNREADABLE):
            listed = []
        files: dict[str, dict[int, Path]] = {}
        for each in listed:
            files.setdefault(each.prompt, {})[each.step] = record.folder / Path(each.file).name
        if files:
            return files
    return _lying_about(record)


def _lying_about(record: Record) -> dict[str, dict[int, Path]]:
    singles: dict[int, dict[int, Path]] = {}
    for path in record.folder.glob("preview_*.png"):
        if found := SINGLE.fullmatch(path.name):
            singles.setdefault(int(found[2] or 0), {})[int(found[1])] = path
    if len(singles) > 1:
        # With several prompts, the picture without a number is the grid of the others.
        singles.pop(0, None)
    names = _prompts(record)
    fits = len(names) == len(singles)
    return {
        names[place] if fits else f"prompt {number or 1}": dict(sorted(singles[number].items()))
        for place, number in enumerate(sorted(singles))
    }


def _prompts(record: Record) -> list[str]:
    """Return the prompts in order, where the pipeline's file still says those that were encoded."""
    if record.config is None or "encode-text" not in record.made:
        return []
    prompts = [prompt_with_trigger(text, record.config.validate.trigger) for text in record.config.preview.prompts]
    return prompts if sorted(set(prompts)) == record.made["encode-text"].params["prompts"] else []


def strips(files: Mapping[str, Mapping[int, Path]], steps: Sequence[int]) -> tuple[list[Strip], list[str]]:
    """Return the strip of every prompt with its pictures at `steps`, and a remark on files that cannot be shown."""
    found: list[Strip] = []
    unreadable: list[str] = []
    for prompt, by_step in files.items():
        shots = []
        for step in steps:
            if step in by_step:
                shot = _shot(step, by_step[step])
                if shot is None:
                    unreadable.append(by_step[step].name)
                else:
                    shots.append(shot)
        if shots:
            found.append(Strip(prompt, shots))
    return found, [f"Previews that cannot be read: {', '.join(unreadable)}."] if unreadable else []


def shown_steps(every: Iterable[int]) -> list[int]:
    """Return the steps to show of those there are: all, or some, evenly spread, with the first and the last."""
    steps = sorted(set(every))
    if len(steps) <= MOST_STEPS:
        return steps
    gap = (len(steps) - 1) / (MOST_STEPS - 1)
    return [steps[round(number * gap)] for number in range(MOST_STEPS)]


def _shot(step: int, path: Path) -> Shot | None:
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG",)) as picture:
            shown = picture.convert("RGB")
    except DECODER_ERRORS:
        return None
    shown.thumbnail((PREVIEW_PX, PREVIEW_PX))
    return Shot(step, data_uri(shown, PREVIEW_QUALITY), shown.width, shown.height)
