"""Fifty stops of fifty: at each, what is saved gives the step that the unbroken training took, bit for bit.

Held is one step on from every stop. The rest follows by induction: the state after stop k is the unbroken one, and a
step is a function of that state and its number alone, as the same fifty steps show.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import msgspec
import pytest

from schemas.adapter import LoRA
from schemas.ema import Ema
from schemas.optimizers import Adafactor, AdamW, AdamW8bit, Lion, Muon, Optimizer, Prodigy, ScheduleFree
from schemas.schedules import Cosine
from schemas.train import Train
from stages.flux2.transformer import Transformer
from stages.lora.merge import attach
from stages.stores.tensors import Tensor, from_mlx, to_mlx
from stages.training.data import Batch as Read
from stages.training.data import Sample, Tables, TrainingData
from stages.training.loop import Line, Loop
from stages.training.objective import Batch
from stages.training.step import Trainer
from tests.golden import tiny
from tests.training import corpus
from tests.training.test_step import batch

ALL = (AdamW(), AdamW8bit(), Adafactor(), Lion(), Prodigy(), Muon(), ScheduleFree())
STOPS = range(1, 51)
STEPS = len(STOPS) + 1
SEED = 1
# Whatever depends on the number of a step is on: warm-up and decay, dropout, the average's own warm-up.
SETTINGS = Train(
    steps=STEPS,
    gradient_accumulation=2,
    rank=2,
    alpha=2.0,
    targets=("single_blocks.*", "double_blocks.0.img_attn.proj"),
    adapter=LoRA(dropout=0.2),
    checkpoint_every=1,
    caption_dropout=0.3,
    gradient_checkpointing=False,
    schedule=Cosine(warmup_steps=10),
    ema=Ema(),
)
MEASURED = ("seconds", "peak_bytes")

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def windows() -> list[list[Batch]]:
    """The micro-batches of every step, of two shapes in turn."""
    batches = [batch(index, ("a",), 2 + index % 2) for index in range(2 * STEPS)]
    mx.eval([array for each in batches for array in each if array is not None])
    return [batches[2 * step : 2 * step + 2] for step in range(STEPS)]


def fresh(settings: Train) -> Trainer:
    """Return a trainer of the smallest transformer of both kinds of block, at step 0; twice the same one."""
    mx.random.seed(SEED)
    model = Transformer(replace(tiny.KLEIN, num_layers=1, num_single_layers=1))
    attach(model, settings, seed=SEED)
    return Trainer(model, settings, SEED)


def saved(trainer: Trainer) -> State:
    return {name: from_mlx(array) for name, array in trainer.state().items()}


def bits(state: State) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (tensor.dtype, tensor.shape, tensor.data.tobytes()) for name, tensor in state.items()}


def restored(trainer: Trainer, settings: Train, state: State) -> Trainer:
    """Return a new trainer on the transformer of another, that knows of the training only what was saved."""
    resumed = Trainer(trainer.transformer, settings, SEED)
    resumed.load_state({name: to_mlx(tensor) for name, tensor in state.items()})
    return resumed


@pytest.mark.parametrize("spec", ALL, ids=lambda spec: type(spec).__name__)
def test_every_optimizer_goes_on_from_every_stop_as_if_it_had_never_stopped(
    spec: Optimizer, windows: Sequence[list[Batch]]
) -> None:
    settings = msgspec.structs.replace(SETTINGS, optimizer=spec, learning_rate=spec.default_rate)
    unbroken = fresh(settings)
    states, losses = [saved(unbroken)], []
    for window in windows:
        losses.append(unbroken.step(window).loss.item())
        states.append(saved(unbroken))
    # Every step moves factors, optimizer and average: an unbroken training that stood still would prove nothing.
    for before, after in itertools.pairwise(states):
        changed = {name.partition(".")[0] for name, each in bits(before).items() if each != bits(after)[name]}
        assert changed == {"lora", "optimizer", "ema", "steps"}
    other = fresh(settings)
    for stop in STOPS:
        resumed = restored(other, settings, states[stop])
        assert resumed.step(windows[stop]).loss.item() == losses[stop]
        assert bits(saved(resumed)) == bits(states[stop + 1])


class Watched(TrainingData):
    """The made-up store's records, and what was asked of them."""

    def __init__(self, store: Path, tables: Tables) -> None:
        super().__init__([store], tables)
        self.asked: list[list[Sample]] = []

    def read(self, samples: Sequence[Sample], *, classes: bool = False) -> Read:
        self.asked.append(list(samples))
        return super().read(samples, classes=classes)


def loop(trainer: Trainer, data: Watched, steps: int, lines: list[Line]) -> list[State]:
    """Train to `steps` with a checkpoint after every step; return what they save, and append to `lines`."""
    states: list[State] = []
    settings = msgspec.structs.replace(SETTINGS, steps=steps)
    Loop(
        trainer,
        data,
        settings,
        seed=SEED,
        on_line=lines.append,
        on_checkpoint=lambda *_: states.append(saved(trainer)),
    ).run()
    return states


def plain(lines: Sequence[Line]) -> list[Line]:
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def test_the_loop_goes_on_from_every_stop_with_the_same_pictures_draws_and_lines(tmp_path: Path) -> None:
    tables = corpus.write(tmp_path)
    data, lines = Watched(tmp_path, tables), list[Line]()
    states = loop(fresh(SETTINGS), data, STEPS, lines)
    assert (len(states), [line["step"] for line in lines]) == (STEPS, list(range(1, STEPS + 1)))
    other = fresh(SETTINGS)
    for stop in STOPS:
        rest, continued = Watched(tmp_path, tables), lines[:stop]
        [after] = loop(restored(other, SETTINGS, states[stop - 1]), rest, stop + 1, continued)
        assert bits(after) == bits(states[stop])
        assert plain(continued) == plain(lines[: stop + 1])
        assert rest.asked == data.asked[2 * stop : 2 * stop + 2]
