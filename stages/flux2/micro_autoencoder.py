"""The built-in model's autoencoder: random everywhere, with a path through it that carries the picture's colours.

Each level has a few carrier channels which random convolutions never write to. They take the picture's luma and two
colour differences (Y, U, V) to an eighth of its size and back, so a decoded latent is a soft thumbnail and not noise,
without any training. A group norm would remove what it is given to normalise: each of its carrier groups therefore
holds v and -v (mean zero) beside two constants +-C (so the deviation hardly depends on v), and its bias lifts the
carriers onto the straight part of silu. All carrier weights but four norm gains are exact in bfloat16. Names and
layout [out, in, rows, columns] are those of a diffusers folder.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from stages.flux2.micro_draws import conv, linear
from stages.flux2.variants import AutoencoderConfig

Weights = dict[str, np.ndarray]
# One per carrier channel: which of Y, U, V (None for a constant), and its sign.
Carriers = list[tuple[int | None, int]]

CONSTANT = 8.0
LIFT = 16.0
# Deviation of Y, U and V that the whitening assumes; pictures of many colours have about that.
COLOR_DEVIATION = 0.5
# Moments of silu of a standard normal number, by quadrature.
SILU_MEAN, SILU_VARIANCE = 0.20662, 0.31296
TEXTURE = 0.06

# Y = (R + 2G + B)/4, U = R - B, V = G - (R + B)/2, and back: all powers of two.
RGB_TO_YUV = np.array([[0.25, 0.5, 0.25], [1, 0, -1], [-0.5, 1, -0.5]], np.float32)
YUV_TO_RGB = np.array([[1, 0.5, -0.5], [1, 0, 0.5], [1, -0.5, -0.5]], np.float32)
HALF_BOX = np.array([[0.25, 0.25, 0], [0.25, 0.25, 0], [0, 0, 0]], np.float32)
CENTRE = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]], np.float32)
SMOOTH = np.outer([0.25, 0.5, 0.25], [0.25, 0.5, 0.25]).astype(np.float32)

# The encoder's last norm has groups of 8 channels, the decoder's groups of 4.
ENCODER_CARRIERS: Carriers = [(0, 1), (0, -1), (1, 1), (1, -1), (2, 1), (2, -1), (None, 1), (None, -1)]
DECODER_CARRIERS: Carriers = [carrier for v in range(3) for carrier in ((v, 1), (v, -1), (None, 1), (None, -1))]


def autoencoder_weights(config: AutoencoderConfig) -> Weights:
    """Return every tensor of the autoencoder as float32, batch-norm statistics (and their int64 counter) included."""
    channels = config.latent_channels
    # Mixed, scaled and shifted, so that an order or statistics got wrong shows in the picture.
    mixing = _hadamard(channels) / 2
    scale = np.resize(np.array([0.5, 1, 2], np.float32), channels)
    offset = (np.arange(channels, dtype=np.float32) - 3) / 8
    moments = np.eye(2 * channels, dtype=np.float32)
    moments[:channels, :channels] = scale[:, None] * mixing
    unmixing = mixing.T * (4 / channels) / scale
    weights = _encoder(config) | _decoder(config)
    _layer(weights, "quant_conv", moments[:, :, None, None], np.concatenate([offset, np.zeros_like(offset)]))
    _layer(weights, "post_quant_conv", unmixing[:, :, None, None], -unmixing @ offset)
    variance = (COLOR_DEVIATION * scale) ** 2 * (channels / 4)
    weights["bn.running_mean"] = np.repeat(offset, 4)
    weights["bn.running_var"] = np.repeat(variance, 4).astype(np.float32)
    weights["bn.num_batches_tracked"] = np.zeros((), np.int64)
    return weights


def _encoder(config: AutoencoderConfig) -> Weights:
    weights: Weights = {}
    widths, carriers = config.block_out_channels, ENCODER_CARRIERS
    _conv_in(weights, "encoder.conv_in", conv("encoder.conv_in", widths[0], 3, 3), carriers, RGB_TO_YUV)
    for i, (before, after) in enumerate(pairwise((widths[0], *widths))):
        for j in range(config.layers_per_block):
            _resnet(weights, f"encoder.down_blocks.{i}.resnets.{j}", (after if j else before, after), carriers)
        if i < len(widths) - 1:
            name = f"encoder.down_blocks.{i}.downsamplers.0.conv"
            _layer(weights, name, _carried(conv(name, after, after, 3), carriers, HALF_BOX))
    _middle(weights, "encoder.mid_block", widths[-1], carriers)
    # Six carriers of colour and two constants in a group of eight.
    deviation = math.sqrt((6 * COLOR_DEVIATION**2 + 2 * CONSTANT**2) / 8)
    _norm_out(weights, "encoder.conv_norm_out", widths[-1], carriers, deviation)
    _layer(weights, "encoder.conv_out", *_latent_rows("encoder.conv_out", widths[-1], config.latent_channels))
    return weights


def _latent_rows(name: str, width: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the weight and bias of moments: Y, U, V, then random features as means; a small fixed variance."""
    first = len(ENCODER_CARRIERS)
    weight = np.zeros((2 * channels, width, 3, 3), np.float32)
    bias = np.full(2 * channels, -6.0, np.float32)
    weight[:3, _values(ENCODER_CARRIERS)] = np.eye(3, dtype=np.float32)[:, :, None, None] * CENTRE
    bias[:3] = -LIFT
    features = conv(name, channels - 3, width - first, 3, COLOR_DEVIATION / math.sqrt(SILU_VARIANCE))
    weight[3:channels, first:] = features
    bias[3:channels] = [-SILU_MEAN * math.fsum(row.ravel().tolist()) for row in features]
    return weight, bias


