"""How much memory each stage needs, before anything is loaded; and what running out of it looks like.

The estimate of a training step is fitted to MLX's own peak, not compiled, mlx 0.32.4, 2026-11. CUDA: klein 4B in
bfloat16 at 512 and 1024 px with and without checkpointing, one H200, work handed over as `backend.prepare` has it,
within 5 %; klein 9B, dev, 8 and 4 bit with MLX's longer queue, within 15 %. CPU: seven small models in float32,
within 12 %. Metal is not measured: like the CPU it has no fused attention in training. T tokens, D width of the
streams.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import mlx.core as mx
import msgspec

from schemas.adapter import LoKr, LoRA
from schemas.errors import NoResources
from schemas.quantize import Quantize
from schemas.train import Train
from stages.flux2.backend import Backend
from stages.flux2.packing import Format, bytes_of, largest_packed, packed_modules
from stages.flux2.shapes import Shapes, autoencoder_shapes, text_encoder_shapes, transformer_shapes
from stages.flux2.transformer import Transformer
from stages.flux2.variants import AutoencoderConfig, TextEncoderConfig, TransformerConfig, Variant
from stages.lora.formats.bfl import to_tensors
from stages.lora.merge import attach, portable
from stages.training.step import Trainer

Device = Literal["cpu", "metal", "cuda"]
Packed = Mapping[str, Format]  # the quantized modules of a model
Remedy = tuple[dict[str, str], int]  # settings with the values that would fit, as TOML, and the peak they leave
# Of a number in the type that large matrices are multiplied in.
ELEMENT_BYTES: dict[Device, int] = {"cpu": 4, "metal": 2, "cuda": 2}
# Of a number of the largest packed matrix while it is multiplied with. CPU: fitted (unpacking alone takes 14, not
# always at the peak). CUDA: three matrices in flight. Metal's kernel unpacks inside.
UNPACKING_BYTES: dict[Device, int] = {"cpu": 8, "metal": 0, "cuda": 6}
# Without gradients. Of a transformer: streams of T x D beside the scores. Of a text encoder: scores, hidden layers of
# its MLP, and how much more of a packed matrix, since two are unpacked side by side. Of the autoencoder: planes of
# the picture's size for every channel of the first level (encoder: always, and for each of its layers), of the first
# and of the second (decoder); most of them are what the CPU unfolds for a convolution.
FORWARD_STREAMS = 44
TEXT_SCORES, TEXT_HIDDEN, TEXT_UNPACKED = 2, 5, 3
ENCODER_PLANES, DECODER_PLANES = (28, 10), (20, 29)
FLOAT_BYTES = 4
# By so much the estimate may be too large.
TOLERANCE = 0.15
PIXELS_PER_TOKEN = 16
SMALL_RANK = 16
QUANTIZED_BY_LOSS: tuple[Quantize, ...] = ("8bit", "4bit")
SMALLER_PX = (1536, 1280, 1024, 768, 512, 384, 256)
CGROUP = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Costs:
    """What a step holds beside weights and state, in arrays of B x T x D elements of the compute type.

    `score_block` and `scores` count attention scores, arrays of B x heads x T x T, where no fused kernel spares them;
    `in_flight_bytes` are buffers that queued work keeps, however large the model.
    """

    block: float
    once: float
    score_block: float
    scores: float
    in_flight_bytes: float = 0.0


PLAIN: dict[Device, Costs] = {
    "cuda": Costs(22, 120, 0, 0, 0.5e9),
    "metal": Costs(17.5, 60, 1, 2),
    "cpu": Costs(17.5, 60, 1, 2),
}
CHECKPOINTED: dict[Device, Costs] = {
    "cuda": Costs(1, 180, 0, 0, 0.5e9),
    "metal": Costs(11, 53, 0, 3),
    "cpu": Costs(11, 53, 0, 3),
}


@dataclass(frozen=True)
class Inference:
    """What computing without gradients holds on a device.

    `encoder` and `decoder` are the shares of the CPU's planes; the bytes are buffers that queued work keeps, of a
    text encoder whose weights are whole or packed, and of the autoencoder's halves.
    """

    encoder: float
    decoder: float
    text_bytes: float = 0.0
    packed_text_bytes: float = 0.0
    encoder_bytes: float = 0.0
    decoder_bytes: float = 0.0


# Fitted within 10 %: the CPU to small models, CUDA to the published ones on one H200. Metal is not measured.
INFERENCE: dict[Device, Inference] = {
    "cuda": Inference(1 / 5.3, 1 / 9.2, 0.7e9, 2.7e9, 0.85e9, 2.9e9),
    "metal": Inference(1 / 6, 1 / 6),
    "cpu": Inference(1, 1),
}


@dataclass(frozen=True)
class Sizes:
    """Bytes of everything a checkpoint holds, of the adapters in it, and of a LoRA file."""

    state: int
    factors: int
    file: int


@dataclass(frozen=True)
class Demand:
    """A training step as far as memory goes; `tokens` are those of the largest picture, `packed` is quantized."""

    config: TransformerConfig
    device: Device
    sizes: Sizes
    tokens: int
    text_tokens: int
    batch: int
    rank: int
    checkpointing: bool
    packed: Packed = field(default_factory=dict[str, Format])


def sizes(variant: Variant, settings: Train, compute: mx.Dtype) -> Sizes:
    """Return the bytes of a training's parts from shapes alone: arrays are described, none is computed."""
    adapter = settings.adapter
    if not isinstance(adapter, LoKr):
        # As large, and started without looking at weights. What that leaves out of DoRA is a 25th part.
        settings = msgspec.structs.replace(settings, adapter=LoRA())
    transformer = Transformer(variant.transformer)
    transformer.set_dtype(compute)
    attach(transformer, settings, seed=0)
    trainer = Trainer(transformer, settings, 0)
    # A PiSSA file holds twice the rank.
    copies = 2 if isinstance(adapter, LoRA) and adapter.init == "pissa" else 1
    file = to_tensors(portable(transformer, trainer.factors), dtype=getattr(mx, settings.save_dtype))
    return Sizes(
        state=sum(array.nbytes for array in trainer.state().values()),
        factors=sum(array.nbytes for array in trainer.factors.values()),
        file=copies * sum(array.nbytes for array in file.values()),
    )


