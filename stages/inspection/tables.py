"""What the tables of a run say: ids that follow from content, and nothing missing, extra or under another key."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from schemas.errors import Damaged
from schemas.manifest import Manifest
from stages.contract.digests import digest_of
from stages.contract.runner import Encoder, Indexed, load_stage
from stages.dataset.captions import caption_id
from stages.dataset.pixels import plan
from stages.inspection.findings import Chain, Inspection
from stages.inspection.lineage import made_of

Rows = Sequence[Mapping[str, Any]]
NAMED = 3


def check_tables(inspection: Inspection, chain: Chain) -> None:
    """Check the tables of every stage that has some, as far as their files are whole."""
    if inspection.depth.quick:
        inspection.leave_out("what the tables say (left out by --quick)")
        return
    for stage in ("validate", "encode-latents", "encode-text"):
        if stage in chain and _whole(inspection, chain, stage):
            with inspection.noting():
                _check(inspection, stage, chain)


def _whole(inspection: Inspection, chain: Chain, *stages: str) -> bool:
    paths = [chain[stage][1] / name for stage in stages if stage in chain for name in chain[stage][0].files]
    return inspection.sound(*paths)


def _check(inspection: Inspection, stage: str, chain: Chain) -> None:
    manifest, folder = chain[stage]
    if stage == "validate":
        _dataset(inspection, folder)
    elif made_of(stage, "validate", chain) and _whole(inspection, chain, "validate"):
        _index(inspection, stage, chain)
    maker = load_stage(stage)
    if isinstance(maker, Indexed) and dict(maker.roles_of(manifest, folder)) != manifest.roles:
        _wrong(inspection, stage, "table.roles", "the tables are not those whose digests the manifest lists", folder)


def _dataset(inspection: Inspection, folder: Path) -> None:
    """Check that ids follow from content and are sorted, and that items and captions belong together."""
    from schemas.tables import CAPTIONS, DATASET
    from stages.stores.tables import read_table

    items = read_table(folder / DATASET.name, DATASET)
    captions = read_table(folder / CAPTIONS.name, CAPTIONS)
    inspection.checked += len(items) + len(captions)
    where = folder / DATASET.name
    ids = [row["item_id"] for row in items]
    if ids != sorted(set(ids)):
        _wrong(inspection, "validate", "dataset.order", "items are not sorted by their ids", where)
    if wrong := _not_following(items):
        what = f"{len(wrong)} ids of items do not follow from what they stand for, {_named(wrong)}"
        _wrong(inspection, "validate", "dataset.ids", what, where)
    if wrong := [row["caption_id"] for row in captions if row["caption_id"] != caption_id(row["text"])]:
        what = f"{len(wrong)} ids of captions do not follow from their texts, {_named(wrong)}"
        _wrong(inspection, "validate", "captions.ids", what, folder / CAPTIONS.name)
    used, known = {row["caption_id"] for row in items}, {row["caption_id"] for row in captions}
    if used != known:
        what = f"{len(used - known)} items lack their caption, {len(known - used)} captions belong to no item"
        _wrong(inspection, "validate", "dataset.captions", what, folder / CAPTIONS.name)


def _not_following(items: Rows) -> list[str]:
    """Return the ids that do not follow from picture, crop, caption and which duplicate it is.

    The last is not in the table; but of as many rows as say the same, each is one of the first so many.
    """
    alike: dict[str, list[str]] = defaultdict(list)
    following: set[str] = set()
    for row in items:
        steps = plan(tuple(row["crop"]), (row["bucket_width"], row["bucket_height"]), row["background"])
        content = [row["image_sha256"], steps, row["caption_id"]]
        same = alike[digest_of("item", content)]
        following.add(digest_of("item", [*content, len(same)])[:32])
        same.append(row["item_id"])
    return [name for names in alike.values() for name in names if name not in following]


def _index(inspection: Inspection, stage: str, chain: Chain) -> None:
    """Check that an index lists exactly the records the dataset asks for, each under its key, and where they lie."""
    manifest, folder = chain[stage]
    maker = load_stage(stage)
    assert isinstance(maker, Encoder)
    rows = index_rows(stage, manifest, folder)
    expected = maker.expected(manifest, chain["validate"])
    inspection.checked += len(rows)
    where = folder / "index.parquet"
    absent, extra = expected.keys() - rows.keys(), rows.keys() - expected.keys()
    if absent or extra:
        what = f"{len(absent)} records are missing and {len(extra)} too many, {_named([*absent, *extra])}"
        _wrong(inspection, stage, "index.records", what, where)
    if wrong := [name for name, row in rows.items() if expected.get(name, key_of(row)) != key_of(row)]:
        what = f"{len(wrong)} records are not made of what they stand for, {_named(wrong)}"
        _wrong(inspection, stage, "index.keys", what, where)
    if {name.partition("/")[0] for name in manifest.fragments} - {"fragments"} or _fragments(rows) != _listed(
        manifest
    ):
        what = "the index refers to other fragments than the manifest lists"
        _wrong(inspection, stage, "index.fragments", what, where)
    if len({key_of(row) for row in rows.values()}) != manifest.counts["total"]:
        what = f"expected {manifest.counts['total']} different records, found {len(set(map(key_of, rows.values())))}"
        _wrong(inspection, stage, "index.count", what, where)
    if stage == "encode-text":
        _tokens(inspection, rows, where)


def _tokens(inspection: Inspection, rows: Mapping[tuple[object, ...], Mapping[str, Any]], where: Path) -> None:
    wrong = [name for name, row in rows.items() if not 0 < row["tokens"] <= row["length"]]
    if wrong:
        what = f"{len(wrong)} texts have more tokens than places, or none, {_named(wrong)}"
        _wrong(inspection, "encode-text", "embeddings.tokens", what, where)


def index_rows(stage: str, manifest: Manifest, folder: Path) -> dict[tuple[object, ...], Mapping[str, Any]]:
    """Return the rows of an encoder's tables by what names them: as `Encoder.expected` does. Raises Damaged."""
    from schemas.tables import EMBEDDING_INDEX, LATENT_INDEX, MASK_INDEX
    from stages.stores.tables import read_table

    if stage == "encode-text":
        texts = read_table(folder / EMBEDDING_INDEX.name, EMBEDDING_INDEX)
        return {(row["role"], row["caption_id"], row["text"]): row for row in texts}
    tables = [LATENT_INDEX, *([MASK_INDEX] if MASK_INDEX.name in manifest.files else [])]
    return {
        (table.name, row["item_id"], row["flip"]): row
        for table in tables
        for row in read_table(folder / table.name, table)
    }


def key_of(row: Mapping[str, Any]) -> str:
    """Return the key of the record in a row of either index."""
    return row["latent_key"] if "latent_key" in row else row["embedding_key"]


def _fragments(rows: Mapping[tuple[object, ...], Mapping[str, Any]]) -> set[str]:
    return {row["fragment"] for row in rows.values()}


def _listed(manifest: Manifest) -> set[str]:
    """Return the fragments whose files a manifest lists: those of latents are folders of two."""
    return {name if name.endswith(".parquet") else name.rpartition("/")[0] for name in manifest.fragments}


def _wrong(inspection: Inspection, stage: str, code: str, what: str, where: Path) -> None:
    inspection.error(Damaged, code, what, where, f"{inspection.job.remedy(stage)} --force")


def _named(names: Collection[object]) -> str:
    shown = [" ".join(map(str, each)) if isinstance(each, tuple) else str(each) for each in names]
    return f"first {', '.join(sorted(shown)[:NAMED])}"
