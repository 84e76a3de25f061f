"""Guards: what ends a training, and what looks like it but does not."""

from __future__ import annotations

import math

import mlx.core as mx
import pytest

from schemas.errors import Diverged
from schemas.train import Train
from schemas.validation import Validation
from stages.training.guards import INITIAL_STEPS, SILENT, Collapse, Guards, fingerprint
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
    guards = Guards(factors(1.0, 0.0), print)
    for step, finite in enumerate([False, False, True, False, False]):
        seen(guards, step, finite=finite)
    with pytest.raises(Diverged) as ended:
        seen(guards, 5, finite=False)
    assert code(ended) == "train.not_finite"


def test_undefined_steps_before_a_stop_count_and_those_left_out_do_not() -> None:
    def line(step: int, loss: float | None, rate: float = RATE) -> dict[str, float | None]:
        return {"step": step, "loss": loss, "learning_rate": rate, "grad_norm": loss}

    start: dict[str, float | None] = {"step": 0, "validation_loss": 1.0}
    history = [start, line(1, None), line(2, 1.0), line(3, None), line(4, None, 0.0), line(5, None)]
    with pytest.raises(Diverged, match="last step 6"):
        seen(Guards(factors(1.0, 0.0), print, history), 6, finite=False)
    seen(Guards(factors(1.0, 0.0), print, history[:-1]), 6, finite=False)
    seen(Guards(factors(1.0, 0.0), print, history[:2]), 2, finite=False)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_state_that_is_not_finite_is_not_saved(value: float) -> None:
    trainer = corpus.trainer(Train(rank=2))
    guards, state = Guards(trainer.factors, print), trainer.state()
    guards.saving(state)
    name = next(name for name in state if name.startswith("optimizer.") and state[name].size > 1)
    state[name] = state[name].at[0].add(value)
    with pytest.raises(Diverged) as ended:
        guards.saving(state)
    assert code(ended) == "train.weights_not_finite"
    assert name in ended.value.faults[0].why


def test_up_matrices_still_zero_are_no_progress() -> None:
    guards = Guards(factors(1.0, 0.0), print)
    seen(guards, 1)
    with pytest.raises(Diverged) as ended:
        guards.progress(factors(2.0, 0.0))
    assert code(ended) == "train.no_progress"
    assert "still zero" in ended.value.faults[0].what


def test_nothing_changed_since_the_last_checkpoint_is_no_progress() -> None:
    guards = Guards(factors(1.0, 1.0), print)
    seen(guards, 1)
    guards.progress(factors(1.0, 2.0))
    seen(guards, 2)
    with pytest.raises(Diverged) as ended:
        guards.progress(factors(1.0, 2.0))
    assert "since the last checkpoint" in ended.value.faults[0].what


@pytest.mark.parametrize(("finite", "rate"), [(True, 0.0), (False, RATE)])
def test_steps_that_were_to_change_nothing_are_no_standstill(rate: float, *, finite: bool) -> None:
    guards = Guards(factors(1.0, 1.0), print)
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


def begun(losses: list[float], silent: list[float]) -> list[str]:
    """Return what is warned of in a training that begins so."""
    warnings: list[str] = []
    guards = Guards(factors(1.0, 0.0), warnings.append)
    for step, (loss, other) in enumerate(zip(losses, silent, strict=True), start=1):
        line = {"step": step, "loss": loss, "learning_rate": RATE, "grad_norm": 1.0, SILENT: other}
        guards.step(line, finite=True)
    return warnings


def test_base_that_is_no_better_than_answering_nothing_is_warned_of_once() -> None:
    # Weights of the noise level make both large in the same steps: their means are compared.
    silent = [2.0, 40.0] * 5
    assert INITIAL_STEPS == 10
    assert begun([1.9, 39.0] * 5, silent) == []
    [line] = begun([2.5, 40.0] * 5, silent)
    assert "the loss of the first 10 steps is 21.2, and 21 for a model that answers nothing" in line
    assert len(begun(silent, silent)) == 1
    assert len(begun([math.nan] * 10, silent)) == 1


def test_beginning_is_judged_only_when_it_was_seen_whole() -> None:
    assert begun([9.0] * 9, [2.0] * 9) == []


def measured(losses: list[float], **settings: float) -> tuple[list[str], int | None]:
    """Return what is warned of, and after how many measurements the training ends."""
    warnings: list[str] = []
    collapse = Collapse(Validation(**settings), warnings.append)
    for number, loss in enumerate(losses):
        try:
            collapse.measured(50 * number, loss)
        except Diverged as error:
            return [*warnings, error.faults[0].line()], number + 1
    return warnings, None


@pytest.mark.parametrize(
    ("losses", "warned", "ends"),
    [
        ([1.0, 0.8, 0.75, 0.9, 1.125], 0, None),  # 1.5 times the best, and not more
        ([1.0, 0.7, 1.06, 0.8, 1.06, 1.06, 0.9], 2, None),  # never three in a row
        ([1.0, 0.7, 1.06, 1.2, 0.7, 1.06, 1.2, 1.06], 3, 8),
        ([1.0, 2.0, 2.0, 2.0], 2, 4),  # the base model is the best
        ([0.9, math.inf, math.nan, math.nan], 2, 4),
        ([math.nan, math.nan, math.nan], 2, 3),
    ],
)
def test_loss_far_above_its_best_three_times_in_a_row_is_a_collapse(
    losses: list[float], warned: int, ends: int | None
) -> None:
    lines, end = measured(losses)
    assert end == ends
    assert len(lines) == warned


def test_collapse_names_the_best_step_and_what_to_do() -> None:
    [first, last], _ = measured([1.0, 0.7, 1.1, 1.2, 1.3])
    assert first == "the validation loss is above 1.5 times its best after step 100: loss 1.1, best 0.7 at step 50"
    assert "for 3 measurements in a row, last step 200: loss 1.3, best 0.7 at step 50" in last
    assert last.startswith("error[train.collapsed] ")
    assert "lower train.learning_rate" in last


def test_collapse_factor_and_collapse_patience_say_what_a_collapse_is() -> None:
    losses = [1.0, 1.2, 1.2, 1.2, 1.2]
    assert measured(losses)[1] is None
    assert measured(losses, collapse_factor=1.1)[1] == 4
    assert measured(losses, collapse_factor=1.1, collapse_patience=1)[1] == 2
    assert measured(losses, collapse_factor=1.1, collapse_patience=5)[1] is None
