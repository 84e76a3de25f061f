"""What the config.json files of a model folder say, as a `Variant`.

These files are foreign: fields nobody here knows are ignored, but those that shape the model must be there, of the
right type, and fit each other. Only JSON is read; nothing heavy is imported.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal, NoReturn, TypeVar, assert_never

import msgspec
from msgspec import Meta

from schemas.base import UNREADABLE
from schemas.errors import Damaged
from stages.flux2.variants import VARIANTS, AutoencoderConfig, TextEncoderConfig, TransformerConfig, Variant

MAX_JSON_BYTES = 32 << 20
TEXT_LENGTH = 512
# Steps and guidance of a model of dimensions nobody published.
DISTILLED_SAMPLING = (4, 1.0)
BASE_SAMPLING = (50, 4.0)

Decoded = TypeVar("Decoded")
Size = Annotated[int, Meta(ge=1, le=1 << 24)]
Count = Annotated[int, Meta(ge=1, le=4096)]
Positive = Annotated[float, Meta(gt=0.0, le=1e12)]


class Pipeline(msgspec.Struct):
    """`model_index.json`; whether the model is distilled stands nowhere else."""

    class_name: Literal["Flux2KleinPipeline", "Flux2KleinInpaintPipeline", "Flux2Pipeline"] = msgspec.field(
        name="_class_name"
    )
    is_distilled: bool = False


class _Transformer(msgspec.Struct):
    num_layers: Count
    num_single_layers: Count
    num_attention_heads: Count
    attention_head_dim: Size
    joint_attention_dim: Size
    in_channels: Size
    axes_dims_rope: Annotated[tuple[Size, ...], Meta(min_length=4, max_length=4)]
    class_name: Literal["Flux2Transformer2DModel"] = msgspec.field(
        name="_class_name", default="Flux2Transformer2DModel"
    )
    patch_size: Literal[1] = 1
    out_channels: Size | None = None
    mlp_ratio: Positive = 3.0
    rope_theta: Positive = 2000.0
    eps: Positive = 1e-6
    guidance_embeds: bool = True
    timestep_guidance_channels: Size = 256


class _Autoencoder(msgspec.Struct):
    latent_channels: Size
    block_out_channels: Annotated[tuple[Size, ...], Meta(min_length=2, max_length=8)]
    layers_per_block: Count
    norm_num_groups: Count
    class_name: Literal["AutoencoderKLFlux2"] = msgspec.field(name="_class_name", default="AutoencoderKLFlux2")
    decoder_block_out_channels: tuple[Size, ...] | None = None
    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    act_fn: Literal["silu"] = "silu"
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    batch_norm_eps: Positive = 1e-4


class _Rope(msgspec.Struct):
    rope_theta: Positive
    rope_type: Literal["default"] = "default"


class _LanguageModel(msgspec.Struct):
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count
    vocab_size: Size
    rms_norm_eps: Positive
    head_dim: Size = 128
    hidden_act: Literal["silu"] = "silu"
    attention_bias: bool = False
    # transformers 4 writes rope_theta, 5 writes rope_parameters.
    rope_theta: Positive | None = None
    rope_scaling: None = None
    rope_parameters: _Rope | None = None


class _Kind(msgspec.Struct):
    model_type: Literal["qwen3", "mistral3"]


class _Mistral3(msgspec.Struct):
    text_config: _LanguageModel


def read_json(path: Path, kind: type[Decoded]) -> Decoded:
    """Return a JSON file as `kind`. Raises `Damaged` if it is missing, not JSON, or not what `kind` asks for."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        _damaged("missing", "the model folder is incomplete", path, why=f"cannot read it: {error.strerror}")
    if len(data) > MAX_JSON_BYTES:
        _damaged("config", "not a model's configuration", path, why=f"more than {MAX_JSON_BYTES} bytes")
    try:
        return msgspec.json.decode(data, type=kind)
    except UNREADABLE as error:
        _damaged("config", "not the JSON that a FLUX.2 model has here", path, why=str(error))


def read_transformer(path: Path) -> TransformerConfig:
    """Return the transformer's dimensions from its config.json. Raises `Damaged`."""
    found = read_json(path, _Transformer)
    if sum(found.axes_dims_rope) != found.attention_head_dim or any(axis % 2 for axis in found.axes_dims_rope):
        _damaged(
            "config",
            "axes_dims_rope does not divide a head",
            path,
            why=f"expected even numbers of sum {found.attention_head_dim}, found {list(found.axes_dims_rope)}",
        )
    if found.out_channels not in (None, found.in_channels):
        _damaged("config", "out_channels differs from in_channels", path, why=f"found {found.out_channels}")
    return msgspec.convert(found, TransformerConfig, from_attributes=True)


