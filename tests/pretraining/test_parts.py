"""The parts as files: what is written is what is loaded, and the model they make is a real folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten

from schemas.pretrain import Recipe
from schemas.run import Model
from stages.contract.config import load_settings
from stages.contract.digests import sha256_file
from stages.flux2 import load
from stages.flux2.autoencoder import Autoencoder
from stages.flux2.folder import open_model
from stages.flux2.micro import AUTOENCODER, TEXT_ENCODER, TOKENIZER, assemble
from stages.flux2.shapes import autoencoder_shapes, transformer_shapes
from stages.flux2.transformer import Transformer
from stages.pretraining import parts
from tests.pretraining import tiny

RECIPE = Path(__file__).parents[2] / "pipelines" / "micro" / "recipe.toml"


def tensors(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in cast(list, tree_flatten(module.parameters()))}


def rounded(module: nn.Module) -> dict[str, np.ndarray]:
    """The module's tensors as files keep them: statistics are not rounded."""
    own = cast(list[tuple[str, mx.array]], tree_flatten(module.parameters()))
    return {
        name: np.array(array if name.startswith("bn.") else array.astype(mx.bfloat16).astype(mx.float32))
        for name, array in own
    }


def test_parts_make_a_model_folder_with_the_weights_that_were_saved(tmp_path: Path) -> None:
    variant = parts.variant_of(tiny.recipe())
    mx.random.seed(4)
    autoencoder, transformer = Autoencoder(variant.autoencoder), Transformer(variant.transformer)
    autoencoder.bn.running_mean = mx.random.normal((8,))
    parts.save_text_parts(tmp_path / "parts", variant)
    for _ in range(2):  # a later state replaces an earlier one
        transformer.img_in.weight = transformer.img_in.weight + 1
        parts.save_autoencoder(tmp_path / "parts", autoencoder)
        parts.save_transformer(tmp_path / "parts", transformer)
    assemble(tmp_path / "parts", variant, tmp_path / "model")
    model = open_model(Model(source="model"), tmp_path, lambda _: tmp_path)
    assert (model.variant.transformer, model.variant.autoencoder) == (variant.transformer, variant.autoencoder)
    found = load.load_autoencoder(model, encoder=True, decoder=True)
    for name, array in rounded(autoencoder).items():
        np.testing.assert_array_equal(tensors(found)[name], array, err_msg=name)
    for name, array in rounded(transformer).items():
        np.testing.assert_array_equal(tensors(load.load_transformer(model, mx.float32))[name], array, err_msg=name)


def test_same_weights_are_the_same_bytes(tmp_path: Path) -> None:
    variant = parts.variant_of(tiny.recipe())
    autoencoder = Autoencoder(variant.autoencoder)
    for name in ("a", "b"):
        parts.save_text_parts(tmp_path / name, variant)
        parts.save_autoencoder(tmp_path / name, autoencoder)
    for file in (AUTOENCODER, TEXT_ENCODER, TOKENIZER):
        assert sha256_file(tmp_path / "a" / file) == sha256_file(tmp_path / "b" / file)


def test_recipe_gives_a_model_below_16_mb() -> None:
    variant = parts.variant_of(load_settings(Recipe, RECIPE))
    shapes = {**autoencoder_shapes(variant.autoencoder), **transformer_shapes(variant.transformer)}
    text_encoder_bytes = 2_171_736
    assert 2 * sum(math.prod(shape) for shape in shapes.values()) + text_encoder_bytes < 15.8e6
