"""Latents on disk: fragments of at most 1024 records of one shape, each a Zarr v3 array with one sample per chunk.

zarr encodes the one shard; `zarr.json` is written here, in one canonical form, so that a reader can demand it byte
for byte. Reading needs neither zarr nor the whole shard, and an absent shard is an error, never zeros.
Letters: C channels, H and W the latent's height and width.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from schemas.base import UNREADABLE, Strict
from schemas.errors import Damaged
from stages.contract.digests import StatCache, canonical_json, digest_of, sha256_bytes
from stages.contract.publish import publish_folder, workspace
from stages.stores.blame import Blame, check_crc32c, check_sha256, file_size, read_bytes
from stages.stores.fragments import FULL_RECORDS, LAYOUTS, ROOT, Kind, check_keys, locate, raw_bytes, whole_records

KIND = Kind(name="latents", suffix="", stage="encode-latents")
METADATA = "zarr.json"
SHARD = "c.0.0.0.0"
CRC_BYTES = 4
INDEX_ENTRY = np.dtype([("offset", "<u8"), ("length", "<u8")])
MOST_METADATA_BYTES = 1 << 20


@dataclass(frozen=True)
class LatentRow:
    """Where one latent lies and what it is: `fragment` is a path below the store, `sha256` is of its raw bytes."""

    latent_key: str
    fragment: str
    row: int
    channels: int
    height: int
    width: int
    dtype: str
    sha256: str


class Record(Strict, frozen=True):
    """One record of a fragment, in the order of its rows."""

    key: str
    sha256: str


class Attributes(Strict, frozen=True):
    """The attributes of the Zarr array: `dtype` is what the bits mean."""

    dtype: Literal["float32", "bfloat16"]
    records: tuple[Record, ...]


class Array(msgspec.Struct, frozen=True):
    """The part of a `zarr.json` that varies; the rest follows from it (`document`)."""

    shape: tuple[int, int, int, int]
    attributes: Attributes

    @property
    def sample_bytes(self) -> int:
        """Size of one record."""
        return prod(self.shape[1:]) * LAYOUTS[self.attributes.dtype].itemsize

    @property
    def index_bytes(self) -> int:
        """Size of the shard's index at its end, checksum included."""
        return self.shape[0] * INDEX_ENTRY.itemsize + CRC_BYTES

    @property
    def shard_bytes(self) -> int:
        """Size of the shard: every chunk present, each followed by its checksum, then the index."""
        return self.shape[0] * (self.sample_bytes + CRC_BYTES) + self.index_bytes

    def fragment(self) -> str:
        """Return the fragment's path below the store: it is named by what it holds."""
        return KIND.path(digest_of("latents", (self.shape, self.attributes)))

    def document(self) -> bytes:
        """Return the whole `zarr.json`: Zarr v3, one shard, one sample per chunk, raw bytes and crc32c."""
        return canonical_json(
            {
                "zarr_format": 3,
                "node_type": "array",
                "shape": self.shape,
                "data_type": LAYOUTS[self.attributes.dtype].name,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": self.shape}},
                "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
                "fill_value": 0,
                "codecs": [_sharding((1, *self.shape[1:]))],
                "attributes": self.attributes,
                "storage_transformers": [],
            }
        )

    def row(self, fragment: str, row: int) -> LatentRow:
        """Return the record in `row` of this fragment as a row of an index."""
        record, (_, channels, height, width) = self.attributes.records[row], self.shape
        return LatentRow(record.key, fragment, row, channels, height, width, self.attributes.dtype, record.sha256)

    def rows(self) -> list[LatentRow]:
        """Return all records as rows of an index."""
        fragment = self.fragment()
        return [self.row(fragment, row) for row in range(self.shape[0])]


def _sharding(chunk_shape: tuple[int, ...]) -> dict[str, object]:
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    configuration = {"chunk_shape": chunk_shape, "codecs": codecs, "index_codecs": codecs, "index_location": "end"}
    return {"name": "sharding_indexed", "configuration": configuration}


def write_latents(
    store: Path, records: Sequence[tuple[str, np.ndarray]], dtype: Literal["float32", "bfloat16"]
) -> list[LatentRow]:
    """Publish one fragment of (latent_key, latent [C, H, W]) and return its rows, in order.

    Latents are float32, or for bfloat16 uint16 bits. A damaged fragment of the same name is replaced. Raises
    ValueError for more than 1024 records, a key twice, or shapes and dtypes that differ.
    """
    check_keys([key for key, _ in records], FULL_RECORDS)
    shapes = {latent.shape for _, latent in records}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 3:
        raise ValueError("a fragment holds latents of one shape [C, H, W]")
    listed = tuple(Record(key=key, sha256=sha256_bytes(raw_bytes(latent, dtype))) for key, latent in records)
    array = Array((len(records), *shape), Attributes(dtype=dtype, records=listed))
    with workspace(store) as folder:
        _write_array(folder / "fragment", array, [latent for _, latent in records])
        publish_folder(folder / "fragment", store / array.fragment())
    return array.rows()


