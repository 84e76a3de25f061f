"""The same weights in every layout they are published in: the same digests, modules and numbers; others are named."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten

from schemas.errors import BadConfig, Damaged, StageError
from schemas.quantize import Quantize
from schemas.run import Model
from stages.flux2 import configs, load, names, shapes, weights
from stages.flux2.folder import ModelFiles, open_model
from stages.flux2.micro import make_micro
from stages.flux2.names import Component
from stages.flux2.positions import rope
from stages.flux2.shapes import Shapes
from stages.flux2.text.mistral3 import Mistral3
from stages.flux2.variants import MICRO
from stages.stores import tensors
from stages.stores.tensors import Tensor
from tests.flux2.test_float8 import in_eight_bits
from tests.golden.tiny import GOLDEN, distance

File = dict[str, Tensor]
PARTS = ("transformer", "autoencoder", "text_encoder")
WHOLE = names.autoencoder(MICRO.autoencoder, encoder=True, decoder=True)
DIGESTS = (
    load.transformer_digest,
    load.autoencoder_encoder_digest,
    load.autoencoder_decoder_digest,
    load.text_encoder_digest,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "flux2-micro"
    make_micro(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> ModelFiles:
    return open_model(Model(source=str(folder)), folder.parent, lambda name: folder / name)


def content(path: Path) -> File:
    return tensors.load(path).tensors


def canonical(file: File, expected: Shapes, component: Component) -> File:
    """Respell diffusers' file as BFL writes it, but names that nobody reads."""
    found: File = {}
    for name in expected:
        pieces = component.spellings[1](name)
        rows = [np.split(file[piece.name].data, piece.of)[piece.index] for piece in pieces]
        found[name] = Tensor(file[pieces[0].name].dtype, np.concatenate(rows))
    return found


def prefixed(file: File, prefix: str) -> File:
    return {prefix + name: tensor for name, tensor in file.items()}


def convolutions(file: File) -> File:
    """Write the autoencoder's attention as BFL does, with 1x1 convolutions."""
    return {
        name: Tensor(one.dtype, one.data[..., None, None]) if "attn_1" in name and one.data.ndim == 2 else one
        for name, one in file.items()
    }


def in_layout(layout: str, part: str, file: File) -> File:
    """Return the tensors of a part as the files of that layout have them."""
    expected = {
        "transformer": (shapes.transformer_shapes(MICRO.transformer), names.TRANSFORMER),
        "autoencoder": (shapes.autoencoder_shapes(MICRO.autoencoder), WHOLE),
    }
    bfl = canonical(file, *expected[part]) if part in expected else file
    match layout, part:
        case "bfl", "autoencoder":
            return convolutions(bfl)
        case "bfl", _:
            return bfl
        case "comfy", "transformer":
            return prefixed(bfl, "diffusion_model.")
        case "comfy", "autoencoder":
            return bfl
        case "comfy", _:
            kept = {name: tensor for name, tensor in file.items() if "model.norm" not in name}
            return kept | {"tekken_model": Tensor("U8", np.zeros(9, np.uint8))}
        case "all-in-one", "transformer":
            return {
                name.replace("_norm.scale", "_norm.weight"): tensor
                for name, tensor in prefixed(bfl, "model.diffusion_model.").items()
            }
        case "all-in-one", "autoencoder":
            return prefixed(convolutions(bfl), "first_stage_model.")
        case _:
            return {name.removeprefix("model."): tensor for name, tensor in file.items()}


LAYOUTS = ("bfl", "comfy", "all-in-one")


def single_files(model: ModelFiles, layout: str, base: Path) -> ModelFiles:
    """Write every part into one file of its own, as that layout does, and open them without a folder."""
    for part in PARTS:
        file = in_layout(layout, part, content(getattr(model, part)[0]))
        tensors.save(base / f"{part}.safetensors", file, {})
    spec = Model(
        source="",
        variant="flux2-micro",
        **{part: f"{part}.safetensors" for part in PARTS},  # pyright: ignore[reportArgumentType]
        tokenizer=str(model.tokenizer),
    )
    return open_model(spec, base, lambda name: base / name)


