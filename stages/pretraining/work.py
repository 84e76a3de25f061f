"""The two trainings in order, each measured, planned, done, judged and on disk before the next begins.

The folder holds the parts (see `parts`), a sheet of pictures for each training, and `report.json`. What a training
has reached is saved now and then, so that a machine that goes away leaves the best so far.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import mlx.core as mx
import msgspec

from schemas.pretrain import Recipe
from stages.console import charts, messages
from stages.contract.digests import sha256_file
from stages.contract.publish import write_file
from stages.flux2 import load
from stages.flux2.autoencoder import Autoencoder
from stages.flux2.micro import PARTS, REPORT, TOKENIZER
from stages.flux2.text.tokenize import Tokenizer
from stages.flux2.transformer import Transformer
from stages.pretraining import autoencoder as making
from stages.pretraining import parts
from stages.pretraining import transformer as drawing
from stages.pretraining.evaluation import Drawn, Shown, judge_autoencoder, judge_transformer
from stages.pretraining.pools import name_of, planned_steps
from stages.pretraining.trainer import Draw, Trainer
from stages.world import scenes

RECONSTRUCTIONS, SAMPLES = "reconstructions.png", "samples.png"
SAVES = 4  # of what is reached, in each training
LINES = 20  # about the loss, in each training
STATISTICS_PICTURES = 8192
SHEET_COLUMNS = 8

Value = TypeVar("Value")


@dataclass(frozen=True)
class Fitted:
    """What a training took; milliseconds of a warm step by size, losses as (step, mean since the one before)."""

    steps: int
    seconds: float
    step_milliseconds: dict[str, float]
    losses: list[tuple[int, float]]


def train_autoencoder(recipe: Recipe, folder: Path) -> None:
    """Train the autoencoder and write it with its figures."""
    spec = recipe.autoencoder
    mx.random.seed(recipe.seed)
    module = Autoencoder(making.config_of(spec))
    held = _timed("pictures", lambda: making.pictures_of(spec, recipe.seed))
    trainer = Trainer(module, making.loss_of(module, spec, getattr(mx, recipe.dtype)), spec, recipe)
    measured = making.measured_pictures(recipe, STATISTICS_PICTURES)

    def keep() -> Autoencoder:
        kept = Autoencoder(module.config)
        kept.update(module.parameters())
        deviations = sorted(making.finish(kept, measured))
        parts.save_autoencoder(folder, kept)
        messages.say(f"deviations of latent channels: {', '.join(f'{each:.2f}' for each in deviations)}")
        return kept

    fitted = _fit(trainer, "autoencoder", making.draws(trainer.schedule, held), keep)
    figures, shown = _timed("judging", lambda: judge_autoencoder(keep(), recipe))
    _report(folder, recipe, {"autoencoder": {"training": fitted, "figures": figures}})
    _sheet(folder / RECONSTRUCTIONS, shown)
    for name, size in figures.sizes.items():
        messages.say(
            f"autoencoder {name}: {size.psnr_db:.1f} dB (whitening forgotten {size.unwhitened_db:.1f}), judged right "
            f"{size.reconstructed.all:.3f}, shape {size.reconstructed.shape:.3f}, real pictures {size.real.all:.3f}"
        )
    messages.say(f"new shapes: {', '.join(f'{name} {share:.2f}' for name, share in figures.new_shapes.items())}")


def train_transformer(recipe: Recipe, folder: Path) -> None:
    """Train the transformer on the folder's autoencoder, write it with its figures. Raises `Damaged` without one."""
    spec, dtype, asked = recipe.transformer, getattr(mx, recipe.dtype), recipe.evaluation
    model = parts.files_of(folder, parts.variant_of(recipe))
    coder = load.load_autoencoder(model, encoder=True, decoder=True)
    tokenizer = Tokenizer(model.tokenizer, model.variant.text_encoder)
    reader = drawing.Reader(tokenizer, load.load_text_encoder(model, mx.float32))
    mx.random.seed(recipe.seed)
    module = Transformer(model.variant.transformer)
    drawing.start(module)
    corpus = _timed("latents and texts", lambda: drawing.corpus_of(spec, recipe.seed, coder, reader, dtype))
    trainer = Trainer(module, drawing.loss_of(module, spec), spec, recipe)

    def scored(kept: Transformer, pool: int, share: int, steps: Sequence[int]) -> tuple[list[Drawn], list[Shown]]:
        own = msgspec.structs.replace(asked, prompts=max(1, asked.prompts // share), steps=tuple(steps))
        found, shown = judge_transformer(kept, coder, reader, spec.pools[pool], own)
        for each in found:
            right = each.score
            messages.say(
                f"drawn {each.size}, {each.steps} steps, {each.prompts} prompts: {right.all:.3f} right, shape "
                f"{right.shape:.3f}, colour {right.colour:.3f}, size {right.size:.3f}, place {right.place:.3f}, "
                f"texture {right.texture:.3f}, ground {right.ground:.3f}"
            )
        return found, shown

    def keep() -> Transformer:
        parts.save_transformer(folder, module)
        return load.load_transformer(model, mx.float32)

    draw = drawing.draws(spec, trainer.schedule, corpus)
    fitted = _fit(trainer, "transformer", draw, lambda: scored(keep(), 0, 2, asked.steps[:1]))
    kept = keep()
    found, shown = scored(kept, 0, 1, asked.steps)
    for pool in range(1, len(spec.pools)):
        found += scored(kept, pool, 4, asked.steps[-1:])[0]
    _report(folder, recipe, {"transformer": {"training": fitted, "drawn": found}})
    _sheet(folder / SAMPLES, shown)


def bench(recipe: Recipe) -> Iterator[str]:
    """Yield a line for each training, way and size: the time of the first step and of others.

    Every size as the recipe says; only the first in the other type, and compiled or not the other way.
    """
    other = "float32" if recipe.dtype == "bfloat16" else "bfloat16"
    for how in ({}, {"dtype": other}, {"compile": not recipe.compile}):
        own = msgspec.structs.replace(recipe, **how)
        for part, trainer, draw in _on_noise(own):
            for index, pool in enumerate(trainer.spec.pools if not how else trainer.spec.pools[:1]):
                mx.reset_peak_memory()
                first, warm = trainer.measure(draw, index)
                way = f"{own.dtype}, {'compiled' if own.compile else 'eager'}"
                yield (
                    f"{part} {name_of(pool)} x {pool.batch_size}, {way}: {1000 * warm:.1f} ms a step, "
                    f"the first {first:.1f} s, peak {mx.get_peak_memory() / 1e9:.1f} GB"
                )


def _on_noise(recipe: Recipe) -> Iterator[tuple[str, Trainer, Draw]]:
    """Yield both trainers with batches of random numbers, which take as long as pictures."""
    spec, other, variant = recipe.autoencoder, recipe.transformer, parts.variant_of(recipe)
    coder, module = Autoencoder(variant.autoencoder), Transformer(variant.transformer)
    text = mx.random.normal((max(pool.batch_size for pool in other.pools), variant.text_encoder.length,
                             variant.text_encoder.width)).astype(getattr(mx, recipe.dtype))  # fmt: skip

    def pictures(pool: int, _step: int) -> Sequence[mx.array]:
        own = spec.pools[pool]
        return (mx.random.randint(0, 256, (own.batch_size, own.height, own.width, 3)).astype(mx.uint8),)

    def latents(pool: int, _step: int) -> Sequence[mx.array]:
        own = other.pools[pool]
        shape = (own.batch_size, variant.transformer.in_channels, own.height // 16, own.width // 16)
        return mx.random.normal(shape), text[: own.batch_size]

    loss = making.loss_of(coder, spec, getattr(mx, recipe.dtype))
    yield "autoencoder", Trainer(coder, loss, spec, recipe), pictures
    yield "transformer", Trainer(module, drawing.loss_of(module, other), other, recipe), latents


def _fit(trainer: Trainer, name: str, draw: Draw, keep: Callable[[], object]) -> Fitted:
    """Measure, plan and train; call `keep` with the average in the module a few times, not at the end."""
    spec, times = trainer.spec, {}
    for index, pool in enumerate(spec.pools):
        first, times[name_of(pool)] = trainer.measure(draw, index)
        messages.say(f"{name} {name_of(pool)}: {1000 * times[name_of(pool)]:.1f} ms a step, the first {first:.1f} s")
    steps = planned_steps(spec.steps, spec.seconds, spec.pools, list(times.values()))
    messages.say(f"{name}: {steps} steps of {spec.steps} asked for, at most {spec.seconds:.0f} s")
    began, losses = time.monotonic(), []
    said, saved = 0, 0
    for step, loss in trainer.fit(draw, steps):
        losses.append((step, round(loss, 6)))
        if step * LINES // steps > said:
            said = step * LINES // steps
            messages.say(f"{name} {step}/{steps}: loss {loss:.4f}, {time.monotonic() - began:.0f} s")
        if step * SAVES // steps > saved and step < steps:
            saved = step * SAVES // steps
            trainer.assign_average()
            keep()
    trainer.assign_average()
    milliseconds = {size: round(1000 * each, 2) for size, each in times.items()}
    return Fitted(losses[-1][0], round(time.monotonic() - began, 1), milliseconds, losses)


def _report(folder: Path, recipe: Recipe, found: dict[str, object]) -> None:
    """Write what was done into report.json, beside what it says of the other training."""
    path = folder / REPORT
    before = json.loads(path.read_bytes()) if path.is_file() else {}
    files = sorted(each for each in folder.iterdir() if each.name in (*PARTS.values(), TOKENIZER))
    own = {
        "recipe": recipe,
        "world_version": scenes.VERSION,
        "mlx": version("mlx"),
        "device": str(mx.default_device()),
        "files": {each.name: {"sha256": sha256_file(each), "bytes": each.stat().st_size} for each in files},
        **found,
    }
    write_file(path, msgspec.json.format(msgspec.json.encode({**before, **own}), indent=1) + b"\n")


def _sheet(path: Path, shown: Sequence[Shown]) -> None:
    pictures, labels = [picture for picture, _ in shown], [label for _, label in shown]
    charts.save_png(charts.grid(pictures, labels, SHEET_COLUMNS), path, {})


def _timed(what: str, work: Callable[[], Value]) -> Value:
    began = time.monotonic()
    result = work()
    messages.say(f"{what}: {time.monotonic() - began:.1f} s")
    return result
