from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from schemas.errors import Damaged
from stages.contract.digests import sha256_bytes, sha256_file
from stages.stores.embeddings import (
    EmbeddingReader,
    EmbeddingRow,
    fragment_files,
    scan_embeddings,
    write_embeddings,
)
from stages.stores.seals import seal
from tests.stores.damage import flipped_bits, not_plain_files, other_lengths, zeroed_pages


def embeddings(count: int, seed: int = 0) -> list[tuple[str, int, np.ndarray]]:
    random = np.random.default_rng(seed)
    return [
        (f"key-{seed}-{row}", row, random.standard_normal((row + 2, 24), dtype=np.float32)) for row in range(count)
    ]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def rows(store: Path) -> list[EmbeddingRow]:
    return write_embeddings(store, embeddings(5), "float32")


def part_of(store: Path, rows: list[EmbeddingRow]) -> Path:
    (path,) = fragment_files(store, rows[0].fragment)
    return path


def footer_bytes(path: Path) -> int:
    return int.from_bytes(path.read_bytes()[-8:-4], "little")


def refusals(store: Path, rows: list[EmbeddingRow]) -> int:
    """How many rows are refused; those that are not must still read exactly."""
    expected = {key: embedding for key, _, embedding in embeddings(5)}
    reader, refused = EmbeddingReader([store]), 0
    for row in rows:
        try:
            assert np.array_equal(reader.read(row), expected[row.embedding_key])
        except Damaged:
            refused += 1
    return refused


@pytest.mark.parametrize("count", [1, 2, 64])
def test_float32_embeddings_come_back_exactly_in_any_order(store: Path, count: int):
    records = embeddings(count)
    rows = write_embeddings(store, records, "float32")
    reader = EmbeddingReader([store])
    assert [row.row for row in rows] == list(range(count))
    for row, (key, tokens, embedding) in reversed(list(zip(rows, records, strict=True))):
        assert (row.embedding_key, row.tokens, row.length, row.width) == (key, tokens, *embedding.shape)
        assert row.sha256 == sha256_bytes(embedding.tobytes())
        found = reader.read(row)
        assert found.dtype == np.float32
        assert np.array_equal(found, embedding)


def test_bfloat16_embeddings_travel_as_their_bits(store: Path):
    bits = (np.arange(48, dtype=np.uint16) * 1361).reshape(6, 8)
    (row,) = write_embeddings(store, [("a", 6, bits)], "bfloat16")
    found = EmbeddingReader([store]).read(row)
    assert found.dtype == np.uint16
    assert np.array_equal(found, bits)


def test_plain_parquet_reads_a_part(store: Path, rows: list[EmbeddingRow]):
    from pyarrow import parquet

    file = parquet.ParquetFile(part_of(store, rows))
    assert file.schema_arrow.names == ["embedding_key", "data"]
    assert str(file.schema_arrow.field("data").type) == "large_binary"
    assert file.metadata.num_row_groups == 5
    columns = [file.metadata.row_group(group).column(1) for group in range(5)]
    assert {column.compression for column in columns} == {"UNCOMPRESSED"}
    assert not any(column.has_dictionary_page for column in columns)
    table = file.read()
    assert table["embedding_key"].to_pylist() == [row.embedding_key for row in rows]
    assert table["data"].to_pylist() == [embedding.tobytes() for _, _, embedding in embeddings(5)]


def test_rows_that_repeat_take_no_room_and_are_whole_to_any_reader(store: Path):
    from pyarrow import parquet

    own = np.random.default_rng(0).standard_normal((40, 1024), dtype=np.float32)
    padded = np.concatenate([np.broadcast_to(own[:1], (472, 1024)), own])
    [row] = write_embeddings(store, [("key", 40, padded)], "float32")
    path = part_of(store, [row])
    assert path.stat().st_size < 1.1 * own.nbytes < padded.nbytes / 10
    assert np.array_equal(EmbeddingReader([store]).read(row), padded)
    assert parquet.read_table(path)["data"].to_pylist() == [padded.tobytes()]
    reader = EmbeddingReader([store])
    for _ in flipped_bits(path, 200):
        with pytest.raises(Damaged):
            reader.read(row)


