"""bench: how long a training step takes on this machine and how much memory it peaks at, with random weights.

Nothing is read or kept: the model has the real shapes and random numbers, so no download is needed to know.
"""

from __future__ import annotations

import itertools
import time
from statistics import median
from typing import TYPE_CHECKING, Any, cast

import click
import msgspec

from schemas.train import Train
from stages.console import messages
from stages.flux2.variants import VARIANTS, Variant

if TYPE_CHECKING:
    from stages.flux2.transformer import Transformer
    from stages.training.objective import Batch

SEED = 0
HELP = """Measure training steps at full size with random weights: time per step and peak memory.

\b
Example:
  flux2-lora bench klein-base-4b --size 512 --size 1024 --steps 10
"""


class Measured(msgspec.Struct):
    """One configuration: milliseconds per step (median), peak bytes of MLX's allocator, the last loss."""

    model: str
    size_px: int
    batch_size: int
    gradient_checkpointing: bool
    compile: bool
    milliseconds: float
    peak_bytes: int
    loss: float


def random_transformer(variant: Variant, dtype: Any) -> Transformer:
    """Return a transformer of the variant's shape with small random weights of `dtype`, made tensor by tensor."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from stages.flux2.transformer import Transformer

    transformer = Transformer(variant.transformer)
    transformer.set_dtype(dtype)
    for _, array in tree_flatten(transformer.parameters()):
        mx.eval(array)  # one at a time: the float32 draw behind it is freed at once
    return transformer


def random_batch(variant: Variant, size_px: int, batch_size: int) -> Batch:
    """Return latents, text and noise of the shapes that pictures of size_px x size_px give."""
    import mlx.core as mx

    from stages.training.objective import Batch

    side = size_px // 16
    shape = (batch_size, variant.transformer.in_channels, side, side)
    encoder = variant.text_encoder
    text = mx.random.normal((batch_size, encoder.length, encoder.width))
    ones = mx.ones((batch_size,))
    return Batch(mx.random.normal(shape), mx.random.normal(shape), text, 0.5 * ones, ones)


def measure(transformer: Transformer, variant: Variant, size_px: int, settings: Train, steps: int) -> Measured:
    """Take two steps to warm up and `steps` to measure."""
    import mlx.core as mx

    from stages.training.step import Trainer

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
        gradient_checkpointing=settings.gradient_checkpointing,
        compile=settings.compile,
        milliseconds=round(1000 * median(times[2:]), 1),
        peak_bytes=mx.get_peak_memory(),
        loss=loss,
    )


@click.command("bench", help=HELP, context_settings={"show_default": True})
@click.argument("model", type=click.Choice(list(VARIANTS)))
@click.option("--size", type=click.IntRange(32, 2048), multiple=True, default=[512], help="Side of the pictures.")
@click.option("--batch-size", type=click.IntRange(1, 64), default=1, help="Pictures per step.")
@click.option("--rank", type=click.IntRange(1, 1024), default=16, help="Rank of the LoRA.")
@click.option("--steps", type=click.IntRange(1, 10000), default=10, help="Steps to measure.")
@click.option("--checkpointing", type=click.Choice(["on", "off", "both"]), default="both", help="Of gradients.")
@click.option("--compile", type=click.Choice(["on", "off", "both"]), default="off", help="Of the step.")
@click.option("--json", is_flag=True, help="Print one JSON object on stdout.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")
def COMMAND(**options: Any) -> int:
    """Be the `bench` command."""
    import mlx.core as mx

    from stages.flux2.backend import prepare
    from stages.lora.merge import attach

    variant = VARIANTS[options["model"]]
    backend = prepare()
    messages.say(backend.line())
    transformer = random_transformer(variant, backend.compute_dtype)
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
