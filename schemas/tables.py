"""The columns of every Parquet table, as readers outside this project see them too. No column is ever null."""

from __future__ import annotations

from typing import Literal

from schemas.base import Strict

# `box` is a fixed-size list of four int32.
Column = Literal["string", "int32", "bool", "box", "large_binary"]


class Table(Strict, frozen=True):
    """A table's columns in order, those that together identify a row (none: rows may repeat), and who writes it."""

    name: str
    stage: str
    columns: dict[str, Column]
    unique: tuple[str, ...]


# One row per picture, resolution and caption variant. `width` and `height` are the picture's after its EXIF rotation;
# `crop` is [x0, y0, x1, y1] in it, before scaling; `path` is relative to the dataset; `background` is the colour
# under a transparent picture, "" for an opaque one.
DATASET = Table(
    name="dataset.parquet",
    stage="validate",
    columns={
        "item_id": "string",
        "path": "string",
        "image_sha256": "string",
        "width": "int32",
        "height": "int32",
        "bucket_width": "int32",
        "bucket_height": "int32",
        "crop": "box",
        "caption_id": "string",
        "background": "string",
    },
    unique=("item_id",),
)

# How training draws the items; there only when some are not drawn once an epoch by themselves. `picture` is
# the smallest item_id among the items that differ in their caption alone; a picture comes `times` times an epoch;
# `prior` pictures are of the class. `mask_path`, relative to the dataset, is "" where all of a picture counts.
DRAWS = Table(
    name="draws.parquet",
    stage="validate",
    columns={
        "item_id": "string",
        "picture": "string",
        "times": "int32",
        "prior": "bool",
        "mask_path": "string",
        "mask_sha256": "string",
    },
    unique=("item_id",),
)

# Each different caption once; `text` is what trains, after the trigger is in.
CAPTIONS = Table(
    name="captions.parquet",
    stage="validate",
    columns={"caption_id": "string", "text": "string"},
    unique=("caption_id",),
)

# Where each item's latent [channels, height, width] lies; `fragment` is a path below the store.
LATENT_INDEX = Table(
    name="index.parquet",
    stage="encode-latents",
    columns={
        "item_id": "string",
        "flip": "bool",
        "latent_key": "string",
        "fragment": "string",
        "row": "int32",
        "channels": "int32",
        "height": "int32",
        "width": "int32",
        "dtype": "string",
        "sha256": "string",
    },
    unique=("item_id", "flip"),
)

# Where the mask [1, height, width] of each item that has one lies, stored as latents are.
MASK_INDEX = Table(
    name="masks.parquet", stage="encode-latents", columns=LATENT_INDEX.columns, unique=LATENT_INDEX.unique
)

# Where each text's embedding [length, width] lies; `role` is caption, empty, prompt or class; `tokens` are not
# padding. A row of role class has the caption_id of the caption it stands in for, in which its `text` has the class
# word for the trigger.
EMBEDDING_INDEX = Table(
    name="index.parquet",
    stage="encode-text",
    columns={
        "caption_id": "string",
        "role": "string",
        "text": "string",
        "embedding_key": "string",
        "fragment": "string",
        "row": "int32",
        "tokens": "int32",
        "length": "int32",
        "width": "int32",
        "dtype": "string",
        "sha256": "string",
    },
    unique=(),
)

# A part of embeddings; `data` holds length x width values, row-major, little-endian.
EMBEDDING_PART = Table(
    name="part",
    stage="encode-text",
    columns={"embedding_key": "string", "data": "large_binary"},
    unique=("embedding_key",),
)
