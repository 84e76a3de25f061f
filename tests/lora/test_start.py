from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from schemas.adapter import Adapter as Spec
from schemas.adapter import DoRA, LoKr, LoRA
from schemas.errors import BadConfig
from schemas.train import Train
from stages.lora.formats import bfl
from stages.lora.formats.read import read
from stages.lora.layer import Factors, LoRALinear, PiSSALinear, dense
from stages.lora.merge import assign, attach, portable, trainable
from stages.lora.start import fresh, principal, require_rank, scale_of
from stages.lora.targets import Size, linear_shapes
from tests.golden import tiny
from tests.lora.velocity import random, velocity

SHAPE = (6, 50)


def made(spec: Spec, rank: int = 400, *, seed: int = 1, module: str = "a") -> Factors:
    base = nn.Linear(*SHAPE[::-1], bias=False)
    return fresh(spec, base, SHAPE, module=module, size=Size(rank, 1.0), seed=seed).parts


def test_kaiming_fills_its_bound_and_changes_nothing() -> None:
    parts, bound = made(LoRA()), 1 / math.sqrt(50)
    assert not parts["lora_B"].any()
    assert parts["lora_B"].shape == (6, 400)
    assert 0.99 * bound < mx.abs(parts["lora_A"]).max().item() <= bound
    assert abs(parts["lora_A"].std().item() - bound / math.sqrt(3)) < 0.02 * bound


@pytest.mark.parametrize("spec", [LoRA(init="gaussian"), DoRA(init="gaussian")])
def test_gaussian_is_normal_with_one_over_rank_as_peft_has_it(spec: Spec) -> None:
    parts = made(spec)
    assert not parts["lora_B"].any()
    assert parts["lora_A"].std().item() * 400 == pytest.approx(1, abs=0.02)
    assert mx.abs(parts["lora_A"]).max().item() * 400 > 3.5


@pytest.mark.parametrize("spec", [LoRA(), LoRA(init="gaussian"), LoKr(factor=2)])
def test_a_start_depends_on_seed_and_name_alone(spec: Spec) -> None:
    name = "lokr_w1" if isinstance(spec, LoKr) else "lora_A"
    one = made(spec, 4)[name]
    assert mx.array_equal(one, made(spec, 4)[name])
    assert not mx.array_equal(one, made(spec, 4, module="b")[name])
    assert not mx.array_equal(one, made(spec, 4, seed=2)[name])


def test_rank_stabilised_scale_is_that_of_peft() -> None:
    size = Size(16, 8.0)
    assert scale_of(LoRA(), size) == scale_of(DoRA(), size) == scale_of(LoKr(), size) == 0.5
    assert scale_of(LoRA(rslora=True), size) == scale_of(DoRA(rslora=True), size) == 2.0


def test_rank_stabilised_adapters_weigh_more() -> None:
    def change(spec: LoRA) -> mx.array:
        model = tiny.transformer("klein")
        attach(model, Train(adapter=spec, rank=4, alpha=4.0, targets=("single_blocks.1.linear2",)), seed=1)
        factors = {name: factor + 1e-4 for name, factor in trainable(model).items()}
        assign(model, factors)
        return velocity(model) - velocity(model, {})

    assert tiny.distance(change(LoRA(rslora=True)), 2 * change(LoRA())) <= 0.02  # nearly linear that near to zero


def test_what_pissa_takes_is_what_peft_takes() -> None:
    golden = tiny.arrays("adapters")
    base = nn.Linear(40, 48, bias=False)
    base.weight = golden["pissa_weight"]
    layer = fresh(LoRA(init="pissa"), base, (48, 40), module="a", size=Size(4, 2.0), seed=1)
    assert isinstance(layer, PiSSALinear)
    assert tiny.distance(layer.lora_B @ layer.lora_A, golden["pissa_product"]) <= 1e-4
    assert tiny.distance(dense(base) - layer.scale * layer.lora_B @ layer.lora_A, golden["pissa_rest"]) <= 1e-4
    roots = mx.square(layer.lora_A).sum(axis=1), mx.square(layer.lora_B).sum(axis=0)
    assert tiny.error(*roots) <= 1e-4  # the singular values are shared evenly


def test_principal_part_of_a_flat_spectrum_is_nearly_the_best() -> None:
    weight = random(1, 96, 160)
    a, b = principal(weight, 8, mx.random.key(0))
    exact = np.linalg.svd(np.array(weight), compute_uv=False)
    left = mx.square(weight - b @ a).sum().item()
    assert left <= 1.002 * np.square(exact[8:]).sum()
    assert mx.array_equal(a, principal(weight, 8, mx.random.key(0))[0])


def test_all_of_a_small_weight_is_its_principal_part() -> None:
    weight = random(1, 6, 4)
    a, b = principal(weight, 4, mx.random.key(0))
    assert (a.shape, b.shape) == ((4, 4), (6, 4))
    assert tiny.error(b @ a, weight) <= 1e-4


def test_pissa_starts_as_the_base_and_is_saved_as_a_plain_lora_of_it() -> None:
    model, bare = tiny.transformer("klein"), velocity(tiny.transformer("klein"))
    attach(model, Train(adapter=LoRA(init="pissa"), rank=4, alpha=2.0), seed=1)
    assert tiny.error(velocity(model), bare) <= 1e-5
    assign(model, {name: 1.1 * factor for name, factor in trainable(model).items()})
    tensors = bfl.to_tensors(portable(model, trainable(model)), dtype=mx.float32)
    assert {tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key} == {8}
    trained = velocity(model)
    assert tiny.error(trained, bare) > 1e-2
    assert tiny.error(velocity(tiny.transformer("klein"), read(tensors, {}, tiny.KLEIN)), trained) <= 1e-5


def test_pissa_works_beside_a_quantized_linear() -> None:
    quantized = nn.QuantizedLinear.from_linear(nn.Linear(64, 32, bias=False), group_size=32, bits=8)
    layer = fresh(LoRA(init="pissa"), quantized, (32, 64), module="a", size=Size(4, 4.0), seed=1)
    x = random(1, 2, 64)
    assert tiny.error(layer(x), quantized(x)) <= 1e-5
    assert tiny.distance(layer.lora_B @ layer.lora_A, dense(quantized)) < 0.95


def test_rank_is_no_larger_than_some_linear_and_for_pissa_than_each() -> None:
    proj, small = "double_blocks.0.img_attn.proj", "img_in"
    assert [min(linear_shapes(tiny.KLEIN)[name]) for name in (proj, small)] == [32, 8]
    pissa, dora = LoRA(init="pissa"), DoRA()
    for spec in (pissa, LoRA(), dora):
        require_rank(spec, tiny.KLEIN, {proj: Size(32, 1.0)})
        with pytest.raises(BadConfig, match=r"train\.rank = 32 or less"):
            require_rank(spec, tiny.KLEIN, {proj: Size(33, 1.0)})
    both = {proj: Size(32, 1.0), small: Size(32, 1.0)}
    require_rank(LoRA(), tiny.KLEIN, both)
    with pytest.raises(BadConfig, match=r"img_in: at most 8.*train\.rank = 8 or less"):
        require_rank(pissa, tiny.KLEIN, both)
    # Its factors are of other shapes.
    require_rank(LoKr(), tiny.KLEIN, {proj: Size(33, 1.0)})


def test_a_plain_lora_saves_its_scale_in_b() -> None:
    layer = LoRALinear(nn.Linear(8, 5, bias=False), random(1, 2, 8), random(2, 5, 2), 0.25)
    assert mx.array_equal(layer.portable(layer.parts)["lora_B"], layer.lora_B / 4)
