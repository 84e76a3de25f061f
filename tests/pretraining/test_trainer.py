"""Training a whole module as one vector: it learns, keeps what it must, and ends when its time is over."""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten

from stages.pretraining import trainer as training
from stages.pretraining.pools import Schedule, planned_steps
from stages.pretraining.trainer import Trainer, Vector
from tests.pretraining import tiny

WANTED = mx.array([[1.0, -2.0, 0.5]])


class Line(nn.Module):
    """A linear layer beside statistics that nobody trains."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.bn = nn.Linear(2, 2)


def loss_of(module: Line) -> training.Loss:
    return lambda _key, x: mx.square(module.layer(x) - x @ WANTED.T - 0.25).mean()


def draw(_pool: int, step: int) -> tuple[mx.array, ...]:
    return (mx.random.normal((16, 3), key=mx.random.key(step)),)


def made(**changes: Any) -> tuple[Line, Trainer]:
    mx.random.seed(3)
    module, own = Line(), tiny.recipe(**{"learning_rate": 0.05, "ema": 0.9, **changes})
    return module, Trainer(module, loss_of(module), own.autoencoder, own)


def arrays(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in cast(list, tree_flatten(module.parameters()))}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_finds_the_weights_and_leaves_statistics_alone(dtype: str) -> None:
    module, trainer = made(dtype=dtype, weight_decay=0.0)
    before = arrays(module)
    losses = [loss for _, loss in trainer.fit(draw, 300)]
    trainer.assign_average()
    assert losses[-1] < 0.01 * losses[0]
    np.testing.assert_allclose(np.array(module.layer.weight), np.array(WANTED), atol=0.03)
    np.testing.assert_allclose(np.array(module.layer.bias), [0.25], atol=0.03)
    np.testing.assert_array_equal(np.array(module.bn.weight), before["bn.weight"])
    assert module.layer.weight.dtype == mx.float32


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 0.01},
        {"weight_decay": 0.5},
        {"clip_norm": 1e-3},
        {"ema": 0.0},
        {"warmup_steps": 3},
        {"seed": 1},
    ],
)
def test_every_setting_of_a_fit_gives_other_weights(changes: dict[str, Any]) -> None:
    results = []
    for own in ({}, {}, changes):
        module, trainer = made(**own)
        rows = trainer.schedule.rows
        noisy = trainer.fit(lambda _pool, step, rows=rows: draw(0, int(rows(step, 0)[0])), 20)
        assert [step for step, _ in noisy] == [20]
        trainer.assign_average()
        results.append(np.array(module.layer.weight))
    np.testing.assert_array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])


def test_measuring_changes_no_weight() -> None:
    _, trainer = made()
    before = np.array(trainer.vector.read())
    first, warm = trainer.measure(draw, 0)
    assert min(first, warm) > 0
    trainer.assign_average()
    np.testing.assert_array_equal(np.array(trainer.vector.read()), before)
    assert [loss for _, loss in trainer.fit(draw, 3)] == [loss for _, loss in made()[1].fit(draw, 3)]


def test_step_that_is_not_finite_changes_next_to_nothing() -> None:
    module, trainer = made(weight_decay=0.0)
    before = arrays(module)
    trainer.step(0.05, mx.random.key(0), (mx.full((4, 3), float("nan")),))
    trainer.assign_average()
    for name, array in arrays(module).items():
        np.testing.assert_array_equal(array, before[name])


def test_fit_ends_when_its_time_is_far_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "LOOK_STEPS", 5)
    _, trainer = made(seconds=1e-6)
    assert [step for step, _ in trainer.fit(draw, 100)] == [5]


def test_vector_takes_tensors_apart_and_together() -> None:
    vector = Vector(Line(), frozen="bn.")
    parts = vector.split(vector.read())
    assert {name: part.shape for name, part in parts.items()} == {"layer.bias": (1,), "layer.weight": (1, 3)}
    np.testing.assert_array_equal(np.array(vector.join(parts)), np.array(vector.read()))


def test_pools_come_by_their_shares_and_pictures_from_their_own() -> None:
    schedule = Schedule(tiny.POOLS, 7)
    found = [schedule.pool(step) for step in range(1000)]
    assert found == [Schedule(tiny.POOLS, 7).pool(step) for step in range(1000)]
    assert 0.2 < np.mean(found) < 0.3
    rows = np.concatenate([schedule.rows(step, 1) for step in range(200)])
    assert set(rows.tolist()) == set(range(8))
    assert found != [Schedule(tiny.POOLS, 8).pool(step) for step in range(1000)]


def test_plan_is_what_there_is_time_for() -> None:
    assert planned_steps(1000, 10.0, tiny.POOLS, [0.01, 0.05]) == 500
    assert planned_steps(100, 10.0, tiny.POOLS, [0.01, 0.05]) == 100
    assert planned_steps(100, 1e-9, tiny.POOLS, [0.01, 0.05]) == 1
