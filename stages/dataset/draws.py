"""How training draws the items of a dataset: which of them show one picture, how often, as what, and what counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from schemas.base import Strict
from schemas.manifest import Manifest
from schemas.tables import DRAWS


class Draw(Strict, frozen=True):
    """One row of the table. `picture` is the same for all items that differ in their caption alone.

    `prior` pictures are of the class; where there is no mask, "", all of the picture counts.
    """

    item_id: str
    picture: str
    times: int = 1
    prior: bool = False
    mask_path: str = ""
    mask_sha256: str = ""

    @property
    def plain(self) -> bool:
        """Whether the item is drawn as if there were no table: by itself, once an epoch, all of it."""
        return self == Draw(item_id=self.item_id, picture=self.item_id)


def read_draws(manifest: Manifest, folder: Path, items: Sequence[Mapping[str, Any]]) -> dict[str, Draw]:
    """Return how each of `items` is drawn; the table is only there when some are not plain. Raises Damaged."""
    from stages.stores.tables import read_table

    if DRAWS.name not in manifest.files:
        return {item["item_id"]: Draw(item_id=item["item_id"], picture=item["item_id"]) for item in items}
    return {row["item_id"]: Draw(**row) for row in read_table(folder / DRAWS.name, DRAWS)}
