"""Text embeddings on disk: Parquet parts of at most 64 records, one record per row group.

What a part holds is listed in its footer, so that a store is scanned by footers alone; that list names the part.
Of a record its row group's seal, its page checksums and its sha256 are checked on every read.
Letters: L positions, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from schemas.base import UNREADABLE, Strict
from schemas.errors import Damaged
from schemas.tables import EMBEDDING_PART
from stages.contract.digests import StatCache, canonical_json, digest_of, sha256_bytes
from stages.contract.publish import publish_file, workspace
from stages.stores.blame import Blame, check_sha256
from stages.stores.fragments import LAYOUTS, MOST_RECORDS, ROOT, Kind, check_keys, locate, raw_bytes, whole_records
from stages.stores.seals import Sealed, open_sealed, seal
from stages.stores.tables import arrow_schema, damage_as

KIND = Kind(name="embeddings", suffix=".parquet", stage="encode-text")
CONTENT = b"flux2-lora.embeddings"


@dataclass(frozen=True)
class EmbeddingRow:
    """Where one embedding [length, width] lies and what it is; `tokens` of its positions are not padding."""

    embedding_key: str
    fragment: str
    row: int
    tokens: int
    length: int
    width: int
    dtype: str
    sha256: str


class Record(Strict, frozen=True):
    """One record of a part, in the order of its rows; `sha256` is of its raw little-endian bytes."""

    key: str
    tokens: int
    length: int
    width: int
    sha256: str


class Part(Strict, frozen=True):
    """What a part's footer lists."""

    dtype: Literal["float32", "bfloat16"]
    records: tuple[Record, ...]

    def fragment(self) -> str:
        """Return the part's path below the store: it is named by what it holds."""
        return KIND.path(digest_of("embeddings", self))

    def row(self, fragment: str, row: int) -> EmbeddingRow:
        """Return the record in `row` of this part as a row of an index."""
        each = self.records[row]
        return EmbeddingRow(each.key, fragment, row, each.tokens, each.length, each.width, self.dtype, each.sha256)

    def rows(self) -> list[EmbeddingRow]:
        """Return all records as rows of an index."""
        fragment = self.fragment()
        return [self.row(fragment, row) for row in range(len(self.records))]


def write_embeddings(
    store: Path, records: Sequence[tuple[str, int, np.ndarray]], dtype: Literal["float32", "bfloat16"]
) -> list[EmbeddingRow]:
    """Publish one part of (embedding_key, tokens, embedding [L, D]) and return its rows, in order.

    Embeddings are float32, or for bfloat16 uint16 bits; lengths may differ. A damaged part of the same name is
    replaced. Raises ValueError for more than 64 records, a key twice, or another shape or dtype.
    """
    check_keys([key for key, _, _ in records], MOST_RECORDS)
    part = Part(dtype=dtype, records=tuple(_record(*each, dtype) for each in records))
    with workspace(store) as folder:
        _write_part(folder / "part", part, [embedding for _, _, embedding in records])
        publish_file(folder / "part", store / part.fragment())
    return part.rows()


def _record(key: str, tokens: int, embedding: np.ndarray, dtype: Literal["float32", "bfloat16"]) -> Record:
    if embedding.ndim != 2 or not 0 <= tokens <= len(embedding):
        raise ValueError(f"an embedding is [L, D] with at most L tokens, not {embedding.shape} with {tokens}")
    length, width = embedding.shape
    return Record(
        key=key, tokens=tokens, length=length, width=width, sha256=sha256_bytes(raw_bytes(embedding, dtype))
    )


