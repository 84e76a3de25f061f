"""Sentences about things: mostly whole ones, the rest shorter or in another order, so that short prompts work."""

from __future__ import annotations

import numpy as np

from stages.world.outlines import BASE
from stages.world.scenes import COLOURS, PLACES, SIZES, TEXTURES, Things

FULL_SHARE = 0.6
FULL = "a {size} {colour} {shape} at the {place} on a {texture} {ground} background"
OTHERS = (
    "a {colour} {shape}",
    "a {size} {colour} {shape}",
    "a {colour} {shape} at the {place}",
    "a {colour} {shape} on a {ground} background",
    "a {size} {colour} {shape} at the {place}",
    "a {size} {colour} {shape} on a {texture} {ground} background",
    "a {colour} {shape} at the {place} on a {texture} {ground} background",
    "on a {texture} {ground} background a {size} {colour} {shape} at the {place}",
    "a {texture} {ground} background with a {size} {colour} {shape} at the {place}",
    "at the {place} a {size} {colour} {shape} on a {texture} {ground} background",
)


def captions(things: Things, rng: np.random.Generator) -> list[str]:
    """Return one sentence for each of the things, of the base shapes."""
    forms = np.where(
        rng.random(len(things.size)) < FULL_SHARE, len(OTHERS), rng.integers(len(OTHERS), size=len(things.size))
    )
    sentences = (*OTHERS, FULL)
    return [sentences[form].format(**words) for form, words in zip(forms, words_of(things), strict=True)]


def full_captions(things: Things, shape: str | None = None) -> list[str]:
    """Return the whole sentence for each of the things; `shape` is said instead of the base shape's name."""
    own = {} if shape is None else {"shape": shape}
    return [FULL.format(**{**words, **own}) for words in words_of(things)]


def words_of(things: Things) -> list[dict[str, str]]:
    """Return the words for each of the things."""
    names = [list(SIZES), list(COLOURS), list(BASE), list(PLACES), list(TEXTURES), list(COLOURS)]
    return [
        {field: words[index] for field, words, index in zip(Things._fields, names, row, strict=True)}
        for row in np.stack(things, axis=1).tolist()
    ]
