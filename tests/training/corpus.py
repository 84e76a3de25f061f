"""A store with everything that training reads, made up: five items in two buckets, mirrored twins, captions."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from schemas.train import Train
from stages.dataset.draws import Draw
from stages.lora.merge import attach
from stages.stores.embeddings import write_embeddings
from stages.stores.latents import write_latents
from stages.training.data import Tables, TrainingData
from stages.training.step import Trainer
from tests.golden import tiny

SHAPES = {"item-a": (3, 5), "item-b": (3, 5), "item-c": (3, 5), "item-d": (5, 3), "item-e": (5, 3)}
CHANNELS, LENGTH, WIDTH = 8, 7, 24
EMPTY = "empty"


def key(name: str) -> str:
    """Return a made-up content key."""
    return name.encode().hex().ljust(64, "0")


def latent(item: str, *, flip: bool = False) -> np.ndarray:
    """Return the latent [8, h, w] float32 of an item; its twin is mirrored."""
    seed = int.from_bytes(item.encode(), "little")
    plain = np.random.default_rng(seed).standard_normal((CHANNELS, *SHAPES[item])).astype(np.float32)
    return plain[:, :, ::-1] if flip else plain


def embedding(name: str) -> np.ndarray:
    """Return the embedding [7, 24] float32 of an item's caption, or the empty one."""
    seed = int.from_bytes(name.encode(), "little") + 1
    return np.random.default_rng(seed).standard_normal((LENGTH, WIDTH)).astype(np.float32)


def write(store: Path, *, flips: bool = True) -> Tables:
    """Write all records into `store` and return the tables that lead to them."""
    latents: list[dict[str, Any]] = []
    for shape in sorted(set(SHAPES.values())):
        twins = [
            (item, flip)
            for item in SHAPES
            if SHAPES[item] == shape
            for flip in ((False, True) if flips else (False,))
        ]
        records = [(key(f"{item}{flip}"), latent(item, flip=flip)) for item, flip in twins]
        written = write_latents(store, records, "float32")
        latents += [
            {"item_id": item, "flip": flip, **asdict(row)} for (item, flip), row in zip(twins, written, strict=True)
        ]
    names = [*SHAPES, EMPTY]
    written = write_embeddings(store, [(key(name), LENGTH, embedding(name)) for name in names], "float32")
    embeddings = [
        {"caption_id": name, "role": EMPTY if name == EMPTY else "caption", "text": name, **asdict(row)}
        for name, row in zip(names, written, strict=True)
    ]
    items = [{"item_id": item, "path": f"{item}.png", "caption_id": item} for item in SHAPES]
    return Tables(items, {item: Draw(item_id=item, picture=item) for item in SHAPES}, latents, embeddings)


def data(store: Path, tables: Tables) -> TrainingData:
    """Return what training reads of `store`."""
    return TrainingData([store], tables)


def trainer(settings: Train) -> Trainer:
    """Return a trainer of a tiny transformer at step 0."""
    model = tiny.transformer("klein")
    attach(model, settings, seed=1)
    return Trainer(model, settings, 1)


def poison(model: Trainer) -> None:
    """Make every loss of a trainer undefined."""
    layer = model.transformer.img_in
    layer.weight = mx.full(layer.weight.shape, float("nan"), layer.weight.dtype)
