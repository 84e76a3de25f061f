"""What the loss is: `[train.loss]`, `[train.weighting]`, `[train.mask]`, `[train.preservation]`."""

from __future__ import annotations

import re
from typing import Annotated

from msgspec import Meta

from schemas.base import TEXT, Strict

Weight = Annotated[float, Meta(gt=0.0, le=1000.0)]
ClassWord = Annotated[str, Meta(min_length=1, max_length=64)]
ClassWords = Annotated[tuple[ClassWord, ...], Meta(min_length=1, max_length=64)]


class Mse(Strict, frozen=True, tag_field="kind", tag="mse"):
    """The square of the velocity's error."""


class Huber(Strict, frozen=True, tag_field="kind", tag="huber"):
    """The square up to an error of `delta`, then the tangent: outliers pull with constant force."""

    delta: Annotated[float, Meta(gt=0.0, le=100.0)] = 1.0


Loss = Mse | Huber


class Unweighted(Strict, frozen=True, tag_field="kind", tag="none"):
    """Every noise level counts the same."""


class Bell(Strict, frozen=True, tag_field="kind", tag="bell"):
    """ai-toolkit's table, mean about 1: noise levels around 0.88 count most, nearly clean pictures least."""


class SigmaSqrt(Strict, frozen=True, tag_field="kind", tag="sigma_sqrt"):
    """t^-2, as diffusers has it: nearly clean pictures count most."""


class Cosmap(Strict, frozen=True, tag_field="kind", tag="cosmap"):
    """2 / (pi (1 - 2t + 2t^2)), as diffusers has it: the middle counts twice the ends."""


Weighting = Unweighted | Bell | SigmaSqrt | Cosmap


class Mask(Strict, frozen=True):
    """How much cells outside a picture's mask count, and whether the base model's prediction is their target."""

    outside: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.1
    keep_base: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError where the base model would be kept at no weight."""
        if self.keep_base and not self.outside:
            raise ValueError("keep_base acts by the weight `outside`, which is 0")


class Output(Strict, frozen=True, tag_field="kind", tag="output"):
    """Keep what the base model makes of `class_word`: where the trigger stands, put it, and train to change nothing.

    Several words take turns from caption to caption: each holds another neighbour of the subject. Every `every`-th
    step pays for a second pass over its pictures; its loss counts `weight` times. Of a step's `loss`, which the
    gradient is of, metrics say both parts: `loss_data` and `loss_preservation`.
    """

    class_word: ClassWord | ClassWords
    every: Annotated[int, Meta(ge=1, le=1000)] = 1
    weight: Weight = 1.0

    def __post_init__(self) -> None:
        """Raise ValueError for control characters: msgspec 0.22 crashes over a pattern of text beside an array."""
        words = [self.class_word] if isinstance(self.class_word, str) else self.class_word
        if not all(re.match(TEXT, word) for word in words):
            raise ValueError("class_word holds a control character")


class Prior(Strict, frozen=True, tag_field="kind", tag="prior"):
    """Train on pictures of the class beside those of the subject; each counts `weight` times."""

    weight: Weight = 1.0


Preservation = Output | Prior
