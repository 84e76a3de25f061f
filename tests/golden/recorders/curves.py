"""Twenty steps of four trainings on made-up data, in numbers that say where two trainings part.

These are the project's own values, not a reference's, and recorded in its own environment: do so again when a change
of them is meant.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import numpy as np

from schemas.adapter import DoRA, LoKr, LoRA
from schemas.ema import Ema
from schemas.objective import Bell, Huber, Output
from schemas.optimizers import Lion, Prodigy
from schemas.schedules import Constant, Cosine
from schemas.timesteps import Mode, Shift, Uniform
from schemas.train import Train
from stages.lora.merge import attach
from stages.stores.embeddings import write_embeddings
from stages.training.data import Tables
from stages.training.loop import Loop
from stages.training.objective import Batch
from stages.training.step import StepResult, Trainer
from tests.golden import tiny
from tests.training import corpus

SEED, STEPS = 5, 20
# In the order in which one brings about the next.
GIVEN = ("latents", "text", "noise", "timesteps", "weights", "target")
MEASURES = (*GIVEN, "learning rate", "loss", "gradient norm", "factors", "average")
CURVES = {
    "plain": Train(
        steps=STEPS, batch_size=2, learning_rate=1e-2, rank=4, alpha=4.0, timesteps=Shift(), caption_dropout=0.3
    ),
    "dora-lion-bell": Train(
        steps=STEPS,
        batch_size=2,
        learning_rate=3e-3,
        rank=4,
        alpha=8.0,
        targets="attention",
        adapter=DoRA(),
        optimizer=Lion(),
        timesteps=Uniform(minimum=0.1),
        weighting=Bell(),
        gradient_checkpointing=False,
    ),
    "lokr-prodigy-cosine-ema": Train(
        steps=STEPS,
        batch_size=3,
        rank=4,
        alpha=4.0,
        adapter=LoKr(factor=4),
        optimizer=Prodigy(d0=5e-3, use_bias_correction=True),
        schedule=Cosine(warmup_steps=3, min_ratio=0.1),
        ema=Ema(decay=0.9),
        gradient_checkpointing=False,
    ),
    "accumulated-huber-preserving-rslora": Train(
        steps=STEPS,
        batch_size=2,
        gradient_accumulation=2,
        learning_rate=1e-2,
        rank=4,
        alpha=2.0,
        adapter=LoRA(rslora=True, dropout=0.1),
        schedule=Constant(warmup_steps=5),
        timesteps=Mode(stratified=True),
        loss=Huber(delta=0.5),
        noise_offset=0.05,
        preservation=Output(class_word="cat", every=2, weight=0.5),
        clip_norm=0.1,
        gradient_checkpointing=False,
    ),
}


class Watched(Trainer):
    """A trainer that keeps a row of measures per step."""

    rows: list[list[float]]

    def step(self, batches: Sequence[Batch], share: float = 1.0, *, held: int = 0) -> StepResult:
        """Take the step, and measure what went in and came out."""
        result = super().step(batches, share, held=held)
        given = [[getattr(batch, name) for batch in batches] for name in GIVEN]
        came = [[mx.array(result.learning_rate)], [result.loss], [result.grad_norm]]
        after = [list(self.factors.values()), list((self.ema_factors or {}).values())]
        self.rows.append([measure([array for array in each if array is not None]) for each in given + came + after])
        return result


def measure(arrays: Sequence[mx.array]) -> float:
    """Return the root of the mean square, in which neighbouring places do not count the same; 0 for no arrays."""
    if not arrays:
        return 0.0
    values = np.concatenate([np.array(array, dtype=np.float64).ravel() for array in arrays])
    places = 1 + 0.5 * np.cos(np.arange(values.size))
    return float(np.sqrt(np.average(values**2, weights=places)))


def trace(settings: Train, seed: int = SEED) -> np.ndarray:
    """Return the measures [steps, 11] float64 of a training."""
    model = tiny.transformer("klein")
    attach(model, settings, seed=seed)
    trainer = Watched(model, settings, seed)
    trainer.rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = corpus.data(Path(folder), tables(Path(folder)))
        Loop(trainer, data, settings, seed, lambda _line: None, lambda _step, _public: None).run()
    return np.array(trainer.rows)


def tables(store: Path) -> Tables:
    """Write the records of the made-up items, and captions that say their class."""
    written = corpus.write(store)
    names = [f"{item} of a class" for item in corpus.SHAPES]
    rows = write_embeddings(
        store, [(corpus.key(name), corpus.LENGTH, corpus.embedding(name)) for name in names], "float32"
    )
    classes = [
        {"caption_id": item, "role": "class", "text": name, **asdict(row)}
        for item, name, row in zip(corpus.SHAPES, names, rows, strict=True)
    ]
    written.embeddings.extend(classes)
    return written


def record(out: Path) -> None:
    """Write curves.npz."""
    np.savez_compressed(out / "curves.npz", **{name: trace(settings) for name, settings in CURVES.items()})