def estimate(demand: Demand) -> int:
    """Return the peak of a training step in bytes."""
    config, costs = demand.config, (CHECKPOINTED if demand.checkpointing else PLAIN)[demand.device]
    blocks = config.num_layers + config.num_single_layers
    element = ELEMENT_BYTES[demand.device]
    total = demand.tokens + demand.text_tokens
    stream = element * demand.batch * total * config.inner_dim
    scores = element * demand.batch * config.num_attention_heads * total**2
    activations = (blocks * costs.block + costs.once) * stream
    # Queued work cannot keep more than a step allocates at all.
    plain = PLAIN[demand.device]
    in_flight = min(costs.in_flight_bytes, (blocks * plain.block + plain.once) * stream)
    attention = (blocks * costs.score_block + costs.scores) * scores
    # The state before and after the step, gradients as they are and clipped.
    weights = held(transformer_shapes(config), demand.packed, demand.device)
    kept = weights + 2 * demand.sizes.state + 2 * demand.sizes.factors
    return math.ceil(kept + in_flight + activations + attention)


def text_peak(config: TextEncoderConfig, packed: Packed, device: Device) -> int:
    """Return the peak of encoding a text in bytes."""
    element, length = ELEMENT_BYTES[device], config.length
    scores = config.num_attention_heads * length**2
    activations = TEXT_SCORES * scores + TEXT_HIDDEN * length * config.intermediate_size
    shapes = text_encoder_shapes(config)
    costs = INFERENCE[device]
    queued = costs.packed_text_bytes if packed else costs.text_bytes
    kept = bytes_of(shapes, packed, element) + TEXT_UNPACKED * unpacking(shapes, packed, device)
    return math.ceil(kept + element * activations + queued)


def latents_peak(config: AutoencoderConfig, device: Device, pixels: int) -> int:
    """Return the peak of encoding a picture of so many pixels in bytes; always computed in float32."""
    weights = bytes_of(autoencoder_shapes(config, decoder=False), {}, FLOAT_BYTES)
    planes = (ENCODER_PLANES[0] + ENCODER_PLANES[1] * config.layers_per_block) * config.block_out_channels[0]
    costs = INFERENCE[device]
    return math.ceil(weights + FLOAT_BYTES * pixels * planes * costs.encoder + costs.encoder_bytes)


