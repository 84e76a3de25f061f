"""How good a small model is: the judge's scores of what it reconstructs and draws, on pictures it never saw."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import numpy as np

from schemas.pretrain import Evaluation, Pool, Recipe
from stages.flux2.autoencoder import Autoencoder
from stages.flux2.sampler import Sampling
from stages.flux2.transformer import Transformer
from stages.pretraining.autoencoder import decoded, encoded, rendered
from stages.pretraining.pools import name_of
from stages.pretraining.transformer import Reader, drawn
from stages.world.captions import full_captions
from stages.world.judge import Judge, Score, Verdict, score
from stages.world.outlines import BASE, NEW
from stages.world.render import from_bytes, to_bytes
from stages.world.scenes import Things, draw_things, scenes_of, things_of_shape

SEED = 2_000_000  # of everything evaluated, whatever seed trained
SHOWN = 4  # pictures of each kind on a sheet

Shown = tuple[np.ndarray, str]


@dataclass(frozen=True)
class Reconstruction:
    """Pictures of one size after encode and decode; `unwhitened_db` without undoing the whitening: it must be bad."""

    pictures: int
    psnr_db: float
    unwhitened_db: float
    real: Score
    reconstructed: Score


@dataclass(frozen=True)
class AutoencoderFigures:
    """By size, and the share of each new shape that is recognised after encode and decode, at the first size."""

    sizes: dict[str, Reconstruction]
    new_shapes: dict[str, float]


@dataclass(frozen=True)
class Drawn:
    """Held-out prompts drawn at one size with so many steps."""

    size: str
    prompts: int
    steps: int
    guidance: float
    score: Score


def judge_autoencoder(autoencoder: Autoencoder, recipe: Recipe) -> tuple[AutoencoderFigures, list[Shown]]:
    """Return the figures at every size of the transformer's and the autoencoder's pools, and pictures to look at."""
    pools = {name_of(pool): pool for pool in (*recipe.transformer.pools, *recipe.autoencoder.pools)}
    sizes: dict[str, Reconstruction] = {}
    shown: list[Shown] = []
    for name, pool in pools.items():
        sizes[name], pictures = _reconstruction(autoencoder, pool, recipe.evaluation.pictures)
        shown += [(picture, name) for picture in pictures[:SHOWN]]
    first = next(iter(pools.values()))
    judge = _judge(first)
    shares: dict[str, float] = {}
    for name, outline in NEW.items():
        rng = np.random.default_rng((SEED, *name.encode()))
        things = things_of_shape(rng, recipe.evaluation.of_each_new_shape)
        pictures = _again(autoencoder, rendered(scenes_of(things, {name: outline}, rng), first))
        shares[name] = score(_verdicts(judge, pictures), things, [name]).shape
        shown += [(picture, name) for picture in pictures[:SHOWN]]
    return AutoencoderFigures(sizes, shares), shown


def judge_transformer(
    transformer: Transformer, autoencoder: Autoencoder, reader: Reader, pool: Pool, asked: Evaluation
) -> tuple[list[Drawn], list[Shown]]:
    """Return the scores of `asked.prompts` held-out prompts at the pool's size, for each number of steps."""
    rng = np.random.default_rng(SEED)
    things = draw_things(rng, asked.prompts, unseen=True)
    sentences = full_captions(things)
    text, empty = reader.features(sentences), reader.features([""])
    shape = (asked.prompts, transformer.config.in_channels, pool.height // 16, pool.width // 16)
    noise = mx.random.normal(shape, key=mx.random.key(SEED))
    judge, found, shown = _judge(pool), [], []
    for steps in asked.steps:
        sampling = Sampling(steps=steps, guidance=asked.guidance, distilled=False)
        latents = drawn(transformer, text, empty, noise, sampling)
        pictures = np.array(to_bytes(decoded(autoencoder, latents)))
        right = score(_verdicts(judge, pictures), things, list(BASE))
        found.append(Drawn(name_of(pool), asked.prompts, steps, asked.guidance, right))
        shown = list(zip(pictures, sentences, strict=True))
    return found, shown


def _reconstruction(autoencoder: Autoencoder, pool: Pool, count: int) -> tuple[Reconstruction, np.ndarray]:
    rng = np.random.default_rng((SEED, pool.height, pool.width))
    things = draw_things(rng, count, unseen=True)
    real = rendered(scenes_of(things, BASE, rng), pool)
    again, judge = _again(autoencoder, real), _judge(pool)
    raw = _again(autoencoder, real, whitened=False)
    figures = Reconstruction(
        pictures=count,
        psnr_db=_psnr_db(again, real),
        unwhitened_db=_psnr_db(raw, real),
        real=_scored(judge, np.array(real), things),
        reconstructed=_scored(judge, again, things),
    )
    return figures, again


def _again(autoencoder: Autoencoder, pictures: mx.array, *, whitened: bool = True) -> np.ndarray:
    """Return pictures [N, H, W, 3] uint8 encoded and decoded, with or without undoing the whitening."""
    latents = encoded(autoencoder, pictures)
    # What `decode` colours comes out as it went in.
    return np.array(to_bytes(decoded(autoencoder, latents if whitened else autoencoder.bn.whiten(latents))))


def _psnr_db(found: np.ndarray, wanted: mx.array) -> float:
    error = cast(float, mx.square(from_bytes(mx.array(found)) - from_bytes(wanted)).mean().item())
    return 10 * math.log10(4 / max(error, 1e-10))


def _judge(pool: Pool) -> Judge:
    return Judge({**BASE, **NEW}, pool.height, pool.width)


def _verdicts(judge: Judge, pictures: np.ndarray) -> list[Verdict]:
    # Mostly numpy, which leaves the interpreter free.
    with ThreadPoolExecutor() as pool:
        return list(pool.map(judge.judge, pictures))


def _scored(judge: Judge, pictures: np.ndarray, things: Things) -> Score:
    return score(_verdicts(judge, pictures), things, list(BASE))
