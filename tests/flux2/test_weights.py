from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from schemas.errors import Damaged
from stages.flux2 import names, shapes, weights
from stages.flux2.names import Component, Piece
from stages.flux2.packing import FORMATS, Format
from stages.flux2.shapes import Shapes
from stages.flux2.variants import AutoencoderConfig, TextEncoderConfig, TransformerConfig
from stages.stores import tensors
from stages.stores.tensors import DTYPES, Tensor

TRANSFORMER = TransformerConfig(
    num_layers=2,
    num_single_layers=3,
    num_attention_heads=2,
    joint_attention_dim=24,
    attention_head_dim=8,
    in_channels=16,
    axes_dims_rope=(2, 2, 2, 2),
    guidance_embeds=True,
    timestep_guidance_channels=4,
)
AUTOENCODER = AutoencoderConfig(
    latent_channels=4, block_out_channels=(4, 6, 8), layers_per_block=1, norm_num_groups=2
)
QWEN = TextEncoderConfig("qwen3", 8, 12, 2, 1, 32, 5, head_dim=4, layers=(1, 2, 3))
EXPECTED = shapes.transformer_shapes(TRANSFORMER)
WHOLE = names.autoencoder(AUTOENCODER, encoder=True, decoder=True)

File = dict[str, Tensor]


def draw(expected: Shapes, dtype: str = "BF16") -> File:
    random = np.random.default_rng(1)
    if dtype == "BF16":
        return {name: Tensor(dtype, random.integers(0, 1 << 16, s, np.uint16)) for name, s in expected.items()}
    return {name: Tensor(dtype, random.standard_normal(s).astype(DTYPES[dtype])) for name, s in expected.items()}


def respell(canonical: File, pieces: Callable[[str], tuple[Piece, ...]]) -> File:
    """Write canonical tensors as the file whose pieces they are."""
    parts: dict[str, dict[int, np.ndarray]] = {}
    for name, tensor in canonical.items():
        found = pieces(name)
        for piece, rows in zip(found, np.split(tensor.data, len(found)), strict=True):
            parts.setdefault(piece.name, {})[piece.index] = rows
    dtype = next(iter(canonical.values())).dtype
    return {name: Tensor(dtype, np.concatenate([rows[i] for i in sorted(rows)])) for name, rows in parts.items()}


def write(folder: Path, content: File, name: str = "a") -> list[Path]:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.safetensors"
    path.unlink(missing_ok=True)
    tensors.save(path, content, {})
    return [path]


def shard(folder: Path, content: File) -> list[Path]:
    order = list(content)
    halves = {"a-1": order[::2], "a-2": order[1::2]}
    paths = [path for name, half in halves.items() for path in write(folder, {n: content[n] for n in half}, name)]
    weight_map = {name: f"{file}.safetensors" for file, half in halves.items() for name in half}
    index = folder / "a.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return [index, *paths]


def resolve(
    paths: list[Path], expected: Shapes = EXPECTED, component: Component = names.TRANSFORMER
) -> weights.Layout:
    return weights.resolve(paths, expected, component)


def faults(
    paths: list[Path], expected: Shapes = EXPECTED, component: Component = names.TRANSFORMER
) -> dict[str, str]:
    with pytest.raises(Damaged) as error:
        resolve(paths, expected, component)
    return {fault.code.removeprefix("weights."): fault.line() for fault in error.value.faults}


CANONICAL = draw(EXPECTED)


def test_every_spelling_of_the_same_weights_has_the_same_digest(tmp_path: Path) -> None:
    diffusers = respell(CANONICAL, names.diffusers_transformer_pieces)
    prefixed = {
        "model.diffusion_model." + name.replace("_norm.scale", "_norm.weight"): t for name, t in CANONICAL.items()
    }
    files = [
        write(tmp_path / "bfl", CANONICAL),
        write(tmp_path / "diffusers", diffusers),
        write(tmp_path / "prefixed", prefixed),
        shard(tmp_path / "bfl-shards", CANONICAL),
        shard(tmp_path / "diffusers-shards", diffusers),
    ]
    assert {weights.digest(resolve(paths)) for paths in files} == {tensors.tensor_digest(CANONICAL)}


def test_every_tensor_and_type_moves_the_digest(tmp_path: Path) -> None:
    digests = {weights.digest(resolve(write(tmp_path, CANONICAL)))}
    for name, tensor in CANONICAL.items():
        data = tensor.data.copy()
        data.reshape(-1)[-1] ^= 1
        digests.add(weights.digest(resolve(write(tmp_path, CANONICAL | {name: Tensor("BF16", data)}))))
    digests.add(weights.digest(resolve(write(tmp_path, draw(EXPECTED, "F32")))))
    assert len(digests) == len(CANONICAL) + 2


