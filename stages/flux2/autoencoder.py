"""The FLUX.2 autoencoder: pictures to whitened, patchified latents and back, always in float32.

Mirrors `src/flux2/autoencoder.py` of black-forest-labs/flux2 (December 2025) and its parameter names; convolution
weights are held in MLX's layout [O, kh, kw, I]. B batch, H W picture height and width, h w = H/16 W/16 latent height
and width, c latent channels before patchify, C = 4c channels after. Tensors are NHWC inside.
"""

from __future__ import annotations

import mlx.core as mx
from mlx import nn

from stages.flux2.variants import AutoencoderConfig

NORM_EPS = 1e-6
# Attention over more queries than this runs in pieces: at 1024x1024 px all scores at once are 1 GiB.
QUERY_ROWS = 4096


class Autoencoder(nn.Module):
    """Encoder, decoder and the whitening statistics; either half can be left out to save memory."""

    def __init__(self, config: AutoencoderConfig, *, encoder: bool = True, decoder: bool = True) -> None:
        super().__init__()
        self.config = config
        if encoder:
            self.encoder = Encoder(config)
        if decoder:
            self.decoder = Decoder(config)
        self.bn = Whitening(config)

    def encode(self, pictures: mx.array) -> mx.array:
        """Return the whitened latents [B, C, h, w] float32 of pictures [B, 3, H, W] float32 in [-1, 1].

        The posterior's mean, never a sample. H and W must be multiples of 16 (ValueError otherwise).
        """
        factor = 2 ** len(self.config.block_out_channels)
        if pictures.shape[2] % factor or pictures.shape[3] % factor:
            raise ValueError(f"picture sides must be multiples of {factor}, found {pictures.shape[2:]}")
        moments = self.encoder(pictures.astype(mx.float32).transpose(0, 2, 3, 1))
        return self.bn.whiten(patchify(moments[..., : self.config.latent_channels]))

    def decode(self, latents: mx.array) -> mx.array:
        """Return the pictures [B, 3, H, W] float32, about [-1, 1] but not clamped, of latents [B, C, h, w]."""
        colored = unpatchify(self.bn.color(latents.astype(mx.float32)))
        return self.decoder(colored).transpose(0, 3, 1, 2)


