"""ComfyUI's 8-bit files: read as the numbers they stand for, in either spelling, or refused."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from schemas.errors import Damaged
from stages.flux2 import float8, names, shapes, weights
from stages.stores import tensors
from stages.stores.tensors import Tensor
from tests.flux2.test_weights import EXPECTED, TRANSFORMER, File, draw, respell
from tests.golden.tiny import distance

FULL = draw(EXPECTED, "F32")
COMPONENT = names.TRANSFORMER


def in_eight_bits(file: File, factor: str) -> File:
    """Pack the matrices of the blocks as ComfyUI does, each with its factor and what it keeps beside."""
    packed: File = {}
    for name, tensor in file.items():
        if "blocks" not in name or tensor.data.ndim != 2:
            packed[name] = Tensor("F32", tensor.data)
            continue
        module, scale = name.removesuffix(".weight"), np.abs(tensor.data).max() / np.float32(448)
        codes = np.array(mx.to_fp8(mx.array(tensor.data / scale)))
        packed[name] = Tensor("F8_E4M3", codes)
        packed[module + factor] = Tensor("F32", np.array(scale, np.float32))
        packed[f"{module}.input_scale"] = Tensor("F32", np.ones((), np.float32))
        packed[f"{module}.comfy_quant"] = Tensor("U8", np.zeros(26, np.uint8))
    return packed


def write(folder: Path, content: File) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "a.safetensors"
    tensors.save(path, content, {})
    return path


def resolve(path: Path) -> weights.Layout:
    return weights.resolve([path], EXPECTED, COMPONENT)


def test_codes_stand_for_the_numbers_mlx_says() -> None:
    codes = mx.arange(256).astype(mx.uint8)
    assert np.array_equal(float8.values(), np.array(mx.from_fp8(codes, dtype=mx.float32)), equal_nan=True)


@pytest.mark.parametrize("factor", float8.FACTORS)
@pytest.mark.parametrize("spelling", COMPONENT.spellings)
def test_matrix_is_its_codes_numbers_times_its_factor(tmp_path: Path, factor: str, spelling: object) -> None:
    file = in_eight_bits(respell(FULL, spelling), factor)  # pyright: ignore[reportArgumentType]
    file[float8.MARKER] = Tensor("F8_E4M3", np.zeros(2, np.uint8))
    loaded = dict(weights.load(resolve(write(tmp_path, file))))
    packed = 0
    for name, full in FULL.items():
        rows = []
        for piece in spelling(name):  # pyright: ignore[reportCallIssue]
            data = file[piece.name].data
            if file[piece.name].dtype == "F8_E4M3":
                scale = file[piece.name.removesuffix(".weight") + factor].data
                data = np.array(mx.from_fp8(mx.array(data), dtype=mx.float32)) * scale
            rows.append(np.split(data, piece.of)[piece.index])
        packed += file[spelling(name)[0].name].dtype == "F8_E4M3"  # pyright: ignore[reportCallIssue]
        assert np.array_equal(np.array(loaded[name]), np.concatenate(rows))
        assert distance(loaded[name], mx.array(full.data)) < 0.04
    assert packed == 8 * TRANSFORMER.num_layers + 2 * TRANSFORMER.num_single_layers


def test_codes_and_factors_both_are_in_the_digest(tmp_path: Path) -> None:
    file = in_eight_bits(FULL, ".weight_scale")
    module = "double_blocks.0.img_mlp.0"
    codes, scale = file[f"{module}.weight"].data.copy(), file[f"{module}.weight_scale"].data * 2
    codes[0, 0] ^= 1
    changes = (
        {},
        {f"{module}.weight": Tensor("F8_E4M3", codes)},
        {f"{module}.weight_scale": Tensor("F32", scale)},
        {f"{module}.input_scale": Tensor("F32", np.zeros((), np.float32))},
    )
    digests = [
        weights.digest(resolve(write(tmp_path / str(number), file | change))) for number, change in enumerate(changes)
    ]
    assert digests[3] == digests[0]
    assert len(set(digests)) == 3
    assert weights.digest(resolve(write(tmp_path / "full", FULL))) not in digests


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"img_in.weight": Tensor("F8_E4M3", np.zeros(EXPECTED["img_in.weight"], np.uint8))}, "bare 8-bit floats"),
        ({"single_blocks.0.linear1.weight_scale": Tensor("F32", np.ones((9, 1), np.float32))}, "ComfyUI's fp8"),
        ({"single_blocks.0.linear1.weight_scale_2": Tensor("F32", np.ones((), np.float32))}, "nvfp4"),
    ],
)
def test_other_eight_bits_are_refused(tmp_path: Path, change: File, words: str) -> None:
    path = write(tmp_path, in_eight_bits(FULL, ".weight_scale") | change)
    with pytest.raises(Damaged, match=words):
        resolve(path)


def test_eight_bits_of_another_shape_are_refused(tmp_path: Path) -> None:
    file = in_eight_bits(FULL, ".weight_scale")
    file["single_blocks.0.linear1.weight"] = Tensor("F8_E4M3", np.zeros((3, 3), np.uint8))
    with pytest.raises(Damaged, match=r"weights\.shape.*linear1"):
        resolve(write(tmp_path, file))


def test_text_encoder_in_eight_bits_loads(tmp_path: Path) -> None:
    from tests.flux2.test_weights import QWEN

    expected, component = shapes.text_encoder_shapes(QWEN), names.text_encoder(QWEN)
    file = draw(expected, "F32")
    name = "model.layers.2.mlp.up_proj"
    codes = np.full(expected[f"{name}.weight"], 0x38, np.uint8)  # 1.0
    file |= {f"{name}.weight": Tensor("F8_E4M3", codes), f"{name}.weight_scale": Tensor("F32", np.array([0.5], "f4"))}
    loaded = dict(weights.load(weights.resolve([write(tmp_path, file)], expected, component)))
    assert loaded[f"{name}.weight"].tolist() == np.full(codes.shape, 0.5).tolist()