def preview_peak(variant: Variant, packed: Packed, device: Device, size_px: int) -> int:
    """Return the peak of drawing a square picture in bytes: transformer and decoder stay in memory together."""
    config, element = variant.transformer, ELEMENT_BYTES[device]
    total = (size_px // PIXELS_PER_TOKEN) ** 2 + variant.text_encoder.length
    activations = FORWARD_STREAMS * total * config.inner_dim
    scores = config.num_attention_heads * total**2 if PLAIN[device].scores else 0
    forward = element * (activations + scores) + PLAIN[device].in_flight_bytes
    first, second, *_ = variant.autoencoder.decoder_channels
    planes = DECODER_PLANES[0] * first + DECODER_PLANES[1] * second
    costs = INFERENCE[device]
    decoding = FLOAT_BYTES * size_px**2 * planes * costs.decoder + costs.decoder_bytes
    decoder = bytes_of(autoencoder_shapes(variant.autoencoder, encoder=False), {}, FLOAT_BYTES)
    return held(transformer_shapes(config), packed, device) + decoder + math.ceil(max(forward, decoding))


def held(shapes: Shapes, packed: Packed, device: Device) -> int:
    """Return the bytes of frozen weights, and of the largest packed one while it is multiplied with."""
    return bytes_of(shapes, packed, ELEMENT_BYTES[device]) + unpacking(shapes, packed, device)


def unpacking(shapes: Shapes, packed: Packed, device: Device) -> int:
    """Return the bytes that the largest packed matrix takes while it is multiplied with."""
    return UNPACKING_BYTES[device] * largest_packed(shapes, packed)


def require(demand: Demand, limit_bytes: int | None, warn: Callable[[str], None]) -> None:
    """Warn where `demand` may exceed `limit_bytes`; raise NoResources, with what would fit, where it surely does."""
    need = estimate(demand)
    if limit_bytes is not None and need > limit_bytes:
        _exceeded("a training step", (need, limit_bytes), advice(demand, limit_bytes), warn)


def require_text(config: TextEncoderConfig, packed: Packed, backend: Backend, warn: Callable[[str], None]) -> None:
    """Warn where encoding text may exceed the device's memory; raise NoResources, with what would fit, if surely."""
    shapes, limit_bytes = text_encoder_shapes(config), device_bytes(backend)
    need = text_peak(config, packed, backend.device)
    if limit_bytes is None or need <= limit_bytes:
        return
    peaks = {mode: text_peak(config, packed_modules(shapes, mode), backend.device) for mode in QUANTIZED_BY_LOSS}
    fitting = [mode for mode, peak in peaks.items() if peak <= limit_bytes]
    least = _gigabytes(min(peaks.values()))
    fix = f'set encode_text.quantize = "{fitting[0]}"' if fitting else f"take a machine with {least} for it"
    _exceeded("encoding text", (need, limit_bytes), fix, warn)


def _exceeded(what: str, bytes_: tuple[int, int], fix: str, warn: Callable[[str], None]) -> None:
    """Warn that `what` may need more than there is, or raise NoResources; `bytes_` are the need and the limit."""
    need, limit = bytes_
    text = f"{what} needs about {_gigabytes(need)}, there are {_gigabytes(limit)}"
    if need * (1 - TOLERANCE) > limit:
        raise NoResources("memory.too_little", "not enough memory", why=text, fix=fix)
    warn(f"{text}; {fix}")


def advice(demand: Demand, limit_bytes: int) -> str:
    """Return the settings that would fit, in words."""
    found, least = remedies(demand, limit_bytes)
    if not found:
        return f"take a smaller model, or a machine with {_gigabytes(least)} for it"
    told = [
        f"{' and '.join(f'{name} = {value}' for name, value in settings.items())} (about {_gigabytes(need)})"
        for settings, need in found
    ]
    return f"set {' or '.join(told)}"


def remedies(demand: Demand, limit_bytes: int) -> tuple[list[Remedy], int]:
    """Return the settings that would fit: each one that does by itself, else the fewest together; and the least need.

    What costs the result least comes first. Where nothing fits there are none.
    """
    fitting: dict[str, Remedy] = {}
    for name, value, changed in _smaller(demand):
        if estimate(changed) <= limit_bytes:
            fitting.setdefault(name, ({name: value}, estimate(changed)))
    if fitting:
        return list(fitting.values()), min(need for _, need in fitting.values())
    taken: dict[str, str] = {}
    while estimate(demand) > limit_bytes and (step := next(_smaller(demand), None)):
        name, value, demand = step
        taken[name] = value
    need = estimate(demand)
    return [(taken, need)] if need <= limit_bytes else [], need


def _smaller(demand: Demand) -> Iterator[tuple[str, str, Demand]]:
    """Yield settings that need less, with their values: what costs the result least comes first."""
    if not demand.checkpointing:
        yield "train.gradient_checkpointing", "true", replace(demand, checkpointing=True)
    if demand.batch > 1:
        yield "train.batch_size", "1", replace(demand, batch=1)
    yield from _quantized(demand, QUANTIZED_BY_LOSS[0])
    if demand.rank > SMALL_RANK:
        share, whole = SMALL_RANK / demand.rank, demand.sizes
        less = replace(whole, state=int(whole.state * share), factors=int(whole.factors * share))
        yield "train.rank", str(SMALL_RANK), replace(demand, rank=SMALL_RANK, sizes=less)
    yield from _quantized(demand, QUANTIZED_BY_LOSS[1])
    for size_px in SMALLER_PX:
        tokens = (size_px // PIXELS_PER_TOKEN) ** 2
        if tokens < demand.tokens:
            yield "validate.resolutions", f"[{size_px}]", replace(demand, tokens=tokens)


def _quantized(demand: Demand, quantize: Quantize) -> Iterator[tuple[str, str, Demand]]:
    """Yield the demand with weights quantized so, if they are larger now."""
    shapes = transformer_shapes(demand.config)
    changed = replace(demand, packed=packed_modules(shapes, quantize))
    if held(shapes, changed.packed, demand.device) < held(shapes, demand.packed, demand.device):
        yield "model.quantize", f'"{quantize}"', changed


def device_bytes(backend: Backend) -> int | None:
    """Return the memory that a training may fill on this machine; None where nobody says how much there is."""
    if backend.device == "cpu":
        return _physical_bytes()
    info = mx.device_info()
    name = "max_recommended_working_set_size" if backend.device == "metal" else "total_memory"
    return int(info[name]) if name in info else None


def _physical_bytes() -> int:
    """Return the memory of the machine, or of the container that this process may not leave."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = CGROUP.read_text().strip() if CGROUP.is_file() else "max"
    return min(physical, int(limit)) if limit.isdigit() else physical


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
