from __future__ import annotations

import mlx.core as mx
import pytest

from schemas.errors import BadConfig, Damaged
from stages.flux2.variants import KLEIN_4B
from stages.lora.formats import bfl
from stages.lora.formats.read import read
from stages.lora.formats.scale import ADAPTER_METADATA
from stages.lora.layer import Factors
from tests.golden import tiny
from tests.lora.velocity import equal, load, velocity

SCALE = 0.5  # of the golden files: alpha 2, rank 4


def golden_factors() -> Factors:
    arrays = tiny.arrays("training")
    return {name.removeprefix("factor."): array for name, array in arrays.items() if name.startswith("factor.")}


def scaled(factors: Factors) -> Factors:
    return {name: factor * (SCALE if name.endswith("lora_B") else 1) for name, factor in factors.items()}


def test_our_file_gives_the_velocity_that_diffusers_computes_with_it() -> None:
    found = velocity(tiny.transformer("klein"), read(*load("lora-bfl"), tiny.KLEIN))
    assert tiny.error(found, tiny.arrays("training")["velocity_bfl"]) <= 1e-5


def test_a_file_saved_by_diffusers_gives_the_velocity_that_diffusers_computes_with_it() -> None:
    found = velocity(tiny.transformer("klein"), read(*load("lora-diffusers"), tiny.KLEIN))
    assert tiny.error(found, tiny.arrays("training")["velocity_diffusers"]) <= 1e-5


def test_what_we_write_is_still_the_file_that_diffusers_loaded() -> None:
    tensors, metadata = load("lora-bfl")
    assert equal(bfl.to_tensors(scaled(golden_factors()), dtype=mx.float32), tensors)
    assert metadata == bfl.metadata(4, {}) == {"format": "pt", "lora_rank": "4", "lora_alpha": "4"}


@pytest.mark.parametrize("name", ["lora-bfl", "lora-diffusers"])
def test_reading_folds_the_scale_into_b_and_joins_a_shared_a(name: str) -> None:
    assert equal(read(*load(name), tiny.KLEIN), scaled(golden_factors()))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_values_are_rounded_once_to_the_saved_type(dtype: mx.Dtype) -> None:
    expected = scaled(golden_factors())
    tensors = bfl.to_tensors(scaled(golden_factors()), dtype=dtype)
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    found = read(tensors, {}, tiny.KLEIN)
    assert equal(found, {name: factor.astype(dtype).astype(mx.float32) for name, factor in expected.items()})


def test_adapters_apart_on_q_and_v_become_one_of_their_common_rank() -> None:
    a, b = mx.random.normal((2, 4, 32)), mx.random.normal((2, 32, 4))
    prefix = "transformer.transformer_blocks.1.attn"
    tensors = {
        f"{prefix}.to_q.lora_A.weight": a[0],
        f"{prefix}.to_q.lora_B.weight": b[0],
        f"{prefix}.to_v.lora_A.weight": a[1],
        f"{prefix}.to_v.lora_B.weight": b[1],
    }
    factors = read(tensors, {}, tiny.KLEIN)
    product = factors["double_blocks.1.img_attn.qkv.lora_B"] @ factors["double_blocks.1.img_attn.qkv.lora_A"]
    expected = mx.concatenate([b[0] @ a[0], mx.zeros((32, 32)), b[1] @ a[1]])
    assert factors["double_blocks.1.img_attn.qkv.lora_A"].shape == (8, 32)
    assert tiny.error(product, expected) <= 1e-6


def test_kohya_names_and_alpha_are_understood() -> None:
    a, b = mx.random.normal((4, 32)), mx.random.normal((32, 4))
    name = "lora_unet_double_blocks_0_txt_mlp_2"
    tensors = {
        f"{name}.lora_down.weight": mx.concatenate([a] * 3, axis=1),
        f"{name}.lora_up.weight": b,
        f"{name}.alpha": mx.array(1.0),
    }
    factors = read(tensors, {}, tiny.KLEIN)
    assert mx.array_equal(factors["double_blocks.0.txt_mlp.2.lora_B"], b / 4)


