from __future__ import annotations

import mlx.core as mx
import msgspec
import pytest

from schemas.adapter import DoRA, LoKr, LoRA, Override
from schemas.errors import BadConfig, Fault
from schemas.train import Train
from stages.lora.formats import bfl
from stages.lora.formats.read import read
from stages.lora.layer import Factors
from stages.lora.merge import assign, attach, portable, trainable
from tests.golden import tiny
from tests.lora.velocity import load, velocity

LORA = Train(rank=4, alpha=2.0, init_lora="x")
KRON = Train(adapter=LoKr(factor=4), rank=4, alpha=2.0, init_lora="x")


def golden(name: str) -> Factors:
    return read(*load(name), tiny.KLEIN)


def lokr_factors() -> Factors:
    arrays = tiny.arrays("adapters")
    return {name.removeprefix("lokr."): array for name, array in arrays.items() if name.startswith("lokr.")}


def replaced(settings: Train, **fields: object) -> Train:
    return msgspec.structs.replace(settings, **fields)


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        (LORA, golden("lora-bfl")),
        (LORA, golden("lora-diffusers")),
        (replaced(LORA, adapter=LoRA(rslora=True), alpha=7.0), golden("lora-bfl")),
        (replaced(LORA, adapter=DoRA()), golden("lora-dora")),
        (KRON, lokr_factors()),
    ],
    ids=["bfl", "diffusers", "another-scale", "dora", "lokr"],
)
def test_training_starts_as_the_model_with_the_file(settings: Train, start: Factors) -> None:
    model = tiny.transformer("klein")
    attach(model, settings, seed=1, start=start)
    assert tiny.error(velocity(model), velocity(tiny.transformer("klein"), start)) <= 2e-6
    tensors = bfl.to_tensors(portable(model, trainable(model)), dtype=mx.float32)
    again = read(tensors, {}, tiny.KLEIN)
    assert tiny.error(velocity(tiny.transformer("klein"), again), velocity(model)) <= 1e-5


def test_a_dora_of_ours_is_trained_on_from_its_file() -> None:
    first, second = tiny.transformer("klein"), tiny.transformer("klein")
    settings = replaced(LORA, adapter=DoRA())
    attach(first, settings, seed=1, start=golden("lora-dora"))
    tensors = bfl.to_tensors(portable(first, trainable(first)), dtype=mx.float32)
    attach(second, settings, seed=1, start=read(tensors, {}, tiny.KLEIN))
    for name, factor in trainable(first).items():
        assert tiny.error(trainable(second)[name], factor) <= 1e-6


def faults(settings: Train, start: Factors) -> list[Fault]:
    with pytest.raises(BadConfig) as caught:
        attach(tiny.transformer("klein"), settings, seed=1, start=start)
    return list(caught.value.faults)


def test_another_rank_names_the_one_to_set() -> None:
    (fault,) = faults(replaced(LORA, rank=8), golden("lora-bfl"))
    assert (fault.code, fault.fix) == ("train.init_lora_rank", "set train.rank = 4")
    assert "double_blocks.0.img_attn.qkv has rank 4, not 8" in fault.why


def test_a_rank_that_differs_in_places_asks_for_overrides_that_then_fit() -> None:
    start = golden("lora-bfl")
    name = "single_blocks.1.linear2"
    start[f"{name}.lora_A"] = mx.concatenate([start[f"{name}.lora_A"]] * 2)
    start[f"{name}.lora_B"] = mx.concatenate([start[f"{name}.lora_B"] / 2] * 2, axis=1)
    (fault,) = faults(LORA, start)
    assert "[[train.overrides]]" in fault.fix
    model = tiny.transformer("klein")
    attach(model, replaced(LORA, overrides=(Override(pattern=name, rank=8, alpha=8.0),)), seed=1, start=start)
    assert tiny.error(velocity(model), velocity(tiny.transformer("klein"), golden("lora-bfl"))) <= 2e-6


def test_other_targets_name_the_set_of_the_file() -> None:
    (fault,) = faults(replaced(LORA, targets="attention"), golden("lora-bfl"))
    assert fault.code == "train.init_lora_targets"
    assert fault.fix == 'set train.targets = "blocks"'
    assert fault.why.startswith("8 of the file are no targets: double_blocks.0.img_mlp.0")
    few = {name: factor for name, factor in golden("lora-bfl").items() if name.startswith("single_blocks.0.linear1")}
    (fault,) = faults(LORA, few)
    assert "19 targets are not in the file" in fault.why
    assert "1 linears of the file" in fault.fix


def test_another_kind_names_the_one_of_the_file() -> None:
    (fault,) = faults(LORA, golden("lora-dora"))
    assert (fault.code, fault.fix) == ("train.init_lora_kind", 'set train.adapter.kind = "dora"')
    (fault,) = faults(LORA, lokr_factors())
    assert fault.fix == 'set train.adapter.kind = "lokr"'


def test_another_split_is_refused() -> None:
    (fault,) = faults(replaced(KRON, adapter=LoKr(factor=8)), lokr_factors())
    assert fault.code == "train.init_lora_size"
    assert "lokr_w1" in fault.why


def test_start_factors_are_not_those_of_the_file_after_training() -> None:
    model, start = tiny.transformer("klein"), golden("lora-bfl")
    before = {name: mx.array(factor) for name, factor in start.items()}
    attach(model, LORA, seed=1, start=start)
    assign(model, {name: factor + 1 for name, factor in trainable(model).items()})
    assert all(mx.array_equal(start[name], before[name]).item() for name in start)


def test_an_own_start_beside_a_file_is_refused() -> None:
    with pytest.raises(ValueError, match="where the adapter starts"):
        Train(init_lora="x", adapter=LoRA(init="gaussian"))