def _write_array(folder: Path, array: Array, latents: list[np.ndarray]) -> None:
    import zarr

    folder.mkdir()
    (folder / METADATA).write_bytes(array.document())
    samples = np.stack(latents)
    try:
        # zarr would leave out a sample of zeros, and an absent one cannot be told from a lost one.
        with zarr.config.set({"array.write_empty_chunks": True}):
            zarr.open_array(folder, mode="r+")[...] = samples
    except ValueError as error:
        # It reads its metadata back, as JSON.
        raise OSError(errno.EIO, "what was just written cannot be read", str(folder / METADATA)) from error
    _check_size(folder / SHARD, array, KIND.blame(array.fragment()))


def fragment_files(store: Path, fragment: str) -> list[Path]:
    """Return the files a fragment consists of."""
    return [store / fragment / METADATA, store / fragment / SHARD]


def scan_latents(store: Path) -> dict[str, LatentRow]:
    """Return every latent in the whole fragments of `store`, by key, from metadata and sizes alone.

    Fragments that are incomplete or damaged are passed over. Of two records with one key the later written counts.
    """
    found: list[tuple[int, str, Array]] = []
    for folder in (store / ROOT / KIND.name).glob("*"):
        fragment = KIND.path(folder.name)
        blame = KIND.blame(fragment)
        try:
            array = _open(locate([store], KIND, fragment, blame), fragment, blame)
        except Damaged:
            continue
        found.append(((folder / SHARD).stat().st_mtime_ns, fragment, array))
    found.sort(key=lambda each: each[:2])
    return {row.latent_key: row for _, _, array in found for row in array.rows()}


def whole_latents(stores: Sequence[Path], rows: Sequence[LatentRow], digests: StatCache) -> dict[str, LatentRow]:
    """Return those of `rows` whose bytes are as they were written, by key."""
    found = whole_records(stores, rows, LatentReader(stores), fragment_files, digests)
    return {row.latent_key: row for row in found}


def _open(folder: Path, fragment: str, blame: Blame) -> Array:
    """Return the checked metadata of a fragment whose files are there, regular and of the exact size."""
    metadata = folder / METADATA
    size = file_size(metadata, blame)
    if size > MOST_METADATA_BYTES:
        raise blame.error("metadata", f"{METADATA} is not this fragment's", f"{size} bytes")
    array = _parse(read_bytes(metadata, 0, size, blame), fragment, blame)
    _check_size(folder / SHARD, array, blame)
    return array


def _parse(data: bytes, fragment: str, blame: Blame) -> Array:
    try:
        array = msgspec.json.decode(data, type=Array)
    except UNREADABLE as error:
        raise blame.error("metadata", f"{METADATA} is not this fragment's", str(error)) from error
    if array.shape[0] != len(array.attributes.records) or min(array.shape) < 1:
        why = f"shape {array.shape}, {len(array.attributes.records)} records"
        raise blame.error("metadata", f"{METADATA} contradicts itself", why)
    if array.fragment() != fragment or array.document() != data:
        raise blame.error("metadata", f"{METADATA} is not this fragment's", "expected the records it is named by")
    return array


def _check_size(shard: Path, array: Array, blame: Blame) -> None:
    size = file_size(shard, blame)
    if size != array.shard_bytes:
        raise blame.error(
            "size", f"{shard.name} has another size", f"expected {array.shard_bytes} bytes, found {size}"
        )


class LatentReader:
    """Reads single latents out of the fragments of several stores, and trusts no byte that it has not checked."""

    def __init__(self, stores: Sequence[Path]) -> None:
        self._stores = tuple(stores)
        self._arrays: dict[str, Array] = {}

    def read(self, row: LatentRow) -> np.ndarray:
        """Return the latent [C, H, W], float32 or the uint16 bits of bfloat16; it cannot be written to.

        Raises Damaged, naming the fragment and the record, when anything differs from what `row` says.
        """
        blame = KIND.blame(row.fragment, row.latent_key)
        folder = locate(self._stores, KIND, row.fragment, blame)
        array = self._arrays.get(row.fragment) or _open(folder, row.fragment, blame)
        self._arrays[row.fragment] = array
        if not 0 <= row.row < array.shape[0] or array.row(row.fragment, row.row) != row:
            raise blame.error("row", "the fragment holds another record there", f"row {row.row}")
        data = _read_sample(folder / SHARD, array, row.row, blame)
        check_sha256(data, row.sha256, blame)
        return np.frombuffer(data, LAYOUTS[row.dtype]).reshape(array.shape[1:])


def _read_sample(shard: Path, array: Array, row: int, blame: Blame) -> bytes:
    _check_size(shard, array, blame)
    index_at = array.shard_bytes - array.index_bytes
    index = np.frombuffer(_unsealed(read_bytes(shard, index_at, array.index_bytes, blame), blame), INDEX_ENTRY)
    offset, length = (int(each) for each in index[row])
    if length != array.sample_bytes + CRC_BYTES or offset + length > index_at:
        raise blame.error("index", "the shard's index is wrong", f"row {row} at {offset}, {length} bytes")
    return _unsealed(read_bytes(shard, offset, length, blame), blame)


def _unsealed(data: bytes, blame: Blame) -> bytes:
    """Return `data` without the crc32c (little-endian) that ends it, once it holds."""
    content = data[:-CRC_BYTES]
    check_crc32c(content, int.from_bytes(data[-CRC_BYTES:], "little"), blame)
    return content
