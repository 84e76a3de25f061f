from __future__ import annotations

import numpy as np
import pytest

from schemas.objective import Bell, Cosmap, SigmaSqrt, Unweighted, Weighting
from schemas.timesteps import Shift, Weighted
from stages.training.weighting import LEAST_SIGMA, resolved, weights
from tests.golden import tiny


@pytest.mark.parametrize(("weighting", "name"), [(SigmaSqrt(), "sigma_sqrt"), (Cosmap(), "cosmap")])
def test_weights_are_those_of_diffusers(weighting: Weighting, name: str) -> None:
    golden = tiny.arrays("objective")
    found = weights(weighting, np.array(golden["sigmas"]))
    assert found.dtype == np.float32
    assert found == pytest.approx(np.array(golden[name]), rel=1e-6)


def test_the_bell_is_ai_toolkits_table() -> None:
    levels = np.array([1.0, 0.95, 0.90, 0.75, 0.5, 0.05, 0.0], dtype=np.float32)
    assert weights(Bell(), levels) == pytest.approx([0.906, 1.375, 1.507, 1.355, 0.925, 0.582, 0.447], abs=1e-6)
    # Its peak lies between two nodes: 1 % is lost there.
    assert weights(Bell(), np.array([0.876])) == pytest.approx([1.5227], rel=0.011)


def test_the_bell_averages_to_one_over_uniform_timesteps() -> None:
    assert weights(Bell(), np.linspace(0, 1, 100_001)).mean() == pytest.approx(0.9961, abs=1e-4)


def test_no_weighting_is_one_everywhere() -> None:
    assert weights(Unweighted(), np.array([0.0, 0.3, 1.0])).tolist() == [1.0, 1.0, 1.0]


def test_the_steepest_weighting_stays_finite_at_a_clean_picture() -> None:
    assert weights(SigmaSqrt(), np.array([0.0, LEAST_SIGMA])).tolist() == [1e6, 1e6]


def test_weighted_timesteps_bring_the_bell() -> None:
    assert resolved(Unweighted(), Weighted()) == Bell()
    assert resolved(Cosmap(), Shift()) == Cosmap()
