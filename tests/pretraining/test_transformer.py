"""The small transformer: how it starts, what a step sees, and what is minimised."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import pytest

from stages.flux2.positions import rope
from stages.flux2.transformer import Transformer
from stages.pretraining import transformer as drawing
from stages.pretraining.pools import Schedule
from stages.pretraining.trainer import Trainer
from tests.pretraining import tiny

COUNT = tiny.POOLS[0].count
LENGTH = 5


def made() -> Transformer:
    mx.random.seed(2)
    module = Transformer(tiny.DIMENSIONS)
    drawing.start(module)
    return module


def corpus() -> drawing.Corpus:
    text = mx.random.normal((4, LENGTH, 12), key=mx.random.key(1))
    latents = mx.random.normal((COUNT, 8, 2, 2), key=mx.random.key(2))
    return drawing.Corpus([latents], [np.arange(COUNT, dtype=np.int32) % 3 + 1], text)


def test_velocity_is_nothing_at_first_and_gradients_still_flow() -> None:
    module, own = made(), tiny.recipe()
    noise = mx.random.normal((2, 4, 8))
    text = mx.random.normal((2, LENGTH, 12))
    found = module(noise, text, mx.array([0.2, 0.8]), None, rope(tiny.DIMENSIONS, LENGTH, 2, 2))
    np.testing.assert_array_equal(np.array(found), 0)
    trainer = Trainer(module, drawing.loss_of(module, own.transformer), own.transformer, own)
    batch = (mx.zeros((2, 8, 2, 2)), text)
    losses = [trainer.step(1e-2, mx.random.key(0), batch).item() for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]


def loss(shift: float) -> float:
    """The loss of a transformer that answers its input: for latents of zero, the mean of (t - 1)^2."""
    spec = msgspec.structs.replace(tiny.recipe().transformer, shift=shift)

    class Echo(Transformer):
        def __call__(self, img: mx.array, *_: Any) -> mx.array:
            return img

    echo = Echo(tiny.DIMENSIONS)
    value = drawing.loss_of(echo, spec)(mx.random.key(0), mx.zeros((512, 8, 2, 2)), mx.zeros((512, LENGTH, 12)))
    return value.item()  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("shift", [-1.0, 0.5])
def test_timesteps_are_logistic_around_the_shift(shift: float) -> None:
    normal = np.random.default_rng(0).standard_normal(200_000)
    expected = np.square(1 / (1 + np.exp(-normal - shift)) - 1).mean()
    assert loss(shift) == pytest.approx(expected, rel=0.1)


def test_captions_are_those_of_the_pictures_and_a_share_is_empty() -> None:
    held, pool = corpus(), msgspec.structs.replace(tiny.POOLS[0], batch_size=4000)
    spec = msgspec.structs.replace(tiny.recipe().transformer, caption_dropout=0.25)
    latents, text = drawing.draws(spec, Schedule((pool,), 0), held)(0, 0)
    rows = np.array(latents).reshape(4000, -1)
    picture = np.array(
        [np.abs(np.array(held.latents[0]).reshape(COUNT, -1) - row).sum(axis=1).argmin() for row in rows]
    )
    said = np.array([np.abs(np.array(held.text)[:, 0] - row).sum(axis=1).argmin() for row in np.array(text)[:, 0]])
    empty = said == drawing.EMPTY
    assert 0.22 < empty.mean() < 0.28
    np.testing.assert_array_equal(said[~empty], held.rows[0][picture[~empty]])
