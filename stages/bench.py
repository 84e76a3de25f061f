"""bench: how long a training step takes on this machine and how much memory it peaks at, with random weights.

Nothing is read or kept: the model has the real shapes and random numbers, so no download is needed to know.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from statistics import median
from typing import TYPE_CHECKING, Any, cast, get_args

import click
import msgspec

from schemas.errors import BadConfig
from schemas.quantize import Quantize
from schemas.train import Train
from stages.console import messages
from stages.console.invocation import shared
from stages.dataset.buckets import PATCH_PX
from stages.flux2.variants import VARIANTS, Variant

if TYPE_CHECKING:
    import mlx.core as mx

    from stages.flux2.transformer import Transformer
    from stages.training.objective import Batch

SEED = 0
HELP = """Measure training steps at full size with random weights: time per step and peak memory.

\b
Example:
  flux2-lora bench klein-base-4b --size 512 --size 1024 --steps 10
  flux2-lora bench dev --quantize 4bit --checkpointing on
"""


class Measured(msgspec.Struct):
    """One configuration: bytes of the frozen weights, milliseconds per step (median), peak bytes of MLX's allocator
    with everything in it, the last loss.
    """

    model: str
    size_px: int
    batch_size: int
    quantize: Quantize
    gradient_checkpointing: bool
    compile: bool
    weight_bytes: int
    milliseconds: float
    peak_bytes: int
    loss: float


def random_transformer(variant: Variant, dtype: Any, quantize: Quantize = "none") -> Transformer:
    """Return a transformer of the variant's shape with small random weights, its blocks' as `quantize` says.

    Made tensor by tensor, so that no full model exists beside a quantized one.
    """
    from stages.flux2.packing import packed_modules
    from stages.flux2.quantize import fill
    from stages.flux2.shapes import transformer_shapes
    from stages.flux2.transformer import Transformer

    shapes = transformer_shapes(variant.transformer)
    wanted = packed_modules(shapes, quantize)
    return fill(Transformer(variant.transformer), _random_tensors(shapes), dtype, found={}, wanted=wanted)


def _random_tensors(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, mx.array]]:
    """Yield matrices as MLX starts them, uniform in +-1/sqrt(columns), and the ones of norms; all lazy bfloat16."""
    import mlx.core as mx

    for name, shape in shapes.items():
        bound = shape[-1] ** -0.5
        yield name, mx.random.uniform(-bound, bound, shape, mx.bfloat16) if len(shape) == 2 else mx.ones(shape)


def random_batch(variant: Variant, size_px: int, batch_size: int) -> Batch:
    """Return latents, text and noise of the shapes that pictures of size_px x size_px give."""
    import mlx.core as mx

    from stages.training.objective import Batch

    side = size_px // PATCH_PX
    shape = (batch_size, variant.transformer.in_channels, side, side)
    encoder = variant.text_encoder
    text = mx.random.normal((batch_size, encoder.length, encoder.width))
    ones = mx.ones((batch_size,))
    return Batch(mx.random.normal(shape), mx.random.normal(shape), text, 0.5 * ones, ones)


def measure(transformer: Transformer, variant: Variant, size_px: int, settings: Train, steps: int) -> Measured:
    """Take two steps to warm up and `steps` to measure."""
    import mlx.core as mx

    from stages.flux2.packing import bytes_of, packed_modules
    from stages.flux2.quantize import held_as
    from stages.flux2.shapes import transformer_shapes
    from stages.training.step import Trainer

    held, shapes = cast(Quantize, held_as(transformer)), transformer_shapes(variant.transformer)
    trainer = Trainer(transformer, settings, SEED)
    batch = random_batch(variant, size_px, settings.batch_size)
    mx.eval(batch)
    times: list[float] = []
    loss = 0.0
    for step in range(steps + 2):
        if step == 2:
            mx.reset_peak_memory()
        began = time.perf_counter()
        result = trainer.step([batch])
        loss = cast(float, result.loss.item())
        mx.synchronize()
        times.append(time.perf_counter() - began)
    return Measured(
        model=variant.name,
        size_px=size_px,
        batch_size=settings.batch_size,
        quantize=held,
        gradient_checkpointing=settings.gradient_checkpointing,
        compile=settings.compile,
        weight_bytes=bytes_of(shapes, packed_modules(shapes, held), transformer.dtype.size),
        milliseconds=round(1000 * median(times[2:]), 1),
        peak_bytes=mx.get_peak_memory(),
        loss=loss,
    )


@shared("json", "debug")
@click.command("bench", help=HELP, context_settings={"show_default": True})
@click.argument("model", type=click.Choice(list(VARIANTS)))
@click.option("--size", type=click.IntRange(32, 2048), multiple=True, default=[512], help="Side of the pictures.")
@click.option("--batch-size", type=click.IntRange(1, 64), default=1, help="Pictures per step.")
@click.option("--rank", type=click.IntRange(1, 1024), default=16, help="Rank of the LoRA.")
@click.option("--quantize", type=click.Choice(get_args(Quantize)), default="none", help="How weights are held.")
@click.option("--steps", type=click.IntRange(1, 10000), default=10, help="Steps to measure.")
@click.option("--checkpointing", type=click.Choice(["on", "off", "both"]), default="both", help="Of gradients.")
@click.option("--compile", type=click.Choice(["on", "off", "both"]), default="off", help="Of the step.")
def COMMAND(**options: Any) -> int:
    """Be the `bench` command."""
    import mlx.core as mx

    from stages.flux2.backend import prepare
    from stages.lora.merge import attach

    if uneven := [size for size in options["size"] if size % PATCH_PX]:
        what = f"pictures have sides that are multiples of {PATCH_PX} pixels"
        raise BadConfig(
            "bench.size", what, where=f"--size {uneven[0]}", fix=f"say {uneven[0] // PATCH_PX * PATCH_PX}"
        )
    variant = VARIANTS[options["model"]]
    backend = prepare()
    messages.say(backend.line())
    transformer = random_transformer(variant, backend.compute_dtype, options["quantize"])
    rank = options["rank"]
    attach(transformer, Train(rank=rank, alpha=float(rank)), seed=SEED)
    rows: list[Measured] = []
    for size_px, checkpointing, compiled in itertools.product(
        options["size"], _choices(options["checkpointing"]), _choices(options["compile"])
    ):
        settings = Train(batch_size=options["batch_size"], gradient_checkpointing=checkpointing, compile=compiled)
        rows.append(measure(transformer, variant, size_px, settings, options["steps"]))
        mx.clear_cache()
        if not options["json"]:
            messages.say(msgspec.json.encode(rows[-1]).decode())
    if options["json"]:
        messages.result(msgspec.json.encode({"device": backend.device, "measured": rows}))
    return 0


def _choices(word: str) -> list[bool]:
    return {"on": [True], "off": [False], "both": [False, True]}[word]
