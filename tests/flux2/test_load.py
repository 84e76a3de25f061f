from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten

from schemas.errors import BadConfig, Damaged
from schemas.quantize import Quantize
from schemas.run import Model
from stages.flux2 import load, names, shapes
from stages.flux2.autoencoder import Autoencoder
from stages.flux2.folder import ModelFiles, open_model
from stages.flux2.micro import make_micro
from stages.flux2.packing import FORMATS, Format
from stages.flux2.positions import rope
from stages.flux2.quantize import held_as, unpacked
from stages.flux2.quantize import packed as quantized
from stages.flux2.shapes import Shapes
from stages.flux2.text.mistral3 import Mistral3
from stages.flux2.text.qwen3 import Qwen3
from stages.flux2.transformer import Transformer
from stages.flux2.variants import DEV, KLEIN_4B, MICRO, MISTRAL_24B, QWEN3_4B, QWEN3_8B, AutoencoderConfig
from stages.stores import tensors
from stages.stores.tensors import Tensor

SMALL_DECODER = AutoencoderConfig(decoder_block_out_channels=(96, 192, 384, 384), mid_block_add_attention=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "flux2-micro"
    make_micro(path)
    return path


@pytest.fixture
def model(folder: Path) -> ModelFiles:
    return open_model(Model(), folder.parent, lambda _: folder)


def parameters(module: nn.Module) -> Shapes:
    return {name: array.shape for name, array in tree_flatten(module.parameters())}


def in_mlx(expected: Shapes) -> Shapes:
    """Shapes in files -> shapes in modules: convolutions [O, I, kh, kw] are [O, kh, kw, I]."""
    return {name: (s[0], s[2], s[3], s[1]) if len(s) == 4 else s for name, s in expected.items()}


@pytest.mark.parametrize("config", [MICRO.transformer, KLEIN_4B, DEV])
def test_transformer_module_is_the_table(config: object) -> None:
    assert parameters(Transformer(config)) == shapes.transformer_shapes(config)


@pytest.mark.parametrize("config", [MICRO.autoencoder, AutoencoderConfig(), SMALL_DECODER])
@pytest.mark.parametrize(("encoder", "decoder"), [(True, True), (True, False), (False, True)])
def test_autoencoder_module_is_the_table(config: AutoencoderConfig, *, encoder: bool, decoder: bool) -> None:
    expected = shapes.autoencoder_shapes(config, encoder=encoder, decoder=decoder)
    assert parameters(Autoencoder(config, encoder=encoder, decoder=decoder)) == in_mlx(expected)


@pytest.mark.parametrize(
    ("kind", "config"),
    [(Qwen3, MICRO.text_encoder), (Qwen3, QWEN3_4B), (Qwen3, QWEN3_8B), (Mistral3, MISTRAL_24B)],
)
def test_text_encoder_module_is_the_table(kind: type[nn.Module], config: object) -> None:
    assert parameters(kind(config)) == shapes.text_encoder_shapes(config)


def test_loaded_modules_hold_the_files_values(model: ModelFiles) -> None:
    transformer = load.load_transformer(model, mx.float32)
    file = tensors.load(model.transformer[0]).tensors
    qkv = dict(tree_flatten(transformer.parameters()))["double_blocks.1.img_attn.qkv.weight"]
    rows = [file[f"transformer_blocks.1.attn.{part}.weight"] for part in ("to_q", "to_k", "to_v")]
    assert np.array_equal(np.array(qkv), np.concatenate([np.array(tensors.to_mlx(row, mx.float32)) for row in rows]))
    autoencoder = load.load_autoencoder(model, encoder=True, decoder=True)
    stored = tensors.load(model.autoencoder[0]).tensors["decoder.up_blocks.0.resnets.0.conv1.weight"]
    found = autoencoder.decoder.up[3].block[0].conv1.weight
    assert np.array_equal(np.array(found), np.array(tensors.to_mlx(stored, mx.float32)).transpose(0, 2, 3, 1))


def test_weights_have_the_type_asked_for(model: ModelFiles) -> None:
    for dtype in (mx.bfloat16, mx.float32):
        for module in (load.load_transformer(model, dtype), load.load_text_encoder(model, dtype)):
            assert {array.dtype for _, array in tree_flatten(module.parameters())} == {dtype}
    autoencoder = load.load_autoencoder(model, encoder=True, decoder=True)
    assert {array.dtype for _, array in tree_flatten(autoencoder.parameters())} == {mx.float32}


def test_loading_never_holds_a_second_model(model: ModelFiles) -> None:
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    module = load.load_transformer(model, mx.bfloat16)
    arrays = [array for _, array in tree_flatten(module.parameters())]
    size, largest = sum(array.nbytes for array in arrays), max(array.nbytes for array in arrays)
    assert mx.get_peak_memory() - before < size + 2 * largest


DIGESTS = (
    load.transformer_digest,
    load.autoencoder_encoder_digest,
    load.autoencoder_decoder_digest,
    load.text_encoder_digest,
)


def respell(paths: tuple[Path, ...], expected: Shapes, component: names.Component, target: Path) -> tuple[Path, ...]:
    """Write diffusers' file as BFL writes it, with BFL's 1x1 convolutions for the autoencoder's attention."""
    file = tensors.load(paths[0]).tensors
    canonical: dict[str, Tensor] = {}
    for name in expected:
        pieces = component.spellings[1](name)
        rows = [np.split(file[piece.name].data, piece.of)[piece.index] for piece in pieces]
        data = np.concatenate(rows)
        if "attn_1" in name and data.ndim == 2:
            data = data[..., None, None]
        canonical[name] = Tensor(file[pieces[0].name].dtype, data)
    tensors.save(target, canonical, {})
    return (target,)


def test_single_files_of_the_same_weights_have_the_same_digests(model: ModelFiles, tmp_path: Path) -> None:
    config = model.variant.autoencoder
    expected = shapes.transformer_shapes(model.variant.transformer)
    whole = names.autoencoder(config, encoder=True, decoder=True)
    single = dataclasses.replace(
        model,
        transformer=respell(model.transformer, expected, names.TRANSFORMER, tmp_path / "t.safetensors"),
        autoencoder=respell(model.autoencoder, shapes.autoencoder_shapes(config), whole, tmp_path / "a.safetensors"),
    )
    assert [digest(single) for digest in DIGESTS] == [digest(model) for digest in DIGESTS]
    loaded = [load.load_autoencoder(each, encoder=True, decoder=True) for each in (model, single)]
    first, second = (dict(tree_flatten(module.parameters())) for module in loaded)
    assert all(mx.array_equal(first[name], second[name]).item() for name in first)


def with_change(model: ModelFiles, name: str, target: Path) -> ModelFiles:
    file = tensors.load(model.autoencoder[0])
    old = file.tensors[name]
    data = old.data.copy()
    data.reshape(-1)[0] += 1
    tensors.save(target, file.tensors | {name: Tensor(old.dtype, data)}, file.metadata)
    return dataclasses.replace(model, autoencoder=(target,))


@pytest.mark.parametrize(
    ("name", "moves_encoder", "moves_decoder"),
    [
        ("encoder.conv_in.weight", True, False),
        ("quant_conv.bias", True, False),
        ("decoder.conv_out.bias", False, True),
        ("post_quant_conv.weight", False, True),
        ("bn.running_var", True, True),
        ("bn.num_batches_tracked", False, False),
    ],
)
def test_digest_of_a_half_moves_with_what_it_reads(
    model: ModelFiles, tmp_path: Path, name: str, *, moves_encoder: bool, moves_decoder: bool
) -> None:
    changed = with_change(model, name, tmp_path / "a.safetensors")
    assert (load.autoencoder_encoder_digest(changed) != load.autoencoder_encoder_digest(model)) == moves_encoder
    assert (load.autoencoder_decoder_digest(changed) != load.autoencoder_decoder_digest(model)) == moves_decoder


def test_swapped_parts_are_refused_by_name(model: ModelFiles) -> None:
    swapped = dataclasses.replace(
        model, transformer=model.autoencoder, autoencoder=model.text_encoder, text_encoder=model.transformer
    )
    with pytest.raises(Damaged, match=r"found a FLUX\.2 autoencoder"):
        load.load_transformer(swapped, mx.float32)
    with pytest.raises(Damaged, match="found a language model of width 64 with 28 layers"):
        load.load_autoencoder(swapped, encoder=True, decoder=False)
    with pytest.raises(Damaged, match=r"found a FLUX\.2 transformer of width 192"):
        load.load_text_encoder(swapped, mx.float32)


def test_truncated_weights_are_an_error_never_zeros(model: ModelFiles, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(model.transformer[0].read_bytes())
    cut = dataclasses.replace(model, transformer=(path,))
    for size in np.linspace(path.stat().st_size - 1, 0, 25).astype(int):
        os.truncate(path, size)
        with pytest.raises(Damaged, match=r"tensors\.truncated"):
            load.load_transformer(cut, mx.float32)


def as_mlx_community(model: ModelFiles, folder: Path, form: Format) -> ModelFiles:
    """Write the text encoder as `mlx_lm.convert -q` does: every matrix packed, the embeddings too."""
    file = tensors.load(model.text_encoder[0]).tensors
    packed: dict[str, Tensor] = {}
    for name, tensor in file.items():
        array = tensors.to_mlx(tensor)
        parts = quantized(array, form) if array.ndim == 2 else [array]
        module, _, last = name.rpartition(".")
        names_of = form.parts if array.ndim == 2 else (last,)
        packed |= {f"{module}.{part}": tensors.from_mlx(each) for part, each in zip(names_of, parts, strict=True)}
    folder.mkdir()
    tensors.save(folder / "model.safetensors", packed, {"format": "mlx"})
    config = json.loads((model.text_encoder[0].parent / "config.json").read_text())
    config["quantization"] = {"group_size": form.group_size, "bits": form.bits, "mode": form.mode}
    (folder / "config.json").write_text(json.dumps(config))
    spec = Model(text_encoder=str(folder))
    return open_model(spec, folder, lambda _: model.transformer[0].parents[1])


@pytest.mark.parametrize("form", [*FORMATS.values(), Format("affine", 6, 32)])
def test_text_encoder_packed_as_mlx_community_does_is_that_of_the_full_one_packed(
    model: ModelFiles, tmp_path: Path, form: Format
) -> None:
    packed = as_mlx_community(model, tmp_path / "text_encoder", form)
    assert load.text_encoder_digest(packed) != load.text_encoder_digest(model)
    encoder = load.load_text_encoder(packed, mx.float32)
    assert held_as(encoder) == str(form)
    full = dict(tree_flatten(load.load_text_encoder(model, mx.float32).parameters()))
    name = "model.layers.3.mlp.down_proj"
    found = dict(tree_flatten(encoder.parameters()))
    expected = quantized(full[f"{name}.weight"], form)
    for part, array in zip(form.parts, expected, strict=True):
        assert mx.array_equal(found[f"{name}.{part}"], array).item()
    # Embeddings are looked up, never multiplied with: unpacked once.
    table = "model.embed_tokens.weight"
    assert mx.array_equal(found[table], unpacked(quantized(full[table], form), form, mx.float32)).item()
    assert mx.isfinite(encoder(mx.array([[1, 2, 3, 0]]), mx.array([3]))).all().item()


def test_text_encoder_packed_otherwise_than_asked_is_refused(model: ModelFiles, tmp_path: Path) -> None:
    packed = as_mlx_community(model, tmp_path / "text_encoder", FORMATS["4bit"])
    assert held_as(load.load_text_encoder(packed, mx.float32, "4bit")) == "4bit"
    with pytest.raises(BadConfig, match=r"model\.quantized_already.*encode_text\.quantize = 8bit.*found 4bit"):
        load.load_text_encoder(packed, mx.float32, "8bit")


@pytest.mark.parametrize("quantize", FORMATS)
def test_quantized_transformer_answers_near_the_full_one(model: ModelFiles, quantize: Quantize) -> None:
    config = model.variant.transformer
    features = [(1, 16, config.in_channels), (1, 8, config.joint_attention_dim)]
    given = [mx.random.normal(shape, key=mx.random.key(1)) for shape in features]
    answers = []
    for mode in ("none", quantize):
        transformer = load.load_transformer(model, mx.float32, mode)
        assert held_as(transformer) == mode
        assert transformer.dtype == mx.float32
        answers.append(transformer(*given, mx.array([0.5]), None, rope(config, 8, 4, 4)))
    distance = (mx.linalg.norm(answers[1] - answers[0]) / mx.linalg.norm(answers[0])).item()
    # Measured with random weights: 0.003 (8bit), 0.009 (mxfp8), 0.026 (4bit), 0.030 (nvfp4), 0.035 (mxfp4); with
    # trained ones 0.006, 0.020, 0.085, 0.102, 0.085.
    assert 1e-3 < distance < (0.03 if FORMATS[quantize].bits == 8 else 0.15)