def patchify(latents: mx.array) -> mx.array:
    """Move 2x2 patches of [B, 2h, 2w, c] to channels of [B, C, h, w]: index 4*channel + 2*row + column."""
    batch, height, width, channels = latents.shape
    patches = latents.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(0, 5, 2, 4, 1, 3)
    return patches.reshape(batch, 4 * channels, height // 2, width // 2)


def unpatchify(latents: mx.array) -> mx.array:
    """Invert `patchify`: [B, C, h, w] to [B, 2h, 2w, c]."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels // 4, 2, 2, height, width).transpose(0, 4, 2, 5, 3, 1)
    return patches.reshape(batch, 2 * height, 2 * width, channels // 4)


class Whitening(nn.Module):
    """Batch-norm statistics measured by the model's makers: latents [B, C, h, w] to about unit variance and back."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.running_mean = mx.zeros((config.packed_channels,))
        self.running_var = mx.ones((config.packed_channels,))
        self._eps = config.batch_norm_eps

    def whiten(self, latents: mx.array) -> mx.array:
        """Subtract the mean, divide by the deviation."""
        mean, deviation = self._statistics()
        return (latents - mean) / deviation

    def color(self, latents: mx.array) -> mx.array:
        """Multiply by the deviation, add the mean."""
        mean, deviation = self._statistics()
        return latents * deviation + mean

    def _statistics(self) -> tuple[mx.array, mx.array]:
        mean = self.running_mean.astype(mx.float32).reshape(1, -1, 1, 1)
        variance = self.running_var.astype(mx.float32).reshape(1, -1, 1, 1)
        return mean, mx.sqrt(variance + self._eps)


class Encoder(nn.Module):
    """Pictures [B, H, W, 3] to the posterior's moments [B, 2h, 2w, 2c]: mean, then log-variance."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        moments = 2 * config.latent_channels
        last = len(widths) - 1
        self.conv_in = _conv3(3, widths[0])
        self.down = [
            DownLevel((widths[max(i - 1, 0)], widths[i]), config.layers_per_block, groups, halve=i < last)
            for i in range(len(widths))
        ]
        self.mid = Middle(widths[last], groups, attention=config.mid_block_add_attention)
        self.norm_out = _norm(widths[last], groups)
        self.conv_out = _conv3(widths[last], moments)
        self.quant_conv = nn.Conv2d(moments, moments, 1)

    def __call__(self, x: mx.array) -> mx.array:
        """Return the moments."""
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.quant_conv(self.conv_out(nn.silu(self.norm_out(self.mid(x)))))


class Decoder(nn.Module):
    """Latents [B, 2h, 2w, c] to pictures [B, H, W, 3]. Levels are named from the output back: the last runs first."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.decoder_channels, config.norm_num_groups
        last = len(widths) - 1
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.conv_in = _conv3(config.latent_channels, widths[last])
        self.mid = Middle(widths[last], groups, attention=config.mid_block_add_attention)
        self.up = [
            UpLevel((widths[min(i + 1, last)], widths[i]), config.layers_per_block + 1, groups, double=i > 0)
            for i in range(len(widths))
        ]
        self.norm_out = _norm(widths[0], groups)
        self.conv_out = _conv3(widths[0], 3)

    def __call__(self, z: mx.array) -> mx.array:
        """Return the pictures."""
        x = self.mid(self.conv_in(self.post_quant_conv(z)))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(nn.silu(self.norm_out(x)))


class DownLevel(nn.Module):
    """Residual blocks at one resolution, then half the resolution; `widths` are the channels before and after."""

    def __init__(self, widths: tuple[int, int], layers: int, groups: int, *, halve: bool) -> None:
        super().__init__()
        before, after = widths
        self.block = [ResnetBlock(after if i else before, after, groups) for i in range(layers)]
        if halve:
            self.downsample = Downsample(after)

    def __call__(self, x: mx.array) -> mx.array:
        """Map [B, y, x, before] to [B, y/2, x/2, after], or to [B, y, x, after] at the last level."""
        for block in self.block:
            x = block(x)
        return self.downsample(x) if "downsample" in self else x


class UpLevel(nn.Module):
    """Residual blocks at one resolution, then twice the resolution; `widths` are the channels before and after."""

    def __init__(self, widths: tuple[int, int], layers: int, groups: int, *, double: bool) -> None:
        super().__init__()
        before, after = widths
        self.block = [ResnetBlock(after if i else before, after, groups) for i in range(layers)]
        if double:
            self.upsample = Upsample(after)

    def __call__(self, x: mx.array) -> mx.array:
        """Map [B, y, x, before] to [B, 2y, 2x, after], or to [B, y, x, after] at the last level."""
        for block in self.block:
            x = block(x)
        return self.upsample(x) if "upsample" in self else x


class Middle(nn.Module):
    """Residual block, attention over all positions, residual block."""

    def __init__(self, width: int, groups: int, *, attention: bool) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(width, width, groups)
        if attention:
            self.attn_1 = AttnBlock(width, groups)
        self.block_2 = ResnetBlock(width, width, groups)

    def __call__(self, x: mx.array) -> mx.array:
        """Keep the shape [B, y, x, width]."""
        x = self.block_1(x)
        if "attn_1" in self:
            x = self.attn_1(x)
        return self.block_2(x)


class ResnetBlock(nn.Module):
    """Two normalised convolutions beside a shortcut, which is a 1x1 convolution where the width changes."""

    def __init__(self, before: int, after: int, groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(before, groups)
        self.conv1 = _conv3(before, after)
        self.norm2 = _norm(after, groups)
        self.conv2 = _conv3(after, after)
        if before != after:
            self.nin_shortcut = nn.Conv2d(before, after, 1)

    def __call__(self, x: mx.array) -> mx.array:
        """Map [B, y, x, before] to [B, y, x, after]."""
        residual = self.conv1(nn.silu(self.norm1(x)))
        residual = self.conv2(nn.silu(self.norm2(residual)))
        return (self.nin_shortcut(x) if "nin_shortcut" in self else x) + residual


class AttnBlock(nn.Module):
    """Single-head attention over all positions. BFL's 1x1 convolutions [C, C, 1, 1] are linears [C, C] here."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = _norm(width, groups)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.proj_out = nn.Linear(width, width)

    def __call__(self, x: mx.array) -> mx.array:
        """Keep the shape [B, y, x, width]."""
        batch, height, width, channels = x.shape
        tokens = self.norm(x).reshape(batch, 1, height * width, channels)
        q, k, v = self.q(tokens), self.k(tokens), self.v(tokens)
        pieces = [
            mx.fast.scaled_dot_product_attention(q[:, :, start : start + QUERY_ROWS], k, v, scale=channels**-0.5)
            for start in range(0, height * width, QUERY_ROWS)
        ]
        return x + self.proj_out(mx.concatenate(pieces, axis=2)).reshape(x.shape)


class Downsample(nn.Module):
    """Half the resolution; one row below and one column to the right are padded, not a frame around."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def __call__(self, x: mx.array) -> mx.array:
        """Map [B, y, x, width] to [B, y/2, x/2, width]."""
        return self.conv(mx.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)]))


class Upsample(nn.Module):
    """Twice the resolution by repetition, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = _conv3(width, width)

    def __call__(self, x: mx.array) -> mx.array:
        """Map [B, y, x, width] to [B, 2y, 2x, width]."""
        return self.conv(mx.repeat(mx.repeat(x, 2, axis=1), 2, axis=2))


def _conv3(before: int, after: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, padding=1)


def _norm(width: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, width, eps=NORM_EPS, pytorch_compatible=True)
