"""`[train.validation]`: the loss on pictures kept from training, at fixed noise levels; absent is off."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from schemas.base import Strict

Name = Annotated[str, Meta(min_length=1, max_length=4096)]
Sigma = Annotated[float, Meta(gt=0.0, le=1.0)]


class Validation(Strict, frozen=True):
    """Every `every` steps the mean loss over the held-out pictures and `sigmas`, with noise of `seed`.

    Held out are the pictures called `names` (paths in the dataset), else `pictures` of them chosen by `seed`. Of all
    this only the choice is keyed: it alone changes what is trained.

    A loss above `collapse_factor` times the best so far, `collapse_patience` times in a row, ends the training: the
    LoRA is ruining the model. Learning too much by heart costs some tenths, seldom half.
    """

    every: Annotated[int, Meta(ge=1, le=10_000_000)] = 50
    pictures: Annotated[int, Meta(ge=1, le=1000)] = 2
    names: tuple[Name, ...] = ()
    seed: Annotated[int, Meta(ge=0, lt=2**32)] = 42
    collapse_factor: Annotated[float, Meta(gt=1.0, le=1000.0)] = 1.5
    collapse_patience: Annotated[int, Meta(ge=1, le=1000)] = 3
    sigmas: Annotated[tuple[Sigma, ...], Meta(min_length=1, max_length=64)] = (0.1, 0.3, 0.5, 0.7, 0.9)