def _write_part(path: Path, part: Part, embeddings: Sequence[np.ndarray]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    schema = arrow_schema(EMBEDDING_PART)
    # Pads on the left are one row hundreds of times: of dev 9 MB in 10, and read faster so. Other embeddings would
    # shrink by a fifth at three times the cost.
    compression = "zstd" if any(_repeats(embedding) for embedding in embeddings) else "none"
    settings = {"compression": compression, "use_dictionary": False, "write_statistics": False}
    with (
        path.open("wb") as file,
        parquet.ParquetWriter(file, schema, **settings, write_page_checksum=True) as writer,
    ):
        for record, embedding in zip(part.records, embeddings, strict=True):
            row = {"embedding_key": [record.key], "data": [raw_bytes(embedding, part.dtype)]}
            writer.write_table(pa.table(row, schema=schema))
        writer.add_key_value_metadata({CONTENT: canonical_json(part)})
    seal(path)


def _repeats(embedding: np.ndarray) -> bool:
    return len(embedding) > 1 and np.array_equal(embedding[0], embedding[1])


def fragment_files(store: Path, fragment: str) -> list[Path]:
    """Return the files a fragment consists of."""
    return [store / fragment]


def scan_embeddings(store: Path) -> dict[str, EmbeddingRow]:
    """Return every embedding in the whole parts of `store`, by key, from footers and sizes alone.

    Parts that are incomplete or damaged are passed over. Of two records with one key the later written counts.
    """
    found: list[tuple[int, str, Part]] = []
    for path in (store / ROOT / KIND.name).glob(f"*{KIND.suffix}"):
        fragment = KIND.path(path.stem)
        blame = KIND.blame(fragment)
        try:
            _, part = _open(locate([store], KIND, fragment, blame), fragment, blame)
        except Damaged:
            continue
        found.append((path.stat().st_mtime_ns, fragment, part))
    found.sort(key=lambda each: each[:2])
    return {row.embedding_key: row for _, _, part in found for row in part.rows()}


def whole_embeddings(
    stores: Sequence[Path], rows: Sequence[EmbeddingRow], digests: StatCache
) -> dict[str, EmbeddingRow]:
    """Return those of `rows` whose bytes are as they were written, by key."""
    found = whole_records(stores, rows, EmbeddingReader(stores), fragment_files, digests)
    return {row.embedding_key: row for row in found}


def _open(path: Path, fragment: str, blame: Blame) -> tuple[Sealed, Part]:
    """Return a part whose footer is whole, and what it lists, checked against the part's name."""
    sealed = open_sealed(path, blame)
    try:
        part = msgspec.json.decode((sealed.metadata().metadata or {}).get(CONTENT, b""), type=Part)
    except UNREADABLE as error:
        raise blame.error("metadata", "the footer is not a part's", str(error)) from error
    if part.fragment() != fragment or len(part.records) != len(sealed.groups):
        raise blame.error("metadata", "the footer is not this part's", "expected the records it is named by")
    return sealed, part


class EmbeddingReader:
    """Reads single embeddings out of the parts of several stores, and trusts no byte that it has not checked."""

    def __init__(self, stores: Sequence[Path]) -> None:
        self._stores = tuple(stores)

    def read(self, row: EmbeddingRow) -> np.ndarray:
        """Return the embedding [L, D], float32 or the uint16 bits of bfloat16; it cannot be written to.

        Raises Damaged, naming the part and the record, when anything differs from what `row` says.
        """
        blame = KIND.blame(row.fragment, row.embedding_key)
        path = locate(self._stores, KIND, row.fragment, blame)
        sealed, part = _open(path, row.fragment, blame)
        if not 0 <= row.row < len(part.records) or part.row(row.fragment, row.row) != row:
            raise blame.error("row", "the part holds another record there", f"row {row.row}")
        sealed.check_group(row.row, blame)
        data = _read_group(sealed, row, blame)
        check_sha256(data, row.sha256, blame)
        return np.frombuffer(data, LAYOUTS[row.dtype]).reshape(row.length, row.width)


def _read_group(sealed: Sealed, row: EmbeddingRow, blame: Blame) -> memoryview:
    from pyarrow import parquet

    with (
        damage_as(partial(blame.error, "damaged", "the record cannot be read")),
        parquet.ParquetFile(sealed.path, metadata=sealed.metadata(), page_checksum_verification=True) as file,
    ):
        group = file.read_row_group(row.row, use_threads=False)
        if group.schema != arrow_schema(EMBEDDING_PART) or group.column(0).to_pylist() != [row.embedding_key]:
            raise blame.error("row", "the part holds another record there", f"row {row.row}")
        return memoryview(group.column(1)[0].as_buffer())
