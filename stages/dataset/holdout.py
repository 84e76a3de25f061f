"""Which pictures are kept from training to measure it on: a pure function of their contents and a seed.

A picture is held out with all its sizes and captions: the loss on a size of it would else be that of a training
picture.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from schemas.errors import BadConfig, Fault
from schemas.validation import Validation


def held_out(rows: Sequence[Mapping[str, Any]], spec: Validation | None) -> frozenset[str]:
    """Return the item ids kept from training, of the rows of dataset.parquet; none without `spec`.

    Raises BadConfig for names that no picture has, and when nothing would be left to train on.
    """
    if spec is None:
        return frozenset()
    chosen = _named(rows, spec.names) if spec.names else _drawn(rows, spec)
    held = frozenset(row["item_id"] for row in rows if row["image_sha256"] in chosen)
    if len(held) == len(rows):
        raise BadConfig(
            "validation.nothing_left",
            "validation would hold out every picture",
            where="train.validation",
            why=f"there are {len({row['image_sha256'] for row in rows})} pictures",
            fix="hold out fewer, or leave out [train.validation]",
        )
    return held


def _drawn(rows: Sequence[Mapping[str, Any]], spec: Validation) -> Collection[str]:
    def draw(image: str) -> bytes:
        return hashlib.sha256(f"hold-out/{spec.seed}/{image}".encode()).digest()

    return sorted({row["image_sha256"] for row in rows}, key=draw)[: spec.pictures]


def _named(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Collection[str]:
    images = {row["path"]: row["image_sha256"] for row in rows}
    if unknown := [name for name in names if name not in images]:
        raise BadConfig.of([_unknown(name, list(images)) for name in unknown])
    return {images[name] for name in names}


def _unknown(name: str, known: list[str]) -> Fault:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return Fault(
        code="validation.unknown_picture",
        what=f"no picture of the dataset is called {name}",
        where="train.validation.names",
        why=f"there are {len(known)} pictures",
        fix=f"did you mean {near[0]}?" if near else "name paths relative to validate.dataset",
    )
