"""`[train.tracking]`: where else the lines and pictures of a training go; it never changes a result."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from schemas.base import Strict

TrackerKind = Literal["tensorboard", "wandb"]


class Tracking(Strict, frozen=True):
    """`kinds` are the trackers to tell; `project` is for Weights & Biases, which sends nothing unless `online`."""

    kinds: tuple[TrackerKind, ...] = ()
    project: Annotated[str, Meta(min_length=1, max_length=128)] = "flux2-lora"
    online: bool = False
