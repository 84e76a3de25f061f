from __future__ import annotations

import msgspec
import numpy as np
import pytest

from schemas.errors import BadConfig
from schemas.timesteps import (
    Balanced,
    Content,
    LogitNormal,
    Mode,
    Shift,
    Sigmoid,
    Style,
    Timesteps,
    Uniform,
    Weighted,
)
from schemas.train import Train
from stages.flux2.flow import training_mu
from stages.training.timesteps import STRATA, Moment, draw, probability, quantile
from tests.golden import tiny

ITEMS = [f"item-{index}" for index in range(4000)]
KINDS = [
    Uniform(),
    Balanced(),
    Weighted(),
    LogitNormal(mean=0.3, std=0.8),
    Sigmoid(scale=2.0),
    Shift(),
    Mode(),
    Mode(scale=-1.0),
    Content(),
    Style(),
]
MOMENT = Moment(seed=1, step=0)
TOKENS = 1024


@pytest.mark.parametrize(
    ("spec", "tokens", "median", "upper"),
    [
        (Uniform(), 1024, 0.5, 0.8413),
        (Balanced(), 1024, 0.5, 0.8413),
        (Weighted(), 1024, 0.5, 0.8413),
        (LogitNormal(), 1024, 0.5, 0.7311),
        (LogitNormal(mean=1.0, std=0.5), 1024, 0.7311, 0.8176),
        (Sigmoid(scale=0.5), 1024, 0.5, 0.6225),
        (Shift(), 256, 0.6225, 0.8176),
        (Shift(), 4096, 0.7595, 0.8957),
        (Content(), 1024, 0.875, 0.9960),
        (Style(), 1024, 0.125, 0.5955),
    ],
)
def test_timesteps_follow_their_distribution(spec: Timesteps, tokens: int, median: float, upper: float) -> None:
    drawn = draw(spec, MOMENT, ITEMS, tokens)
    assert drawn.dtype == np.float32
    assert np.quantile(drawn, [0.5, 0.8413]) == pytest.approx([median, upper], abs=0.02)


# Means in closed form: of 1 - u^3 and of u^3.
@pytest.mark.parametrize(("spec", "mean"), [(Content(), 0.75), (Style(), 0.25), (Mode(), 0.5), (Balanced(), 0.5)])
def test_means_say_which_end_is_favoured(spec: Timesteps, mean: float) -> None:
    assert draw(spec, MOMENT, ITEMS, TOKENS).mean() == pytest.approx(mean, abs=0.01)


@pytest.mark.parametrize("scale", [1.29, -0.7])
def test_mode_is_that_of_diffusers(scale: float) -> None:
    golden = tiny.arrays("objective")
    found = [quantile(Mode(scale=scale), number, TOKENS) for number in golden["uniform"].tolist()]
    assert found == pytest.approx(golden[f"mode_{scale}"].tolist(), abs=2e-7)


def test_shift_is_that_of_the_sigma_formula() -> None:
    plain, shifted = draw(LogitNormal(), MOMENT, ITEMS[:8], TOKENS), draw(Shift(), MOMENT, ITEMS[:8], TOKENS)
    factor = np.exp(training_mu(TOKENS))
    assert shifted == pytest.approx(plain * factor / (1 + (factor - 1) * plain), rel=1e-6)


def test_sigmoid_is_logit_normal_by_another_name() -> None:
    named, plain = Sigmoid(scale=0.7), LogitNormal(std=0.7)
    assert draw(named, MOMENT, ITEMS[:8], TOKENS).tolist() == draw(plain, MOMENT, ITEMS[:8], TOKENS).tolist()


@pytest.mark.parametrize("spec", KINDS)
def test_probability_inverts_quantile(spec: Timesteps) -> None:
    numbers = [0.001, 0.2, 0.5, 0.83, 0.999]
    levels = [quantile(spec, number, TOKENS) for number in numbers]
    # Content's last number comes back through 1 - 1e-9, which knows it to 1e-16 / (3 * 0.001^2) = 4e-11.
    assert [probability(spec, level, TOKENS) for level in levels] == pytest.approx(numbers, abs=4e-11)
    assert levels == sorted(levels)
    assert [probability(spec, end, TOKENS) for end in (0.0, 1.0)] == [0.0, 1.0]


