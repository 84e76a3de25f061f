from __future__ import annotations

import mlx.core as mx
import pytest
from mlx import nn

from schemas.adapter import DoRA
from schemas.errors import Damaged
from schemas.train import Train
from stages.flux2.transformer import Transformer
from stages.lora.dora import DoRALinear
from stages.lora.formats import bfl
from stages.lora.formats.read import read
from stages.lora.layer import Factors, by_module, dense
from stages.lora.merge import adapters, assign, attach, portable, trainable
from stages.training.objective import Batch, loss
from tests.golden import tiny
from tests.lora.velocity import load, random, velocity

# ||difference|| / ||gradient|| of every factor against peft 0.21.2 on torch 2.13, float32.
GRADIENT_BOUND = 3e-5
SETTINGS = Train(adapter=DoRA(), rank=4, alpha=2.0)


def golden_factors() -> Factors:
    training, ours = tiny.arrays("training"), tiny.arrays("adapters")
    factors = {name.removeprefix("factor."): array for name, array in training.items() if name.startswith("factor.")}
    return factors | {name.removeprefix("dora."): array for name, array in ours.items() if name.startswith("dora.")}


@pytest.fixture
def model() -> Transformer:
    model = tiny.transformer("klein")
    attach(model, SETTINGS, seed=1)
    return model


def test_loss_and_gradients_of_every_factor_are_those_of_peft(model: Transformer) -> None:
    training, golden = tiny.arrays("training"), tiny.arrays("adapters")
    batch = Batch(*(training.get(field) for field in Batch._fields))

    def value(factors: Factors) -> mx.array:
        assign(model, factors)
        return loss(model, batch, SETTINGS.loss)

    found, gradients = mx.value_and_grad(value)(golden_factors())
    assert tiny.error(found, golden["dora_loss"]) <= GRADIENT_BOUND
    assert len(gradients) == 3 * 20
    distances = {name: tiny.distance(gradients[name], golden[f"dora_gradient.{name}"]) for name in gradients}
    assert max(distances.values()) <= GRADIENT_BOUND, distances


def test_a_file_saved_by_diffusers_means_what_peft_computed() -> None:
    factors = read(*load("lora-dora"), tiny.KLEIN)
    expected = golden_factors()
    assert factors.keys() == expected.keys()
    assert mx.array_equal(
        factors["double_blocks.0.img_attn.qkv.lora_magnitude_vector"],
        expected["double_blocks.0.img_attn.qkv.lora_magnitude_vector"],
    )
    assert tiny.error(velocity(tiny.transformer("klein"), factors), tiny.arrays("adapters")["dora_velocity"]) <= 1e-5


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_our_file_means_the_trained_model_again(model: Transformer, dtype: mx.Dtype) -> None:
    assign(model, golden_factors())
    tensors = bfl.to_tensors(portable(model, trainable(model)), dtype=dtype)
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith(".dora_scale")}
    assert {(tensor.ndim, tensor.shape[1], tensor.dtype) for tensor in scales.values()} == {(2, 1, mx.float32)}
    found = velocity(tiny.transformer("klein"), read(tensors, {}, tiny.KLEIN))
    bound = {mx.float32: 1e-5, mx.bfloat16: 2e-2}[dtype]
    assert tiny.error(found, tiny.arrays("adapters")["dora_velocity"]) <= bound


def test_comfyui_computes_the_trained_weight_from_our_file(model: Transformer) -> None:
    """ComfyUI's formula: dora_scale / ||W|| * (W + B A), the norm of the bare rows."""
    assign(model, golden_factors())
    parts = by_module(portable(model, trainable(model)))
    for name, layer in adapters(model).items():
        weight, own = dense(layer.base), parts[name]
        gain = own["dora_scale"] / mx.linalg.norm(weight, axis=1)
        read_there = gain[:, None] * (weight + own["lora_B"] @ own["lora_A"])
        assert tiny.error(layer(mx.eye(weight.shape[1])).T, read_there) <= 2e-6


def test_a_fresh_one_changes_nothing(model: Transformer) -> None:
    bare = velocity(tiny.transformer("klein"), {})
    assert tiny.error(velocity(model), bare) <= 2e-6
    assert mx.array_equal(
        trainable(model)["single_blocks.0.linear1.lora_magnitude_vector"],
        mx.linalg.norm(tiny.transformer("klein").single_blocks[0].linear1.weight, axis=1),
    )


def layer(base: nn.Module) -> DoRALinear:
    made = DoRALinear(base, random(2, 4, 64), 0.1 * random(3, 32, 4), 0.5)
    made.lora_magnitude_vector = made.lora_magnitude_vector * 1.01
    return made


def test_a_small_gain_survives_a_bfloat16_stream() -> None:
    base = nn.Linear(64, 32, bias=False)
    base.set_dtype(mx.bfloat16)
    x = random(1, 256, 64)
    exact, plain = layer(base)(x), base(x)
    rounded = layer(base)(x.astype(mx.bfloat16))
    assert rounded.dtype == mx.bfloat16
    change = (rounded.astype(mx.float32) * exact).sum() / mx.square(exact).sum()
    assert change.item() == pytest.approx(1, abs=1e-3)
    assert tiny.distance(exact, plain) > 5e-3


def test_it_works_beside_a_quantized_linear() -> None:
    quantized = nn.QuantizedLinear.from_linear(nn.Linear(64, 32, bias=False), group_size=32, bits=8)
    plain = nn.Linear(64, 32, bias=False)
    plain.weight = dense(quantized)
    x = random(1, 2, 64)
    assert tiny.error(layer(quantized)(x), layer(plain)(x)) <= 1e-5


QKV = "diffusion_model.double_blocks.0.img_attn.qkv"


@pytest.mark.parametrize(("shape", "code"), [((1, 32), "lora.shape"), ((95, 1), "lora.shape")])
def test_a_magnitude_that_is_not_per_output_row_is_refused(shape: tuple[int, int], code: str) -> None:
    tensors = {
        f"{QKV}.lora_A.weight": random(1, 4, 32),
        f"{QKV}.lora_B.weight": random(2, 96, 4),
        f"{QKV}.dora_scale": mx.ones(shape),
    }
    with pytest.raises(Damaged, match=code.replace(".", r"\.")):
        read(tensors, {}, tiny.KLEIN)


def test_magnitudes_on_some_of_q_k_and_v_are_refused() -> None:
    tensors, metadata = load("lora-dora")
    del tensors["transformer.transformer_blocks.0.attn.to_k.lora_magnitude_vector"]
    with pytest.raises(Damaged, match="1 DoRAs cover only some"):
        read(tensors, metadata, tiny.KLEIN)
