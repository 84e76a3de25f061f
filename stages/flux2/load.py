"""From a model's files to modules with weights in them, and to the digests of their tensors.

Everything is strict: the files hold exactly the tensors that the module has, and all of them are evaluated before a
module is returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar, assert_never

import mlx.core as mx
from mlx import nn

from schemas.quantize import Quantize
from stages.flux2 import names, shapes, weights
from stages.flux2.folder import ModelFiles
from stages.flux2.packing import Format, chosen
from stages.flux2.quantize import fill, held
from stages.flux2.weights import Layout

if TYPE_CHECKING:
    from stages.flux2.autoencoder import Autoencoder
    from stages.flux2.text.decoder import TextEncoder
    from stages.flux2.transformer import Transformer

Part = TypeVar("Part", bound=nn.Module)
Asked = tuple[Quantize, str]  # how weights are to be held, and the setting that says so


def load_transformer(model: ModelFiles, dtype: mx.Dtype, quantize: Quantize = "none") -> Transformer:
    """Return the transformer with weights of `dtype`, but its blocks' as `quantize` says, packed one by one.

    Raises `Damaged` if the files are not exactly it, `BadConfig` if they cannot be held so.
    """
    from stages.flux2.transformer import Transformer

    module = Transformer(model.variant.transformer)
    return _fill(module, _transformer(model), dtype, (quantize, "model.quantize"))


def load_autoencoder(model: ModelFiles, *, encoder: bool, decoder: bool) -> Autoencoder:
    """Return the autoencoder, or half of it, with float32 weights. Raises `Damaged` if the files are not it."""
    from stages.flux2.autoencoder import Autoencoder

    module = Autoencoder(model.variant.autoencoder, encoder=encoder, decoder=decoder)
    return _fill(module, _autoencoder(model, encoder=encoder, decoder=decoder), mx.float32)


def load_text_encoder(model: ModelFiles, dtype: mx.Dtype, quantize: Quantize = "none") -> TextEncoder:
    """Return the text encoder's layers in use, weights and activations of `dtype`, but weights as `quantize` says.

    Raises `Damaged` if the files are not exactly it, `BadConfig` if they cannot be held so.
    """
    from stages.flux2.text.mistral3 import Mistral3
    from stages.flux2.text.qwen3 import Qwen3

    config = model.variant.text_encoder
    asked: Asked = (quantize, "encode_text.quantize")
    match config.kind:
        case "qwen3":
            return _fill(Qwen3(config, dtype), _text_encoder(model), dtype, asked)
        case "mistral3":
            return _fill(Mistral3(config, dtype), _text_encoder(model), dtype, asked)
    assert_never(config.kind)


def transformer_formats(model: ModelFiles, quantize: Quantize) -> dict[str, Format]:
    """Return the modules that `load_transformer` would hold packed, reading headers only. Raises as it does."""
    layout = _transformer(model)
    return chosen(layout.shapes, layout.packed, quantize, "model.quantize")


def text_encoder_formats(model: ModelFiles, quantize: Quantize) -> dict[str, Format]:
    """Return the modules that `load_text_encoder` would hold packed, in the same way."""
    layout = _text_encoder(model)
    return chosen(layout.shapes, layout.packed, quantize, "encode_text.quantize")


def packed_transformer(model: ModelFiles, quantize: Quantize) -> Iterator[tuple[str, mx.array]]:
    """Yield the transformer's tensors as `load_transformer` would hold them, those left dense of their own type."""
    return _packed(_transformer(model), (quantize, "model.quantize"))


def packed_text_encoder(model: ModelFiles, quantize: Quantize) -> Iterator[tuple[str, mx.array]]:
    """Yield the text encoder's tensors in the same way."""
    return _packed(_text_encoder(model), (quantize, "encode_text.quantize"))


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


def _packed(layout: Layout, asked: Asked) -> Iterator[tuple[str, mx.array]]:
    return held(weights.load(layout), layout.packed, chosen(layout.shapes, layout.packed, *asked), None)


def _fill(module: Part, layout: Layout, dtype: mx.Dtype, asked: Asked = ("none", "")) -> Part:
    """Return the module with the tensors of the layout."""
    wanted = chosen(layout.shapes, layout.packed, *asked)
    return fill(module, weights.load(layout), dtype, found=layout.packed, wanted=wanted)