@pytest.mark.parametrize("spec", KINDS)
def test_a_window_keeps_the_shape_and_piles_nothing_up_at_its_ends(spec: Timesteps) -> None:
    window = msgspec.structs.replace(spec, minimum=0.3, maximum=0.7)
    whole, inside = (np.sort(draw(each, MOMENT, ITEMS, TOKENS)) for each in (spec, window))
    kept = whole[(whole > 0.3) & (whole < 0.7)]
    shares = [0.1, 0.3, 0.5, 0.7, 0.9]
    assert np.quantile(inside, shares) == pytest.approx(np.quantile(kept, shares), abs=0.03)
    assert 0.3 < inside[0] < inside[1]
    assert inside[-2] < inside[-1] < np.float32(0.7)


def test_timesteps_stay_inside_zero_and_one() -> None:
    drawn = draw(LogitNormal(std=10.0), MOMENT, ITEMS, 16)
    assert 0 <= drawn.min() < drawn.max() <= 1


def test_a_window_that_a_kind_never_reaches_is_refused() -> None:
    with pytest.raises(BadConfig, match="never falls into its window"):
        draw(LogitNormal(mean=5.0, std=0.5, maximum=0.1), MOMENT, ["a"], TOKENS)


@pytest.mark.parametrize(("minimum", "maximum"), [(0.5, 0.5), (0.8, 0.2)])
def test_a_window_with_nothing_in_it_does_not_parse(minimum: float, maximum: float) -> None:
    with pytest.raises(msgspec.ValidationError, match="is not below maximum"):
        msgspec.convert({"kind": "uniform", "minimum": minimum, "maximum": maximum}, Timesteps)


def test_weighting_twice_does_not_parse() -> None:
    table = {"timesteps": {"kind": "weighted"}, "weighting": {"kind": "bell"}}
    with pytest.raises(msgspec.ValidationError, match="weight the loss already"):
        msgspec.convert(table, Train)


def strata(draws: list[float]) -> list[int]:
    return sorted(int(drawn * STRATA) for drawn in draws)


def test_stratified_steps_of_one_picture_fall_once_into_every_stratum() -> None:
    spec = Uniform(stratified=True)
    blocks = [
        [draw(spec, Moment(1, step, step), ["a"], TOKENS)[0].item() for step in range(start, start + STRATA)]
        for start in (0, STRATA)
    ]
    assert [strata(block) for block in blocks] == 2 * [list(range(STRATA))]
    orders = [[int(drawn * STRATA) for drawn in block] for block in blocks]
    assert orders[0] != orders[1] != sorted(orders[1])


def test_stratified_draws_spread_over_a_batch_as_over_steps() -> None:
    spec = Uniform(stratified=True)
    whole = draw(spec, Moment(1, 0, 0), ITEMS[:STRATA], TOKENS)
    assert strata(whole.tolist()) == list(range(STRATA))
    halves = [draw(spec, Moment(1, 0, place), ITEMS[place : place + 8], TOKENS) for place in (0, 8)]
    assert np.array_equal(np.concatenate(halves), whole)


def spread_of_means(spec: Timesteps) -> float:
    means = [
        np.mean([draw(spec, Moment(1, step, step), ["a"], TOKENS)[0] for step in range(start, start + STRATA)])
        for start in range(0, 20 * STRATA, STRATA)
    ]
    return float(np.std(means))


def test_strata_steady_the_mean_over_few_steps() -> None:
    # In theory 1 / sqrt(12 * 16) = 0.072 against 0.072 / 16 = 0.0045.
    assert spread_of_means(Uniform()) > 0.04
    assert spread_of_means(Uniform(stratified=True)) < 0.01
