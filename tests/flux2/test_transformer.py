from __future__ import annotations

import dataclasses
from functools import partial

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from stages.flux2.blocks import DoubleBlock, Modulation
from stages.flux2.positions import rope, rotate
from stages.flux2.shapes import transformer_shapes
from stages.flux2.transformer import Transformer
from stages.flux2.variants import DEV, MICRO, TransformerConfig
from tests.golden import tiny

CONFIGS = {"klein": tiny.KLEIN, "dev": dataclasses.replace(tiny.KLEIN, guidance_embeds=True)}
# Of the maximum, float32, diffusers 0.42.1 on torch 2.13; measured 3.2e-6.
VELOCITY_BOUND = 5e-6


def velocity(model: Transformer, golden: dict[str, mx.array]) -> mx.array:
    tables = rope(model.config, tiny.TEXT_LENGTH, tiny.HEIGHT, tiny.WIDTH)
    return model(
        golden["hidden_states"], golden["encoder_hidden_states"], golden["timestep"], golden["guidance"], tables
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_velocity_of_a_batch_on_an_oblong_grid_is_that_of_diffusers(name: str) -> None:
    golden = tiny.arrays("transformer")
    assert tiny.error(velocity(tiny.transformer(name, CONFIGS[name]), golden), golden[name]) <= VELOCITY_BOUND


def test_velocity_of_a_sample_does_not_depend_on_its_batch() -> None:
    golden, model = tiny.arrays("transformer"), tiny.transformer("klein")
    single = velocity(model, {name: array[1:] for name, array in golden.items()})
    assert tiny.error(single, golden["klein"][1:]) <= VELOCITY_BOUND


def test_bfloat16_weights_compute_in_bfloat16_and_stay_near() -> None:
    golden = tiny.arrays("transformer")
    found = velocity(tiny.transformer("klein", dtype=mx.bfloat16), golden)
    assert found.dtype == mx.bfloat16
    # Eight bits of mantissa through four blocks; measured 0.009.
    assert tiny.error(found.astype(mx.float32), golden["klein"]) <= 0.03


def test_guidance_must_be_given_where_it_is_embedded() -> None:
    model, golden = tiny.transformer("dev", CONFIGS["dev"]), tiny.arrays("transformer")
    with pytest.raises(ValueError, match="guidance"):
        model(golden["hidden_states"], golden["encoder_hidden_states"], golden["timestep"], None, rope(DEV, 7, 3, 5))


@pytest.mark.parametrize("config", [*CONFIGS.values(), MICRO.transformer])
def test_parameters_are_exactly_the_tensors_of_a_bfl_file(config: TransformerConfig) -> None:
    parameters = tree_flatten(Transformer(config).parameters(), destination={})
    assert {name: array.shape for name, array in parameters.items()} == transformer_shapes(config)


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    golden, model = tiny.arrays("transformer"), tiny.transformer("klein")
    model.freeze()
    for block in (*model.double_blocks, *model.single_blocks):
        block.unfreeze(keys="weight")

    def loss(parameters: dict, img: mx.array) -> mx.array:
        model.update(parameters)
        return mx.square(velocity(model, golden | {"hidden_states": img})).mean()

    def gradients(*, checkpoint: bool) -> dict[str, mx.array]:
        model.checkpoint = checkpoint
        weights, img = mx.grad(loss, argnums=(0, 1))(model.trainable_parameters(), golden["hidden_states"])
        return tree_flatten(weights, destination={"img": img})

    plain, checkpointed = gradients(checkpoint=False), gradients(checkpoint=True)
    assert len(plain) == 1 + len(model.double_blocks) * 8 + len(model.single_blocks) * 2
    assert all(mx.array_equal(plain[name], checkpointed[name]).item() for name in plain)


def test_checkpointed_blocks_need_less_memory() -> None:
    config = dataclasses.replace(MICRO.transformer, num_layers=1, num_single_layers=6)
    model = Transformer(config)
    model.freeze()
    mx.eval(model.parameters())
    txt, tables = mx.random.normal((1, 64, 192)), rope(config, 64, 8, 16)

    def loss(img: mx.array) -> mx.array:
        return mx.square(model(img, txt, mx.array([0.5]), None, tables)).mean()

    def peak_bytes(*, checkpoint: bool) -> int:
        model.checkpoint = checkpoint
        mx.clear_cache()
        mx.reset_peak_memory()
        mx.eval(mx.grad(loss)(mx.ones((1, 128, config.in_channels))))
        return mx.get_peak_memory()

    plain, checkpointed = peak_bytes(checkpoint=False), peak_bytes(checkpoint=True)
    assert checkpointed < 0.75 * plain, f"{checkpointed / 1e6:.1f} against {plain / 1e6:.1f} MB"


def test_gradient_of_a_rotation_is_that_of_plain_slices() -> None:
    cos, sin = rope(tiny.KLEIN, 3, 2, 2)
    x, cotangent = (mx.random.normal((2, 7, 2, 16), key=mx.random.key(seed)) for seed in (1, 2))

    def sliced(x: mx.array) -> mx.array:
        pairs = x.reshape(*x.shape[:-1], -1, 2)
        a, b = pairs[..., 0], pairs[..., 1]
        c, s = cos[..., ::2], sin[..., 1::2]
        return mx.stack([a * c - b * s, a * s + b * c], axis=-1).reshape(x.shape)

    found, gradient = mx.vjp(partial(rotate, cos=cos, sin=sin), [x], [cotangent])
    expected, expected_gradient = mx.vjp(sliced, [x], [cotangent])
    assert mx.array_equal(found[0], expected[0])
    assert tiny.error(gradient[0], expected_gradient[0]) <= 1e-6


def test_tables_are_made_once_per_sequence() -> None:
    assert rope(tiny.KLEIN, 5, 2, 3)[0] is rope(tiny.KLEIN, 5, 2, 3)[0]
    assert rope(tiny.KLEIN, 5, 3, 2)[0] is not rope(tiny.KLEIN, 5, 2, 3)[0]


def test_double_block_keeps_its_streams_apart_where_gates_are_closed() -> None:
    block = DoubleBlock(tiny.KLEIN)
    img, txt, zero = mx.random.normal((1, 4, 32)), mx.random.normal((1, 3, 32)), mx.zeros((1, 1, 32))
    closed = (Modulation(zero, zero, zero), Modulation(zero, zero, zero))
    found = block(img, txt, closed, closed, rope(tiny.KLEIN, 3, 2, 2))
    assert mx.array_equal(found[0], img)
    assert mx.array_equal(found[1], txt)
