from __future__ import annotations

import math
from pathlib import Path

import mlx.core as mx
import msgspec
import pytest

from schemas.ema import Ema
from schemas.errors import BadConfig
from schemas.optimizers import ScheduleFree
from stages.training.ema import initial_average, post_hoc, update_average
from tests.golden import tiny
from tests.training.test_step import SETTINGS, batch, equal, trainer

STOPS = 8


def walked(spec: Ema, values: list[float]) -> float:
    """The average of one number that starts at 0 and then takes `values`."""
    average = initial_average({"w": mx.array(0.0)})
    for value in values:
        average = update_average(spec, average, {"w": mx.array(value)})
    assert average["step"].item() == len(values)
    return average["w"].item()


def test_the_average_moves_by_one_minus_decay() -> None:
    assert walked(Ema(decay=0.9, warmup=False), [1.0, 2.0]) == pytest.approx(0.9 * 0.1 + 0.1 * 2.0)
    assert walked(Ema(decay=0.0), [1.0, 2.0]) == 2.0


def test_warm_up_forgets_the_start_and_ends_at_the_decay() -> None:
    assert walked(Ema(decay=0.99), [1.0]) == pytest.approx(1 - 1 / 10)
    assert walked(Ema(decay=0.99), [1.0, 1.0]) == pytest.approx(1 - 1 / 10 * 2 / 11)
    # 0.3 is reached at the fourth update: (1 + 3) / (10 + 3) = 0.307...
    assert walked(Ema(decay=0.3), [1.0] * 4) == pytest.approx(1 - 1 / 10 * 2 / 11 * 3 / 12 * 0.3)


def test_a_trainer_averages_the_factors_it_would_save_and_trains_on_as_without() -> None:
    spec = Ema(decay=0.6)
    plain, averaging = trainer(), trainer(msgspec.structs.replace(SETTINGS, ema=spec))
    expected = initial_average(plain.factors)
    for step in range(4):
        plain.step([batch(step)])
        averaging.step([batch(step)])
        expected = update_average(spec, expected, plain.factors)
    assert equal(averaging.factors, plain.factors)
    assert averaging.ema_factors is not None
    assert equal(averaging.ema_factors | {"step": expected["step"]}, expected)
    assert not equal(averaging.ema_factors, plain.factors)


def test_without_ema_there_is_no_average() -> None:
    taking = trainer()
    assert taking.ema_factors is None
    assert not [name for name in taking.state() if name.startswith("ema.")]


@pytest.mark.parametrize("spec", [Ema(), Ema(decay=0.5, warmup=False)])
def test_a_training_with_ema_stopped_anywhere_goes_on_bit_for_bit(spec: Ema, tmp_path: Path) -> None:
    settings = msgspec.structs.replace(SETTINGS, ema=spec)
    unbroken = trainer(settings)
    states = []
    for step in range(STOPS):
        states.append(unbroken.state())
        unbroken.step([batch(step)])
    states.append(unbroken.state())
    for stop in range(STOPS):
        mx.save_safetensors(str(tmp_path / "state.safetensors"), states[stop])
        resumed = trainer(settings)
        resumed.load_state(mx.load(str(tmp_path / "state.safetensors")))
        resumed.step([batch(stop)])
        assert equal(resumed.state(), states[stop + 1])


def test_a_step_that_is_not_finite_is_not_averaged() -> None:
    taking = trainer(msgspec.structs.replace(SETTINGS, ema=Ema()))
    taking.step([batch(0)])
    before, broken = taking.state(), batch(1)
    taking.step([broken._replace(latents=broken.latents + float("inf"))])
    assert equal(taking.state() | {"steps": before["steps"]}, before)


def test_schedule_free_and_ema_average_what_is_saved() -> None:
    spec = Ema(decay=0.0)
    taking = trainer(msgspec.structs.replace(SETTINGS, ema=spec, optimizer=ScheduleFree()))
    for step in range(3):
        taking.step([batch(step)])
    assert taking.ema_factors is not None
    for name, factor in taking.factors.items():
        assert tiny.error(taking.ema_factors[name], factor) <= 1e-6


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.2, 0.28])
def test_the_post_hoc_profile_is_as_wide_as_asked(sigma_rel: float) -> None:
    """Of factors [t, t^2] the average is the profile's first two moments; saved at every one of 2000 steps."""
    last = 2000
    saved = [(step, {"w": mx.array([step / last, (step / last) ** 2])}) for step in range(1, last + 1)]
    mean, square = post_hoc(saved, sigma_rel=sigma_rel)["w"].tolist()
    assert math.sqrt(square - mean**2) == pytest.approx(sigma_rel, rel=2e-3)


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.1, 6.94)])
def test_post_hoc_shares_are_the_power_function_of_the_paper(sigma_rel: float, gamma: float) -> None:
    saved = [(step, {"w": mx.array(float(step == 300))}) for step in (100, 300, 400)]
    share = 0.75 ** (gamma + 1) - 0.25 ** (gamma + 1)
    assert post_hoc(saved, sigma_rel=sigma_rel)["w"].item() == pytest.approx(share, rel=2e-3)


def test_post_hoc_of_one_checkpoint_is_that_checkpoint() -> None:
    factors = {"w": mx.array([1.5, -2.0])}
    assert equal(post_hoc([(500, factors)], sigma_rel=0.1), factors)


@pytest.mark.parametrize(
    ("saved", "sigma_rel", "code"),
    [
        ([], 0.1, "ema.steps"),
        ([(2, {}), (1, {})], 0.1, "ema.steps"),
        ([(0, {}), (1, {})], 0.1, "ema.steps"),
        ([(1, {"w": mx.zeros(2)}), (2, {"w": mx.zeros(3)})], 0.1, "ema.factors"),
        ([(1, {"w": mx.zeros(2)}), (2, {"u": mx.zeros(2)})], 0.1, "ema.factors"),
        ([(1, {"w": mx.zeros(2)})], 0.0, "ema.sigma_rel"),
        ([(1, {"w": mx.zeros(2)})], 0.3, "ema.sigma_rel"),
    ],
)
def test_post_hoc_refuses_what_has_no_average(saved: list, sigma_rel: float, code: str) -> None:
    with pytest.raises(BadConfig) as caught:
        post_hoc(saved, sigma_rel=sigma_rel)
    assert caught.value.faults[0].code == code
