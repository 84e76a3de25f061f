"""From a model's files to modules with weights in them, and to the digests of their tensors.

Everything is strict: the files hold exactly the tensors that the module has, and all of them are evaluated before a
module is returned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar, assert_never

import mlx.core as mx
from mlx import nn

from stages.flux2 import names, shapes, weights
from stages.flux2.folder import ModelFiles
from stages.flux2.weights import Layout

if TYPE_CHECKING:
    from stages.flux2.autoencoder import Autoencoder
    from stages.flux2.text.decoder import TextEncoder
    from stages.flux2.transformer import Transformer

Part = TypeVar("Part", bound=nn.Module)


def load_transformer(model: ModelFiles, dtype: mx.Dtype) -> Transformer:
    """Return the transformer with weights of `dtype`. Raises `Damaged` if the files are not exactly it."""
    from stages.flux2.transformer import Transformer

    return _fill(Transformer(model.variant.transformer), _transformer(model), dtype)


def load_autoencoder(model: ModelFiles, *, encoder: bool, decoder: bool) -> Autoencoder:
    """Return the autoencoder, or half of it, with float32 weights. Raises `Damaged` if the files are not it."""
    from stages.flux2.autoencoder import Autoencoder

    module = Autoencoder(model.variant.autoencoder, encoder=encoder, decoder=decoder)
    return _fill(module, _autoencoder(model, encoder=encoder, decoder=decoder), mx.float32)


def load_text_encoder(model: ModelFiles, dtype: mx.Dtype) -> TextEncoder:
    """Return the text encoder's layers in use, weights and activations of `dtype`. Raises `Damaged` if not it."""
    from stages.flux2.text.mistral3 import Mistral3
    from stages.flux2.text.qwen3 import Qwen3

    config = model.variant.text_encoder
    match config.kind:
        case "qwen3":
            return _fill(Qwen3(config, dtype), _text_encoder(model), dtype)
        case "mistral3":
            return _fill(Mistral3(config, dtype), _text_encoder(model), dtype)
    assert_never(config.kind)


def transformer_digest(model: ModelFiles, on_bytes: Callable[[int], None] | None = None) -> str:
    """Return the digest of all the transformer's tensors; `on_bytes` is told of bytes done, as by the others here."""
    return weights.digest(_transformer(model), on_bytes)


def autoencoder_encoder_digest(model: ModelFiles, on_bytes: Callable[[int], None] | None = None) -> str:
    """Return the digest of the tensors pictures are encoded with: the encoder and the whitening statistics."""
    return weights.digest(_autoencoder(model, encoder=True, decoder=False), on_bytes)


def autoencoder_decoder_digest(model: ModelFiles, on_bytes: Callable[[int], None] | None = None) -> str:
    """Return the digest of the tensors latents are decoded with: the decoder and the whitening statistics."""
    return weights.digest(_autoencoder(model, encoder=False, decoder=True), on_bytes)


def text_encoder_digest(model: ModelFiles, on_bytes: Callable[[int], None] | None = None) -> str:
    """Return the digest of the text encoder's embeddings and the layers in use."""
    return weights.digest(_text_encoder(model), on_bytes)


def _transformer(model: ModelFiles) -> Layout:
    expected = shapes.transformer_shapes(model.variant.transformer)
    return weights.resolve(model.transformer, expected, names.TRANSFORMER)


def _autoencoder(model: ModelFiles, *, encoder: bool, decoder: bool) -> Layout:
    config = model.variant.autoencoder
    expected = shapes.autoencoder_shapes(config, encoder=encoder, decoder=decoder)
    return weights.resolve(model.autoencoder, expected, names.autoencoder(config, encoder=encoder, decoder=decoder))


def _text_encoder(model: ModelFiles) -> Layout:
    config = model.variant.text_encoder
    return weights.resolve(model.text_encoder, shapes.text_encoder_shapes(config), names.text_encoder(config))


def _fill(module: Part, layout: Layout, dtype: mx.Dtype) -> Part:
    # The module's own random start is never evaluated, so only the weights take memory.
    module.load_weights(list(weights.load(layout, dtype)), strict=True)
    mx.eval(module.parameters())
    return module
