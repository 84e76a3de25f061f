"""The built-in model: the packed bytes and no others, a real FLUX.2 folder, and pictures of what was asked for."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import mlx.core as mx
import msgspec
import numpy as np
import pytest

from schemas.errors import Damaged
from schemas.pretrain import Recipe
from schemas.run import Model
from stages.contract.config import load_settings
from stages.flux2 import backend, load
from stages.flux2.autoencoder import patchify
from stages.flux2.folder import ModelFiles, open_model
from stages.flux2.micro import PARTS, REPORT, TEXT_ENCODER, TOKENIZER, WEIGHTS, make_micro
from stages.flux2.positions import rope
from stages.flux2.sampler import Sampling
from stages.flux2.text.tokenize import Tokenizer
from stages.flux2.variants import MICRO
from stages.pretraining.autoencoder import decoded
from stages.pretraining.parts import save_text_parts, variant_of
from stages.pretraining.transformer import Reader, drawn
from stages.world import scenes
from stages.world.judge import Judge
from stages.world.outlines import BASE
from stages.world.render import render, to_bytes
from stages.world.scenes import draw_things, scenes_of
from tests.golden import tiny
from tests.golden.recorded_prompts import MICRO_GRID, MICRO_PROMPT

PIPELINES = Path(__file__).parents[2] / "pipelines"
# sha256 over the files' paths and bytes; changes only when the model is changed on purpose.
DIGEST = "1ef10412c9f4e78bf8de515367b11d3aaa777699ee29e98934c175cac31d273c"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("micro")
    make_micro(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> ModelFiles:
    backend.prepare()
    return open_model(Model(source="flux2-micro"), folder, lambda _name: folder)


def digest(folder: Path) -> str:
    sha256 = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        sha256.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode() + path.read_bytes())
    return sha256.hexdigest()


def test_files_are_the_same_bytes_every_time_and_everywhere(folder: Path, tmp_path: Path) -> None:
    make_micro(tmp_path)
    assert digest(tmp_path) == digest(folder) == DIGEST


def test_whole_model_is_below_16_mb(folder: Path) -> None:
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 16e6


@pytest.mark.parametrize("name", [*PARTS.values(), TOKENIZER])
def test_packed_file_with_another_byte_is_refused(name: str, tmp_path: Path) -> None:
    shutil.copytree(WEIGHTS, tmp_path / "weights")
    path = tmp_path / "weights" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(Damaged, match=r"model.builtin_damaged.*sha256"):
        make_micro(tmp_path / "model", tmp_path / "weights")
    path.unlink()
    with pytest.raises(Damaged, match="found no file"):
        make_micro(tmp_path / "model", tmp_path / "weights")
    assert not (tmp_path / "model").exists()


def test_packed_files_without_a_whole_report_are_refused(tmp_path: Path) -> None:
    shutil.copytree(WEIGHTS, tmp_path / "weights")
    path = tmp_path / "weights" / REPORT
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(Damaged, match=r"model\.builtin_damaged"):
        make_micro(tmp_path / "model", tmp_path / "weights")
    path.unlink()
    with pytest.raises(Damaged, match=r"model\.builtin_damaged"):
        make_micro(tmp_path / "model", tmp_path / "weights")


def test_packed_files_are_those_of_the_recipe_in_the_pipelines() -> None:
    report = json.loads((WEIGHTS / REPORT).read_bytes())
    recipe = load_settings(Recipe, PIPELINES / "micro" / "recipe.toml")
    assert variant_of(recipe) == MICRO
    # The report was written after the second training, which was run in another type than the first.
    assert msgspec.convert(report["recipe"], Recipe) == recipe
    assert report["world_version"] == scenes.VERSION


def test_random_parts_are_made_again_with_the_packed_bytes(tmp_path: Path) -> None:
    save_text_parts(tmp_path, MICRO)
    for name in (TEXT_ENCODER, TOKENIZER):
        assert (tmp_path / name).read_bytes() == (WEIGHTS / name).read_bytes()


def test_folder_is_recognised_as_the_built_in_variant(model: ModelFiles) -> None:
    assert model.variant == MICRO


def test_pictures_of_the_world_survive_the_autoencoder(model: ModelFiles) -> None:
    autoencoder = load.load_autoencoder(model, encoder=True, decoder=True)
    rng = np.random.default_rng(1)
    real = render(scenes_of(draw_things(rng, 4, unseen=True), BASE, rng), 128, 128).transpose(0, 3, 1, 2)
    latents = autoencoder.encode(real)
    assert latents.shape == (4, MICRO.transformer.in_channels, 8, 8)
    # Whitened: about unit variance. Measured 1.0.
    assert 0.7 < latents.std().item() < 1.4
    # Pictures span 2; measured 31.6 dB.
    assert -10 * np.log10(mx.square(autoencoder.decode(latents) - real).mean().item() / 4) > 29


def test_whole_caption_is_drawn_as_it_says(model: ModelFiles) -> None:
    wanted = "a large blue circle at the top left on a striped yellow background"
    reader = Reader(Tokenizer(model.tokenizer, MICRO.text_encoder), load.load_text_encoder(model, mx.float32))
    sampling = Sampling(steps=MICRO.preview_steps, guidance=MICRO.preview_guidance, distilled=False)
    noise = mx.random.normal((1, MICRO.transformer.in_channels, 8, 8), key=mx.random.key(3))
    transformer = load.load_transformer(model, mx.float32)
    latents = drawn(transformer, reader.features([wanted]), reader.features([""]), noise, sampling)
    decoder = load.load_autoencoder(model, encoder=False, decoder=True)
    picture = np.array(to_bytes(decoded(decoder, latents)))[0]
    verdict = Judge(BASE, 128, 128).judge(picture)
    colours, places = list(scenes.COLOURS), list(scenes.PLACES)
    assert (verdict.shape, verdict.texture) == ("circle", scenes.STRIPED)
    assert (verdict.colour, verdict.ground) == (colours.index("blue"), colours.index("yellow"))
    assert (verdict.size, verdict.place) == (1, places.index("top left"))


def test_text_encoder_tells_prompts_apart_at_every_layer(model: ModelFiles) -> None:
    encoder = load.load_text_encoder(model, mx.float32)
    tokenizer = Tokenizer(model.tokenizer, MICRO.text_encoder)
    tokens = [tokenizer.encode(text) for text in ("a small red ring", "a small blue ring")]
    states = encoder(mx.array([token.ids for token in tokens]), mx.array([token.count for token in tokens]))
    assert states.shape == (2, 64, 192)
    for start in (0, 64, 128):
        layer = states[:, :, start : start + 64]
        assert 1 < layer[:, : tokens[0].count].std().item() < 4
        assert mx.abs(layer[0] - layer[1]).max().item() > 0.1


def test_every_part_computes_what_diffusers_and_transformers_compute_with_the_same_folder(model: ModelFiles) -> None:
    golden = tiny.arrays("micro")
    tokens = Tokenizer(model.tokenizer, MICRO.text_encoder).encode(MICRO_PROMPT)
    text = load.load_text_encoder(model, mx.float32)(mx.array([tokens.ids]), mx.array([tokens.count]))
    transformer = load.load_transformer(model, mx.float32)
    velocity = transformer(golden["tokens"], text, mx.array([0.6]), None, rope(MICRO.transformer, 64, *MICRO_GRID))
    autoencoder = load.load_autoencoder(model, encoder=False, decoder=True)
    picture = autoencoder.decode(autoencoder.bn.whiten(patchify(golden["raw_latents"].transpose(0, 2, 3, 1))))
    # Of the maximum.
    errors = {
        "text": tiny.error(text, golden["text"]),
        "velocity": tiny.error(velocity, golden["velocity"]),
        "picture": tiny.error(picture, golden["picture"]),
    }
    assert max(errors.values()) < 1e-5, errors
