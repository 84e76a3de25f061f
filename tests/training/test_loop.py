"""The loop: a stop after any step leaves no trace, checkpoints fall where they should, divergence ends it."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import pytest

from schemas.errors import Diverged, Stopped
from schemas.train import Train
from stages.stores.tensors import from_mlx, tensor_digest, to_mlx
from stages.training.checkpoints import Snapshot, newest, write_checkpoint
from stages.training.loop import Line, Loop
from stages.training.step import Trainer
from tests.training import corpus

STEPS = 8
SETTINGS = Train(
    steps=STEPS,
    batch_size=2,
    gradient_accumulation=2,
    learning_rate=1e-3,
    rank=4,
    alpha=4.0,
    checkpoint_every=3,
    caption_dropout=0.3,
    gradient_checkpointing=False,
)
SEED = 5
TRAJECTORY = "0" * 64


def fail(text: str) -> None:
    raise AssertionError(text)


@dataclass
class Run:
    """Training in a store of its own; it resumes from what the store has."""

    store: Path
    tables: corpus.Tables
    settings: Train = SETTINGS
    lines: list[Line] = field(default_factory=list[Line])
    checkpoints: list[tuple[int, bool]] = field(default_factory=list[tuple[int, bool]])

    def go(self, heard: Callable[[Line], None] = lambda _: None) -> Trainer:
        """Train on; `heard` is told of every line."""
        trainer = corpus.trainer(self.settings)
        start = newest([self.store], TRAJECTORY, self.settings.steps, fail)
        if start is not None:
            trainer.load_state({name: to_mlx(tensor) for name, tensor in start.state().items()})
            self.lines = start.metrics()

        def on_line(line: Line) -> None:
            self.lines.append(line)
            heard(line)

        def on_checkpoint(step: int, public: bool) -> None:  # noqa: FBT001
            state = {name: from_mlx(array) for name, array in trainer.state().items()}
            snapshot = Snapshot(
                step=step, public=public, state=state, lora=state, ema=None, metadata={}, metrics=self.lines
            )
            write_checkpoint(self.store, TRAJECTORY, snapshot)
            self.checkpoints.append((step, public))

        data = corpus.data(self.store, self.tables)
        Loop(trainer, data, self.settings, SEED, on_line, on_checkpoint).run()
        return trainer

    def trace(self) -> tuple[str, list[Line]]:
        """Return the digest of the state saved last, and the lines without time and memory."""
        end = newest([self.store], TRAJECTORY, self.settings.steps, fail)
        assert end is not None
        kept = ("step", "loss", "learning_rate", "grad_norm")
        return tensor_digest(end.state()), [{name: line[name] for name in kept} for line in self.lines]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run without a stop; only to be looked at."""
    store = tmp_path_factory.mktemp("unbroken")
    run = Run(store, corpus.write(store))
    run.go()
    return run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path, corpus.write(tmp_path))


def raising(number: signal.Signals, after: int) -> Callable[[Line], None]:
    def heard(line: Line) -> None:
        if line["step"] == after:
            signal.raise_signal(number)

    return heard


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
    loop = Loop(trainer, data, msgspec.structs.replace(SETTINGS, checkpoint_every=50), SEED, print, print)
    with pytest.raises(Diverged) as diverged:
        loop.run()
    assert diverged.value.faults[0].code == "train.not_finite"
    assert "last step 3" in diverged.value.faults[0].what
    assert [line["step"] for line in loop.metrics] == [1, 2]


def test_run_that_learns_nothing_ends_at_its_first_checkpoint(run: Run) -> None:
    run.settings = msgspec.structs.replace(SETTINGS, learning_rate=1e-60)
    with pytest.raises(Diverged) as diverged:
        run.go()
    assert diverged.value.faults[0].code == "train.no_progress"
    assert run.checkpoints == []