def test_two_stores_hold_the_same_bytes(tmp_path: Path):
    digests = []
    for name in ("one", "two"):
        rows = write_embeddings(tmp_path / name, embeddings(5), "float32")
        digests.append((rows[0].fragment, sha256_file(part_of(tmp_path / name, rows))))
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("records", "dtype"),
    [
        ([], "float32"),
        (embeddings(65), "float32"),
        (embeddings(1) + embeddings(1), "float32"),
        (embeddings(1), "bfloat16"),
        ([("a", 1, np.zeros((2, 3), np.float16))], "float32"),
        ([("a", 1, np.zeros(3, np.float32))], "float32"),
        ([("a", 3, np.zeros((2, 3), np.float32))], "float32"),
    ],
)
def test_what_is_no_part_is_not_written(store: Path, records, dtype):
    with pytest.raises(ValueError, match=r"fragment|records are given|an embedding is"):
        write_embeddings(store, records, dtype)
    assert not (store / "fragments").exists()


def test_writing_again_mends_a_damaged_part(store: Path, rows: list[EmbeddingRow]):
    path = part_of(store, rows)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert write_embeddings(store, embeddings(5), "float32") == rows
    assert path.read_bytes() == whole
    assert not list((store / ".tmp").iterdir())


# Finding


def test_scan_finds_every_embedding(store: Path, rows: list[EmbeddingRow]):
    more = write_embeddings(store, embeddings(3, seed=1), "float32")
    assert scan_embeddings(store) == {row.embedding_key: row for row in [*rows, *more]}


def test_scan_of_a_store_without_embeddings_is_empty(store: Path):
    assert scan_embeddings(store) == {}


def test_scan_passes_over_what_is_not_whole(store: Path, rows: list[EmbeddingRow], tmp_path: Path):
    whole = {row.embedding_key for row in write_embeddings(store, embeddings(2, seed=1), "float32")}
    path = part_of(store, rows)
    for length in other_lengths(path, 50):
        assert set(scan_embeddings(store)) == whole, length
    for what in not_plain_files(path, tmp_path / "aside"):
        assert set(scan_embeddings(store)) == whole, what
    path.rename(path.with_name(f"{0:064x}.parquet"))
    assert set(scan_embeddings(store)) == whole


def test_scan_passes_over_every_damaged_footer(store: Path, rows: list[EmbeddingRow]):
    path = part_of(store, rows)
    size = path.stat().st_size
    footer = range(size - footer_bytes(path) - 8, size)
    assert [at for at in flipped_bits(path, 400, within=footer) if scan_embeddings(store)] == []


def test_scan_prefers_the_later_of_two_records_of_one_key(store: Path):
    (old,) = write_embeddings(store, [("key", 1, np.ones((2, 3), np.float32))], "float32")
    (new,) = write_embeddings(store, [("key", 1, np.zeros((2, 3), np.float32))], "float32")
    os.utime(part_of(store, [old]), ns=(1, 1))
    assert scan_embeddings(store)["key"] == new
    os.utime(part_of(store, [new]), ns=(0, 0))
    assert scan_embeddings(store)["key"] == old


# Damage


def test_damage_names_the_part_the_record_and_the_remedy(store: Path, rows: list[EmbeddingRow]):
    part_of(store, rows).unlink()
    with pytest.raises(Damaged) as caught:
        EmbeddingReader([store]).read(rows[2])
    line = caught.value.faults[0].line()
    assert line.startswith("error[embeddings.absent] the fragment is missing")
    assert f"({rows[2].fragment}, record key-0-2)" in line
    assert line.endswith("fix: flux2-lora encode-text --config ... --force")


def test_every_flipped_bit_is_refused(store: Path, rows: list[EmbeddingRow]):
    assert [at for at in flipped_bits(part_of(store, rows), 600) if not refusals(store, rows)] == []
    assert refusals(store, rows) == 0


