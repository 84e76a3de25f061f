"""Which programs load a file: the rules, one by one, as those programs were seen to behave."""

from __future__ import annotations

import json
import time

import pytest

from stages.lora.formats.readers import readers, spelling

QKV, LINEAR1 = "double_blocks.0.img_attn.qkv", "single_blocks.0.linear1"
TO_Q, FF_IN = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.ff.linear_in"
AB, DOWN_UP = (".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight")


def verdicts(*keys: str, rank: int = 16, **metadata: str) -> dict[str, str]:
    shapes = {key: (rank, 64) if "_A." in key or "down" in key else (64, rank) for key in keys}
    return {name: verdict for name, (verdict, _) in readers(spelling(shapes, metadata)).items()}


def pair(base: str, suffixes: tuple[str, str] = AB) -> list[str]:
    return [base + suffix for suffix in suffixes]


ALL = ("ComfyUI", "diffusers", "ai-toolkit", "mflux", "Swift app")
LOADS, NOTHING, REFUSES, OTHER, PART = (
    "loads",
    "loads nothing",
    "refuses it",
    "shows another picture",
    "loads in part",
)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (pair(f"diffusion_model.{QKV}"), (LOADS, LOADS, LOADS, LOADS, LOADS)),
        (pair(f"transformer.{TO_Q}"), (LOADS, LOADS, NOTHING, LOADS, LOADS)),
        (pair(f"transformer.{FF_IN}"), (LOADS, LOADS, NOTHING, LOADS, PART)),
        (pair(f"diffusion_model.{TO_Q}"), (NOTHING, LOADS, NOTHING, LOADS, LOADS)),
        (pair(f"base_model.model.{QKV}"), (NOTHING, LOADS, NOTHING, LOADS, LOADS)),
        (pair("lora_unet_double_blocks_0_img_attn_qkv", DOWN_UP), (LOADS, LOADS, NOTHING, LOADS, NOTHING)),
        (pair(f"diffusion_model.{LINEAR1}", DOWN_UP), (LOADS, NOTHING, NOTHING, LOADS, NOTHING)),
        ([*pair(f"diffusion_model.{QKV}"), *pair("diffusion_model.img_in")], (LOADS, LOADS, LOADS, PART, PART)),
        (
            [*pair(f"diffusion_model.{LINEAR1}"), f"diffusion_model.{LINEAR1}.alpha"],
            (LOADS, REFUSES, LOADS, LOADS, OTHER),
        ),
        (pair(TO_Q), (LOADS, NOTHING, NOTHING, LOADS, LOADS)),
        (pair(QKV), (NOTHING, NOTHING, NOTHING, NOTHING, LOADS)),
        (pair(f"transformer.{QKV}"), (NOTHING, REFUSES, LOADS, NOTHING, LOADS)),
        (
            [*pair(f"diffusion_model.{LINEAR1}"), f"diffusion_model.{LINEAR1}.dora_scale"],
            (LOADS, OTHER, LOADS, REFUSES, OTHER),
        ),
        (
            [f"diffusion_model.{LINEAR1}.lokr_w1", f"diffusion_model.{LINEAR1}.lokr_w2"],
            (LOADS, LOADS, LOADS, REFUSES, NOTHING),
        ),
    ],
)
def test_each_spelling_is_read_as_each_program_reads_it(keys: list[str], expected: tuple[str, ...]) -> None:
    assert verdicts(*keys) == dict(zip(ALL, expected, strict=True))


@pytest.mark.parametrize(("rank", "expected"), [(16, LOADS), (12, REFUSES)])
def test_mflux_refuses_ranks_of_qkv_that_are_divisible_by_three(rank: int, expected: str) -> None:
    assert verdicts(*pair(f"diffusion_model.{QKV}"), rank=rank)["mflux"] == expected
    assert verdicts(*pair(f"diffusion_model.{LINEAR1}"), rank=rank)["mflux"] == LOADS


@pytest.mark.parametrize(
    ("alpha", "rslora", "expected"),
    [(8, False, OTHER), (16, False, LOADS), (4, True, LOADS), (16, True, OTHER)],
)
def test_scale_in_the_metadata_alone_is_lost_on_all_but_diffusers(alpha: int, rslora: bool, expected: str) -> None:  # noqa: FBT001
    fields = {"transformer.r": 16, "transformer.lora_alpha": alpha, "transformer.use_rslora": rslora}
    found = verdicts(*pair(f"diffusion_model.{QKV}"), lora_adapter_metadata=json.dumps(fields))
    assert found == dict.fromkeys(ALL, expected) | {"diffusers": LOADS}


def test_swift_app_takes_a_scale_that_is_said_by_its_own_names() -> None:
    scaled = json.dumps({"transformer.r": 16, "transformer.lora_alpha": 8})
    found = verdicts(*pair(f"transformer.{TO_Q}"), lora_adapter_metadata=scaled, lora_alpha="8", lora_rank="16")
    assert found["Swift app"] == LOADS


def test_names_of_no_flux2_linear_are_judged_by_nobody() -> None:
    assert set(verdicts(*pair("lora_te_text_model_encoder_layers_0")).values()) == {"not known"}


@pytest.mark.parametrize(
    ("key", "metadata", "producer"),
    [
        (f"diffusion_model.{QKV}", {"software": "flux2-lora 0.1.0"}, "flux2-lora 0.1.0"),
        (f"diffusion_model.{QKV}", {"software": '{"name": "ai-toolkit"}'}, "ai-toolkit"),
        ("lora_unet_double_blocks_0_img_attn_qkv", {"ss_network_dim": "4"}, "kohya or musubi-tuner"),
        (f"transformer.{TO_Q}", {"lora_adapter_metadata": "{}"}, "diffusers"),
        (f"transformer.{TO_Q}", {"mflux_version": "0.9"}, "mflux 0.9"),
        (TO_Q, {"format": "diffusers"}, "flux-2-swift-mlx"),
        (f"base_model.model.{QKV}", {}, "peft"),
    ],
)
def test_who_wrote_a_file_is_told_by_what_it_says_or_how_it_spells(
    key: str, metadata: dict[str, str], producer: str
) -> None:
    assert spelling(dict.fromkeys(pair(key), (4, 4)), metadata).producer == producer


def test_half_without_dimensions_and_file_without_tensors_are_no_more_than_that() -> None:
    scalar = spelling({f"diffusion_model.{QKV}{AB[0]}": ()}, {})
    assert scalar.ranks == {}
    assert readers(scalar)["mflux"][0] == LOADS
    assert {verdict for verdict, _ in readers(spelling({}, {})).values()} == {"not known"}


def test_long_names_take_no_time() -> None:
    started = time.perf_counter()
    spelling({f"{'a' * 500}{number}": (1,) for number in range(2000)}, {})
    assert time.perf_counter() - started < 1
