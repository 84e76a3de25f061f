"""What training reads: latents and embeddings by item, handed over as numpy by one thread that reads ahead."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from schemas.errors import Damaged
from stages.stores.embeddings import EmbeddingReader, EmbeddingRow
from stages.stores.latents import LatentReader, LatentRow

Made = TypeVar("Made")


@dataclass(frozen=True)
class Sample:
    """One picture of a batch: whether mirrored, and whether its caption is dropped for the empty one."""

    item_id: str
    flip: bool
    dropped: bool


@dataclass(frozen=True)
class Batch:
    """Latents [B, C, h, w] float32 of one bucket, and embeddings [B, L, J] float32, with the items they belong to.

    `class_text` [B, L, J] embeds the captions with the class word in the trigger's place, where asked for.
    """

    item_ids: tuple[str, ...]
    latents: np.ndarray
    text: np.ndarray
    class_text: np.ndarray | None = None


class TrainingData:
    """The latents and embeddings of every item, from the two encoders' indexes."""

    def __init__(
        self,
        stores: Sequence[Path],
        items: Sequence[Mapping[str, Any]],
        latents: Sequence[Mapping[str, Any]],
        embeddings: Sequence[Mapping[str, Any]],
    ) -> None:
        """Take the rows of dataset.parquet and of both index.parquet."""
        self._latents = {(row["item_id"], row["flip"]): latent_row(row) for row in latents}
        self._captions = {row["item_id"]: row["caption_id"] for row in items}
        self._texts = {row["caption_id"]: embedding_row(row) for row in embeddings if row["role"] == "caption"}
        self._classes = {row["caption_id"]: embedding_row(row) for row in embeddings if row["role"] == "class"}
        self._empty = next(embedding_row(row) for row in embeddings if row["role"] == "empty")
        self._latent_reader = LatentReader(stores)
        self._embedding_reader = EmbeddingReader(stores)

    @property
    def buckets(self) -> list[tuple[str, tuple[int, int]]]:
        """Return (item_id, (h, w) of its latent) of every item."""
        return [(item, (row.height, row.width)) for (item, flip), row in self._latents.items() if not flip]

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
        return Batch(tuple(sample.item_id for sample in samples), np.stack(latents), np.stack(text), class_text)

    def _latent(self, sample: Sample) -> np.ndarray:
        row = self._latents[sample.item_id, sample.flip]
        latent = widened(self._latent_reader.read(row), row.dtype)
        if not np.isfinite(latent).all():
            raise Damaged(
                "latents.not_finite",
                "a stored latent is not finite",
                where=f"item {sample.item_id}",
                fix="flux2-lora encode-latents --config ... --force",
            )
        return latent

    def _text(self, sample: Sample) -> np.ndarray:
        row = self._empty if sample.dropped else self._texts[self._captions[sample.item_id]]
        return widened(self._embedding_reader.read(row), row.dtype)

    def _class_text(self, sample: Sample) -> np.ndarray:
        row = self._classes[self._captions[sample.item_id]]
        return widened(self._embedding_reader.read(row), row.dtype)


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
