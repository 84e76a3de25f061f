"""What training reads: latents and embeddings by visit, handed over as numpy by one thread that reads ahead.

A picture that comes several times an epoch has a visit for each, with draws of its own; its name is the picture's
item_id, from the second time on with a number behind it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from schemas.errors import GIVEN, Damaged
from schemas.train import Train
from stages.dataset.buckets import PATCH_PX
from stages.dataset.draws import Draw
from stages.dataset.order import PhasedOrder, Visits
from stages.stores.embeddings import EmbeddingReader, EmbeddingRow
from stages.stores.latents import LatentReader, LatentRow

Made = TypeVar("Made")


@dataclass(frozen=True)
class Sample:
    """One picture of a batch: whether mirrored, and whether its caption is dropped for the empty one.

    `caption` in 0..1 picks among the variants of its caption.
    """

    visit: str
    flip: bool
    dropped: bool
    caption: float = 0.0


@dataclass(frozen=True)
class Picture:
    """A picture in one size: its file, the item its latent is listed under, its captions, its visits an epoch.

    `prior` pictures are of the class.
    """

    path: str
    item_id: str
    captions: tuple[str, ...]
    times: int
    prior: bool

    @property
    def visits(self) -> list[str]:
        """The names of its visits."""
        return [self.item_id, *(f"{self.item_id}*{number}" for number in range(1, self.times))]


@dataclass(frozen=True)
class Batch:
    """Latents [B, C, h, w] float32 of one bucket, and embeddings [B, L, J] float32, a row per picture.

    `class_text` [B, L, J] embeds the captions with the class word in the trigger's place, where asked for; `masks`
    [B, 1, h, w] float32 in 0..1 say where the pictures count, where there are any; `prior` pictures are of the class.
    """

    latents: np.ndarray
    text: np.ndarray
    class_text: np.ndarray | None = None
    masks: np.ndarray | None = None
    prior: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Tables:
    """The rows of dataset.parquet, how each item is drawn, and the rows of both encoders' index.parquet.

    `masks` are the rows of masks.parquet, None where masks are not to be read.
    """

    items: Sequence[Mapping[str, Any]]
    draws: Mapping[str, Draw]
    latents: Sequence[Mapping[str, Any]]
    embeddings: Sequence[Mapping[str, Any]]
    masks: Sequence[Mapping[str, Any]] | None = None


class TrainingData:
    """The latents and embeddings of every picture in every size."""

    def __init__(self, stores: Sequence[Path], tables: Tables) -> None:
        self._pictures = pictures(tables.items, tables.draws)
        self._visits = {name: each for each in self._pictures for name in each.visits}
        latents, embeddings = tables.latents, tables.embeddings
        self._shapes = {row["item_id"]: (row["height"], row["width"]) for row in latents}
        self._latents = _by_item(latents)
        self._masks = None if tables.masks is None else _by_item(tables.masks)
        self._texts = {row["caption_id"]: embedding_row(row) for row in embeddings if row["role"] == "caption"}
        self._classes = {row["caption_id"]: embedding_row(row) for row in embeddings if row["role"] == "class"}
        self._empty = next(embedding_row(row) for row in embeddings if row["role"] == "empty")
        self._latent_reader = LatentReader(stores)
        self._embedding_reader = EmbeddingReader(stores)

    @property
    def buckets(self) -> Visits:
        """Return (visit, (h, w) of its latent) of every visit of an epoch."""
        return self._visits_of(self._pictures)

    def order(self, settings: Train, seed: int) -> PhasedOrder:
        """Return the visits of every micro-step of a training."""
        count = settings.gradient_accumulation
        ends = [phase.until or 0 for phase in settings.resolutions[:-1]]
        phases = [self._visits_at(phase.sizes) for phase in settings.resolutions] or [self.buckets]
        starts = [0, *(step * count for step in ends)]
        return PhasedOrder(list(zip(starts, phases, strict=True)), settings.batch_size, seed)

    def _visits_at(self, sizes: Sequence[int]) -> Visits:
        """Return every visit of the pictures in those of their sizes that `sizes` (px) stand for."""
        files: dict[str, list[Picture]] = defaultdict(list)
        for each in self._pictures:
            files[each.path].append(each)
        return self._visits_of([each for same in files.values() for each in self._in_sizes(same, sizes)])

    def _in_sizes(self, same: Sequence[Picture], sizes: Sequence[int]) -> list[Picture]:
        """Return of one picture for each size the largest that it can hold, else the smallest there is."""
        areas = {each.item_id: prod(self._shapes[each.item_id]) * PATCH_PX**2 for each in same}
        rising = sorted(same, key=lambda each: (areas[each.item_id], each.item_id))
        chosen = [max((n for n, each in enumerate(rising) if areas[each.item_id] <= s**2), default=0) for s in sizes]
        return [rising[number] for number in sorted(set(chosen))]

    def _visits_of(self, pictures: Sequence[Picture]) -> Visits:
        return [(name, self._shapes[each.item_id]) for each in pictures for name in each.visits]

    @property
    def items(self) -> list[str]:
        """The item of every picture in every size: the name of its first visit."""
        return [each.item_id for each in self._pictures]

    @property
    def flips(self) -> bool:
        """Whether every item has a mirrored twin."""
        return any(flip for _, flip in self._latents)

    def read(self, samples: Sequence[Sample], *, classes: bool = False) -> Batch:
        """Return a batch, with class captions too if `classes`.

        Raises Damaged, naming the item, for bytes that changed or values that are not finite.
        """
        latents = [self._latent(sample) for sample in samples]
        text = [self._text(sample) for sample in samples]
        class_text = np.stack([self._class_text(sample) for sample in samples]) if classes else None
        masks = None if self._masks is None else np.stack([self._mask(sample) for sample in samples])
        prior = tuple(self._visits[sample.visit].prior for sample in samples)
        return Batch(np.stack(latents), np.stack(text), class_text, masks, prior)

    def _latent(self, sample: Sample) -> np.ndarray:
        item_id = self._visits[sample.visit].item_id
        row = self._latents[item_id, sample.flip]
        return _finite(widened(self._latent_reader.read(row), row.dtype), "latent", f"item {item_id}")

    def _mask(self, sample: Sample) -> np.ndarray:
        """Return the mask [1, h, w] float32: ones where a picture has none."""
        item_id = self._visits[sample.visit].item_id
        row = (self._masks or {}).get((item_id, sample.flip))
        return np.ones((1, *self._shapes[item_id]), np.float32) if row is None else self._latent_reader.read(row)

    def _text(self, sample: Sample) -> np.ndarray:
        return self._embedding(self._empty if sample.dropped else self._texts[self._caption(sample)])

    def _class_text(self, sample: Sample) -> np.ndarray:
        return self._embedding(self._classes[self._caption(sample)])

    def _embedding(self, row: EmbeddingRow) -> np.ndarray:
        where = f"{row.fragment}, record {row.embedding_key}"
        return _finite(widened(self._embedding_reader.read(row), row.dtype), "embedding", where)

    def _caption(self, sample: Sample) -> str:
        captions = self._visits[sample.visit].captions
        return captions[int(sample.caption * len(captions))]


def _finite(record: np.ndarray, kind: str, where: str) -> np.ndarray:
    if not np.isfinite(record).all():
        stage = {"latent": "encode-latents", "embedding": "encode-text"}[kind]
        what, fix = f"a stored {kind} is not finite", f"flux2-lora {stage} {GIVEN} --force"
        raise Damaged(f"{kind}s.not_finite", what, where=where, fix=fix)
    return record


def pictures(items: Sequence[Mapping[str, Any]], draws: Mapping[str, Draw]) -> list[Picture]:
    """Return every picture in every size, its caption variants gathered."""
    paths = {item["item_id"]: item["path"] for item in items}
    captions: dict[str, list[str]] = defaultdict(list)
    for item in items:
        captions[draws[item["item_id"]].picture].append(item["caption_id"])
    return [
        Picture(paths[name], name, tuple(sorted(each)), draws[name].times, draws[name].prior)
        for name, each in captions.items()
    ]


def _by_item(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, bool], LatentRow]:
    return {(row["item_id"], row["flip"]): latent_row(row) for row in rows}


def latent_row(row: Mapping[str, Any]) -> LatentRow:
    """Return the store's row of a row of the latents' index."""
    return LatentRow(**{name: row[name] for name in LatentRow.__dataclass_fields__})


def embedding_row(row: Mapping[str, Any]) -> EmbeddingRow:
    """Return the store's row of a row of the embeddings' index."""
    return EmbeddingRow(**{name: row[name] for name in EmbeddingRow.__dataclass_fields__})


def widened(array: np.ndarray, dtype: str) -> np.ndarray:
    """Return a record as float32; bfloat16 comes as its bits, the upper half of a float32's."""
    return (array.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else array


def ahead(make: Callable[[int], Made], start: int, stop: int) -> Generator[Made]:
    """Yield make(start) .. make(stop - 1); one thread is always one ahead.

    MLX arrays do not cross threads: `make` returns numpy.
    """
    if start >= stop:
        return
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as pool:
        coming = pool.submit(make, start)
        for index in range(start + 1, stop + 1):
            ready = coming.result()
            if index < stop:
                coming = pool.submit(make, index)
            yield ready
