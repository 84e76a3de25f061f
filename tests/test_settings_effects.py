"""Settings of training, each shown to act in a whole training, or to change nothing in it, on tiny real weights."""

from __future__ import annotations

import functools
from collections.abc import Callable

import mlx.core as mx
import msgspec
import numpy as np
import pytest

from schemas.adapter import DoRA, LoRA, Override
from schemas.ema import Ema
from schemas.optimizers import AdamW
from schemas.schedules import Cosine
from schemas.timesteps import LogitNormal, Uniform
from schemas.train import Train
from stages.lora.merge import attach
from stages.training.step import Trainer
from tests.golden import tiny
from tests.golden.recorders.curves import MEASURES, trace

PLAIN = Train(steps=2, batch_size=2, learning_rate=1e-2, rank=4, alpha=4.0, gradient_checkpointing=False)


@functools.cache
def traced(settings: Train, seed: int = 5) -> np.ndarray:
    """Return the measures [2, 11] of a training."""
    return trace(settings, seed)


def changed(**fields: object) -> Train:
    return msgspec.structs.replace(PLAIN, **fields)


def first_to_differ(found: np.ndarray, expected: np.ndarray) -> str:
    """Name the step from 1 and the measure, in causal order, in which a training first differs; "" if in none."""
    places = np.argwhere(found != expected)
    return f"{places[0][0] + 1} {MEASURES[places[0][1]]}" if places.size else ""


@pytest.mark.parametrize(
    ("fields", "first"),
    [
        ({"batch_size": 1}, "1 latents"),
        ({"gradient_accumulation": 2}, "1 latents"),
        ({"caption_dropout": 1.0}, "1 text"),
        ({"noise_offset": 0.1}, "1 noise"),
        ({"timesteps": Uniform()}, "1 timesteps"),
        ({"timesteps": LogitNormal(stratified=True)}, "1 timesteps"),
        ({"learning_rate": 2e-2}, "1 learning rate"),
        ({"rank": 8}, "1 gradient norm"),
        ({"alpha": 8.0}, "1 gradient norm"),
        ({"targets": "attention"}, "1 gradient norm"),
        ({"exclude": ("double_blocks.*",)}, "1 gradient norm"),
        ({"overrides": (Override(pattern="single_blocks.*", rank=2, alpha=4.0),)}, "1 gradient norm"),
        ({"adapter": LoRA(init="gaussian")}, "1 gradient norm"),
        ({"adapter": DoRA()}, "1 gradient norm"),
        ({"adapter": LoRA(dropout=0.2)}, "1 gradient norm"),
        ({"clip_norm": 0.01}, "1 factors"),
        ({"optimizer": AdamW(weight_decay=0.5)}, "1 factors"),
        ({"ema": Ema()}, "1 average"),
        ({"schedule": Cosine()}, "2 learning rate"),
    ],
    ids=str,
)
def test_setting_acts_first_where_it_should(fields: dict[str, object], first: str) -> None:
    assert first_to_differ(traced(changed(**fields)), traced(PLAIN)) == first


def test_another_seed_is_another_order_start_and_draw_of_everything() -> None:
    other = (traced(PLAIN, seed=6) != traced(PLAIN)).any(axis=0)
    assert [name for name, differs in zip(MEASURES, other, strict=True) if not differs] == [
        *("weights", "target", "learning rate", "average")
    ]


@pytest.mark.parametrize("fields", [{"gradient_checkpointing": True}, {"checkpoint_every": 1}, {"steps": 3}], ids=str)
def test_setting_that_is_no_part_of_the_result_changes_no_step(fields: dict[str, object]) -> None:
    assert first_to_differ(traced(changed(**fields))[:2], traced(PLAIN)) == ""


def test_compile_traces_gradient_and_update_and_its_absence_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    traces: list[str] = []

    def remember(function: Callable[..., object]) -> Callable[..., object]:
        traces.append(function.__name__)
        return function

    monkeypatch.setattr(mx, "compile", remember)
    for switch, expected in ((False, []), (True, ["gradient", "apply"])):
        model = tiny.transformer("klein")
        attach(model, PLAIN, seed=1)
        Trainer(model, changed(compile=switch), 1)
        assert traces == expected
