"""`[train]`: everything that shapes a LoRA; choices are tagged by their `kind`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, ClassVar, Literal

from msgspec import Meta
from msgspec.structs import force_setattr

from schemas.adapter import Adapter, Alpha, DoRA, LoRA, Override, Path, Pattern, Rank
from schemas.base import Strict
from schemas.ema import Ema
from schemas.objective import Loss, Mask, Mse, Preservation, Unweighted, Weighting
from schemas.optimizers import AdamW, Optimizer, ScheduleFree
from schemas.resolutions import Phase, check
from schemas.rotation import Rotation
from schemas.schedules import Constant, Schedule
from schemas.timesteps import Shift, Timesteps, Weighted
from schemas.tracking import Tracking
from schemas.validation import Validation

Positive = Annotated[int, Meta(ge=1, le=10_000_000)]
Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]


class Train(Strict, frozen=True):
    """Keyed as a whole except `checkpoint_every`, `rotation`, `tracking` and, where the schedule allows, `steps`.

    Of `validation` only the choice of pictures is keyed, of `init_lora` what the file holds. A `learning_rate` left
    out is the optimizer's own, filled in at once: keys hold the number.
    """

    NEUTRAL: ClassVar[Mapping[str, object]] = MappingProxyType({"resolutions": (), "mask": None})

    steps: Positive = 1500
    batch_size: Annotated[int, Meta(ge=1, le=1024)] = 1
    gradient_accumulation: Annotated[int, Meta(ge=1, le=1024)] = 1
    learning_rate: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    rank: Rank = 16
    alpha: Alpha = 16.0
    targets: Literal["blocks", "attention", "all"] | tuple[Pattern, ...] = "blocks"
    exclude: tuple[Pattern, ...] = ()
    overrides: tuple[Override, ...] = ()
    adapter: Adapter = LoRA()
    init_lora: Path | None = None
    checkpoint_every: Positive = 500
    rotation: Rotation | None = None
    gradient_checkpointing: bool = True
    compile: bool = False
    caption_dropout: Fraction = 0.05
    clip_norm: Annotated[float, Meta(gt=0.0, le=1e6)] = 1.0
    save_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    optimizer: Optimizer = AdamW()
    schedule: Schedule = Constant()
    ema: Ema | None = None
    validation: Validation | None = None
    tracking: Tracking = Tracking()
    timesteps: Timesteps = Shift()
    weighting: Weighting = Unweighted()
    loss: Loss = Mse()
    noise_offset: Fraction = 0.0
    mask: Mask | None = None
    preservation: Preservation | None = None
    resolutions: Annotated[tuple[Phase, ...], Meta(max_length=16)] = ()

    def __post_init__(self) -> None:
        """Fill in the learning rate. Raises ValueError for settings of which one would undo the other."""
        force_setattr(self, "learning_rate", self.peak_rate)
        check(self.resolutions)
        if isinstance(self.timesteps, Weighted) and not isinstance(self.weighting, Unweighted):
            raise ValueError('timesteps of kind "weighted" weight the loss already; take "uniform", or no weighting')
        starts_itself = isinstance(self.adapter, LoRA | DoRA) and self.adapter.init != "kaiming"
        if self.init_lora is not None and starts_itself:
            raise ValueError("init_lora is where the adapter starts: leave out adapter.init")
        if self.adapter.max_norm is not None and isinstance(self.optimizer, ScheduleFree):
            raise ValueError("schedule_free averages past the bound of adapter.max_norm: leave one out")

    @property
    def peak_rate(self) -> float:
        """The greatest learning rate of the schedule."""
        return self.optimizer.default_rate if self.learning_rate is None else self.learning_rate
