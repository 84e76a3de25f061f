"""Text embeddings against diffusers' dev pipeline with a tiny random Mistral of 31 layers (transformers 5, SDPA)."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from stages.flux2 import configs, names, weights
from stages.flux2.shapes import text_encoder_shapes
from stages.flux2.text.decoder import DecoderLayer
from stages.flux2.text.mistral3 import Mistral3
from stages.flux2.text.tokenize import Tokenizer
from stages.stores import tensors
from tests.golden.recorded_prompts import EMBEDDED
from tests.golden.tiny import GOLDEN, arrays, error

FOLDER = GOLDEN / "tiny-dev"
WEIGHTS = FOLDER / "text_encoder" / "model.safetensors"
CONFIG = configs.read_text_encoder(FOLDER / "text_encoder" / "config.json")
# max |a - b| / max |b|; measured 1e-6 to 2e-6.
BOUND = 1e-5


def layout(path: Path = WEIGHTS) -> weights.Layout:
    return weights.resolve([path], text_encoder_shapes(CONFIG), names.text_encoder(CONFIG))


def load(weight_dtype: mx.Dtype = mx.float32, compute_dtype: mx.Dtype = mx.float32) -> Mistral3:
    model = Mistral3(CONFIG, compute_dtype)
    model.load_weights(list(weights.load(layout(), weight_dtype)), strict=True)
    return model


def embed(model: Mistral3, *prompts: str) -> mx.array:
    tokenizer = Tokenizer(FOLDER / "tokenizer" / "tokenizer.json", CONFIG)
    tokens = [tokenizer.encode(prompt) for prompt in prompts]
    return model(mx.array([token.ids for token in tokens]), mx.array([token.count for token in tokens]))


def test_dimensions_of_the_tiny_model_are_not_trivial() -> None:
    assert CONFIG.layers == (10, 20, 30)
    assert CONFIG.num_attention_heads * CONFIG.head_dim > CONFIG.hidden_size
    assert CONFIG.num_attention_heads > CONFIG.num_key_value_heads
    assert CONFIG.rope_theta == 1e9


@pytest.mark.parametrize("name", list(EMBEDDED))
def test_embeddings_of_all_512_positions_equal_diffusers(name: str) -> None:
    golden = arrays("dev")[f"text_{name}"]
    assert golden.shape == (512, 24)
    assert error(embed(load(), EMBEDDED[name])[0], golden) < BOUND


@pytest.mark.parametrize("name", list(EMBEDDED))
def test_token_ids_equal_transformers_with_pads_on_the_left(name: str) -> None:
    tokens = Tokenizer(FOLDER / "tokenizer" / "tokenizer.json", CONFIG).encode(EMBEDDED[name])
    np.testing.assert_array_equal(tokens.ids, np.array(arrays("dev")[f"ids_{name}"]))
    assert (tokens.count == 512) == (name == "long")
    assert tokens.ids[512 - tokens.count] == 1


def test_prompts_in_one_batch_do_not_see_each_other() -> None:
    together, golden = embed(load(), EMBEDDED["short"], EMBEDDED["empty"]), arrays("dev")
    assert error(together[0], golden["text_short"]) < BOUND
    assert error(together[1], golden["text_empty"]) < BOUND


def test_pads_are_one_row_whatever_the_prompt() -> None:
    golden = arrays("dev")
    rows = [golden[f"text_{name}"][:300] for name in ("short", "empty")]
    # What the reference computes at every position is one row, but for its own rounding.
    assert all(error(each, mx.broadcast_to(rows[0][:1], each.shape)) < 1e-6 for each in rows)
    model = load()
    short, empty = (embed(model, EMBEDDED[name])[0] for name in ("short", "empty"))
    assert mx.array_equal(short[:300], mx.broadcast_to(empty[:1], (300, 24)))


def test_a_prompt_computes_no_more_than_its_own_tokens_and_all_prompts_one_pad(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lengths: list[int] = []
    forward = DecoderLayer.unseeing

    def counted(layer: DecoderLayer, x: mx.array) -> mx.array:
        lengths.append(x.shape[1])
        return forward(layer, x)

    monkeypatch.setattr(DecoderLayer, "unseeing", counted)
    model = load()
    tokenizer = Tokenizer(FOLDER / "tokenizer" / "tokenizer.json", CONFIG)
    counts = [tokenizer.encode(EMBEDDED[name]).count for name in ("short", "empty", "long")]
    embed(model, *(EMBEDDED[name] for name in ("short", "empty", "long")))
    assert lengths == [counts[0]] * 30 + [1] * 30 + [counts[1]] * 30 + [512] * 30


def test_both_spellings_of_a_checkpoint_are_the_same_weights(tmp_path: Path) -> None:
    file = tensors.load(WEIGHTS)
    # Newer and older transformers wrap the language model in these two ways.
    spellings = ("model.language_model.", "language_model.model.")
    found = {spelling for spelling in spellings if any(name.startswith(spelling) for name in file.tensors)}
    [theirs] = found
    [other] = set(spellings) - found
    renamed = {
        name.replace(theirs, other).replace("lm_head.", "language_model.lm_head."): tensor
        for name, tensor in file.tensors.items()
    }
    assert renamed.keys() != file.tensors.keys()
    tensors.save(tmp_path / "model.safetensors", renamed, file.metadata)
    assert weights.digest(layout(tmp_path / "model.safetensors")) == weights.digest(layout())


def test_bfloat16_weights_compute_in_float32() -> None:
    embeddings = embed(load(mx.bfloat16), EMBEDDED["short"])
    assert embeddings.dtype == mx.float32
    # bfloat16 keeps 8 bits; 30 layers of them.
    assert 1e-4 < error(embeddings[0], arrays("dev")["text_short"]) < 0.1


def test_activations_have_the_type_asked_for() -> None:
    assert embed(load(mx.bfloat16, mx.bfloat16), EMBEDDED["short"]).dtype == mx.bfloat16
