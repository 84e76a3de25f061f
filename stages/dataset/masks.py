"""Masks: which part of each picture trains, by its own alpha channel or by a file name.mask.png beside it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import assert_never

from schemas.errors import Fault
from schemas.validate import Validate
from stages.dataset.discover import masked_by, stem_of
from stages.dataset.inspections import Look
from stages.dataset.pixels import Inspected


@dataclass(frozen=True)
class Mask:
    """The file a mask comes from, relative to the dataset, and its sha256; "" where all of the picture counts."""

    path: str = ""
    sha256: str = ""


def find_masks(
    folder: Path, files: Sequence[str], pictures: Mapping[str, Inspected], config: Validate, look: Look
) -> tuple[dict[str, Mask], list[Fault]]:
    """Return the mask of every picture whose mask can be used, and the fault of each other."""
    masks = dict.fromkeys(pictures, Mask())
    match config.masks:
        case None:
            return masks, []
        case "alpha":
            own = {path: Mask(path, seen.image_sha256) for path, seen in pictures.items() if seen.transparent}
            return masks | own, []
        case "files":
            return _from_files(
                pictures, dict(zip(files, look.inspect(folder, files, config.max_megapixels), strict=True))
            )
        case _:
            assert_never(config.masks)


def _from_files(
    pictures: Mapping[str, Inspected], files: Mapping[str, Inspected | Fault]
) -> tuple[dict[str, Mask], list[Fault]]:
    by_stem: dict[str, list[str]] = defaultdict(list)
    for path in pictures:
        by_stem[stem_of(path)].append(path)
    masks = dict.fromkeys(pictures, Mask())
    faults: list[Fault] = []
    for name, seen in files.items():
        for path in by_stem[masked_by(name)]:
            outcome = _fitting(name, seen, pictures[path])
            if isinstance(outcome, Fault):
                faults.append(outcome)
                del masks[path]
            else:
                masks[path] = outcome
    return masks, faults


def _fitting(name: str, seen: Inspected | Fault, picture: Inspected) -> Mask | Fault:
    """Return the mask in the file `name`, which must be as large as its picture."""
    if isinstance(seen, Fault):
        return seen
    if (picture.width, picture.height) != (seen.width, seen.height):
        return Fault(
            code="mask.size",
            what="the mask is not as large as its picture",
            where=name,
            why=f"expected {picture.width} x {picture.height}, found {seen.width} x {seen.height}",
            fix="draw the mask over the upright picture, at its full size",
        )
    return Mask(name, seen.image_sha256)
