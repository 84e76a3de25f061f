"""The recipe of a small FLUX.2 from nothing: autoencoder, then transformer, on pictures of the small world."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from schemas.base import Strict

Count = Annotated[int, Meta(ge=1, le=10_000_000)]
Seconds = Annotated[float, Meta(gt=0.0, le=86_400.0)]
Rate = Annotated[float, Meta(gt=0.0, le=1.0)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Weight = Annotated[float, Meta(ge=0.0, le=1000.0)]
Side = Annotated[int, Meta(ge=32, le=1024, multiple_of=16)]
Width = Annotated[int, Meta(ge=8, le=1024, multiple_of=8)]


class Pool(Strict, frozen=True):
    """Pictures of one size: `count` of them in memory, `batch_size` a step, in `share` of the steps."""

    height: Side
    width: Side
    count: Count
    batch_size: Count
    share: Annotated[float, Meta(gt=0.0, le=1.0)]


Pools = Annotated[tuple[Pool, ...], Meta(min_length=1, max_length=16)]


class Fit(Strict, frozen=True):
    """AdamW with warm-up and a cosine to zero, on pools of pictures.

    `seconds` is a ceiling: a machine that would need longer for `steps` takes fewer. `ema` is the decay of the
    average that is kept.
    """

    steps: Count
    pools: Pools
    seconds: Seconds = 150.0
    learning_rate: Rate = 1.5e-3
    warmup_steps: Annotated[int, Meta(ge=0, le=1_000_000)] = 200
    weight_decay: Share = 0.01
    clip_norm: Annotated[float, Meta(gt=0.0, le=1e6)] = 1.0
    ema: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.999


class Autoencoder(Fit, frozen=True):
    """Loss: mean |error| + mean error^2 + `edges` x mean |error of differences of neighbours| + `kl` x mean KL.

    `wide` is the share of pictures with any shapes, fills and colours.
    """

    latent_channels: Annotated[int, Meta(ge=1, le=64)] = 16
    widths: Annotated[tuple[Width, ...], Meta(min_length=4, max_length=4)] = (32, 48, 80, 96)
    wide: Share = 0.5
    edges: Weight = 0.5
    kl: Weight = 1e-3


class Transformer(Fit, frozen=True):
    """Loss: the mean square of velocity, at timesteps sigmoid(N(`shift`, 1)); some captions are left empty."""

    caption_dropout: Share = 0.1
    shift: Annotated[float, Meta(ge=-10.0, le=10.0)] = 0.5


class Evaluation(Strict, frozen=True):
    """How well it went: `prompts` held-out captions for the first size of the transformer, a quarter for others."""

    prompts: Count = 64
    steps: Annotated[tuple[Count, ...], Meta(min_length=1, max_length=8)] = (8, 16)
    guidance: Annotated[float, Meta(ge=1.0, le=100.0)] = 3.0
    pictures: Count = 128
    of_each_new_shape: Count = 32


class Recipe(Strict, frozen=True):
    """`dtype` is that of forward and backward passes; weights, optimizer and losses are float32 in any case."""

    autoencoder: Autoencoder
    transformer: Transformer
    evaluation: Evaluation = Evaluation()
    seed: Annotated[int, Meta(ge=0, lt=1 << 32)] = 0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    compile: bool = False
