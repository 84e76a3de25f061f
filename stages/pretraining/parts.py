"""The parts of a small model as files: what `pretrain` writes, and what a built-in model is put together from.

Tensors are bfloat16 under diffusers' names, batch-norm statistics float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten

from schemas.pretrain import Recipe
from stages.contract.publish import publish_file, workspace
from stages.flux2 import names
from stages.flux2.autoencoder import Autoencoder
from stages.flux2.folder import ModelFiles
from stages.flux2.micro import AUTOENCODER, TEXT_ENCODER, TOKENIZER, TRANSFORMER, write_json
from stages.flux2.micro_tokenizer import tokenizer_json
from stages.flux2.names import Piece
from stages.flux2.transformer import Transformer
from stages.flux2.variants import MICRO, Variant
from stages.pretraining.autoencoder import config_of
from stages.pretraining.text_encoder import Weights, text_encoder_weights
from stages.stores.tensors import Tensor, save

METADATA = {"format": "pt"}


def variant_of(recipe: Recipe) -> Variant:
    """Return the model's dimensions: the built-in one's but for the autoencoder."""
    autoencoder = config_of(recipe.autoencoder)
    transformer = dataclasses.replace(MICRO.transformer, in_channels=autoencoder.packed_channels)
    return dataclasses.replace(MICRO, transformer=transformer, autoencoder=autoencoder)


def files_of(folder: Path, variant: Variant) -> ModelFiles:
    """Return where the parts lie; those that are not there yet are missed when they are loaded."""
    return ModelFiles(
        variant=variant,
        transformer=(folder / TRANSFORMER,),
        autoencoder=(folder / AUTOENCODER,),
        text_encoder=(folder / TEXT_ENCODER,),
        tokenizer=folder / TOKENIZER,
        source=str(folder),
    )


def save_text_parts(folder: Path, variant: Variant) -> None:
    """Write the tokenizer and the text encoder, which is random and stays so."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / TEXT_ENCODER, text_encoder_weights(variant.text_encoder))
    write_json(folder / TOKENIZER, tokenizer_json(variant.text_encoder.vocab_size))


def save_autoencoder(folder: Path, autoencoder: Autoencoder) -> None:
    """Write the autoencoder."""
    levels = len(autoencoder.config.block_out_channels)
    own = _spelled(_canonical(autoencoder), lambda name: (Piece(names.diffusers_autoencoder_name(name, levels)),))
    _write(folder / AUTOENCODER, {**own, "bn.num_batches_tracked": np.zeros((), np.int64)})


def save_transformer(folder: Path, transformer: Transformer) -> None:
    """Write the transformer."""
    _write(folder / TRANSFORMER, _spelled(_canonical(transformer), names.diffusers_transformer_pieces))


def _write(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    with workspace(path.parent) as space:
        save(space / path.name, _stored(tensors), METADATA)
        publish_file(space / path.name, path)


def _stored(weights: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Return the tensors as they are saved: bfloat16, but batch-norm statistics as they are."""
    return {
        name: _statistic(values) if name.startswith("bn.") else Tensor("BF16", _bfloat16_bits(values))
        for name, values in weights.items()
    }


def _statistic(values: np.ndarray) -> Tensor:
    return Tensor("I64" if values.dtype == np.int64 else "F32", values)


def _bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16, to nearest even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _canonical(module: nn.Module) -> Weights:
    """Return the module's tensors as float32, convolutions [O, I, kh, kw] as in files."""
    tensors = cast(list[tuple[str, mx.array]], tree_flatten(module.parameters()))
    own = {name: np.array(array.astype(mx.float32)) for name, array in tensors}
    return {name: array.transpose(0, 3, 1, 2) if array.ndim == 4 else array for name, array in own.items()}


def _spelled(tensors: Weights, pieces: Callable[[str], tuple[Piece, ...]]) -> Weights:
    """Return canonical tensors as a file of another spelling holds them: the inverse of reading it."""
    rows: dict[str, dict[int, np.ndarray]] = {}
    for name, array in tensors.items():
        own = pieces(name)
        for part, piece in zip(np.split(array, len(own)), own, strict=True):
            rows.setdefault(piece.name, {})[piece.index] = part
    return {name: np.concatenate([parts[index] for index in sorted(parts)]) for name, parts in rows.items()}