def sharded(model: ModelFiles, folder: Path, base: Path) -> ModelFiles:
    """Write every part as two shards and their index into a folder of the same layout."""
    shutil.copytree(folder, base / "sharded")
    for below in ("transformer", "vae", "text_encoder"):
        (path,) = (base / "sharded" / below).glob("*.safetensors")
        file, weight_map = content(path), {}
        path.unlink()
        for number in (1, 2):
            shard = f"{path.stem}-{number:05}-of-00002.safetensors"
            half = list(file)[number - 1 :: 2]
            weight_map |= dict.fromkeys(half, shard)
            tensors.save(path.with_name(shard), {name: file[name] for name in half}, {})
        path.with_name(f"{path.name}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return open_model(Model(source="sharded"), base, lambda name: base / name)


def parameters(module: nn.Module) -> dict[str, mx.array]:
    return tree_flatten(module.parameters(), destination={})  # pyright: ignore[reportReturnType]


def numbers(model: ModelFiles) -> list[mx.array]:
    """Return what the model computes: latents, embeddings, a velocity."""
    mx.random.seed(3)
    pictures = mx.random.uniform(-1, 1, (1, 3, 32, 48))
    latents = load.load_autoencoder(model, encoder=True, decoder=True).encode(pictures)
    ids = mx.arange(MICRO.text_encoder.length)[None]
    text = load.load_text_encoder(model, mx.float32)(ids, mx.array([9]))
    _, channels, height, width = latents.shape
    tokens = latents.reshape(1, channels, -1).swapaxes(1, 2)
    transformer = load.load_transformer(model, mx.float32)
    positions = rope(MICRO.transformer, MICRO.text_encoder.length, height, width)
    velocity = transformer(tokens, text, mx.array([0.7]), None, positions)
    mx.eval(latents, text, velocity)
    return [latents, text, velocity]


@pytest.mark.parametrize("layout", [*LAYOUTS, "sharded"])
def test_every_layout_is_the_same_model(model: ModelFiles, folder: Path, tmp_path: Path, layout: str) -> None:
    other = sharded(model, folder, tmp_path) if layout == "sharded" else single_files(model, layout, tmp_path)
    assert [digest(other) for digest in DIGESTS] == [digest(model) for digest in DIGESTS]
    assert all(mx.array_equal(a, b).item() for a, b in zip(numbers(other), numbers(model), strict=True))
    assert all((mx.abs(each).max() > 0.1).item() for each in numbers(model))


@pytest.mark.parametrize("quantize", ["none", "8bit"])
def test_transformer_in_comfyuis_eight_bits_computes_nearly_the_same(
    model: ModelFiles, tmp_path: Path, quantize: Quantize
) -> None:
    bfl = canonical(content(model.transformer[0]), shapes.transformer_shapes(MICRO.transformer), names.TRANSFORMER)
    full = {name: Tensor("F32", np.array(tensors.to_mlx(tensor, mx.float32))) for name, tensor in bfl.items()}
    tensors.save(tmp_path / "t.safetensors", prefixed(in_eight_bits(full, ".weight_scale"), "diffusion_model."), {})
    other = dataclasses.replace(model, transformer=(tmp_path / "t.safetensors",))
    loaded = [load.load_transformer(each, mx.float32, quantize) for each in (model, other)]
    text = mx.random.normal((1, 8, MICRO.transformer.joint_attention_dim), key=mx.random.key(1))
    tokens = mx.random.normal((1, 6, MICRO.transformer.in_channels), key=mx.random.key(2))
    positions = rope(MICRO.transformer, 8, 2, 3)
    expected, found = (each(tokens, text, mx.array([0.7]), None, positions) for each in loaded)
    assert 0 < distance(found, expected) < 0.05
    assert load.transformer_digest(other) != load.transformer_digest(model)


MISTRAL = GOLDEN / "tiny-dev" / "text_encoder"
WRAPPINGS = {
    "model.language_model.": ("model.language_model.layers.", "lm_head.weight"),
    "language_model.model.": ("language_model.model.layers.", "language_model.lm_head.weight"),
    "model.": ("model.layers.", "lm_head.weight"),
    "": ("layers.", "lm_head.weight"),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("pruned", [False, True])
def test_every_spelling_of_mistral_is_the_same_encoder(tmp_path: Path, wrapping: str, *, pruned: bool) -> None:
    config = configs.read_text_encoder(MISTRAL / "config.json")
    component, expected = names.text_encoder(config), shapes.text_encoder_shapes(config)
    file = content(MISTRAL / "model.safetensors")
    plain = {component.plain(name): tensor for name, tensor in file.items()}
    # What a pruned file leaves out: layers that no state is taken from, head, vision; it has a tokenizer instead.
    kept = {name: tensor for name, tensor in plain.items() if not (pruned and component.unused(name))}
    kept |= {"tekken_model": Tensor("U8", np.zeros(5, np.uint8))} if pruned else {}
    language = ("model.layers.", "model.embed_tokens.", "model.norm.")
    spelt = {
        wrapping + name.removeprefix("model.") if name.startswith(language) else name: tensor
        for name, tensor in kept.items()
    }
    path = tmp_path / "mistral.safetensors"
    tensors.save(path, spelt, {})
    assert any(name.startswith(WRAPPINGS[wrapping][0]) for name in spelt)
    layout = weights.resolve([path], expected, component)
    published = weights.resolve([MISTRAL / "model.safetensors"], expected, component)
    assert weights.digest(layout) == weights.digest(published)
    module = Mistral3(config, mx.float32)
    module.load_weights(list(weights.load(layout, mx.float32)), strict=True)
    assert parameters(module).keys() == expected.keys()


def refused(model: ModelFiles, kind: type[StageError], **fields: str) -> str:
    """Return the fault of opening the micro model's folder with these fields, and of loading its transformer."""
    folder = model.transformer[0].parent.parent
    spec = Model(**{"source": str(folder), "variant": "flux2-micro", **fields})  # pyright: ignore[reportArgumentType]
    with pytest.raises(kind) as error:
        load.load_transformer(open_model(spec, folder.parent, lambda name: folder / name), mx.float32)
    assert all(fault.fix for fault in error.value.faults)
    return str(error.value)


OTHER_BYTES = {
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7751105712\n",
    "a web page": b"<!DOCTYPE html><html><body>Access restricted</body></html>",
    "a text, perhaps an answer": b'{"error": "Repository is gated"}',
    "a GGUF file": b"GGUF\x03\x00\x00\x00" + bytes(64),
    "a pickle in a zip": b"PK\x03\x04\x00\x00\x08\x08" + bytes(64),
    "a pickle, not": b"\x80\x02}q\x00X\x03\x00" + bytes(64),
}


@pytest.mark.parametrize("words", OTHER_BYTES)
def test_other_files_under_the_name_of_weights_are_called_by_theirs(
    model: ModelFiles, tmp_path: Path, words: str
) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(OTHER_BYTES[words])
    line = refused(model, Damaged, transformer=str(path))
    assert line.startswith("error[tensors.other] this is ")
    assert words in line


@pytest.mark.parametrize(("suffix", "words"), [(".gguf", "a GGUF file"), (".ckpt", "pickles"), (".pth", "pickles")])
def test_weights_of_another_format_are_refused(model: ModelFiles, tmp_path: Path, suffix: str, words: str) -> None:
    path = tmp_path / f"t{suffix}"
    path.touch()
    assert words in refused(model, Damaged, transformer=str(path))


def tiny(*named: str, dtype: str = "BF16") -> File:
    held = {"BF16": np.uint16, "F8_E4M3": np.uint8, "F32": np.float32}[dtype]
    return {name: Tensor(dtype, np.zeros((2, 2), held)) for name in named}


OTHER_MODELS = {
    "found a FLUX.1 transformer": tiny("double_blocks.0.img_mod.lin.weight"),
    "found a Stable Diffusion XL model": tiny("model.diffusion_model.label_emb.0.0.weight"),
    "found a LoRA": tiny("diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight"),
    "found a language model of width 2 with 1 layers": tiny("model.embed_tokens.weight", "model.layers.0.x.weight"),
    "the weights are 8-bit floats with scales (ComfyUI's fp8)": {
        **tiny("img_in.weight", dtype="F8_E4M3"),
        **tiny("img_in.weight_scale", dtype="F32"),
    },
    "the weights are bare 8-bit floats (fp8)": tiny("img_in.weight", dtype="F8_E4M3"),
}


@pytest.mark.parametrize("words", OTHER_MODELS)
def test_weights_of_another_model_are_called_by_their_name(model: ModelFiles, tmp_path: Path, words: str) -> None:
    path = tmp_path / "t.safetensors"
    tensors.save(path, OTHER_MODELS[words], {})
    assert words in refused(model, Damaged, transformer=str(path))


def test_text_encoder_in_place_of_the_transformer_is_said(model: ModelFiles) -> None:
    line = refused(model, Damaged, transformer=str(model.text_encoder[0]))
    assert "expected a FLUX.2 transformer of width 192" in line
    assert "found a language model of width 64 with 28 layers (flux2-micro)" in line


@pytest.mark.parametrize(
    ("name", "variant", "words"),
    [
        (
            "flux-2-klein-4b.safetensors",
            "klein-base-4b",
            "klein-base-4b is a base model, flux-2-klein-4b is distilled",
        ),
        ("flux-2-klein-9b-fp16.safetensors", "klein-base-9b", "flux-2-klein-9b is distilled"),
        ("flux-2-klein-base-4b.safetensors", "klein-4b", "klein-4b is distilled, flux-2-klein-base-4b is a base"),
    ],
)
def test_file_whose_name_says_another_training_is_refused(
    model: ModelFiles, tmp_path: Path, name: str, variant: str, words: str
) -> None:
    (tmp_path / name).touch()
    parts = {part: str(tmp_path / name) for part in PARTS}
    line = refused(model, BadConfig, variant=variant, tokenizer=str(model.tokenizer), **parts)
    assert words in line


def test_parts_of_a_real_model_are_never_mixed_with_the_built_in_ones(model: ModelFiles, tmp_path: Path) -> None:
    (tmp_path / "t.safetensors").touch()
    line = refused(
        model, BadConfig, source="flux2-micro", variant="klein-4b", transformer=str(tmp_path / "t.safetensors")
    )
    assert "missing: model.autoencoder, model.text_encoder, model.tokenizer" in line


@pytest.mark.parametrize("name", ["tekken.json", "vocab.txt"])
def test_tokenizer_of_another_format_is_refused(model: ModelFiles, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    assert "expected a tokenizer.json" in refused(model, Damaged, tokenizer=str(tmp_path / name))
