"""The FLUX.2 family as rows of one table; dimensions follow the published configurations.

Everything else asks a `Variant`; nothing tests a model's name. A folder of other dimensions gives a row of its own
(`stages/flux2/folder.py` reads it from the config files), so any real FLUX.2 architecture loads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class TransformerConfig:
    """Dimensions of the transformer. No linear has a bias; modulation is shared by all blocks of a kind."""

    num_layers: int
    num_single_layers: int
    num_attention_heads: int
    joint_attention_dim: int
    attention_head_dim: int = 128
    in_channels: int = 128
    mlp_ratio: float = 3.0
    axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)
    rope_theta: float = 2000.0
    eps: float = 1e-6
    guidance_embeds: bool = False
    timestep_guidance_channels: int = 256

    @property
    def inner_dim(self) -> int:
        """D, the width of both streams."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mlp_dim(self) -> int:
        """Width of the gated MLP's hidden layer (one of its two halves)."""
        return int(self.inner_dim * self.mlp_ratio)


@dataclass(frozen=True)
class AutoencoderConfig:
    """Dimensions of the autoencoder; the latent is patchified 2x2 and whitened by stored batch-norm statistics."""

    latent_channels: int = 32
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_block_out_channels: tuple[int, ...] | None = None
    layers_per_block: int = 2
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    batch_norm_eps: float = 1e-4

    @property
    def packed_channels(self) -> int:
        """Channels after 2x2 patchify: what the transformer sees."""
        return 4 * self.latent_channels

    @property
    def decoder_channels(self) -> tuple[int, ...]:
        """Channels of the decoder's blocks; some published decoders are narrower than the encoder."""
        return self.decoder_block_out_channels or self.block_out_channels


@dataclass(frozen=True)
class TextEncoderConfig:
    """Dimensions of the language model whose hidden states condition the transformer."""

    kind: Literal["qwen3", "mistral3"]
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    num_hidden_layers: int
    head_dim: int = 128
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    layers: tuple[int, int, int] = (9, 18, 27)
    length: int = 512

    @property
    def width(self) -> int:
        """Features per token of the embedding: three hidden states side by side."""
        return 3 * self.hidden_size

    @property
    def normalises_queries(self) -> bool:
        """Whether each head's queries and keys are normalised, with weights of their own."""
        return self.kind == "qwen3"


@dataclass(frozen=True)
class Variant:
    """One member of the family: its parts and how it is sampled by default."""

    name: str
    transformer: TransformerConfig
    text_encoder: TextEncoderConfig
    preview_steps: int
    preview_guidance: float
    distilled: bool = False
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    hub_id: str | None = None


QWEN3_4B = TextEncoderConfig("qwen3", 2560, 9728, 32, 8, 151936, 36)
QWEN3_8B = TextEncoderConfig("qwen3", 4096, 12288, 32, 8, 151936, 36)
MISTRAL_24B = TextEncoderConfig(
    "mistral3", 5120, 32768, 32, 8, 131072, 40, rope_theta=1e9, rms_norm_eps=1e-5, layers=(10, 20, 30)
)
KLEIN_4B = TransformerConfig(num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680)
KLEIN_9B = TransformerConfig(num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12288)
DEV = TransformerConfig(
    num_layers=8, num_single_layers=48, num_attention_heads=48, joint_attention_dim=15360, guidance_embeds=True
)

# The tiny real FLUX.2 that the package brings (stages/flux2/micro.py): everything real but the size.
MICRO = Variant(
    name="flux2-micro",
    transformer=TransformerConfig(
        num_layers=2,
        num_single_layers=4,
        num_attention_heads=6,
        joint_attention_dim=192,
        attention_head_dim=32,
        in_channels=64,
        axes_dims_rope=(8, 8, 8, 8),
    ),
    text_encoder=TextEncoderConfig("qwen3", 64, 128, 4, 2, 512, 28, head_dim=16, length=64),
    autoencoder=AutoencoderConfig(
        latent_channels=16, block_out_channels=(32, 48, 80, 96), layers_per_block=1, norm_num_groups=8
    ),
    preview_steps=8,
    preview_guidance=3.0,
)

VARIANTS: dict[str, Variant] = {
    row.name: row
    for row in (
        Variant("klein-base-4b", KLEIN_4B, QWEN3_4B, 50, 4.0, hub_id="black-forest-labs/FLUX.2-klein-base-4B"),
        Variant("klein-4b", KLEIN_4B, QWEN3_4B, 4, 1.0, distilled=True, hub_id="black-forest-labs/FLUX.2-klein-4B"),
        Variant("klein-base-9b", KLEIN_9B, QWEN3_8B, 50, 4.0, hub_id="black-forest-labs/FLUX.2-klein-base-9B"),
        Variant("klein-9b", KLEIN_9B, QWEN3_8B, 4, 1.0, distilled=True, hub_id="black-forest-labs/FLUX.2-klein-9B"),
        Variant("dev", DEV, MISTRAL_24B, 50, 4.0, hub_id="black-forest-labs/FLUX.2-dev"),
        MICRO,
    )
}