def test_loaded_tensors_are_the_canonical_ones_in_either_spelling(tmp_path: Path) -> None:
    diffusers = respell(CANONICAL, names.diffusers_transformer_pieces)
    for paths in (write(tmp_path / "a", CANONICAL), shard(tmp_path / "b", diffusers)):
        loaded = dict(weights.load(resolve(paths)))
        assert loaded.keys() == CANONICAL.keys()
        for name, array in loaded.items():
            assert array.dtype == mx.bfloat16
            assert np.array_equal(tensors.from_mlx(array).data, CANONICAL[name].data)


def test_final_modulation_is_shift_then_scale_from_either_spelling(tmp_path: Path) -> None:
    width = TRANSFORMER.inner_dim
    shift, scale = np.zeros((width, width), np.float32), np.ones((width, width), np.float32)
    rest = draw(EXPECTED, "F32")
    file = respell(rest, names.diffusers_transformer_pieces)
    file["norm_out.linear.weight"] = Tensor("F32", np.concatenate([scale, shift]))
    loaded = dict(weights.load(resolve(write(tmp_path, file))))["final_layer.adaLN_modulation.1.weight"]
    assert loaded[:width].max().item() == 0
    assert loaded[width:].min().item() == 1


def test_fused_qkv_stacks_queries_keys_values(tmp_path: Path) -> None:
    width = TRANSFORMER.inner_dim
    file = respell(draw(EXPECTED, "F16"), names.diffusers_transformer_pieces)
    for value, name in enumerate(("add_q_proj", "add_k_proj", "add_v_proj")):
        file[f"transformer_blocks.1.attn.{name}.weight"] = Tensor("F16", np.full((width, width), value, np.float16))
    loaded = dict(weights.load(resolve(write(tmp_path, file)), mx.float32))["double_blocks.1.txt_attn.qkv.weight"]
    assert loaded.dtype == mx.float32
    assert loaded[:, 0].tolist() == [0.0] * width + [1.0] * width + [2.0] * width


def autoencoder_file(*, convolutions: bool) -> tuple[File, File]:
    """The same weights as BFL and as diffusers write them."""
    canonical = draw(shapes.autoencoder_shapes(AUTOENCODER), "F32")
    steps = {"bn.num_batches_tracked": Tensor("I64", np.array(0))}
    diffusers = {names.diffusers_autoencoder_name(name, 3): tensor for name, tensor in canonical.items()}
    bfl = {
        name: Tensor("F32", tensor.data[..., None, None]) if "attn_1" in name and tensor.data.ndim == 2 else tensor
        for name, tensor in canonical.items()
    }
    return (bfl if convolutions else canonical) | steps, diffusers | steps


def test_autoencoder_digest_is_the_same_in_every_spelling(tmp_path: Path) -> None:
    expected = shapes.autoencoder_shapes(AUTOENCODER)
    bfl, diffusers = autoencoder_file(convolutions=True)
    linear, _ = autoencoder_file(convolutions=False)
    digests = {
        weights.digest(resolve(write(tmp_path, content), expected, WHOLE)) for content in (bfl, diffusers, linear)
    }
    assert digests == {tensors.tensor_digest(draw(expected, "F32"))}


def test_convolutions_load_in_mlx_layout(tmp_path: Path) -> None:
    expected = shapes.autoencoder_shapes(AUTOENCODER)
    bfl, diffusers = autoencoder_file(convolutions=True)
    for content in (bfl, diffusers):
        loaded = dict(weights.load(resolve(write(tmp_path, content), expected, WHOLE)))
        for name, tensor in draw(expected, "F32").items():
            data = tensor.data.transpose(0, 2, 3, 1) if tensor.data.ndim == 4 else tensor.data
            assert np.array_equal(tensors.from_mlx(loaded[name]).data, data)


def test_half_an_autoencoder_needs_and_reads_only_that_half(tmp_path: Path) -> None:
    bfl, diffusers = autoencoder_file(convolutions=True)
    for encoder in (True, False):
        expected = shapes.autoencoder_shapes(AUTOENCODER, encoder=encoder, decoder=not encoder)
        component = names.autoencoder(AUTOENCODER, encoder=encoder, decoder=not encoder)
        kept = {name: tensor for name, tensor in bfl.items() if name in expected}
        digests = {
            weights.digest(resolve(write(tmp_path, content), expected, component))
            for content in (bfl, diffusers, kept)
        }
        assert len(digests) == 1
        assert "missing" in faults(write(tmp_path, kept), shapes.autoencoder_shapes(AUTOENCODER), WHOLE)


