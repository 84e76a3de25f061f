"""`[train.timesteps]`: how t is drawn, in 0..1 where 1 is pure noise; a kind each, all with a window and strata."""

from __future__ import annotations

import math
from typing import Annotated

from msgspec import Meta

from schemas.base import Strict

Level = Annotated[float, Meta(ge=0.0, le=1.0)]
Mean = Annotated[float, Meta(ge=-10.0, le=10.0)]
Spread = Annotated[float, Meta(gt=0.0, le=10.0)]
# Outside these the map of Esser et al. turns back and is no longer a quantile function.
MODE_SCALE_MAX = 2 / (math.pi - 2)
ModeScale = Annotated[float, Meta(ge=-1.0, le=MODE_SCALE_MAX)]


class Windowed(Strict, frozen=True, tag_field="kind"):
    """t stays in minimum..maximum: the distribution is restricted, nothing piles up at the ends.

    `stratified` draws every sixteenth of the probability once in any sixteen successive places of the run.
    """

    minimum: Level = 0.0
    maximum: Level = 1.0
    stratified: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for a window with nothing in it."""
        if self.minimum >= self.maximum:
            raise ValueError(f"minimum {self.minimum} is not below maximum {self.maximum}")


class Uniform(Windowed, frozen=True, tag="uniform"):
    """t ~ U(0, 1)."""


class Balanced(Windowed, frozen=True, tag="balanced"):
    """t ~ U(0, 1): what ai-toolkit calls neither content nor style; not a mixture of the two."""


class Weighted(Windowed, frozen=True, tag="weighted"):
    """t ~ U(0, 1), and the loss weighted by the bell of `[train.weighting]` (ai-toolkit's choice for FLUX.2)."""


class LogitNormal(Windowed, frozen=True, tag="logit_normal"):
    """t = sigmoid(n), n ~ N(mean, std)."""

    mean: Mean = 0.0
    std: Spread = 1.0


class Sigmoid(Windowed, frozen=True, tag="sigmoid"):
    """t = sigmoid(scale * n), n ~ N(0, 1): logit-normal under the name other trainers use."""

    scale: Spread = 1.0


class Shift(Windowed, frozen=True, tag="shift"):
    """Logit-normal with FLUX.2's resolution shift: larger pictures see more noise."""

    mean: Mean = 0.0
    std: Spread = 1.0


class Mode(Windowed, frozen=True, tag="mode"):
    """More of the middle (scale > 0) or of the ends (scale < 0) than uniform, and no level without its share."""

    scale: ModeScale = 1.29


class Content(Windowed, frozen=True, tag="content"):
    """t = 1 - u^3: much noise, where the layout of a picture is decided."""


class Style(Windowed, frozen=True, tag="style"):
    """t = u^3: little noise, where texture and brushwork are decided."""


Timesteps = Uniform | Balanced | Weighted | LogitNormal | Sigmoid | Shift | Mode | Content | Style
