"""`[train]`: everything that shapes a LoRA; choices are tagged by their `kind`."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from schemas.base import Strict
from schemas.objective import Loss, Mse, Unweighted, Weighting
from schemas.timesteps import Shift, Timesteps, Weighted

Positive = Annotated[int, Meta(ge=1, le=10_000_000)]
Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
Beta = Annotated[float, Meta(ge=0.0, lt=1.0)]


class AdamW(Strict, frozen=True, tag_field="kind", tag="adamw"):
    """AdamW with decoupled weight decay; bias-corrected moments."""

    beta1: Beta = 0.9
    beta2: Beta = 0.999
    eps: Annotated[float, Meta(gt=0.0, le=1.0)] = 1e-8
    weight_decay: Annotated[float, Meta(ge=0.0, le=1.0)] = 1e-4


class Constant(Strict, frozen=True, tag_field="kind", tag="constant"):
    """The same rate at every step after a linear warm-up of `warmup_steps`."""

    warmup_steps: Annotated[int, Meta(ge=0, le=10_000_000)] = 0


class Train(Strict, frozen=True):
    """Keyed as a whole except `checkpoint_every` and, where the schedule allows, `steps`."""

    steps: Positive = 1500
    batch_size: Annotated[int, Meta(ge=1, le=1024)] = 1
    gradient_accumulation: Annotated[int, Meta(ge=1, le=1024)] = 1
    learning_rate: Annotated[float, Meta(gt=0.0, le=1.0)] = 1e-4
    rank: Annotated[int, Meta(ge=1, le=1024)] = 16
    alpha: Annotated[float, Meta(gt=0.0, le=4096.0)] = 16.0
    targets: Literal["blocks", "attention"] | tuple[str, ...] = "blocks"
    checkpoint_every: Positive = 500
    gradient_checkpointing: bool = True
    compile: bool = False
    caption_dropout: Fraction = 0.05
    clip_norm: Annotated[float, Meta(gt=0.0, le=1e6)] = 1.0
    save_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    optimizer: AdamW = AdamW()
    schedule: Constant = Constant()
    timesteps: Timesteps = Shift()
    weighting: Weighting = Unweighted()
    loss: Loss = Mse()
    noise_offset: Fraction = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError where noise levels would be weighted twice."""
        if isinstance(self.timesteps, Weighted) and not isinstance(self.weighting, Unweighted):
            raise ValueError('timesteps of kind "weighted" weight the loss already; take "uniform", or no weighting')
