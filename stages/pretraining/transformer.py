"""The small transformer from nothing: latents and text features made once, then read by every step.

Letters: N pictures, B batch, C channels, h w latent grid, L text tokens, J features of a text embedding, M captions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx import nn

from schemas.pretrain import Transformer as Spec
from stages.flux2.autoencoder import Autoencoder
from stages.flux2.flow import interpolate, pack, velocity
from stages.flux2.positions import rope
from stages.flux2.sampler import Sampling, sample
from stages.flux2.text.decoder import TextEncoder
from stages.flux2.text.tokenize import Tokenizer
from stages.flux2.transformer import Transformer
from stages.pretraining.autoencoder import encoded, rendered
from stages.pretraining.pools import Schedule
from stages.pretraining.trainer import Draw, Loss
from stages.world.captions import captions
from stages.world.outlines import BASE
from stages.world.scenes import draw_things, scenes_of

TEXTS = 512  # encoded at a time
EMPTY = 0  # the row of the empty caption


@dataclass(frozen=True)
class Reader:
    """Sentences to features: the model's tokenizer and text encoder."""

    tokenizer: Tokenizer
    encoder: TextEncoder

    def features(self, sentences: Sequence[str]) -> mx.array:
        """Return the embeddings [M, L, J] float32 of M sentences."""
        tokens = [self.tokenizer.encode(sentence) for sentence in sentences]
        parts = []
        for start in range(0, len(tokens), TEXTS):
            some = tokens[start : start + TEXTS]
            ids, counts = mx.array([each.ids for each in some]), mx.array([each.count for each in some])
            parts.append(self.encoder(ids, counts))
            mx.eval(parts[-1])
        return mx.concatenate(parts)


@dataclass(frozen=True)
class Corpus:
    """Latents [N, C, h, w] float32 of each pool with the rows [N] of their captions in text [M, L, J]."""

    latents: list[mx.array]
    rows: list[np.ndarray]
    text: mx.array


def corpus_of(spec: Spec, seed: int, autoencoder: Autoencoder, reader: Reader, dtype: mx.Dtype) -> Corpus:
    """Return every pool's latents and all captions' features, text in `dtype`."""
    latents, said = [], []
    for index, pool in enumerate(spec.pools):
        rng = np.random.default_rng((seed, 1000 + index))
        things = draw_things(rng, pool.count)
        latents.append(encoded(autoencoder, rendered(scenes_of(things, BASE, rng), pool)))
        said.append(captions(things, rng))
    distinct = {"": EMPTY}
    rows = [np.array([distinct.setdefault(each, len(distinct)) for each in pool], np.int32) for pool in said]
    text = reader.features(list(distinct)).astype(dtype)
    mx.eval(text)
    return Corpus(latents, rows, text)


def start(transformer: Transformer) -> None:
    """Let modulation and output begin at zero: every block starts as the identity, every velocity as nothing."""
    layers: list[nn.Linear] = [
        transformer.double_stream_modulation_img.lin,
        transformer.double_stream_modulation_txt.lin,
        transformer.single_stream_modulation.lin,
        transformer.final_layer.adaLN_modulation[1],  # pyright: ignore[reportAssignmentType]
        transformer.final_layer.linear,
    ]
    for layer in layers:
        layer.weight = mx.zeros_like(layer.weight)


def loss_of(transformer: Transformer, spec: Spec) -> Loss:
    """Return loss(key, latents [B, C, h, w], text [B, L, J]) -> float32 scalar."""

    def loss(key: mx.array, latents: mx.array, text: mx.array) -> mx.array:
        noise_key, time_key = mx.random.split(key)
        noise = mx.random.normal(latents.shape, key=noise_key)
        timesteps = mx.sigmoid(mx.random.normal((len(latents),), key=time_key) + spec.shift)
        tables = rope(transformer.config, text.shape[1], *latents.shape[2:])
        noisy = pack(interpolate(latents, noise, timesteps))
        predicted = transformer(noisy, text, timesteps, None, tables).astype(mx.float32)
        return mx.square(predicted - pack(velocity(latents, noise))).mean()

    return loss


def draws(spec: Spec, schedule: Schedule, corpus: Corpus) -> Draw:
    """Return draw(pool, step) -> (latents, text) of a step; some captions are empty."""

    def draw(pool: int, step: int) -> Sequence[mx.array]:
        chosen = schedule.rows(step, pool)
        empty = schedule.chance(step, len(chosen)) < spec.caption_dropout
        rows = np.where(empty, EMPTY, corpus.rows[pool][chosen])
        return corpus.latents[pool][mx.array(chosen)], corpus.text[mx.array(rows)]

    return draw


def drawn(transformer: Transformer, text: mx.array, empty: mx.array, noise: mx.array, sampling: Sampling) -> mx.array:
    """Return latents [B, C, h, w] float32 drawn from noise [B, C, h, w] for text [B, L, J]; empty is [1, L, J]."""
    return sample(transformer, noise, text, mx.broadcast_to(empty, text.shape), sampling)
