"""The dataset at a glance: a small picture of everything trained, its captions and its buckets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from schemas.errors import RejectedInput
from schemas.tables import CAPTIONS, DATASET
from stages.contract.config import located
from stages.contract.digests import sha256_bytes
from stages.dataset.decoder import decoders
from stages.dataset.draws import read_draws
from stages.dataset.pixels import read_picture
from stages.pages.pictures import data_uri
from stages.pages.record import Record
from stages.stores.tables import read_table

THUMBNAIL_PX = 240
THUMBNAIL_QUALITY = 78
# Of larger datasets, the first by path.
MOST_CARDS = 60

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Card:
    """One training picture: where it lies, its captions and buckets; without `src`, `missing` says why.

    Both are empty where nothing says in which folder the pictures are.
    """

    path: str
    captions: Sequence[str]
    buckets: Sequence[str]
    prior: bool
    src: str = ""
    missing: str = ""


@dataclass(frozen=True)
class Contact:
    """The dataset at a glance: (bucket, width and height as shares, its items), cards, how many have no card."""

    buckets: Sequence[tuple[str, float, float, int]]
    cards: Sequence[Card]
    left_out: int


def contact_of(record: Record) -> Contact | None:
    """Return the dataset that the run's validate saw; None when that is not known. Raises Damaged for its tables."""
    if "validate" not in record.made:
        return None
    manifest, folder = record.made["validate"], record.artifacts["validate"]
    rows = read_table(folder / DATASET.name, DATASET)
    texts = {row["caption_id"]: row["text"] for row in read_table(folder / CAPTIONS.name, CAPTIONS)}
    draws = read_draws(manifest, folder, rows)
    counts: dict[tuple[int, int], int] = {}
    by_path: dict[str, list[Row]] = {}
    for row in rows:
        bucket = (row["bucket_width"], row["bucket_height"])
        counts[bucket] = counts.get(bucket, 0) + 1
        by_path.setdefault(row["path"], []).append({**row, "prior": draws[row["item_id"]].prior})
    cards = [_card(record, path, by_path[path], texts) for path in sorted(by_path)[:MOST_CARDS]]
    longest = max((max(bucket) for bucket in counts), default=1)
    return Contact(
        buckets=[
            (f"{width} x {height}", width / longest, height / longest, counts[width, height])
            for width, height in sorted(counts, key=lambda each: (-counts[each], each))
        ],
        cards=cards,
        left_out=len(by_path) - len(cards),
    )


def _card(record: Record, path: str, rows: Sequence[Row], texts: Mapping[str, str]) -> Card:
    """Return the card of one picture, cut as its largest bucket cuts it."""
    largest = max(rows, key=lambda row: row["bucket_width"] * row["bucket_height"])
    src, missing = _thumbnail(record, path, largest)
    return Card(
        path=path,
        captions=sorted({texts.get(row["caption_id"], "") for row in rows}),
        buckets=sorted({f"{row['bucket_width']} x {row['bucket_height']}" for row in rows}),
        prior=largest["prior"],
        src=src,
        missing=missing,
    )


def _thumbnail(record: Record, path: str, row: Row) -> tuple[str, str]:
    """Return the data URI of a picture as training sees it; else "", and why there is none."""
    import numpy as np
    from PIL import Image

    if record.config is None:
        return "", ""
    bucket = (row["bucket_width"], row["bucket_height"])
    share = min(1.0, THUMBNAIL_PX / max(bucket))
    size = (max(1, round(bucket[0] * share)), max(1, round(bucket[1] * share)))
    x0, y0, x1, y1 = row["crop"]
    try:
        data = read_picture(located(record.config.validate.dataset, record.base) / path, path)
        # What lies there now may be another picture of that name.
        if sha256_bytes(data) != row["image_sha256"]:
            return "", "the picture was changed since"
        ask = decoders(record.config.validate.max_megapixels)
        values = ask.pixels(data, (x0, y0, x1, y1), size, row["background"], where=path)
    except RejectedInput as error:
        return "", error.faults[0].what
    upright = np.clip((values.transpose(1, 2, 0) + 1) * 127.5, 0, 255).round().astype(np.uint8)
    return data_uri(Image.fromarray(upright), THUMBNAIL_QUALITY), ""
