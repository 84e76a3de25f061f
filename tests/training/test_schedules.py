from __future__ import annotations

import msgspec
import pytest

from schemas.schedules import Constant, Cosine, CosineRestarts, Linear, Polynomial, Rex, Schedule
from schemas.train import Train
from stages.training.checkpoints import trajectory_of
from stages.training.schedules import depends_on_total, learning_rate
from tests.golden import tiny
from tests.training.test_step import SETTINGS, run, trainer

# As recorded: shares of the peak at steps 0 to 23.
WARMUP, TOTAL = 4, 23
RECORDED = {
    "linear": Linear(warmup_steps=WARMUP),
    "cosine": Cosine(warmup_steps=WARMUP),
    "cosine_min": Cosine(warmup_steps=WARMUP, min_ratio=0.1),
    "cosine_restarts": CosineRestarts(warmup_steps=WARMUP, cycles=3),
    "polynomial_min": Polynomial(warmup_steps=WARMUP, power=1.7, min_ratio=0.1),
}
DECAYING = (Linear(), Cosine(), CosineRestarts(), Polynomial(), Rex())


def name_of(value: object) -> str:
    return type(value).__name__


def rates(schedule: Schedule, total: int = TOTAL) -> list[float]:
    return [learning_rate(schedule, 1.0, step, total) for step in range(total + 1)]


@pytest.mark.parametrize("name", RECORDED)
def test_rates_are_those_of_transformers_with_the_warm_up_one_step_sooner(name: str) -> None:
    expected, found = tiny.arrays("optimizers")[f"schedule.{name}"].tolist(), rates(RECORDED[name])
    assert found[WARMUP:] == pytest.approx(expected[WARMUP:], rel=1e-6, abs=1e-7)
    assert found[: WARMUP - 1] == pytest.approx(expected[1:WARMUP], rel=1e-6)
    assert found[WARMUP - 1] == 1.0


def test_learning_rate_warms_up_linearly_and_stays() -> None:
    found = [learning_rate(Constant(warmup_steps=4), 1e-3, step, 10) for step in (0, 1, 3, 4, 1000)]
    assert found == pytest.approx([0.25e-3, 0.5e-3, 1e-3, 1e-3, 1e-3])
    assert learning_rate(Constant(), 1e-3, 0, 10) == 1e-3


def test_rex_is_the_formula_of_its_paper() -> None:
    """(1 - z) / (1/2 + (1 - z) / 2), z the share of the steps taken."""
    found = rates(Rex(), 10)
    assert [found[step] for step in (0, 5, 9, 10)] == pytest.approx([1.0, 2 / 3, 0.1 / 0.55, 0.0])
    assert rates(Rex(min_ratio=0.4), 10)[5] == pytest.approx(0.4 + 0.6 * 2 / 3)


def test_polynomial_of_power_one_is_linear_and_a_higher_one_lies_below() -> None:
    assert rates(Polynomial(power=1.0)) == pytest.approx(rates(Linear()))
    assert rates(Polynomial(power=3.0))[10] < rates(Polynomial(power=2.0))[10] < rates(Linear())[10]


@pytest.mark.parametrize("cycles", [1, 2, 5])
def test_every_restart_is_at_the_peak(cycles: int) -> None:
    found = rates(CosineRestarts(cycles=cycles), 40)
    assert [step for step, rate in enumerate(found) if rate == 1.0] == [
        40 // cycles * cycle for cycle in range(cycles)
    ]


@pytest.mark.parametrize("schedule", DECAYING, ids=name_of)
@pytest.mark.parametrize("warmup_steps", [0, 5])
@pytest.mark.parametrize("min_ratio", [0.0, 0.2])
def test_decay_goes_from_the_peak_to_the_least_share(schedule: Schedule, warmup_steps: int, min_ratio: float) -> None:
    found = rates(msgspec.structs.replace(schedule, warmup_steps=warmup_steps, min_ratio=min_ratio))
    assert max(found) == found[warmup_steps] == 1.0
    assert (
        min(found[warmup_steps:])
        == found[TOTAL]
        == learning_rate(msgspec.structs.replace(schedule, min_ratio=min_ratio), 1.0, 10 * TOTAL, TOTAL)
    )
    assert found[TOTAL] == pytest.approx(min_ratio)
    assert all(rate > 0 for rate in found[:TOTAL])


@pytest.mark.parametrize("schedule", [Constant(), Constant(warmup_steps=3), *DECAYING], ids=name_of)
def test_the_total_matters_exactly_where_it_is_said_to(schedule: Schedule) -> None:
    changed = rates(schedule, TOTAL)[:10] != rates(schedule, 2 * TOTAL)[:10]
    assert changed == depends_on_total(schedule)


@pytest.mark.parametrize("schedule", [Constant(warmup_steps=3), *DECAYING], ids=name_of)
def test_more_steps_are_another_trajectory_exactly_where_the_total_matters(schedule: Schedule) -> None:
    found = {trajectory_of(msgspec.to_builtins(Train(steps=steps, schedule=schedule)), {}) for steps in (100, 200)}
    assert len(found) == (2 if depends_on_total(schedule) else 1)


@pytest.mark.parametrize("schedule", DECAYING, ids=name_of)
def test_a_warm_up_as_long_as_the_training_is_all_there_is(schedule: Schedule) -> None:
    found = rates(msgspec.structs.replace(schedule, warmup_steps=TOTAL))
    assert found[:TOTAL] == pytest.approx([(step + 1) / TOTAL for step in range(TOTAL)])


def test_the_trainer_steps_at_the_scheduled_rates() -> None:
    settings: Train = msgspec.structs.replace(SETTINGS, steps=4, schedule=Linear(warmup_steps=2))
    found = [result.learning_rate for result in run(trainer(settings), 4)]
    assert found == pytest.approx([5e-3, 1e-2, 1e-2, 5e-3])
