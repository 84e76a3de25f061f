"""The loop: a stop after any step leaves no trace, checkpoints fall where they should, what goes wrong ends it."""

from __future__ import annotations

import math
import signal
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import msgspec
import pytest

from schemas.errors import Diverged, NoResources, Stopped
from stages.training.loop import Line, Loop
from stages.training.objective import Batch
from stages.training.step import StepResult, Trainer
from tests.training import corpus
from tests.training.runs import SEED, SETTINGS, STEPS, Run, raising


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("after", range(1, STEPS - 1))
def test_stop_after_any_step_leaves_no_trace(run: Run, unbroken: Run, after: int, number: signal.Signals) -> None:
    with pytest.raises(Stopped) as stopped:
        run.go(raising(number, after))
    # A line is heard one step late, unless a checkpoint falls on it.
    saved = after if after % SETTINGS.checkpoint_every == 0 else after + 1
    assert stopped.value.signal_number == number
    assert f"after step {saved} of {STEPS}" in str(stopped.value)
    assert run.checkpoints[-1] == (saved, saved % SETTINGS.checkpoint_every == 0)
    assert run.go().steps == STEPS
    assert run.trace() == unbroken.trace()


@pytest.mark.parametrize("after", [STEPS - 1, STEPS])
def test_stop_in_the_last_step_finishes(run: Run, unbroken: Run, after: int) -> None:
    run.go(raising(signal.SIGTERM, after))
    assert run.trace() == unbroken.trace()


def test_run_stopped_as_often_as_possible_leaves_no_trace(run: Run, unbroken: Run) -> None:
    stops = 0
    while not run.checkpoints or run.checkpoints[-1][0] < STEPS:
        reached = run.checkpoints[-1][0] if run.checkpoints else 0
        try:
            run.go(raising(signal.SIGTERM, reached + 1))
        except Stopped:
            stops += 1
    assert [step for step, _ in run.checkpoints] == [2, 3, 5, 6, 8]
    assert stops == 4
    assert run.trace() == unbroken.trace()


def test_checkpoints_fall_on_every_nth_step_and_the_last(unbroken: Run) -> None:
    assert unbroken.checkpoints == [(3, True), (6, True), (8, True)]
    assert [line["step"] for line in unbroken.lines] == list(range(1, STEPS + 1))


