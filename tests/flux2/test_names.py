from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable
from math import prod
from pathlib import Path

import pytest

from stages.flux2 import names, shapes
from stages.flux2.names import Piece
from stages.flux2.variants import DEV, KLEIN_4B, KLEIN_9B, MICRO, MISTRAL_24B, QWEN3_4B, QWEN3_8B, AutoencoderConfig

# Shapes of the published configurations as torch 2.13, diffusers 0.42.1 and transformers 5.23 build them.
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "flux2-shapes.json").read_text())
TRANSFORMERS = {"klein-4b": KLEIN_4B, "klein-9b": KLEIN_9B, "dev": DEV}
PARAMETERS = {"klein-4b": 3_875_544_576, "klein-9b": 9_078_581_248, "dev": 32_223_281_152}


def golden(table: dict[str, tuple[list[int], int]]) -> shapes.Shapes:
    return {
        pattern.replace("{i}", str(i)): tuple(shape)
        for pattern, (shape, count) in table.items()
        for i in range(count)
    }


def sources(expected: shapes.Shapes, pieces: Callable[[str], tuple[Piece, ...]]) -> shapes.Shapes:
    """The file whose pieces make up `expected`; every row of it is used exactly once."""
    found: shapes.Shapes = {}
    used: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for name, shape in expected.items():
        parts = pieces(name)
        for piece in parts:
            found[piece.name] = (shape[0] // len(parts) * piece.of, *shape[1:])
            used[piece.name].append((piece.index, piece.of))
    for parts in used.values():
        assert sorted(parts) == [(i, len(parts)) for i in range(len(parts))]
    return found


@pytest.mark.parametrize("size", TRANSFORMERS)
def test_transformer_in_diffusers_spelling_is_the_reference_table(size: str) -> None:
    expected = shapes.transformer_shapes(TRANSFORMERS[size])
    assert sources(expected, names.diffusers_transformer_pieces) == golden(GOLDEN["transformer"][size])
    assert sum(prod(shape) for shape in expected.values()) == PARAMETERS[size]


def test_transformer_in_bfl_spelling_has_fused_tensors() -> None:
    expected = shapes.transformer_shapes(KLEIN_4B)
    assert len(expected) == 169 - 5 * 4
    assert expected["double_blocks.4.txt_attn.qkv.weight"] == (9216, 3072)
    assert expected["double_blocks.0.img_attn.norm.query_norm.scale"] == (128,)
    assert expected["double_blocks.0.img_mlp.0.weight"] == (18432, 3072)
    assert expected["single_blocks.19.linear1.weight"] == (27648, 3072)
    assert expected["single_blocks.19.linear2.weight"] == (3072, 12288)
    assert expected["final_layer.adaLN_modulation.1.weight"] == (6144, 3072)
    assert "guidance_in.in_layer.weight" not in expected
    assert "guidance_in.in_layer.weight" in shapes.transformer_shapes(DEV)


def test_autoencoder_in_diffusers_spelling_is_the_reference_table() -> None:
    expected = shapes.autoencoder_shapes(AutoencoderConfig())
    table = golden(GOLDEN["autoencoder"])
    assert table.pop("bn.num_batches_tracked") == ()
    assert {names.diffusers_autoencoder_name(name, 4): shape for name, shape in expected.items()} == table


def test_autoencoder_in_bfl_spelling_counts_the_decoder_from_the_output() -> None:
    expected = shapes.autoencoder_shapes(AutoencoderConfig())
    assert expected["decoder.up.0.block.0.conv1.weight"] == (128, 256, 3, 3)
    assert expected["decoder.up.3.block.2.conv2.weight"] == (512, 512, 3, 3)
    assert expected["encoder.mid.attn_1.proj_out.weight"] == (512, 512)
    assert expected["encoder.quant_conv.weight"] == (64, 64, 1, 1)
    assert "encoder.down.3.downsample.conv.weight" not in expected
    assert "decoder.up.0.upsample.conv.weight" not in expected


def test_small_decoder_has_its_own_widths() -> None:
    config = AutoencoderConfig(decoder_block_out_channels=(96, 192, 384, 384))
    expected = shapes.autoencoder_shapes(config)
    assert expected["decoder.up.0.block.0.conv1.weight"] == (96, 192, 3, 3)
    assert expected["encoder.down.0.block.0.conv1.weight"] == (128, 128, 3, 3)


def test_halves_of_the_autoencoder_share_only_the_statistics() -> None:
    encoder = shapes.autoencoder_shapes(AutoencoderConfig(), decoder=False)
    decoder = shapes.autoencoder_shapes(AutoencoderConfig(), encoder=False)
    assert encoder.keys() & decoder.keys() == {"bn.running_mean", "bn.running_var"}
    assert encoder | decoder == shapes.autoencoder_shapes(AutoencoderConfig())


@pytest.mark.parametrize(("golden_name", "config"), [("qwen3-4b", QWEN3_4B), ("qwen3-8b", QWEN3_8B)])
def test_qwen3_is_the_first_27_layers_of_the_reference_table(golden_name: str, config: object) -> None:
    expected = shapes.text_encoder_shapes(config)
    table = golden(GOLDEN["text_encoder"][golden_name])
    unused = names.text_encoder(config).unused
    assert {name: shape for name, shape in table.items() if not unused(name)} == expected
    assert len(expected) == 1 + 27 * 11


def older(name: str) -> str:
    """Spell a name of Mistral as transformers 4 did; the table is of transformers 5."""
    name = name.removeprefix("model.")
    name = re.sub(r"^language_model\.", "language_model.model.", name)
    return re.sub(r"^lm_head\.", "language_model.lm_head.", name)


@pytest.mark.parametrize("spelling", [str, older])
def test_mistral_is_the_first_30_layers_of_the_reference_table(spelling: Callable[[str], str]) -> None:
    component = names.text_encoder(MISTRAL_24B)
    table = {
        component.plain(spelling(name)): shape
        for name, shape in golden(GOLDEN["text_encoder"]["mistral-small-3.2-24b"]).items()
    }
    expected = shapes.text_encoder_shapes(MISTRAL_24B)
    assert {name: shape for name, shape in table.items() if not component.unused(name)} == expected
    assert len(expected) == 1 + 30 * 9


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("qwen3-4b", 4_022_468_096), ("qwen3-8b", 8_190_735_360), ("mistral-small-3.2-24b", 24_011_361_280)],
)
def test_reference_tables_of_text_encoders_are_whole(name: str, parameters: int) -> None:
    table = golden(GOLDEN["text_encoder"][name])
    if name == "qwen3-4b":
        # Its head is its embedding.
        table.pop("lm_head.weight", None)
    assert sum(prod(shape) for shape in table.values()) == parameters


