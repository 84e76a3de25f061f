from __future__ import annotations

import mlx.core as mx
import pytest
from mlx import nn

from schemas.adapter import LoKr
from schemas.errors import Damaged
from schemas.train import Train
from stages.lora.formats import bfl
from stages.lora.formats.read import read
from stages.lora.layer import Factors
from stages.lora.lokr import LoKrLinear, split
from stages.lora.merge import assign, attach, portable, trainable
from stages.training.objective import Batch, loss
from tests.golden import tiny
from tests.lora.velocity import equal, random, velocity

GRADIENT_BOUND = 3e-5  # as for LoRA
FACTOR, RANK = 4, 4  # of the golden factors
QKV = "double_blocks.0.img_attn.qkv"


def golden_factors() -> Factors:
    golden = tiny.arrays("adapters")
    return {name.removeprefix("lokr."): array for name, array in golden.items() if name.startswith("lokr.")}


def settings(alpha: float) -> Train:
    return Train(adapter=LoKr(factor=FACTOR), rank=RANK, alpha=alpha)


def test_sizes_are_split_as_peft_splits_them() -> None:
    splits = tiny.arrays("adapters")["splits"].tolist()
    assert len(splits) == 60
    assert [split(size, factor) for size, factor, _, _ in splits] == [(p, q) for _, _, p, q in splits]


@pytest.mark.parametrize("names", [("lokr_w2",), ("lokr_w2_a", "lokr_w2_b")])
def test_it_adds_the_scaled_kronecker_product(names: tuple[str, ...]) -> None:
    base = nn.Linear(12, 20, bias=False)
    shapes = {"lokr_w1": (5, 3), "lokr_w2": (4, 4), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 4)}
    parts = {name: random(seed, *shapes[name]) for seed, name in enumerate(("lokr_w1", *names))}
    w2 = parts["lokr_w2"] if "lokr_w2" in parts else parts["lokr_w2_a"] @ parts["lokr_w2_b"]
    layer, x = LoKrLinear(base, parts, 0.5), random(9, 2, 7, 12)
    assert tiny.error(layer(x), x @ (base.weight + 0.5 * mx.kron(parts["lokr_w1"], w2)).T) <= 1e-5
    assert tiny.error(layer.norm(layer.parts), 0.5 * mx.linalg.norm(mx.kron(parts["lokr_w1"], w2))) <= 1e-5
    assert layer(x.astype(mx.bfloat16)).dtype == mx.float32  # that of the base here
    base.set_dtype(mx.bfloat16)
    assert layer(x.astype(mx.bfloat16)).dtype == mx.bfloat16


def test_a_file_of_ours_gives_the_velocity_that_diffusers_computes_with_it() -> None:
    tensors = bfl.to_tensors(golden_factors(), dtype=mx.float32)
    assert f"diffusion_model.{QKV}.lokr_w2_a" in tensors
    found = velocity(tiny.transformer("klein"), read(tensors, bfl.metadata(RANK, {}), tiny.KLEIN))
    assert tiny.error(found, tiny.arrays("adapters")["lokr_velocity"]) <= 1e-5


def test_loss_and_gradients_of_every_factor_are_those_of_peft() -> None:
    training, golden = tiny.arrays("training"), tiny.arrays("adapters")
    model = tiny.transformer("klein")
    attach(model, settings(alpha=4.0), seed=1)
    batch = Batch(*(training.get(field) for field in Batch._fields))

    def value(factors: Factors) -> mx.array:
        assign(model, factors)
        return loss(model, batch, settings(4.0).loss)

    found, gradients = mx.value_and_grad(value)(golden_factors())
    assert tiny.error(found, golden["lokr_loss"]) <= GRADIENT_BOUND
    distances = {name: tiny.distance(gradients[name], golden[f"lokr_gradient.{name}"]) for name in gradients}
    assert {name.rpartition(".")[2] for name in gradients} == {"lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b"}
    assert max(distances.values()) <= GRADIENT_BOUND, distances


def test_a_fresh_one_changes_nothing_and_what_is_trained_is_what_is_read() -> None:
    model = tiny.transformer("klein")
    attach(model, settings(alpha=1.0), seed=1)
    assert mx.array_equal(velocity(model), velocity(tiny.transformer("klein")))
    assign(model, golden_factors())
    written = bfl.to_tensors(portable(model, trainable(model)), dtype=mx.float32)
    assert tiny.error(velocity(tiny.transformer("klein"), read(written, {}, tiny.KLEIN)), velocity(model)) <= 1e-6
    assert tiny.error(velocity(model), velocity(tiny.transformer("klein"), golden_factors())) > 1e-2  # the scale


def others(name: str) -> dict[str, mx.array]:
    return {
        f"{name}.lokr_w1_a": random(1, 4, 2),
        f"{name}.lokr_w1_b": random(2, 2, 4),
        f"{name}.lokr_w2": random(3, 24, 8),
        f"{name}.alpha": mx.array(1.0),
    }


def test_other_trainers_split_w1_and_alpha_are_understood() -> None:
    tensors = others("lora_unet_double_blocks_0_img_attn_qkv")
    a, b, w2, _ = tensors.values()
    found = read(tensors, {}, tiny.KLEIN)
    assert tiny.error(found[f"{QKV}.lokr_w1"], a @ b / 2) <= 1e-6
    assert mx.array_equal(found[f"{QKV}.lokr_w2"], w2)


def test_alpha_of_two_whole_factors_means_nothing() -> None:
    tensors = {
        f"diffusion_model.{QKV}.lokr_w1": random(1, 4, 4),
        f"diffusion_model.{QKV}.lokr_w2": random(2, 24, 8),
        f"diffusion_model.{QKV}.alpha": mx.array(0.01),
    }
    assert equal(read(tensors, {}, tiny.KLEIN), {key[16:]: value for key, value in list(tensors.items())[:2]})


def refused(tensors: dict[str, mx.array]) -> str:
    with pytest.raises(Damaged) as caught:
        read(tensors, {}, tiny.KLEIN)
    assert len(caught.value.faults) == 1
    return caught.value.faults[0].code


def test_half_misshapen_or_mixed_products_are_refused() -> None:
    name = f"diffusion_model.{QKV}"
    whole = others(name)
    assert refused({key: tensor for key, tensor in whole.items() if not key.endswith("w1_b")}) == "lora.missing_half"
    assert refused(whole | {f"{name}.lokr_w1": random(4, 4, 4)}) == "lora.missing_half"
    assert refused(whole | {f"{name}.lora_A.weight": random(4, 4, 32)}) == "lora.missing_half"
    assert refused(whole | {f"{name}.lokr_w2": random(4, 24, 9)}) == "lora.shape"
    assert refused(whole | {f"{name}.lokr_w1_b": random(4, 3, 4)}) == "lora.shape"
    assert refused(whole | {f"{name}.lokr_w2": random(4, 24)}) == "lora.shape"


def test_a_product_on_q_alone_is_refused() -> None:
    name = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{name}.lokr_w1": random(1, 4, 4), f"{name}.lokr_w2": random(2, 8, 8)}
    with pytest.raises(Damaged, match="1 LoKrs are on q, k or v alone"):
        read(tensors, {}, tiny.KLEIN)
