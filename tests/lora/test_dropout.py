from __future__ import annotations

import mlx.core as mx
import pytest
from mlx import nn

from schemas.adapter import Adapter as Spec
from schemas.adapter import DoRA, LoKr, LoRA
from stages.lora.dora import DoRALinear
from stages.lora.dropout import Draw, Rates, draw_key
from stages.lora.layer import LoRALinear, PiSSALinear
from stages.lora.lokr import LoKrLinear
from stages.lora.merge import draw_keys, rates
from tests.golden import tiny
from tests.lora.velocity import random

KEY = draw_key(1, 2, 0, "a")


def adapted(kind: type = LoRALinear) -> tuple[LoRALinear, mx.array]:
    return kind(nn.Linear(64, 5, bias=False), random(2, 4, 64), random(3, 5, 4), 0.5), random(1, 3, 7, 64)


@pytest.mark.parametrize(
    "other",
    [(2, 2, 0, "a"), (1, 3, 0, "a"), (1, 2, 1, "a"), (1, 2, 0, "b")],
    ids=["seed", "step", "micro-batch", "module"],
)
def test_every_part_of_a_key_counts(other: tuple[int, int, int, str]) -> None:
    assert KEY.tolist() == draw_key(1, 2, 0, "a").tolist()
    assert KEY.tolist() != draw_key(*other).tolist()


def test_dropped_inputs_are_zero_and_the_rest_grows_as_in_torch() -> None:
    x = mx.ones((4, 50, 50))
    seen = Draw(Rates(inputs=0.2), KEY).inputs(x)
    assert set(seen.flatten().tolist()) == {0.0, 1.25}
    assert seen.mean().item() == pytest.approx(1, abs=0.02)


def test_dropped_ranks_are_those_of_whole_samples() -> None:
    low = Draw(Rates(ranks=0.5), KEY).ranks(mx.ones((64, 9, 16)))
    assert (low == low[:, :1]).all().item()
    assert set(low.flatten().tolist()) == {0.0, 2.0}
    assert not (low == low[:1]).all().item()
    assert low.mean().item() == pytest.approx(1, abs=0.1)


def test_modules_are_dropped_whole_at_their_rate() -> None:
    drops = [
        Draw(Rates(module=0.3), draw_key(1, step, 0, "a")).module(mx.array(1.0), mx.array(0.0)) for step in range(500)
    ]
    values = mx.stack(drops)
    assert set(values.tolist()) == {0.0, 1.0}
    assert values.mean().item() == pytest.approx(0.7, abs=0.06)


def test_dropout_acts_on_the_adapters_input_alone() -> None:
    layer, x = adapted()
    layer.draw = Draw(Rates(inputs=0.5), KEY)
    expected = layer.base(x) + 0.5 * layer.draw.inputs(x) @ layer.lora_A.T @ layer.lora_B.T
    assert tiny.error(layer(x), expected) <= 1e-6
    assert tiny.error(layer(x), layer.base(x) + 0.5 * x @ layer.lora_A.T @ layer.lora_B.T) > 0.05


def test_dropout_of_dora_leaves_the_base_its_whole_input_as_in_peft() -> None:
    layer, x = adapted(DoRALinear)
    layer.lora_magnitude_vector = layer.lora_magnitude_vector * 1.5
    layer.draw = Draw(Rates(inputs=0.5), KEY)
    seen = layer.draw.inputs(x)
    change = 0.5 * seen @ layer.lora_A.T @ layer.lora_B.T
    expected = layer.base(x) + 0.5 * layer.base(seen) + 1.5 * change
    assert tiny.error(layer(x), expected) <= 1e-5


def test_dropout_of_pissa_leaves_the_base_its_principal_part() -> None:
    layer, x = adapted(PiSSALinear)
    layer.draw = Draw(Rates(inputs=0.5, ranks=0.5), KEY)
    low = layer.draw.ranks(layer.draw.inputs(x) @ layer.lora_A.T)
    expected = layer.base(x) - 0.5 * x @ layer.lora_A.T @ layer.lora_B.T + 0.5 * low @ layer.lora_B.T
    assert tiny.error(layer(x), expected) <= 1e-6


def test_dropout_of_lokr_acts_on_its_input() -> None:
    base, x = nn.Linear(64, 20, bias=False), random(1, 3, 7, 64)
    layer = LoKrLinear(base, {"lokr_w1": random(2, 4, 8), "lokr_w2": random(3, 5, 8)}, 0.5)
    layer.draw = Draw(Rates(inputs=0.5), KEY)
    expected = base(x) + 0.5 * layer.draw.inputs(x) @ mx.kron(layer.lokr_w1, layer.lokr_w2).T
    assert tiny.error(layer(x), expected) <= 1e-5


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear, PiSSALinear])
def test_a_dropped_module_is_the_bare_linear_to_the_bit(kind: type) -> None:
    layer, x = adapted(kind)
    layer.lora_B = layer.lora_B + 1
    keys = [draw_key(1, step, 0, "a") for step in range(20)]
    outputs = []
    for key in keys:
        layer.draw = Draw(Rates(module=0.5), key)
        outputs.append(mx.array_equal(layer(x), layer.base(x)).item())
    assert 3 < sum(outputs) < 17


def test_without_rates_nothing_is_drawn() -> None:
    layer, x = adapted()
    plain = layer(x)
    layer.draw = Draw(Rates(), KEY)
    assert mx.array_equal(layer(x), plain)
    assert layer.draw.inputs(x) is x


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (LoRA(dropout=0.1, rank_dropout=0.2, module_dropout=0.3), Rates(0.1, 0.2, 0.3)),
        (DoRA(dropout=0.1, rank_dropout=0.2, module_dropout=0.3), Rates(0.1, 0.2, 0.3)),
        (LoKr(dropout=0.1, module_dropout=0.3), Rates(0.1, 0.0, 0.3)),
    ],
)
def test_rates_are_those_of_the_settings(spec: Spec, expected: Rates) -> None:
    assert rates(spec) == expected


def test_a_training_that_drops_nothing_needs_no_keys() -> None:
    assert draw_keys(tiny.transformer("klein"), LoRA(), seed=1, step=0, micro_batch=0) == {}