def _decoder(config: AutoencoderConfig) -> Weights:
    weights: Weights = {}
    widths, carriers = config.decoder_channels[::-1], DECODER_CARRIERS
    latent = conv("decoder.conv_in", widths[0], config.latent_channels, 3, 1 / COLOR_DEVIATION)
    _conv_in(weights, "decoder.conv_in", latent, carriers, np.eye(3, config.latent_channels, dtype=np.float32))
    _middle(weights, "decoder.mid_block", widths[0], carriers)
    for i, (before, after) in enumerate(pairwise((widths[0], *widths))):
        for j in range(config.layers_per_block + 1):
            _resnet(weights, f"decoder.up_blocks.{i}.resnets.{j}", (after if j else before, after), carriers)
        if i < len(widths) - 1:
            name = f"decoder.up_blocks.{i}.upsamplers.0.conv"
            # The first doubling stays sharp: smoothing there would darken a frame of 8 px.
            _layer(weights, name, _carried(conv(name, after, after, 3), carriers, SMOOTH if i else CENTRE))
    deviation = math.sqrt((2 * COLOR_DEVIATION**2 + 2 * CONSTANT**2) / 4)
    _norm_out(weights, "decoder.conv_norm_out", widths[-1], carriers, deviation)
    picture = conv("decoder.conv_out", 3, widths[-1], 3, TEXTURE / math.sqrt(SILU_VARIANCE))
    picture[:, : len(carriers)] = 0
    picture[:, _values(carriers)] = YUV_TO_RGB[:, :, None, None] * CENTRE
    _layer(weights, "decoder.conv_out", picture, -LIFT * YUV_TO_RGB.sum(axis=1))
    return weights


def _conv_in(weights: Weights, name: str, weight: np.ndarray, carriers: Carriers, taps: np.ndarray) -> None:
    """Fill the carriers from the input: `taps` [3, inputs] gives Y, U and V."""
    bias = np.zeros(len(weight), np.float32)
    for row, (value, sign) in enumerate(carriers):
        weight[row] = 0
        if value is None:
            bias[row] = sign * CONSTANT
        else:
            weight[row, :, 1, 1] = sign * taps[value]
    _layer(weights, name, weight, bias)


def _carried(weight: np.ndarray, carriers: Carriers, kernel: np.ndarray) -> np.ndarray:
    """Let carriers pass on their own: values through `kernel`, constants unchanged and seen by nobody else."""
    weight[: len(carriers)] = 0
    centre = weight.shape[2] // 2
    for channel, (value, _) in enumerate(carriers):
        if value is None:
            weight[:, channel] = 0
            # The box of a halving convolution reads no padding, so constants stay constant in it too.
            weight[channel, channel, centre, centre] = 1
        else:
            weight[channel, channel] = kernel
    return weight


def _middle(weights: Weights, name: str, width: int, carriers: Carriers) -> None:
    _resnet(weights, f"{name}.resnets.0", (width, width), carriers)
    attention = f"{name}.attentions.0"
    _norm(weights, f"{attention}.group_norm", width)
    for part in ("to_q", "to_k", "to_v"):
        _layer(weights, f"{attention}.{part}", linear(f"{attention}.{part}", width, width))
    out = linear(f"{attention}.to_out.0", width, width, 0.5)
    out[: len(carriers)] = 0
    _layer(weights, f"{attention}.to_out.0", out)
    _resnet(weights, f"{name}.resnets.1", (width, width), carriers)


def _resnet(weights: Weights, name: str, widths: tuple[int, int], carriers: Carriers) -> None:
    before, after = widths
    _norm(weights, f"{name}.norm1", before)
    _layer(weights, f"{name}.conv1", conv(f"{name}.conv1", after, before, 3))
    _norm(weights, f"{name}.norm2", after)
    residual = conv(f"{name}.conv2", after, after, 3, 0.5)
    residual[: len(carriers)] = 0
    _layer(weights, f"{name}.conv2", residual)
    if before != after:
        shortcut = conv(f"{name}.conv_shortcut", after, before, 1)
        _layer(weights, f"{name}.conv_shortcut", _carried(shortcut, carriers, np.ones((1, 1), np.float32)))


def _norm_out(weights: Weights, name: str, width: int, carriers: Carriers, deviation: float) -> None:
    """Undo the norm's division for the carriers and lift them onto the straight part of silu."""
    _norm(weights, name, width)
    weights[f"{name}.weight"][: len(carriers)] = deviation
    weights[f"{name}.bias"][: len(carriers)] = LIFT


def _norm(weights: Weights, name: str, width: int) -> None:
    _layer(weights, name, np.ones(width, np.float32))


def _layer(weights: Weights, name: str, weight: np.ndarray, bias: np.ndarray | None = None) -> None:
    weights[f"{name}.weight"] = weight
    weights[f"{name}.bias"] = np.zeros(len(weight), np.float32) if bias is None else bias.astype(np.float32)


def _values(carriers: Carriers) -> list[int]:
    """Return the channels that hold Y, U and V with their own sign."""
    return [carriers.index((value, 1)) for value in range(3)]


def _hadamard(size: int) -> np.ndarray:
    """Return the Hadamard matrix of a power of two: orthogonal rows of +-1."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix
