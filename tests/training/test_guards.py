"""Guards: what ends a training, and what looks like it but does not."""

from __future__ import annotations

import math

import mlx.core as mx
import pytest

from schemas.errors import Diverged
from schemas.train import Train
from stages.training.guards import Guards, fingerprint
from tests.training import corpus

RATE = 1e-3


def factors(*values: float) -> dict[str, mx.array]:
    return {
        "a.lora_A": mx.array([values[0]], mx.float32),
        "a.lora_B": mx.array([values[1]], mx.float32),
    }


def seen(guards: Guards, step: int, *, finite: bool = True, rate: float = RATE) -> None:
    loss = 1.0 if finite else math.inf
    guards.step({"step": step, "loss": loss, "learning_rate": rate, "grad_norm": loss}, finite=finite)


def code(error: pytest.ExceptionInfo[Diverged]) -> str:
    return error.value.faults[0].code


def test_only_the_third_undefined_step_in_a_row_ends_a_training() -> None:
    guards = Guards(factors(1.0, 0.0))
    for step, finite in enumerate([False, False, True, False, False]):
        seen(guards, step, finite=finite)
    with pytest.raises(Diverged) as ended:
        seen(guards, 5, finite=False)
    assert code(ended) == "train.not_finite"


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_state_that_is_not_finite_is_not_saved(value: float) -> None:
    trainer = corpus.trainer(Train(rank=2))
    guards, state = Guards(trainer.factors), trainer.state()
    guards.saving(state)
    name = next(name for name in state if name.startswith("optimizer.") and state[name].size > 1)
    state[name] = state[name].at[0].add(value)
    with pytest.raises(Diverged) as ended:
        guards.saving(state)
    assert code(ended) == "train.weights_not_finite"
    assert name in ended.value.faults[0].why


def test_up_matrices_still_zero_are_no_progress() -> None:
    guards = Guards(factors(1.0, 0.0))
    seen(guards, 1)
    with pytest.raises(Diverged) as ended:
        guards.progress(factors(2.0, 0.0))
    assert code(ended) == "train.no_progress"
    assert "still zero" in ended.value.faults[0].what


def test_nothing_changed_since_the_last_checkpoint_is_no_progress() -> None:
    guards = Guards(factors(1.0, 1.0))
    seen(guards, 1)
    guards.progress(factors(1.0, 2.0))
    seen(guards, 2)
    with pytest.raises(Diverged) as ended:
        guards.progress(factors(1.0, 2.0))
    assert "since the last checkpoint" in ended.value.faults[0].what


@pytest.mark.parametrize(("finite", "rate"), [(True, 0.0), (False, RATE)])
def test_steps_that_were_to_change_nothing_are_no_standstill(rate: float, *, finite: bool) -> None:
    guards = Guards(factors(1.0, 1.0))
    seen(guards, 1, finite=finite, rate=rate)
    guards.progress(factors(1.0, 1.0))
    seen(guards, 2)
    guards.progress(factors(1.0, 1.5))


def test_fingerprint_tells_the_smallest_change_and_no_more() -> None:
    trainer = corpus.trainer(Train(rank=2))
    before = trainer.factors
    name = next(iter(before))
    changed = before | {name: before[name].at[0, 0].add(1e-7)}
    assert fingerprint(before) == fingerprint(dict(before))
    assert fingerprint(before) != fingerprint(changed)