def test_a_flipped_bit_in_one_record_leaves_the_others_readable(store: Path, rows: list[EmbeddingRow]):
    path, (_, _, embedding) = part_of(store, rows), embeddings(5)[3]
    start = path.read_bytes().index(embedding.tobytes())
    within = range(start, start + embedding.nbytes)
    assert {refusals(store, rows) for _ in flipped_bits(path, 50, within=within)} == {1}


def test_every_other_length_is_refused(store: Path, rows: list[EmbeddingRow]):
    assert [length for length in other_lengths(part_of(store, rows), 100) if refusals(store, rows) != 5] == []


def test_zeroed_pages_are_refused(store: Path, rows: list[EmbeddingRow]):
    assert [start for start in zeroed_pages(part_of(store, rows)) if not refusals(store, rows)] == []


def test_absent_files_links_folders_and_pipes_are_refused(store: Path, rows: list[EmbeddingRow], tmp_path: Path):
    for what in not_plain_files(part_of(store, rows), tmp_path / "aside"):
        assert refusals(store, rows) == 5, what
    assert refusals(store, rows) == 0


def test_swapped_parts_are_refused(store: Path, rows: list[EmbeddingRow]):
    others = write_embeddings(store, embeddings(5, seed=1), "float32")
    first, second = part_of(store, rows), part_of(store, others)
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    for row in [*rows, *others]:
        with pytest.raises(Damaged):
            EmbeddingReader([store]).read(row)
    assert scan_embeddings(store) == {}


@pytest.mark.parametrize(("keys", "code"), [("ab", "digest"), ("ba", "row")])
def test_swapped_records_are_refused(store: Path, keys: str, code: str):
    """Two records exchanged with their keys, or without, under a list that still names the part and a whole seal."""
    import pyarrow as pa
    from pyarrow import parquet

    arrays = [np.full((2, 3), value, np.float32) for value in (1, 2)]
    rows = write_embeddings(store, [("a", 1, arrays[0]), ("b", 1, arrays[1])], "float32")
    path = part_of(store, rows)
    metadata = parquet.read_metadata(path).metadata
    schema = parquet.read_schema(path)
    with parquet.ParquetWriter(
        path, schema, compression="none", use_dictionary=False, write_statistics=False, write_page_checksum=True
    ) as writer:
        for key, array in zip(keys, reversed(arrays), strict=True):
            writer.write_table(pa.table({"embedding_key": [key], "data": [array.tobytes()]}, schema=schema))
        writer.add_key_value_metadata({b"flux2-lora.embeddings": metadata[b"flux2-lora.embeddings"]})
    seal(path)
    for row in rows:
        with pytest.raises(Damaged, match=rf"embeddings\.{code}"):
            EmbeddingReader([store]).read(row)


@pytest.mark.parametrize(
    "change",
    [
        {"row": 1},
        {"row": 5},
        {"row": -1},
        {"embedding_key": "key-0-1"},
        {"tokens": 7},
        {"length": 1, "width": 48},
        {"dtype": "bfloat16"},
        {"dtype": "int8"},
        {"sha256": "0" * 64},
        {"fragment": f"fragments/embeddings/{0:064x}.parquet"},
        {"fragment": "fragments/embeddings/../../secret.parquet"},
    ],
)
def test_a_row_that_says_otherwise_is_refused(store: Path, rows: list[EmbeddingRow], change):
    with pytest.raises(Damaged):
        EmbeddingReader([store]).read(replace(rows[0], **change))


def test_the_second_store_is_asked_for_what_the_first_lacks(store: Path, rows: list[EmbeddingRow], tmp_path: Path):
    write_embeddings(tmp_path / "own", embeddings(1, seed=1), "float32")
    reader = EmbeddingReader([tmp_path / "own", store])
    assert np.array_equal(reader.read(rows[4]), embeddings(5)[4][2])
