"""How much memory a training step needs, before anything is loaded; and what running out of it looks like.

The estimate is fitted to MLX's own peak, not compiled, mlx 0.32.4, 2026-11. CUDA: klein 4B and 9B in bfloat16 at 512
and 1024 px with and without checkpointing, one H200, within 3 %. CPU: seven small models in float32, within 12 %.
Metal is not measured: like the CPU it has no fused attention in training. T tokens, D width of the streams.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import mlx.core as mx
import msgspec

from schemas.adapter import LoKr, LoRA
from schemas.errors import NoResources
from schemas.train import Train
from stages.flux2.backend import Backend
from stages.flux2.shapes import transformer_shapes
from stages.flux2.transformer import Transformer
from stages.flux2.variants import TransformerConfig, Variant
from stages.lora.formats.bfl import to_tensors
from stages.lora.merge import attach, portable
from stages.training.step import Trainer

# By so much the estimate may be too large.
TOLERANCE = 0.15
PIXELS_PER_TOKEN = 16
SMALL_RANK = 16
SMALLER_PX = (1536, 1280, 1024, 768, 512, 384, 256)
CGROUP = Path("/sys/fs/cgroup/memory.max")
# Of MLX's allocators (CPU, Metal, CUDA) and of the CUDA and Metal drivers.
OUT_OF_MEMORY = ("malloc", "out of memory", "unable to allocate", "insufficient memory", "bad_alloc")


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


Device = Literal["cpu", "metal", "cuda"]
PLAIN: dict[Device, Costs] = {
    "cuda": Costs(22, 120, 0, 0, 6.25e9),
    "metal": Costs(17.5, 60, 1, 2),
    "cpu": Costs(17.5, 60, 1, 2),
}
CHECKPOINTED: dict[Device, Costs] = {
    "cuda": Costs(1, 180, 0, 0, 6.25e9),
    "metal": Costs(11, 53, 0, 3),
    "cpu": Costs(11, 53, 0, 3),
}


@dataclass(frozen=True)
class Sizes:
    """Bytes of the frozen weights, of everything a checkpoint holds, of the adapters in it, and of a LoRA file."""

    weights: int
    state: int
    factors: int
    file: int


@dataclass(frozen=True)
class Demand:
    """A training step as far as memory goes; `tokens` are those of the largest picture."""

    config: TransformerConfig
    device: Device
    sizes: Sizes
    tokens: int
    text_tokens: int
    batch: int
    rank: int
    checkpointing: bool


def sizes(variant: Variant, settings: Train, compute: mx.Dtype) -> Sizes:
    """Return the bytes of a training's parts from shapes alone: arrays are described, none is computed."""
    adapter = settings.adapter
    if not isinstance(adapter, LoKr):
        # As large, and started without looking at weights. What that leaves out of DoRA is a 25th part.
        settings = msgspec.structs.replace(settings, adapter=LoRA())
    transformer = Transformer(variant.transformer)
    transformer.set_dtype(compute)
    weights = sum(math.prod(shape) for shape in transformer_shapes(variant.transformer).values()) * compute.size
    attach(transformer, settings, seed=0)
    trainer = Trainer(transformer, settings, 0)
    # A PiSSA file holds twice the rank.
    copies = 2 if isinstance(adapter, LoRA) and adapter.init == "pissa" else 1
    file = to_tensors(portable(transformer, trainer.factors), dtype=getattr(mx, settings.save_dtype))
    return Sizes(
        weights=weights,
        state=sum(array.nbytes for array in trainer.state().values()),
        factors=sum(array.nbytes for array in trainer.factors.values()),
        file=copies * sum(array.nbytes for array in file.values()),
    )


