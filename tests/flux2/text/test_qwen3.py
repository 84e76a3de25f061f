"""Text embeddings against diffusers' klein pipeline with a tiny random Qwen3 of 28 layers (transformers 5, SDPA)."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from stages.flux2 import configs, names, weights
from stages.flux2.shapes import text_encoder_shapes
from stages.flux2.text.qwen3 import Qwen3
from stages.flux2.text.tokenize import Tokenizer
from tests.golden.recorded_prompts import EMBEDDED
from tests.golden.tiny import GOLDEN, arrays

FOLDER = GOLDEN / "tiny-klein"
CONFIG = configs.read_text_encoder(FOLDER / "text_encoder" / "config.json")
# max |a - b| / max |b|; measured 1e-6 to 2e-6.
BOUND = 1e-5


def load(weight_dtype: mx.Dtype = mx.float32, compute_dtype: mx.Dtype = mx.float32) -> Qwen3:
    layout = weights.resolve(
        [FOLDER / "text_encoder" / "model.safetensors"], text_encoder_shapes(CONFIG), names.text_encoder(CONFIG)
    )
    model = Qwen3(CONFIG, compute_dtype)
    model.load_weights(list(weights.load(layout, weight_dtype)), strict=True)
    return model


def embed(model: Qwen3, *prompts: str) -> mx.array:
    tokenizer = Tokenizer(FOLDER / "tokenizer" / "tokenizer.json", CONFIG)
    tokens = [tokenizer.encode(prompt) for prompt in prompts]
    return model(mx.array([token.ids for token in tokens]), mx.array([token.count for token in tokens]))


def error(got: mx.array, expected: mx.array) -> float:
    assert got.shape == expected.shape
    return (mx.abs(got - expected).max() / mx.abs(expected).max()).item()


@pytest.mark.parametrize("name", list(EMBEDDED))
def test_embeddings_of_all_512_positions_equal_diffusers(name: str) -> None:
    golden = arrays("text")[name]
    assert golden.shape == (512, 24)
    assert error(embed(load(), EMBEDDED[name])[0], golden) < BOUND


@pytest.mark.parametrize("name", list(EMBEDDED))
def test_token_ids_equal_transformers(name: str) -> None:
    tokens = Tokenizer(FOLDER / "tokenizer" / "tokenizer.json", CONFIG).encode(EMBEDDED[name])
    np.testing.assert_array_equal(tokens.ids, np.array(arrays("text")[f"{name}_ids"]))
    assert (tokens.count == 512) == (name == "long")


def test_prompts_in_one_batch_do_not_see_each_other() -> None:
    model = load()
    together = embed(model, EMBEDDED["short"], EMBEDDED["empty"])
    golden = arrays("text")
    assert error(together[0], golden["short"]) < BOUND
    assert error(together[1], golden["empty"]) < BOUND


def test_pads_depend_on_the_prompt_and_the_prompt_not_on_pads() -> None:
    model = load()
    ids = mx.array([[3, 4, 5, 6, 0, 0], [3, 4, 5, 7, 0, 0]])
    states = model(ids, mx.array([4, 4]))
    assert not mx.allclose(states[0, 4:], states[1, 4:]).item()
    alone = model(ids[:1, :4], mx.array([4]))
    assert error(states[0, :4], alone[0]) < BOUND


def test_bfloat16_weights_compute_in_float32() -> None:
    embeddings = embed(load(mx.bfloat16), EMBEDDED["short"])
    rounded = load()
    rounded.update(tree_map(lambda weight: weight.astype(mx.bfloat16).astype(mx.float32), rounded.parameters()))
    assert embeddings.dtype == mx.float32
    assert error(embeddings, embed(rounded, EMBEDDED["short"])) < BOUND


def test_activations_have_the_type_asked_for() -> None:
    assert embed(load(mx.bfloat16, mx.bfloat16), EMBEDDED["short"]).dtype == mx.bfloat16