def test_unused_layers_of_the_text_encoder_do_not_count(tmp_path: Path) -> None:
    used = draw(shapes.text_encoder_shapes(QWEN))
    more = {f"model.layers.{i}.mlp.up_proj.weight": Tensor("F32", np.zeros(3, np.float32)) for i in (3, 4)}
    more |= {name: Tensor("F32", np.ones(1, np.float32)) for name in ("model.norm.weight", "lm_head.weight")}
    component = names.text_encoder(QWEN)
    expected = shapes.text_encoder_shapes(QWEN)
    alone = resolve(write(tmp_path / "alone", used), expected, component)
    among = resolve(write(tmp_path / "among", used | more), expected, component)
    assert weights.digest(among) == weights.digest(alone)
    assert among.size == sum(tensor.data.nbytes for tensor in used.values())


def test_missing_extra_misshapen_and_mistyped_tensors_are_all_said_at_once(tmp_path: Path) -> None:
    file = dict(CANONICAL)
    del file["img_in.weight"]
    del file["single_blocks.2.linear2.weight"]
    file["img_in.bias"] = Tensor("F32", np.zeros(16, np.float32))
    file["txt_in.weight"] = Tensor("BF16", np.zeros((24, 16), np.uint16))
    file["final_layer.linear.weight"] = Tensor("I16", np.zeros((16, 16), np.int16))
    lines = faults(write(tmp_path, file))
    assert lines.keys() == {"missing", "extra", "shape", "dtype"}
    assert "2 tensors are missing" in lines["missing"]
    assert "img_in.weight, single_blocks.2.linear2.weight" in lines["missing"]
    assert "img_in.bias" in lines["extra"]
    assert "txt_in.weight [24, 16] instead of [16, 24]" in lines["shape"]
    assert "final_layer.linear.weight I16" in lines["dtype"]
    assert all(str(tmp_path) in line and "fix:" in line for line in lines.values())


def test_pieces_of_different_types_are_refused(tmp_path: Path) -> None:
    file = respell(CANONICAL, names.diffusers_transformer_pieces)
    name = "transformer_blocks.0.attn.to_k.weight"
    file[name] = Tensor("F32", np.zeros(file[name].shape, np.float32))
    assert "double_blocks.0.img_attn.qkv.weight BF16 and F32" in faults(write(tmp_path, file))["dtype"]


def test_file_of_something_else_is_called_by_its_name(tmp_path: Path) -> None:
    others = {
        "a language model of width 8 with 3 layers": draw(shapes.text_encoder_shapes(QWEN)),
        "a FLUX.2 autoencoder (encoder and decoder) of 4 latent channels": autoencoder_file(convolutions=True)[0],
        "a LoRA": {"diffusion_model.img_in.lora_A.weight": Tensor("F32", np.zeros((2, 2), np.float32))},
    }
    for words, content in others.items():
        line = faults(write(tmp_path, content))["missing"]
        assert f"{len(EXPECTED)} tensors are missing" in line
        assert "expected a FLUX.2 transformer of width 16 with 2 double and 3 single blocks" in line
        assert f"found {words}" in line


def test_transformer_of_another_size_is_called_by_its_size(tmp_path: Path) -> None:
    larger = TransformerConfig(
        2, 4, 2, 24, 8, 16, 3.0, (2, 2, 2, 2), guidance_embeds=True, timestep_guidance_channels=4
    )
    lines = faults(write(tmp_path, draw(shapes.transformer_shapes(larger))))
    assert lines.keys() == {"extra"}
    assert "expected a FLUX.2 transformer of width 16 with 2 double and 3 single blocks" in lines["extra"]
    assert "found a FLUX.2 transformer of width 16 with 2 double and 4 single blocks" in lines["extra"]


def test_index_must_name_exactly_what_the_shards_hold(tmp_path: Path) -> None:
    files = shard(tmp_path, CANONICAL)
    good = json.loads(files[0].read_text())["weight_map"]
    swapped = good | {"img_in.weight": "a-2.safetensors" if "1" in good["img_in.weight"] else "a-1.safetensors"}
    fewer = {name: file for name, file in good.items() if name != "img_in.weight"}
    for weight_map in (swapped, fewer, good | {"ghost": "a-1.safetensors"}):
        files[0].write_text(json.dumps({"weight_map": weight_map}))
        assert faults(files).keys() == {"index"}
    for text in ("", "{", "[" * 100_000, '{"weight_map": {"a": 1}}', "{}"):
        files[0].write_text(text)
        assert faults(files).keys() == {"index"}


def test_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    files = write(tmp_path, CANONICAL) + write(tmp_path, {"img_in.weight": CANONICAL["img_in.weight"]}, "b")
    assert faults(files).keys() == {"twice"}