def test_every_wrapping_of_a_language_model_is_undone() -> None:
    for name in (
        "layers.3.mlp.up_proj.weight",
        "language_model.model.layers.3.mlp.up_proj.weight",
        "model.language_model.layers.3.mlp.up_proj.weight",
    ):
        assert names.plain_text_encoder_name(name) == "model.layers.3.mlp.up_proj.weight"
    assert names.plain_text_encoder_name("language_model.lm_head.weight") == "lm_head.weight"


@pytest.mark.parametrize("prefix", ["", *names.TRANSFORMER_PREFIXES])
def test_prefix_and_weight_spelling_of_norms_are_undone(prefix: str) -> None:
    name = f"{prefix}double_blocks.0.img_attn.norm.query_norm.weight"
    assert names.plain_transformer_name(name) == "double_blocks.0.img_attn.norm.query_norm.scale"


def test_final_modulation_swaps_its_halves() -> None:
    assert names.diffusers_transformer_pieces("final_layer.adaLN_modulation.1.weight") == (
        Piece("norm_out.linear.weight", 1, 2),
        Piece("norm_out.linear.weight", 0, 2),
    )


def test_unknown_modules_are_refused() -> None:
    for module in ("double_blocks.0.linear1", "single_blocks.0.img_attn.qkv", "linear1", "final_layer"):
        with pytest.raises(KeyError):
            names.diffusers_modules(module)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (golden(GOLDEN["transformer"]["klein-9b"]), "8 double and 24 single blocks (klein-base-9b, klein-9b)"),
        (shapes.transformer_shapes(MICRO.transformer), "width 192 with 2 double and 4 single blocks (flux2-micro)"),
        *(
            ({prefix + name: shape for name, shape in shapes.transformer_shapes(DEV).items()}, "single blocks (dev)")
            for prefix in names.TRANSFORMER_PREFIXES
        ),
        (golden(GOLDEN["autoencoder"]), "a FLUX.2 autoencoder (encoder and decoder) of 32 latent channels"),
        ({"encoder.conv_in.weight": (128, 3, 3, 3)}, "the autoencoder of another model"),
        (
            golden(GOLDEN["autoencoder"]) | {"decoder.conv_out.weight": (3, 96, 3, 3)},
            "of 32 latent channels, whose decoder is narrow (96)",
        ),
        (
            golden(GOLDEN["text_encoder"]["qwen3-4b"]),
            "a language model of width 2560 with 36 layers (klein-base-4b, klein-4b)",
        ),
        (
            golden(GOLDEN["text_encoder"]["mistral-small-3.2-24b"]),
            "a language model of width 5120 with 40 layers (dev)",
        ),
        ({"double_blocks.0.img_mod.lin.weight": (1, 1)}, "a FLUX.1 transformer"),
        ({"model.diffusion_model.double_blocks.0.img_mod.lin.weight": (1, 1)}, "a FLUX.1 transformer"),
        ({"transformer_blocks.0.norm1.linear.weight": (1, 1)}, "a FLUX.1 transformer"),
        (
            {
                "first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3),
                "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
                "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
            },
            "a Stable Diffusion XL model",
        ),
        ({"joint_blocks.0.x_block.attn.qkv.weight": (1, 1)}, "a Stable Diffusion 3 transformer"),
        ({"encoder.block.0.layer.0.SelfAttention.q.weight": (1, 1)}, "a T5 text encoder"),
        ({"tok_embeddings.weight": (1, 1)}, "in Mistral's own layout, not that of Hugging Face"),
        ({"lora_unet_double_blocks_0_img_attn_qkv.alpha": ()}, "a LoRA"),
        ({"diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": (1, 1)}, "a LoRA"),
        ({"x": ()}, "an unknown model of 1 tensors"),
    ],
)  # fmt: skip
def test_files_are_recognised_in_words(table: shapes.Shapes, words: str) -> None:
    assert shapes.recognise(table).endswith(words)


