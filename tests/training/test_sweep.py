from __future__ import annotations

import math

import numpy as np
import pytest

from schemas.errors import Diverged
from schemas.schedules import Rising
from stages.training.schedules import learning_rate
from stages.training.sweep import found, smoothed

RATES = np.geomspace(1e-6, 1e-1, 101).tolist()


def curve(fall: float, rise: float = math.inf) -> list[float]:
    """A loss that falls from 1 to 0.5 around a rate of `fall`, and rises with the square of the rate over `rise`."""
    return [1 - 0.5 / (1 + fall / rate) + (rate / rise) ** 2 for rate in RATES]


def test_suggested_is_the_rate_of_the_steepest_fall() -> None:
    judged = found(RATES, curve(3e-4), 1.0)
    assert judged.suggested == pytest.approx(3e-4, rel=0.15)
    assert judged.diverged is None


def test_suggested_stays_a_decade_below_where_the_loss_diverges() -> None:
    judged = found(RATES, curve(1e-3, rise=3e-3), 1.0)
    assert judged.diverged is not None
    assert judged.steepest > judged.diverged / 10
    assert judged.suggested == pytest.approx(judged.diverged / 10, rel=0.05)


def test_noise_on_the_loss_moves_the_suggestion_by_less_than_its_square_root_of_ten() -> None:
    noise = np.random.default_rng(0).normal(0, 0.01, len(RATES))
    judged = found(RATES, (np.array(curve(3e-4)) + noise).tolist(), 1.0)
    assert 3e-4 / math.sqrt(10) < judged.suggested < 3e-4 * math.sqrt(10)


@pytest.mark.parametrize("losses", [[1.0] * 101, [1.0 + rate for rate in RATES], [math.nan] * 101])
def test_a_loss_that_never_falls_suggests_nothing(losses: list[float]) -> None:
    with pytest.raises(Diverged, match="nothing_learnt"):
        found(RATES, losses, 1.0)


def test_a_sweep_that_explodes_at_once_suggests_nothing() -> None:
    with pytest.raises(Diverged, match="nothing_learnt"):
        found(RATES[:1], [5.0], 1.0)


def test_rates_rise_by_the_same_factor_up_to_the_highest() -> None:
    rates = np.array([learning_rate(Rising(min_ratio=1e-5), 0.1, step, 50) for step in range(51)])
    assert rates == pytest.approx(np.geomspace(1e-6, 0.1, 51))
    late = [learning_rate(Rising(warmup_steps=4, min_ratio=0.01), 1.0, step, 54) for step in range(55)]
    assert late[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert late[4:] == pytest.approx(np.geomspace(0.01, 1.0, 51))


def test_smoothing_keeps_lines_and_both_ends() -> None:
    line = np.linspace(3.0, 1.0, 50)
    assert smoothed(line.tolist()) == pytest.approx(line)