def test_file_replaced_after_resolving_is_refused(tmp_path: Path) -> None:
    layout = resolve(write(tmp_path, CANONICAL))
    write(tmp_path, draw(EXPECTED, "F32"))
    for use in (lambda: weights.digest(layout), lambda: list(weights.load(layout))):
        with pytest.raises(Damaged, match=r"weights\.changed"):
            use()


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    done: list[int] = []
    layout = resolve(write(tmp_path, CANONICAL))
    weights.digest(layout, done.append)
    assert sum(done) == layout.size == sum(tensor.data.nbytes for tensor in CANONICAL.values())
    assert len(done) == len(CANONICAL)


MATRIX = {"single_blocks.0.linear1.weight": (12, 128), "double_blocks.0.img_attn.qkv.weight": (6, 64)}
FUSED = Component(
    plain=lambda name: name,
    spellings=(
        names.canonical_pieces,
        lambda name: tuple(Piece(f"{part}.weight") for part in "qkv") if "qkv" in name else (Piece(name),),
    ),
    unused=lambda _: False,
)


def packed_file(form: Format) -> File:
    """The matrices of MATRIX as MLX packs them, q, k and v apart."""
    random = mx.random.normal((30, 128), key=mx.random.key(1)).astype(mx.bfloat16)
    matrices = {"single_blocks.0.linear1": random[:12]} | {
        part: random[12 + 2 * i : 14 + 2 * i, :64] for i, part in enumerate("qkv")
    }
    packed = {
        name: mx.quantize(matrix, form.group_size, form.bits, mode=form.mode) for name, matrix in matrices.items()
    }
    return {
        f"{name}.{part}": tensors.from_mlx(array)
        for name, parts in packed.items()
        for part, array in zip(form.parts, parts, strict=True)
    }


@pytest.mark.parametrize("form", [*FORMATS.values(), Format("affine", 6, 32)])
def test_packed_matrices_are_found_with_their_format_and_stacked_by_rows(tmp_path: Path, form: Format) -> None:
    file = packed_file(form)
    layout = resolve(write(tmp_path, file), MATRIX, FUSED)
    assert layout.packed == {"single_blocks.0.linear1": form, "double_blocks.0.img_attn.qkv": form}
    loaded = dict(weights.load(layout))
    assert len(loaded) == 2 * len(form.parts)
    for part in form.parts:
        stacked = mx.concatenate([tensors.to_mlx(file[f"{piece}.{part}"]) for piece in "qkv"])
        assert mx.array_equal(loaded[f"double_blocks.0.img_attn.qkv.{part}"], stacked).item()


@pytest.mark.parametrize("part", FORMATS["4bit"].parts)
def test_digest_moves_with_every_part_of_a_packed_matrix(tmp_path: Path, part: str) -> None:
    file = packed_file(FORMATS["4bit"])
    before = weights.digest(resolve(write(tmp_path, file), MATRIX, FUSED))
    data = file[f"k.{part}"].data.copy()
    data.reshape(-1)[0] ^= 1
    changed = file | {f"k.{part}": Tensor(file[f"k.{part}"].dtype, data)}
    assert weights.digest(resolve(write(tmp_path, changed), MATRIX, FUSED)) != before


@pytest.mark.parametrize("part", ["scales", "biases"])
def test_packed_matrix_without_what_unpacks_it_is_refused(tmp_path: Path, part: str) -> None:
    file = {name: tensor for name, tensor in packed_file(FORMATS["8bit"]).items() if name != f"k.{part}"}
    with pytest.raises(
        Damaged, match=r"1 tensors are packed otherwise .*; double_blocks\.0\.img_attn\.qkv\.weight\. fix"
    ):
        resolve(write(tmp_path, file), MATRIX, FUSED)


def test_pieces_packed_in_two_ways_are_refused(tmp_path: Path) -> None:
    eight = {name: tensor for name, tensor in packed_file(FORMATS["8bit"]).items() if name.startswith("k.")}
    with pytest.raises(
        Damaged, match=r"1 tensors are packed otherwise .*; double_blocks\.0\.img_attn\.qkv\.weight\. fix"
    ):
        resolve(write(tmp_path, packed_file(FORMATS["4bit"]) | eight), MATRIX, FUSED)


def test_scales_of_too_few_rows_are_refused(tmp_path: Path) -> None:
    file = packed_file(FORMATS["mxfp8"])
    name = "single_blocks.0.linear1.scales"
    with pytest.raises(Damaged, match=r"weights\.shape.*linear1\.scales \[11, 4\] instead of \[12, 4\]"):
        resolve(write(tmp_path, file | {name: Tensor("U8", file[name].data[:-1])}), MATRIX, FUSED)
