"""The run's own tables `[run]` and `[model]`, and the whole configuration file."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from schemas.base import Strict
from schemas.encode_latents import EncodeLatents
from schemas.encode_text import EncodeText
from schemas.objective import Prior
from schemas.preview import Preview
from schemas.quantize import Quantize
from schemas.train import Train
from schemas.validate import Validate
from schemas.verify import Verify

RUN_NAME = r"^[a-z0-9][a-z0-9-]*\Z"

RunName = Annotated[str, Meta(pattern=RUN_NAME, max_length=64)]
Seed = Annotated[int, Meta(ge=0, lt=2**32)]


class Run(Strict, frozen=True):
    """`[run]`: the name of the result folder and the seed all draws derive from."""

    name: RunName | None = None
    seed: Seed = 42


class Model(Strict, frozen=True):
    """`[model]`: where the weights come from. A path is relative to the configuration file.

    `revision` is a branch, tag or commit of a model from the hub.
    """

    source: str = "flux2-micro"
    revision: Annotated[str, Meta(min_length=1, max_length=256)] = "main"
    variant: Literal["auto", "klein-base-4b", "klein-4b", "klein-base-9b", "klein-9b", "dev", "flux2-micro"] = "auto"
    transformer: str | None = None
    autoencoder: str | None = None
    text_encoder: str | None = None
    tokenizer: str | None = None
    quantize: Quantize = "none"
    allow_distilled: bool = False


class Config(Strict, frozen=True):
    """A pipeline's TOML file: one table per stage, all with defaults except the dataset."""

    validate: Validate
    run: Run = Run()
    model: Model = Model()
    encode_latents: EncodeLatents = EncodeLatents()
    encode_text: EncodeText = EncodeText()
    train: Train = Train()
    preview: Preview = Preview()
    verify: Verify = Verify()

    def __post_init__(self) -> None:
        """Raise ValueError for settings of one table that need another's."""
        if self.preview.ema and self.train.ema is None:
            raise ValueError("preview.ema draws with the moving average: add [train.ema], or leave it out")
        if self.train.mask is not None and self.validate.masks is None:
            raise ValueError('[train.mask] needs masks: set validate.masks to "alpha" or "files"')
        if isinstance(self.train.preservation, Prior) != (self.validate.class_dataset is not None):
            raise ValueError('validate.class_dataset and a [train.preservation] of kind "prior" need each other')
        known = self.validate.resolutions
        for phase in self.train.resolutions:
            if unknown := sorted(set(phase.sizes) - set(known)):
                raise ValueError(f"train.resolutions draws {unknown}, validate.resolutions has {sorted(known)}")