@pytest.mark.parametrize(
    ("dtypes", "words"),
    [
        ({"img_in.weight": "BF16"}, None),
        ({"model.layers.0.mlp.up_proj.weight": "U32", "model.layers.0.mlp.up_proj.scales": "BF16"}, None),
        ({"img_in.weight": "F8_E4M3"}, "bare 8-bit floats (fp8)"),
        ({"img_in.weight": "F8_E4M3", "img_in.weight_scale": "F32"}, "8-bit floats with scales (ComfyUI's fp8)"),
        ({"img_in.weight": "F8_E4M3", "img_in.scale_weight": "F32"}, "8-bit floats with scales (ComfyUI's fp8)"),
        ({"a.weight_scale": "F8_E4M3", "a.weight_scale_2": "F32"}, "4-bit floats with scales (ComfyUI's nvfp4)"),
        ({"a.weight": "U8", "a.weight.absmax": "U8"}, "integers of bitsandbytes"),
        ({"a.qweight": "I32"}, "integers of GPTQ, AWQ or Nunchaku"),
        ({"a.weight._data": "I8", "a.weight._scale": "BF16"}, "integers of quanto"),
    ],
)  # fmt: skip
def test_packings_of_other_tools_are_told_apart(dtypes: dict[str, str], words: str | None) -> None:
    assert shapes.packed_elsewhere(dtypes) == words
