"""The built-in model: the same bytes every time, a real FLUX.2 folder, and sane activations."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from schemas.run import Model
from stages.flux2 import backend, load
from stages.flux2.autoencoder import patchify
from stages.flux2.folder import ModelFiles, open_model
from stages.flux2.micro import make_micro
from stages.flux2.micro_draws import normal
from stages.flux2.positions import rope
from stages.flux2.text.tokenize import Tokenizer
from stages.flux2.variants import MICRO
from tests.golden import tiny
from tests.golden.recorded_prompts import MICRO_GRID, MICRO_PROMPT

# sha256 over the files' paths and bytes; changes only when the model is changed on purpose.
DIGEST = "4b04ece2c8e987775d01e7f0c6588fdc341eeb9dfa89cfe81bd1fc0498dd919b"


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


def test_draws_are_normal_and_depend_on_the_name_alone() -> None:
    numbers = normal("some.weight", 400, 500, deviation=2.0)
    assert numbers.dtype == np.float32
    assert abs(numbers.mean()) < 0.02
    assert abs(numbers.std() - 2.0) < 0.02
    assert abs(np.mean(np.abs(numbers) < 2.0) - 0.68) < 0.01
    np.testing.assert_array_equal(numbers.ravel()[:300], normal("some.weight", 300, deviation=2.0))
    assert not np.array_equal(numbers, normal("other.weight", 400, 500, deviation=2.0))


def test_folder_is_recognised_as_the_built_in_variant(model: ModelFiles) -> None:
    assert model.variant == MICRO


@cache
def pictures() -> mx.array:
    """Three pictures [3, 3, 128, 128] of soft colours and a sharp disc each."""
    y, x = np.mgrid[0:128, 0:128] / 128
    disc = (x - 0.4) ** 2 + (y - 0.5) ** 2 < 0.06
    soft = np.stack([np.stack([x, y, 1 - x]), np.stack([y, 1 - y, x]), np.stack([0.2 + 0 * x, x * y, 0.6 + 0 * x])])
    colors = np.array([[1, 0.1, 0.1], [0.1, 0.2, 0.9], [0.9, 0.8, 0.1]])
    return mx.array((np.where(disc, colors[:, :, None, None], soft) * 2 - 1).astype(np.float32))


def test_decoded_picture_is_a_soft_version_of_the_encoded_one(model: ModelFiles) -> None:
    autoencoder = load.load_autoencoder(model, encoder=True, decoder=True)
    latents = autoencoder.encode(pictures())
    decoded = autoencoder.decode(latents)
    assert latents.shape == (3, 32, 8, 8)
    # Measured 0.08; the pictures' own deviation is 0.6.
    assert mx.abs(decoded - pictures()).mean().item() < 0.1
    # Whitened: about unit variance. Measured 1.2.
    assert 0.7 < latents.std().item() < 1.5


def test_latents_of_noise_decode_to_visible_pictures(model: ModelFiles) -> None:
    autoencoder = load.load_autoencoder(model, encoder=False, decoder=True)
    decoded = autoencoder.decode(mx.random.normal((4, 32, 8, 8), key=mx.random.key(0)))
    assert (mx.abs(decoded) <= 1).mean().item() > 0.9
    assert decoded.std().item() > 0.2


def test_text_encoder_tells_prompts_apart_at_every_layer(model: ModelFiles) -> None:
    encoder = load.load_text_encoder(model, mx.float32)
    tokenizer = Tokenizer(model.tokenizer, MICRO.text_encoder)
    tokens = [tokenizer.encode(text) for text in ("a photo of a red cat", "a photo of a blue cat")]
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
