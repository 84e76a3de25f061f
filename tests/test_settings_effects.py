"""Settings of training, each shown to act in a whole training, or to change nothing in it, on tiny real weights."""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable

import mlx.core as mx
import msgspec
import numpy as np
import pytest

from schemas.adapter import Adapter, DoRA, LoKr, LoRA, Override
from schemas.ema import Ema
from schemas.optimizers import AdamW
from schemas.schedules import Cosine
from schemas.timesteps import LogitNormal, Shift, Timesteps, Uniform
from schemas.train import Train
from stages.flux2.flow import training_mu
from stages.lora.merge import attach
from stages.training.step import Trainer
from stages.training.timesteps import STRATA, Moment, draw, probability
from tests.golden import tiny
from tests.golden.recorders.curves import MEASURES, trace

PLAIN = Train(steps=2, batch_size=2, learning_rate=1e-2, rank=4, alpha=4.0, gradient_checkpointing=False)
FACTORS = MEASURES.index("factors")


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
        ({"adapter": DoRA()}, "1 gradient norm"),
        ({"adapter": LoKr(factor=4)}, "1 gradient norm"),
        ({"clip_norm": 0.01}, "1 factors"),
        ({"optimizer": AdamW(weight_decay=0.5)}, "1 factors"),
        ({"ema": Ema()}, "1 average"),
        ({"schedule": Cosine()}, "2 learning rate"),
    ],
    ids=str,
)
def test_setting_acts_first_where_it_should(fields: dict[str, object], first: str) -> None:
    assert first_to_differ(traced(changed(**fields)), traced(PLAIN)) == first


COMMON = {"dropout": 0.3, "module_dropout": 0.5, "max_norm": 0.01}
LOW_RANK = {**COMMON, "init": "gaussian", "rslora": True, "rank_dropout": 0.5}


@pytest.mark.parametrize(
    ("adapter", "fields"),
    [(LoRA(), LOW_RANK), (DoRA(), LOW_RANK), (LoKr(factor=4), {**COMMON, "factor": 2})],
    ids=str,
)
def test_every_setting_of_an_adapter_trains_another_one(adapter: Adapter, fields: dict[str, object]) -> None:
    assert set(fields) == set(adapter.__struct_fields__)
    plain = traced(changed(adapter=adapter))
    for name, value in fields.items():
        other = traced(changed(adapter=msgspec.structs.replace(adapter, **{name: value})))
        assert other[1, FACTORS] != plain[1, FACTORS], name


@pytest.mark.parametrize("kind", typing.get_args(Timesteps))
def test_strata_of_every_kind_of_timesteps_each_get_one_of_sixteen_draws(kind: type[Timesteps]) -> None:
    spec, items = kind(stratified=True), [f"item-{index}" for index in range(STRATA)]
    numbers = [probability(spec, t, 64) for t in draw(spec, Moment(1, 0), items, 64).astype(float)]
    assert sorted(int(number * STRATA) for number in numbers) == list(range(STRATA))


def test_mean_and_std_of_shifted_timesteps_move_and_stretch_the_logits() -> None:
    def logits(spec: Shift) -> np.ndarray:
        drawn = draw(spec, Moment(1, 0), [f"item-{index}" for index in range(50)], 64).astype(float)
        return np.log(drawn / (1 - drawn))

    normal = logits(Shift()) - training_mu(64)
    found = logits(Shift(mean=-0.5, std=0.7)) - training_mu(64)
    assert found == pytest.approx(-0.5 + 0.7 * normal, abs=1e-5)  # float32 timesteps


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


@pytest.mark.parametrize("switch", [False, True])
def test_gradient_checkpointing_is_asked_of_the_transformer(switch: bool) -> None:  # noqa: FBT001
    model = tiny.transformer("klein")
    attach(model, PLAIN, seed=1)
    assert Trainer(model, changed(gradient_checkpointing=switch), 1).transformer.checkpoint is switch
