"""Fragments put together: records that came a few at a time are stored again in full fragments, under a new index.

The artifact keeps its key and its digest, which never say where a record lies. The old fragments stay as long as
anything refers to them.
"""

from __future__ import annotations

import math
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from schemas.errors import Damaged, Stale
from schemas.manifest import Manifest
from stages.contract.artifacts import MANIFEST, Built, Plan, read_manifest, write_manifest
from stages.contract.publish import publish_folder, workspace
from stages.inspection.reachability import whole_fragment, withdraw
from stages.inspection.tables import key_of

if TYPE_CHECKING:
    from schemas.tables import Table
    from stages.stores.embeddings import EmbeddingRow
    from stages.stores.latents import LatentRow

    Stored = LatentRow | EmbeddingRow
Row = Mapping[str, Any]
Group = tuple[object, ...]


def scattered(store: Path, folder: Path, manifest: Manifest) -> bool:
    """Whether the records of an artifact lie in more fragments of our store than they need. Raises Damaged."""
    if manifest.stage not in ("encode-latents", "encode-text"):
        return False
    rows = [row for _, listed in _tables(folder, manifest) for row in listed]
    fragments = {row["fragment"] for row in rows}
    return len(fragments) > sum(math.ceil(len(each) / _most(each)) for each in _groups(rows).values()) and all(
        (store / name).exists() for name in fragments
    )


def gather(store: Path, folder: Path, manifest: Manifest) -> Manifest:
    """Compact an artifact that was just made, delete what nothing refers to any more, and return its new manifest.

    The caller holds the store's lock alone. Raises Damaged, NoResources.
    """
    gathered = compact(store, folder, manifest)
    # Beside an artifact that cannot be read nothing is known to be needless.
    with suppress(Damaged, Stale):
        withdraw(store, [store / name for name in sorted(_fragments(manifest) - _in_use(store, manifest.stage))])
    return gathered


def _in_use(store: Path, stage: str) -> set[str]:
    """Return the fragments that any artifact of a stage refers to, whether or not a run still names it."""
    return {
        name
        for path in (store / stage).iterdir()
        if (path / MANIFEST).exists()
        for name in _fragments(read_manifest(path))
    }


def _fragments(manifest: Manifest) -> set[str]:
    return {whole_fragment(name) for name in manifest.fragments}


def compact(store: Path, folder: Path, manifest: Manifest) -> Manifest:
    """Store the records of an artifact in full fragments and publish its index anew; return its new manifest.

    Raises Damaged, NoResources.
    """
    from stages.stores.tables import write_table

    tables = _tables(folder, manifest)
    rows = [row for _, listed in tables for row in listed]
    stored: dict[str, Stored] = {}
    for records in _groups(rows).values():
        keys, most = sorted(records), _most(records)
        for start in range(0, len(keys), most):
            stored |= _store(store, [records[key] for key in keys[start : start + most]])
    with workspace(store) as space:
        work = space / "artifact"
        shutil.copytree(folder, work, ignore=shutil.ignore_patterns("manifest.json"))
        for table, listed in tables:
            moved = [
                {**row, "fragment": stored[key_of(row)].fragment, "row": stored[key_of(row)].row} for row in listed
            ]
            (work / table.name).unlink()
            write_table(work / table.name, table, moved)
        names = {each.fragment for each in stored.values()}
        files = {path.as_posix(): store for name in sorted(names) for path in _files(manifest.stage, name)}
        identity = (manifest.stage, manifest.version, manifest.key)
        built = Built(manifest.roles, manifest.counts, files)
        gathered = write_manifest(work, identity, Plan(manifest.params, manifest.inputs), built, manifest.provenance)
        publish_folder(work, folder)
    return gathered


def _most(records: Mapping[str, Row]) -> int:
    """Return how many records of a group one fragment holds. Of texts no more: each read parses its part's footer."""
    from stages.stores.fragments import LAYOUTS, MOST_RECORDS, full

    row = next(iter(records.values()))
    if "latent_key" not in row:
        return MOST_RECORDS
    return full(row["channels"] * row["height"] * row["width"] * LAYOUTS[row["dtype"]].itemsize)


def _tables(folder: Path, manifest: Manifest) -> list[tuple[Table, list[dict[str, Any]]]]:
    """Return the tables of an encoder's artifact that say where records lie, with their rows. Raises Damaged."""
    from schemas.tables import EMBEDDING_INDEX, LATENT_INDEX, MASK_INDEX
    from stages.stores.tables import read_table

    known = [EMBEDDING_INDEX] if manifest.stage == "encode-text" else [LATENT_INDEX, MASK_INDEX]
    return [(table, read_table(folder / table.name, table)) for table in known if table.name in manifest.files]


def _groups(rows: list[Row] | list[dict[str, Any]]) -> dict[Group, dict[str, Row]]:
    """Return the records, each once, by what one fragment holds: latents of one shape and type, texts of one type."""
    groups: dict[Group, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        shape = (row["channels"], row["height"], row["width"]) if "latent_key" in row else ()
        groups[*shape, row["dtype"]][key_of(row)] = row
    return groups


def _store(store: Path, rows: list[Row]) -> dict[str, Stored]:
    """Read records, every byte checked, and store them as one fragment."""
    from stages.stores.embeddings import EmbeddingReader, write_embeddings
    from stages.stores.latents import LatentReader, write_latents
    from stages.training.data import embedding_row, latent_row

    dtype = rows[0]["dtype"]
    if "latent_key" in rows[0]:
        latents = LatentReader([store])
        written = write_latents(store, [(key_of(row), latents.read(latent_row(row))) for row in rows], dtype)
        return {each.latent_key: each for each in written}
    texts = EmbeddingReader([store])
    records = [(key_of(row), row["tokens"], texts.read(embedding_row(row))) for row in rows]
    return {each.embedding_key: each for each in write_embeddings(store, records, dtype)}


def _files(stage: str, fragment: str) -> Iterator[Path]:
    from stages.stores import embeddings, latents

    yield from (latents if stage == "encode-latents" else embeddings).fragment_files(Path(), fragment)
