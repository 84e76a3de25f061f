"""Which matrices are packed, in how many bytes, and what is recognised in files."""

from __future__ import annotations

import math
from typing import get_args

import mlx.core as mx
import pytest

from schemas.errors import BadConfig
from schemas.quantize import Quantize
from stages.flux2 import packing
from stages.flux2.packing import FORMATS, Format, bytes_of, chosen, packed_modules, recognise
from stages.flux2.shapes import text_encoder_shapes, transformer_shapes
from stages.flux2.variants import VARIANTS

KLEIN, DEV = (transformer_shapes(VARIANTS[name].transformer) for name in ("klein-base-4b", "dev"))
FILE_TYPES = {mx.uint32: "U32", mx.uint8: "U8", mx.bfloat16: "BF16"}


def test_every_mode_has_a_format() -> None:
    assert {"none", *FORMATS} == set(get_args(Quantize))


@pytest.mark.parametrize("shapes", [KLEIN, DEV, text_encoder_shapes(VARIANTS["dev"].text_encoder)])
@pytest.mark.parametrize("quantize", FORMATS)
def test_all_linears_of_blocks_are_packed_and_nothing_else(shapes: packing.Shapes, quantize: Quantize) -> None:
    inside = {name for name, shape in shapes.items() if ".0." in name.replace(".1.", ".0.") or len(shape) == 2}
    inside = {name for name in inside if "blocks." in name or "layers." in name}
    expected = {name.removesuffix(".weight") for name in inside if len(shapes[name]) == 2}
    assert set(packed_modules(shapes, quantize)) == expected


@pytest.mark.parametrize(("shapes", "share"), [(KLEIN, 0.949), (DEV, 0.974)])
def test_what_stays_dense_is_a_small_part(shapes: packing.Shapes, share: float) -> None:
    modules = packed_modules(shapes, "4bit")
    inside = sum(math.prod(shapes[f"{name}.weight"]) for name in modules)
    assert inside / sum(map(math.prod, shapes.values())) == pytest.approx(share, abs=1e-3)


@pytest.mark.parametrize("form", FORMATS.values())
def test_bytes_are_those_of_the_arrays(form: Format) -> None:
    parts = mx.quantize(mx.zeros((6, 192), mx.bfloat16), form.group_size, form.bits, mode=form.mode)
    assert form.bytes_of((6, 192)) == sum(part.nbytes for part in parts)
    found = {name: (part.shape, (FILE_TYPES[part.dtype],)) for name, part in zip(form.parts, parts, strict=True)}
    expected = form.tensors((6, 192))
    assert {name: shape for name, (shape, _) in found.items()} == {
        name: shape for name, (shape, _) in expected.items()
    }
    assert all(set(types) <= set(expected[name][1]) for name, (_, types) in found.items())


def test_sizes_of_klein_4b_are_its_tables() -> None:
    sizes = {mode: bytes_of(KLEIN, packed_modules(KLEIN, mode), 2) / 1e9 for mode in get_args(Quantize)}
    assert sizes == pytest.approx(
        {"none": 7.75, "8bit": 4.30, "4bit": 2.46, "mxfp8": 4.19, "mxfp4": 2.35, "nvfp4": 2.46}, abs=0.01
    )


@pytest.mark.parametrize("form", [*FORMATS.values(), Format("affine", 3, 32), Format("affine", 6, 128)])
def test_format_is_recognised_from_shapes(form: Format) -> None:
    words, scales, *biases = mx.quantize(mx.zeros((4, 384), mx.bfloat16), form.group_size, form.bits, mode=form.mode)
    found = recognise(384, words.shape[1], (FILE_TYPES[scales.dtype], scales.shape[1]), biases=bool(biases))
    assert found == form


@pytest.mark.parametrize(
    ("words", "scales", "biases"),
    [
        (96, ("BF16", 6), False),  # affine without biases
        (96, ("U8", 12), True),  # a float with biases
        (48, ("U8", 6), False),  # four bits in groups of 64: no float of MLX
        (96, ("F8_E4M3", 6), True),
        (95, ("BF16", 6), True),  # bits that are not whole
        (96, ("BF16", 7), True),  # groups that are not whole
        (96, ("BF16", 0), True),
        (384, ("BF16", 6), True),  # 32 bits
        (96, ("BF16", 24), True),  # groups of 16
    ],
)
def test_what_mlx_never_packs_is_not_recognised(words: int, scales: tuple[str, int], *, biases: bool) -> None:
    assert recognise(384, words, scales, biases=biases) is None


def test_files_that_are_packed_stay_so_and_another_format_is_refused() -> None:
    found = {"double_blocks.0.img_attn.qkv": Format("affine", 4, 32), "img_in": Format("affine", 4, 32)}
    assert chosen(KLEIN, found, "none", "model.quantize") == {"double_blocks.0.img_attn.qkv": Format("affine", 4, 32)}
    with pytest.raises(BadConfig) as refused:
        chosen(KLEIN, found, "4bit", "model.quantize")
    fault = refused.value.faults[0]
    assert (fault.code, fault.where) == ("model.quantized_already", "model.quantize = 4bit")
    assert fault.why == "found affine, 4 bits, groups of 32"
    same = {"double_blocks.0.img_attn.qkv": FORMATS["4bit"]}
    assert chosen(KLEIN, same, "4bit", "model.quantize") == packed_modules(KLEIN, "4bit")


def test_format_that_fits_no_matrix_is_refused() -> None:
    with pytest.raises(BadConfig) as refused:
        chosen({"single_blocks.0.linear1.weight": (64, 48)}, {}, "4bit", "model.quantize")
    assert refused.value.faults[0].code == "model.not_quantizable"
    assert chosen({"single_blocks.0.linear1.weight": (64, 48)}, {}, "nvfp4", "")  # groups of 16 fit