def read_autoencoder(path: Path) -> AutoencoderConfig:
    """Return the autoencoder's dimensions from its config.json. Raises `Damaged`."""
    found = read_json(path, _Autoencoder)
    decoder = found.decoder_block_out_channels or found.block_out_channels
    if len(decoder) != len(found.block_out_channels):
        _damaged("config", "decoder and encoder have different numbers of levels", path, why=f"found {list(decoder)}")
    if any(width % found.norm_num_groups for width in (*found.block_out_channels, *decoder)):
        _damaged("config", "norm_num_groups does not divide every width", path, why=f"found {found.norm_num_groups}")
    if not (found.use_quant_conv and found.use_post_quant_conv):
        _damaged(
            "config", "the autoencoder lacks quant_conv", path, why="FLUX.2's has quant_conv and post_quant_conv"
        )
    return msgspec.convert(found, AutoencoderConfig, from_attributes=True)


def read_text_encoder(path: Path) -> TextEncoderConfig:
    """Return the text encoder's dimensions from its config.json. Raises `Damaged`."""
    kind = read_json(path, _Kind).model_type
    match kind:
        case "qwen3":
            return _language_model(path, kind, read_json(path, _LanguageModel), (9, 18, 27))
        case "mistral3":
            return _language_model(path, kind, read_json(path, _Mistral3).text_config, (10, 20, 30))
    assert_never(kind)


def check_fit(folder: Path, variant: Variant) -> None:
    """Raise `Damaged` unless the text encoder and the autoencoder feed this transformer."""
    transformer = variant.transformer
    if transformer.joint_attention_dim != variant.text_encoder.width:
        _damaged(
            "parts",
            "the text encoder does not fit the transformer",
            folder,
            why=f"joint_attention_dim is {transformer.joint_attention_dim}, expected three times the hidden size "
            f"{variant.text_encoder.hidden_size}",
        )
    if transformer.in_channels != variant.autoencoder.packed_channels:
        _damaged(
            "parts",
            "the autoencoder does not fit the transformer",
            folder,
            why=f"in_channels is {transformer.in_channels}, expected four times the latent channels "
            f"{variant.autoencoder.latent_channels}",
        )


def same_text_encoder(found: TextEncoderConfig, row: TextEncoderConfig) -> bool:
    """Tell whether a row has the dimensions found; no configuration file says how long its texts are."""
    return found == dataclasses.replace(row, length=found.length)


def identify(
    transformer: TransformerConfig,
    text_encoder: TextEncoderConfig,
    autoencoder: AutoencoderConfig,
    *,
    distilled: bool,
) -> Variant:
    """Return the published row of these dimensions, with this autoencoder, or a row of its own, "custom"."""
    rows = [
        row
        for row in VARIANTS.values()
        if row.transformer == transformer and same_text_encoder(text_encoder, row.text_encoder)
    ]
    for row in rows:
        if row.distilled == distilled:
            return dataclasses.replace(row, autoencoder=autoencoder)
    return Variant(
        "custom",
        transformer,
        rows[0].text_encoder if rows else text_encoder,
        *(DISTILLED_SAMPLING if distilled else BASE_SAMPLING),
        distilled=distilled,
        autoencoder=autoencoder,
    )


def _language_model(
    path: Path, kind: Literal["qwen3", "mistral3"], found: _LanguageModel, layers: tuple[int, int, int]
) -> TextEncoderConfig:
    theta = found.rope_parameters.rope_theta if found.rope_parameters else found.rope_theta
    if theta is None:
        _damaged("config", "the text encoder's rope_theta is missing", path)
    if found.attention_bias:
        _damaged("config", "the text encoder has attention biases", path, why="FLUX.2's has none")
    if found.num_hidden_layers < max(layers):
        _damaged(
            "config",
            "the text encoder has too few layers",
            path,
            why=f"expected {max(layers)} or more, found {found.num_hidden_layers}",
        )
    if found.num_attention_heads % found.num_key_value_heads:
        _damaged("config", "num_key_value_heads does not divide num_attention_heads", path)
    return TextEncoderConfig(
        kind=kind,
        hidden_size=found.hidden_size,
        intermediate_size=found.intermediate_size,
        num_attention_heads=found.num_attention_heads,
        num_key_value_heads=found.num_key_value_heads,
        vocab_size=found.vocab_size,
        num_hidden_layers=found.num_hidden_layers,
        head_dim=found.head_dim,
        rope_theta=theta,
        rms_norm_eps=found.rms_norm_eps,
        layers=layers,
        length=TEXT_LENGTH,
    )


def _damaged(code: str, what: str, path: Path, *, why: str = "") -> NoReturn:
    raise Damaged(
        f"model.{code}", what, where=str(path), why=why, fix="download the model again, or correct model.source"
    )