def codes(caught: pytest.ExceptionInfo[Damaged]) -> list[str]:
    return [fault.code for fault in caught.value.faults]


def test_all_faults_of_a_file_are_reported_at_once_with_counts() -> None:
    tensors, metadata = load("lora-bfl")
    tensors["diffusion_model.double_blocks.9.img_attn.qkv.lora_A.weight"] = mx.zeros((4, 32))
    tensors["diffusion_model.time_in.in_layer.lora_A.weight"] = mx.zeros((4, 8))
    del tensors["diffusion_model.single_blocks.0.linear1.lora_B.weight"]
    tensors["diffusion_model.single_blocks.1.linear1.lora_B.weight"] = mx.zeros((31, 4))
    tensors["diffusion_model.single_blocks.1.linear2.lora_B.weight"] *= float("nan")
    with pytest.raises(Damaged) as caught:
        read(tensors, metadata, tiny.KLEIN, "x.safetensors")
    assert codes(caught) == ["lora.unknown_key", "lora.missing_half", "lora.shape", "lora.not_finite"]
    assert caught.value.faults[0].what.startswith("2 names")
    assert {fault.where for fault in caught.value.faults} == {"x.safetensors"}


def test_a_lora_of_another_model_is_refused() -> None:
    with pytest.raises(Damaged) as caught:
        read(*load("lora-bfl"), KLEIN_4B)
    assert codes(caught) == ["lora.shape"]
    assert caught.value.faults[0].what.startswith("20 adapters")


def test_a_file_without_adapters_is_refused() -> None:
    with pytest.raises(Damaged, match="no adapter"):
        read({}, {}, tiny.KLEIN)


def test_a_linear_named_twice_is_refused() -> None:
    tensors, metadata = load("lora-bfl")
    again, _ = load("lora-diffusers")
    tensors |= {key: again[key] for key in again if "single_transformer_blocks.0" in key or "1.attn.to_q" in key}
    with pytest.raises(Damaged) as caught:
        read(tensors, metadata, tiny.KLEIN)
    assert codes(caught) == ["lora.twice"]
    assert caught.value.faults[0].what.startswith("8 names")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"transformer.r": 0, "transformer.lora_alpha": 1}',
        '{"transformer.r": 4, "transformer.lora_alpha": NaN}',
        '{"transformer.r": 4, "transformer.lora_alpha": 1e999}',
        pytest.param(f'{{"transformer.r": 1, "transformer.lora_alpha": {"9" * 999}}}', id="more than a float holds"),
        pytest.param("[" * 100_000, id="deep"),
        '{"transformer.r": 4, "transformer.lora_alpha": 4, "transformer.rank_pattern": {"to_q": 8}}',
    ],
)
def test_adapter_metadata_that_cannot_be_applied_is_refused(text: str) -> None:
    tensors, _ = load("lora-bfl")
    with pytest.raises(Damaged, match=r"lora\.metadata"):
        read(tensors, {ADAPTER_METADATA: text}, tiny.KLEIN)


def test_metadata_has_no_paths_to_grow_without_bound() -> None:
    assert bfl.metadata(8, {"seed": "42"})["seed"] == "42"
    with pytest.raises(BadConfig, match="65536"):
        bfl.metadata(8, {"prompt": "x" * 65_536})


def test_names_of_lycoris_are_understood() -> None:
    name = "lycoris_single_transformer_blocks_1_attn_to_out"
    w1, w2 = mx.random.normal((4, 8)), mx.random.normal((8, 16))
    factors = read({f"{name}.lokr_w1": w1, f"{name}.lokr_w2": w2}, {}, tiny.KLEIN)
    assert equal(factors, {"single_blocks.1.linear2.lokr_w1": w1, "single_blocks.1.linear2.lokr_w2": w2})
