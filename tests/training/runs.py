"""A training of a made-up store that can be stopped, resumed and compared with another."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from schemas.errors import NoResources
from schemas.train import Train
from stages.stores.tensors import from_mlx, tensor_digest, to_mlx
from stages.training.checkpoints import Snapshot, newest, write_checkpoint
from stages.training.control import Control
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
    warnings: list[str] = field(default_factory=list[str])
    full: set[int] = field(default_factory=set[int])
    control: Control | None = None

    def go(self, heard: Callable[[Line], None] = lambda _: None) -> Trainer:
        """Train on; `heard` is told of every line; the disk is full at the steps in `full`."""
        trainer = corpus.trainer(self.settings)
        start = newest([self.store], TRAJECTORY, self.settings.steps, fail)
        if start is not None:
            trainer.load_state({name: to_mlx(tensor) for name, tensor in start.state().items()})
            self.lines = start.metrics()

        def on_line(line: Line) -> None:
            heard(line)
            self.lines.append(line)

        def on_checkpoint(step: int, public: bool) -> None:  # noqa: FBT001
            if step in self.full:
                raise NoResources("disk.full", "the disk is full", fix="free some space")
            state = {name: from_mlx(array) for name, array in trainer.state().items()}
            lines = [line for line in self.lines if line["step"] <= step]
            snapshot = Snapshot(
                step=step, public=public, state=state, lora=state, ema=None, metadata={}, metrics=lines
            )
            write_checkpoint(self.store, TRAJECTORY, snapshot)
            self.checkpoints.append((step, public))

        data = corpus.data(self.store, self.tables)
        places = {"control": self.control, "warn": self.warnings.append}
        Loop(trainer, data, self.settings, SEED, on_line, on_checkpoint, **places).run()
        return trainer

    def trace(self) -> tuple[str, list[Line]]:
        """Return the digest of the state saved last, and the lines without time and memory."""
        end = newest([self.store], TRAJECTORY, self.settings.steps, fail)
        assert end is not None
        kept = ("step", "loss", "learning_rate", "grad_norm")
        return tensor_digest(end.state()), [{name: line[name] for name in kept} for line in self.lines]


def raising(number: signal.Signals, after: int) -> Callable[[Line], None]:
    def heard(line: Line) -> None:
        if line["step"] == after:
            signal.raise_signal(number)

    return heard