def estimate(demand: Demand) -> int:
    """Return the peak of a training step in bytes."""
    config, costs = demand.config, (CHECKPOINTED if demand.checkpointing else PLAIN)[demand.device]
    blocks = config.num_layers + config.num_single_layers
    element = 4 if demand.device == "cpu" else 2
    total = demand.tokens + demand.text_tokens
    stream = element * demand.batch * total * config.inner_dim
    scores = element * demand.batch * config.num_attention_heads * total**2
    activations = (blocks * costs.block + costs.once) * stream
    # Queued work cannot keep more than a step allocates at all.
    plain = PLAIN[demand.device]
    in_flight = min(costs.in_flight_bytes, (blocks * plain.block + plain.once) * stream)
    attention = (blocks * costs.score_block + costs.scores) * scores
    # The state before and after the step, gradients as they are and clipped.
    kept = demand.sizes.weights + 2 * demand.sizes.state + 2 * demand.sizes.factors
    return math.ceil(kept + in_flight + activations + attention)


def require(demand: Demand, limit_bytes: int | None, warn: Callable[[str], None]) -> None:
    """Warn where `demand` may exceed `limit_bytes`; raise NoResources, with what would fit, where it surely does."""
    need = estimate(demand)
    if limit_bytes is None or need <= limit_bytes:
        return
    text = f"a training step needs about {_gigabytes(need)}, there are {_gigabytes(limit_bytes)}"
    if need * (1 - TOLERANCE) <= limit_bytes:
        warn(f"{text}; {advice(demand, limit_bytes)}")
        return
    raise NoResources("memory.too_little", "not enough memory", why=text, fix=advice(demand, limit_bytes))


def advice(demand: Demand, limit_bytes: int) -> str:
    """Return the settings that would fit: each one that does by itself, else the fewest together."""
    fitting: dict[str, str] = {}
    for name, value, changed in _smaller(demand):
        if estimate(changed) <= limit_bytes:
            fitting.setdefault(name, f"{name} = {value} (about {_gigabytes(estimate(changed))})")
    if fitting:
        return f"set {' or '.join(fitting.values())}"
    taken: dict[str, str] = {}
    while estimate(demand) > limit_bytes and (step := next(_smaller(demand), None)):
        name, value, demand = step
        taken[name] = f"{name} = {value}"
    if estimate(demand) > limit_bytes:
        return f"take a smaller model, or a machine with {_gigabytes(estimate(demand))} for it"
    return f"set {' and '.join(taken.values())} (about {_gigabytes(estimate(demand))})"


def _smaller(demand: Demand) -> Iterator[tuple[str, str, Demand]]:
    """Yield settings that need less, with their values: what costs the result least comes first."""
    if not demand.checkpointing:
        yield "train.gradient_checkpointing", "true", replace(demand, checkpointing=True)
    if demand.batch > 1:
        yield "train.batch_size", "1", replace(demand, batch=1)
    if demand.rank > SMALL_RANK:
        share, whole = SMALL_RANK / demand.rank, demand.sizes
        less = replace(whole, state=int(whole.state * share), factors=int(whole.factors * share))
        yield "train.rank", str(SMALL_RANK), replace(demand, rank=SMALL_RANK, sizes=less)
    for size_px in SMALLER_PX:
        tokens = (size_px // PIXELS_PER_TOKEN) ** 2
        if tokens < demand.tokens:
            yield "validate.resolutions", f"[{size_px}]", replace(demand, tokens=tokens)


def device_bytes(backend: Backend) -> int | None:
    """Return the memory that a training may fill on this machine; None where nobody says how much there is."""
    if backend.device == "cpu":
        return _physical_bytes()
    info = mx.device_info()
    name = "max_recommended_working_set_size" if backend.device == "metal" else "total_memory"
    return int(info[name]) if name in info else None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether MLX raised `error` because an allocation failed."""
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in OUT_OF_MEMORY)


def _physical_bytes() -> int:
    """Return the memory of the machine, or of the container that this process may not leave."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = CGROUP.read_text().strip() if CGROUP.is_file() else "max"
    return min(physical, int(limit)) if limit.isdigit() else physical


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
