"""`[train.adapter]`: what is trained beside the frozen linears, and `[[train.overrides]]`: how large it is where.

Absent, it is a plain LoRA.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from schemas.base import Strict

Rank = Annotated[int, Meta(ge=1, le=1024)]
Alpha = Annotated[float, Meta(gt=0.0, le=4096.0)]
Rate = Annotated[float, Meta(ge=0.0, lt=1.0)]
Norm = Annotated[float, Meta(gt=0.0, le=1e6)]
# Shell-style, or behind "re:" a regular expression; of a linear's whole name.
Pattern = Annotated[str, Meta(min_length=1, max_length=256)]
Path = Annotated[str, Meta(min_length=1, max_length=4096)]


class LoRA(Strict, frozen=True, tag_field="kind", tag="lora"):
    """W + scale * B A; the scale is alpha / rank, with `rslora` alpha / sqrt(rank).

    `dropout` acts on the adapter's input, `rank_dropout` on single ranks of single samples, `module_dropout` on
    whole adapters. `max_norm` bounds the Frobenius norm of scale * B A per linear after every step.
    """

    init: Literal["kaiming", "gaussian", "pissa"] = "kaiming"
    rslora: bool = False
    dropout: Rate = 0.0
    rank_dropout: Rate = 0.0
    module_dropout: Rate = 0.0
    max_norm: Norm | None = None

    def __post_init__(self) -> None:
        if self.init == "pissa" and self.max_norm is not None:
            raise ValueError('max_norm would cut away the base weights that init = "pissa" starts from: drop one')


class DoRA(Strict, frozen=True, tag_field="kind", tag="dora"):
    """A LoRA whose rows are brought to trained lengths: magnitude * (W + scale * B A) / ||W + scale * B A||."""

    init: Literal["kaiming", "gaussian"] = "kaiming"
    rslora: bool = False
    dropout: Rate = 0.0
    rank_dropout: Rate = 0.0
    module_dropout: Rate = 0.0
    max_norm: Norm | None = None


class LoKr(Strict, frozen=True, tag_field="kind", tag="lokr"):
    """W + scale * kron(w1, w2), the scale alpha / rank.

    `factor` is the size of w1 where it divides the linear's; -1 splits both sides near their square roots. w2 is two
    factors of the rank, or whole where the rank is at least half of its longer side.
    """

    factor: Annotated[int, Meta(ge=-1, le=1024)] = 16
    dropout: Rate = 0.0
    module_dropout: Rate = 0.0
    max_norm: Norm | None = None


Adapter = LoRA | DoRA | LoKr


class Override(Strict, frozen=True):
    """Another rank and alpha for the targets that `pattern` matches; of several overrides the last one counts."""

    pattern: Pattern
    rank: Rank
    alpha: Alpha