def test_every_line_tells_the_seconds_of_its_own_step(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those before a checkpoint too, where launching a step takes as long as the step does, as on a CPU."""
    now = [100.0]

    def launched(arrays: list[mx.array]) -> None:
        now[0] += 2.0
        mx.eval(arrays)

    monkeypatch.setattr(mx, "async_eval", launched)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    run.go()
    assert [line["seconds"] for line in run.lines] == [2.0] * STEPS


def test_number_of_checkpoints_changes_nothing(run: Run, unbroken: Run) -> None:
    run.settings = msgspec.structs.replace(SETTINGS, checkpoint_every=1)
    run.go()
    assert len(run.checkpoints) == STEPS
    assert run.trace() == unbroken.trace()


def test_handlers_are_put_back_whatever_ends_the_loop(run: Run) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Stopped):
        run.go(raising(signal.SIGINT, 1))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_order_of_the_tables_changes_nothing(run: Run, unbroken: Run) -> None:
    run.tables = replace(run.tables, items=run.tables.items[::-1], latents=run.tables.latents[::-1])
    run.go()
    assert run.trace() == unbroken.trace()


def test_three_undefined_steps_in_a_row_end_the_run_without_a_checkpoint(run: Run) -> None:
    trainer = corpus.trainer(SETTINGS)
    corpus.poison(trainer)
    data = corpus.data(run.store, run.tables)
    heard: list[Line] = []
    loop = Loop(trainer, data, msgspec.structs.replace(SETTINGS, checkpoint_every=50), SEED, heard.append, print)
    with pytest.raises(Diverged) as diverged:
        loop.run()
    assert diverged.value.faults[0].code == "train.not_finite"
    assert "last step 3" in diverged.value.faults[0].what
    assert [line["step"] for line in heard] == [1, 2]


def test_run_that_learns_nothing_ends_at_its_first_checkpoint(run: Run) -> None:
    run.settings = msgspec.structs.replace(SETTINGS, learning_rate=1e-60)
    with pytest.raises(Diverged) as diverged:
        run.go()
    assert diverged.value.faults[0].code == "train.no_progress"
    assert run.checkpoints == []


def test_latents_that_overflow_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    latent = corpus.latent
    monkeypatch.setattr(corpus, "latent", lambda item, **flip: latent(item, **flip) * 1e25)
    run = Run(tmp_path, corpus.write(tmp_path), msgspec.structs.replace(SETTINGS, checkpoint_every=50))
    with pytest.raises(Diverged) as diverged:
        run.go()
    assert diverged.value.faults[0].code == "train.not_finite"
    assert run.checkpoints == []


def test_weights_that_are_not_finite_are_not_saved(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    apply = Trainer.step

    def overflow(trainer: Trainer, batches: list[Batch], share: float, *, held: int) -> StepResult:
        result = apply(trainer, batches, share, held=held)
        if trainer.steps == 3:
            state = trainer.state()
            trainer.load_state({name: array * 1e39 if "lora_A" in name else array for name, array in state.items()})
        return result

    monkeypatch.setattr(Trainer, "step", overflow)
    with pytest.raises(Diverged) as diverged:
        run.go()
    assert diverged.value.faults[0].code == "train.weights_not_finite"
    assert run.checkpoints == []


def without_memory(patch: pytest.MonkeyPatch, *steps: int) -> None:
    """Let MLX fail to allocate while it computes each of `steps`, once."""
    launch, left = Trainer._launch, list(steps)

    def failing(trainer: Trainer, arrays: list[mx.array]) -> None:
        launch(trainer, arrays)
        if trainer.steps + 1 in left:
            left.remove(trainer.steps + 1)
            raise RuntimeError("[malloc_or_wait] Unable to allocate 99 bytes.")

    patch.setattr(Trainer, "_launch", failing)


def test_step_without_memory_is_left_out_and_the_run_resumes_without_a_trace(tmp_path: Path) -> None:
    ends: list[str] = []
    for name, after in (("straight", STEPS), ("stopped", 5)):
        store = tmp_path / name
        store.mkdir()
        run = Run(store, corpus.write(store))
        with pytest.MonkeyPatch.context() as patch:
            without_memory(patch, 4)
            if after < STEPS:
                with pytest.raises(Stopped):
                    run.go(raising(signal.SIGTERM, after))
            assert run.go().steps == STEPS
        assert run.warnings == [
            "step 4 found no memory and was left out: [malloc_or_wait] Unable to allocate 99 bytes."
        ]
        assert [line["step"] for line in run.lines] == list(range(1, STEPS + 1))
        assert [line["step"] for line in run.lines if line["loss"] is None or math.isnan(line["loss"])] == [4]
        ends.append(run.trace()[0])
    assert ends[0] == ends[1]


def test_three_steps_without_memory_in_a_row_end_the_run_and_cost_no_work(run: Run, unbroken: Run) -> None:
    with pytest.MonkeyPatch.context() as patch:
        without_memory(patch, 5, 6, 7)
        with pytest.raises(NoResources) as ended:
            run.go()
    assert ended.value.faults[0].code == "memory.full"
    assert run.checkpoints == [(3, True), (4, False)]
    assert run.go().steps == STEPS
    assert run.trace() == unbroken.trace()


def test_first_steps_without_memory_end_the_run_without_a_checkpoint(run: Run) -> None:
    with pytest.MonkeyPatch.context() as patch:
        without_memory(patch, 1, 2, 3)
        with pytest.raises(NoResources):
            run.go()
    assert run.checkpoints == []


def test_other_errors_of_a_step_are_not_taken_for_full_memory(run: Run) -> None:
    trainer = corpus.trainer(SETTINGS)
    trainer.transformer.img_in.weight = trainer.transformer.img_in.weight[:, :-1]
    data = corpus.data(run.store, run.tables)
    with pytest.raises(ValueError, match="matmul"):
        Loop(trainer, data, SETTINGS, SEED, print, print).run()


def test_full_disk_is_tried_again_at_the_next_checkpoint(run: Run, unbroken: Run) -> None:
    run.full = {3}
    run.go()
    assert run.checkpoints == [(6, True), (8, True)]
    [warning] = run.warnings
    assert warning.startswith("step 3 could not be saved, training goes on: error[disk.full]")
    assert run.trace() == unbroken.trace()


@pytest.mark.parametrize(
    ("full", "every", "saved"),
    [
        ({2, 3, 4}, 1, [(1, True)]),
        ({2, 3, 5, 6}, 1, [(1, True), (4, True), (7, True), (8, True)]),
        ({8}, 4, [(4, True)]),
    ],
)
def test_disk_full_three_times_in_a_row_or_at_the_end_ends_the_run(
    run: Run, full: set[int], every: int, saved: list[tuple[int, bool]]
) -> None:
    run.full, run.settings = full, msgspec.structs.replace(SETTINGS, checkpoint_every=every)
    if saved[-1][0] == STEPS:
        run.go()
    else:
        with pytest.raises(NoResources):
            run.go()
    assert run.checkpoints == saved
