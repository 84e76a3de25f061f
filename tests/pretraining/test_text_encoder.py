"""Random weights that are the same on every machine."""

from __future__ import annotations

import numpy as np

from stages.flux2.variants import MICRO
from stages.pretraining.text_encoder import normal, text_encoder_weights


def test_draws_are_normal_and_depend_on_the_name_alone() -> None:
    numbers = normal("some.weight", 400, 500, deviation=2.0)
    assert numbers.dtype == np.float32
    assert abs(numbers.mean()) < 0.02
    assert abs(numbers.std() - 2.0) < 0.02
    assert abs(np.mean(np.abs(numbers) < 2.0) - 0.68) < 0.01
    np.testing.assert_array_equal(numbers.ravel()[:300], normal("some.weight", 300, deviation=2.0))
    assert not np.array_equal(numbers, normal("other.weight", 400, 500, deviation=2.0))


def test_projections_keep_the_variance_of_what_they_are_given() -> None:
    config = MICRO.text_encoder
    up = text_encoder_weights(config)["model.layers.3.mlp.up_proj.weight"]
    assert up.shape == (config.intermediate_size, config.hidden_size)
    assert abs(up.std() * config.hidden_size**0.5 - 1) < 0.03
