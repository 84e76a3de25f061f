"""encode-latents: every picture of the dataset through the autoencoder, once per distinct content and crop.

Masks come along: cropped and scaled as their pictures, one number per cell of the latent.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from schemas.errors import Fault, RejectedInput, Stale
from schemas.manifest import Manifest
from schemas.validate import MaskSource
from stages.contract.artifacts import Built, Plan, holder, keyed
from stages.contract.digests import digest_of, sha256_bytes, unknown
from stages.contract.job import Job
from stages.contract.places import require_room
from stages.contract.runner import upstream
from stages.dataset import pixels
from stages.dataset.buckets import PATCH_PX
from stages.dataset.draws import Draw
from stages.dataset.stand_in import require_pictures
from stages.flux2.identity import encoder_digest, model_of, model_without_making

if TYPE_CHECKING:
    import numpy as np

    from stages.flux2.autoencoder import Autoencoder
    from stages.stores.latents import LatentRow

INDEX = "index.parquet"
# Fragments of 64 come to this with 16,000 latents.
MANY_FILES = 500


class EncodeLatents:
    """Reads validate's items and the pictures; its roles `latents` and `masks` are what training reads of them."""

    name = "encode-latents"
    version = 1

    def plan(self, job: Job) -> Plan:
        """Key the settings, the pictures and their crops, and the encoder's tensors."""
        model = model_of(job)
        dataset, _ = upstream(job, "validate")
        settings = keyed(job.config.encode_latents)
        inputs = {"pictures": dataset.roles["pictures"], "autoencoder": encoder_digest(job, model)}
        if "masks" in dataset.roles:
            inputs["masks"] = dataset.roles["masks"]
        return Plan(settings, inputs)

    def build(self, job: Job, plan: Plan, work: Path) -> Built:
        """Encode what no store has yet, one fragment of at most 64 at a time, and write the index.

        The counts are of latents and masks together.
        """
        from schemas.tables import DATASET, LATENT_INDEX, MASK_INDEX
        from stages.dataset.draws import read_draws
        from stages.flux2.backend import prepare
        from stages.stores.latents import fragment_files
        from stages.stores.tables import read_table, write_table

        manifest, folder = upstream(job, "validate")
        items = read_table(folder / "dataset.parquet", DATASET)
        wanted = list(_wanted(plan, items))
        covers = list(_wanted_masks(plan, manifest, items, read_draws(manifest, folder, items)))
        distinct = {each.key: each for each in [*wanted, *covers]}
        known = _known(job, distinct)
        missing = [each for key, each in distinct.items() if key not in known]
        _require_room(job, missing)
        pictures = [each for each in missing if isinstance(each, _Wanted)]
        known |= _encode(job, pictures)
        known |= _cover(job, [each for each in missing if isinstance(each, _WantedMask)])
        rows = [_index_row(each, known[each.key]) for each in wanted]
        write_table(work / INDEX, LATENT_INDEX, rows)
        masks = [_index_row(each, known[each.key]) for each in covers]
        if "masks" in plan.inputs:
            write_table(work / MASK_INDEX.name, MASK_INDEX, masks)
        names = sorted({known[key].fragment for key in distinct})
        files = [path.as_posix() for name in names for path in fragment_files(Path(), name)]
        return Built(
            roles=_roles(rows, masks if "masks" in plan.inputs else None),
            counts=_counts(len(distinct), len(missing)),
            fragments={name: holder(name, job.stores) for name in files},
            device=prepare().name if pictures else "",
        )

    def foresee(self, job: Job, plan: Plan, work: Path) -> Built:
        """Count what no store has yet, and write the index with what is unknown of it."""
        from schemas.tables import LATENT_INDEX, MASK_INDEX
        from stages.stores.tables import write_table

        wanted = _all(Plan(plan.params, plan.inputs), upstream(job, "validate"))
        distinct = {each.key: each for each in wanted}
        known = _known(job, distinct)
        coming = {key: _coming(job, each) for key, each in distinct.items() if key not in known}
        tables = {
            kind.table: [_index_row(each, (known | coming)[each.key]) for each in wanted if isinstance(each, kind)]
            for kind in (_Wanted, _WantedMask)
        }
        write_table(work / INDEX, LATENT_INDEX, tables[INDEX])
        if "masks" in plan.inputs:
            write_table(work / MASK_INDEX.name, MASK_INDEX, tables[MASK_INDEX.name])
        masks = tables[MASK_INDEX.name] if "masks" in plan.inputs else None
        return Built(roles=_roles(tables[INDEX], masks), counts=_counts(len(distinct), len(coming)))

    def reused(self, manifest: Manifest) -> Mapping[str, int]:
        """Everything was there."""
        return _counts(manifest.counts["total"], 0)

    def restore(self, job: Job, folder: Path, manifest: Manifest) -> None:
        """Leave nothing in the run folder: latents are not looked at."""

    def scattered(self, job: Job, manifest: Manifest, folder: Path) -> bool:
        """Whether there are more than `MANY_FILES`, and fewer would do."""
        from stages.inspection.compaction import scattered

        return len(manifest.fragments) > MANY_FILES and scattered(job.store, folder, manifest)

    def gather(self, job: Job, manifest: Manifest, folder: Path) -> Manifest:
        """Store the latents in full fragments. Raises Damaged, NoResources."""
        from stages.inspection.compaction import gather

        job.say(f"putting {len(manifest.fragments)} files of fragments together")
        return gather(job.store, folder, manifest)

    def roles_of(self, manifest: Manifest, folder: Path) -> Mapping[str, str]:
        """Return the digests of what training reads, from the indices in `folder`. Raises Damaged."""
        from schemas.tables import LATENT_INDEX, MASK_INDEX
        from stages.stores.tables import read_table

        masks = read_table(folder / MASK_INDEX.name, MASK_INDEX) if "masks" in manifest.inputs else None
        return _roles(read_table(folder / INDEX, LATENT_INDEX), masks)

    def expected(self, manifest: Manifest, validated: tuple[Manifest, Path]) -> dict[tuple[object, ...], str]:
        """Return the key of every latent and mask by (table, item_id, flip). Raises Damaged."""
        return {
            (each.table, each.item["item_id"], each.flip): each.key
            for each in _all(Plan(manifest.params, manifest.inputs), validated)
        }

    def encode_again(
        self, job: Job, manifest: Manifest, validated: tuple[Manifest, Path], keys: Collection[str]
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (key, record as stored) of latents and masks. Raises Stale for a picture that changed."""
        from stages.flux2.backend import prepare
        from stages.flux2.load import load_autoencoder

        prepare()
        autoencoder = load_autoencoder(model_without_making(job), encoder=True, decoder=False)
        listed = _all(Plan(manifest.params, manifest.inputs), validated)
        wanted = {each.key: each for each in listed}
        for each in (wanted[key] for key in keys if key in wanted):
            yield each.key, _latent(job, autoencoder, each) if isinstance(each, _Wanted) else _mask(job, each)


class _Wanted(msgspec.Struct, frozen=True):
    """One latent that the dataset asks for: `item` is its row of dataset.parquet."""

    table: ClassVar[str] = INDEX
    item: dict[str, Any]
    flip: bool
    key: str


class _WantedMask(msgspec.Struct, frozen=True):
    """One mask that the dataset asks for: `draw` names its file."""

    table: ClassVar[str] = "masks.parquet"
    item: dict[str, Any]
    flip: bool
    key: str
    draw: Draw
    source: MaskSource


def _counts(total: int, encoded: int) -> dict[str, int]:
    return {"total": total, "encoded": encoded, "reused": total - encoded}


def _all(plan: Plan, validated: tuple[Manifest, Path]) -> list[_Wanted | _WantedMask]:
    """Return what an artifact of that plan must list of the dataset. Raises Damaged."""
    from schemas.tables import DATASET
    from stages.dataset.draws import read_draws
    from stages.stores.tables import read_table

    dataset, folder = validated
    items = read_table(folder / DATASET.name, DATASET)
    return [*_wanted(plan, items), *_wanted_masks(plan, dataset, items, read_draws(dataset, folder, items))]


def _wanted(plan: Plan, items: Sequence[dict[str, Any]]) -> Iterator[_Wanted]:
    for item in items:
        for flip in (False, True) if plan.params["flip"] else (False,):
            value = {
                "image": item["image_sha256"],
                "plan": pixels.plan(_crop(item), _bucket(item), item["background"]),
                "flip": flip,
                "autoencoder": plan.inputs["autoencoder"],
                "dtype": plan.params["dtype"],
                "version": EncodeLatents.version,
            }
            yield _Wanted(item, flip, digest_of("latent", value))


def _wanted_masks(
    plan: Plan, dataset: Manifest, items: Sequence[dict[str, Any]], draws: Mapping[str, Draw]
) -> Iterator[_WantedMask]:
    source: MaskSource | None = dataset.params.get("masks")
    if source is None:
        return
    for item in items:
        draw = draws[item["item_id"]]
        for flip in (False, True) if plan.params["flip"] else (False,):
            value = {
                "mask": draw.mask_sha256,
                "source": source,
                "crop": list(_crop(item)),
                "bucket": list(_bucket(item)),
                "flip": flip,
                "version": pixels.COVERAGE_VERSION,
            }
            if draw.mask_path:
                yield _WantedMask(item, flip, digest_of("mask", value), draw, source)


def _bucket(item: Mapping[str, Any]) -> tuple[int, int]:
    return item["bucket_width"], item["bucket_height"]


def _bucket_of(each: _Wanted | _WantedMask) -> tuple[int, int]:
    return _bucket(each.item)


def _crop(item: Mapping[str, Any]) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = item["crop"]
    return x0, y0, x1, y1


def _known(job: Job, keys: Collection[str]) -> dict[str, LatentRow]:
    """Return those of `keys` that a store has whole; none where all is to be done again."""
    from stages.stores.latents import scan_latents, whole_latents

    known: dict[str, LatentRow] = {}
    for store in () if job.flags.force else reversed(job.stores):
        known |= scan_latents(store)
    return whole_latents(job.stores, [known[key] for key in keys if key in known], job.digests)


def _require_room(job: Job, missing: Sequence[_Wanted | _WantedMask]) -> None:
    """Raise NoResources unless all that is to be encoded fits on the disk."""
    from stages.stores.fragments import stored_bytes

    rows = (_coming(job, each) for each in missing)
    need = sum(stored_bytes(row.channels * row.height * row.width, row.dtype) for row in rows)
    require_room(job.store, need, why=f"for {len(missing)} latents")


def _coming(job: Job, each: _Wanted | _WantedMask) -> LatentRow:
    """Return the row of a record that is not there yet."""
    from stages.stores.latents import LatentRow

    (width, height), latent = _bucket(each.item), isinstance(each, _Wanted)
    channels = model_of(job).variant.autoencoder.packed_channels if latent else 1
    dtype = job.config.encode_latents.dtype if latent else "float32"
    return LatentRow(each.key, "", 0, channels, height // PATCH_PX, width // PATCH_PX, dtype, unknown(each.key))


def _encode(job: Job, missing: Sequence[_Wanted]) -> dict[str, LatentRow]:
    """Encode and store what is missing; one bucket shape at a time, so that a kill loses one fragment at most.

    Raises RejectedInput after a fragment in which pictures give no latent, for all of those; the others are stored.
    """
    if not missing:
        return {}
    from stages.console.progress import progress
    from stages.flux2.backend import prepare
    from stages.flux2.load import load_autoencoder
    from stages.stores.fragments import MOST_RECORDS
    from stages.stores.latents import write_latents

    job.say(prepare().line())
    autoencoder = load_autoencoder(model_of(job), encoder=True, decoder=False)
    dtype = job.config.encode_latents.dtype
    written: dict[str, LatentRow] = {}
    with progress("encode-latents", total=len(missing), quiet=job.flags.quiet) as bar:
        for _, group in groupby(sorted(missing, key=_bucket_of), key=_bucket_of):
            pending = list(group)
            for start in range(0, len(pending), MOST_RECORDS):
                records: list[tuple[str, np.ndarray]] = []
                faults: list[Fault] = []
                for each in pending[start : start + MOST_RECORDS]:
                    try:
                        records.append((each.key, _latent(job, autoencoder, each)))
                    except RejectedInput as error:
                        faults += error.faults
                    bar.advance(1, note=each.item["path"])
                if records:
                    written |= {row.latent_key: row for row in write_latents(job.store, records, dtype)}
                if faults:
                    raise RejectedInput.of(faults)
    return written


def _latent(job: Job, autoencoder: Autoencoder, each: _Wanted) -> np.ndarray:
    """Return the whitened latent [C, H/16, W/16] as it is stored. Raises Stale or RejectedInput."""
    import mlx.core as mx
    import numpy as np

    from stages.dataset.decoder import decoders
    from stages.stores.tensors import from_mlx

    path = job.dataset / each.item["path"]
    data = _proved(job, path, each.item["image_sha256"])
    settings = job.config.validate
    picture = decoders(settings.max_megapixels).pixels(
        data, _crop(each.item), _bucket(each.item), settings.background, flip=each.flip, where=str(path)
    )
    latent = autoencoder.encode(mx.array(picture)[None])[0]
    stored = from_mlx(latent.astype(mx.bfloat16 if job.config.encode_latents.dtype == "bfloat16" else mx.float32))
    if not np.isfinite(np.array(latent)).all():
        fault = Fault(
            code="latents.not_finite",
            what="the latent is not finite",
            where=str(path),
            fix="remove that picture, or check the autoencoder's file",
        )
        raise RejectedInput.of([fault])
    return stored.data


def _cover(job: Job, missing: Sequence[_WantedMask]) -> dict[str, LatentRow]:
    """Store the masks that are missing, fragments of one bucket shape each."""
    from stages.stores.fragments import MOST_RECORDS
    from stages.stores.latents import write_latents

    written: dict[str, LatentRow] = {}
    for _, group in groupby(sorted(missing, key=_bucket_of), key=_bucket_of):
        pending = list(group)
        for start in range(0, len(pending), MOST_RECORDS):
            records: list[tuple[str, np.ndarray]] = []
            for each in pending[start : start + MOST_RECORDS]:
                records.append((each.key, _mask(job, each)))
            written |= {row.latent_key: row for row in write_latents(job.store, records, "float32")}
    return written


def _mask(job: Job, each: _WantedMask) -> np.ndarray:
    """Return the mask [1, H/16, W/16] float32. Raises Stale or RejectedInput."""
    from stages.dataset.decoder import decoders

    path, bucket = job.dataset / each.draw.mask_path, _bucket(each.item)
    data = _proved(job, path, each.draw.mask_sha256)
    ask = decoders(job.config.validate.max_megapixels)
    return ask.coverage(data, each.source, _crop(each.item), bucket, flip=each.flip, where=str(path))


def _proved(job: Job, path: Path, sha256: str) -> bytes:
    """Return a file's bytes. Raises Stale when they are not those that validate saw."""
    require_pictures(job.dataset, "change the settings back, or name the pictures' folder in validate.dataset")
    try:
        data = path.read_bytes()
    except OSError:
        data = b""
    if sha256_bytes(data) != sha256:
        what = "a picture changed since validate"
        raise Stale.since("validate", "dataset.changed", what, where=str(path), fix=job.remedy("validate"))
    return data


def _index_row(each: _Wanted | _WantedMask, row: LatentRow) -> dict[str, Any]:
    return {
        "item_id": each.item["item_id"],
        "flip": each.flip,
        "latent_key": row.latent_key,
        "fragment": row.fragment,
        "row": row.row,
        "channels": row.channels,
        "height": row.height,
        "width": row.width,
        "dtype": row.dtype,
        "sha256": row.sha256,
    }


def _roles(rows: Sequence[Mapping[str, Any]], masks: Sequence[Mapping[str, Any]] | None) -> dict[str, str]:
    covers = {} if masks is None else {"masks": digest_of("masks", sorted(map(_content, masks)))}
    return {"latents": digest_of("latents", sorted(map(_content, rows))), **covers}


def _content(row: Mapping[str, Any]) -> list[Any]:
    """What training reads of an index row: not where it lies."""
    return [row[name] for name in ("item_id", "flip", "channels", "height", "width", "dtype", "sha256")]


STAGE = EncodeLatents()
