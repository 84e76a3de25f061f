from __future__ import annotations

import time
from pathlib import Path

import pytest

from schemas.errors import Damaged, RejectedInput
from schemas.tables import CAPTIONS, DATASET, EMBEDDING_INDEX, LATENT_INDEX, Table
from stages.contract.digests import sha256_file
from stages.stores.tables import arrow_schema, read_table, read_texts, write_table
from tests.stores.damage import flipped_bits, not_plain_files, other_lengths, zeroed_pages

CAPTION_ROWS = [{"caption_id": f"{n:032x}", "text": text} for n, text in enumerate(["a cat", "", "猫 🐈", "e\u0301"])]


def items(count: int) -> list[dict[str, object]]:
    return [
        {
            "item_id": f"{n:032x}",
            "path": f"pictures/{n}.png",
            "image_sha256": f"{n * 31:064x}",
            "width": 640 + n,
            "height": 480,
            "bucket_width": 512,
            "bucket_height": 384,
            "crop": [0, 0, 640 + n, 480],
            "caption_id": f"{n % 3:032x}",
            "background": "",
        }
        for n in range(count)
    ]


def latents(count: int) -> list[dict[str, object]]:
    return [
        {
            "item_id": f"{n // 2:032x}",
            "flip": bool(n % 2),
            "latent_key": f"{n:064x}",
            "fragment": f"fragments/latents/{n // 64:064x}",
            "row": n % 64,
            "channels": 128,
            "height": 32,
            "width": 32,
            "dtype": "bfloat16",
            "sha256": f"{n * 7919:064x}",
        }
        for n in range(count)
    ]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "captions.parquet"


def refused(path: Path) -> bool:
    try:
        assert read_table(path, CAPTIONS) == CAPTION_ROWS
    except Damaged:
        return True
    return False


def test_columns_are_those_that_others_rely_on():
    assert {name: str(arrow_schema(DATASET).field(name).type) for name in DATASET.columns} == {
        "item_id": "string",
        "path": "string",
        "image_sha256": "string",
        "width": "int32",
        "height": "int32",
        "bucket_width": "int32",
        "bucket_height": "int32",
        "crop": "fixed_size_list<element: int32 not null>[4]",
        "caption_id": "string",
        "background": "string",
    }
    assert list(CAPTIONS.columns) == ["caption_id", "text"]
    assert list(LATENT_INDEX.columns) == [
        *["item_id", "flip", "latent_key", "fragment", "row", "channels", "height", "width", "dtype", "sha256"]
    ]
    assert list(EMBEDDING_INDEX.columns) == [
        *["caption_id", "role", "text", "embedding_key", "fragment", "row", "tokens", "length", "width", "dtype"],
        "sha256",
    ]


@pytest.mark.parametrize(
    ("table", "rows"),
    [(DATASET, items(5)), (CAPTIONS, CAPTION_ROWS), (LATENT_INDEX, latents(5)), (CAPTIONS, []), (DATASET, [])],
)
def test_rows_come_back_in_order(tmp_path: Path, table: Table, rows: list[dict[str, object]]):
    write_table(tmp_path / table.name, table, rows)
    assert read_table(tmp_path / table.name, table) == rows


def test_plain_parquet_reads_a_table(tmp_path: Path):
    from pyarrow import parquet

    write_table(tmp_path / DATASET.name, DATASET, items(3))
    assert parquet.read_table(tmp_path / DATASET.name).to_pylist() == items(3)


def test_the_same_rows_are_the_same_bytes(tmp_path: Path):
    write_table(tmp_path / "one", DATASET, items(100))
    write_table(tmp_path / "two", DATASET, items(100))
    assert sha256_file(tmp_path / "one") == sha256_file(tmp_path / "two")


@pytest.mark.parametrize(
    "rows",
    [
        [{"caption_id": "a"}],
        [{"caption_id": "a", "text": "b", "more": "c"}],
        [{"caption_id": "a", "text": None}],
        [{"caption_id": "a", "text": 3}],
        [{"caption_id": "a", "text": "b"}, {"caption_id": "a", "text": "c"}],
    ],
)
def test_rows_that_do_not_fit_are_not_written(path: Path, rows):
    with pytest.raises((ValueError, TypeError)):
        write_table(path, CAPTIONS, rows)
    assert not path.exists() or refused(path)


def test_a_flipped_and_an_unflipped_latent_of_one_item_are_two_rows(tmp_path: Path):
    rows = latents(2)
    write_table(tmp_path / "index.parquet", LATENT_INDEX, rows)
    assert [row["flip"] for row in read_table(tmp_path / "index.parquet", LATENT_INDEX)] == [False, True]
    rows[1]["flip"] = False
    with pytest.raises(ValueError, match="item_id and flip"):
        write_table(tmp_path / "index.parquet", LATENT_INDEX, rows)


def test_more_columns_than_asked_for_are_left_out(path: Path):
    more = Table(
        name="captions.parquet",
        stage="validate",
        columns={**CAPTIONS.columns, "words": "int32"},
        unique=("caption_id",),
    )
    write_table(path, more, [{**row, "words": 2} for row in CAPTION_ROWS])
    assert read_table(path, CAPTIONS) == CAPTION_ROWS


@pytest.mark.parametrize(
    "columns", [{"caption_id": "string"}, {"caption_id": "string", "text": "large_binary"}, {"text": "string"}]
)
def test_another_table_is_refused(path: Path, columns):
    other = Table(name="captions.parquet", stage="validate", columns=columns, unique=())
    values = {"string": "x", "large_binary": b"x"}
    write_table(path, other, [{name: values[kind] for name, kind in columns.items()}])
    with pytest.raises(Damaged, match=r"table\.columns"):
        read_table(path, CAPTIONS)


def test_a_table_nobody_here_wrote_is_refused(path: Path):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(CAPTION_ROWS, arrow_schema(CAPTIONS)), path)
    with pytest.raises(Damaged, match=r"table\.seal"):
        read_table(path, CAPTIONS)


def test_a_hundred_thousand_rows_are_written_and_read_in_a_second_each(tmp_path: Path):
    rows = latents(100_000)
    started = time.process_time()
    write_table(tmp_path / "index.parquet", LATENT_INDEX, rows)
    written = time.process_time()
    found = read_table(tmp_path / "index.parquet", LATENT_INDEX)
    read = time.process_time()
    assert found == rows
    assert written - started < 1
    assert read - written < 1


# Damage


def test_damage_names_the_file_and_a_remedy(path: Path):
    with pytest.raises(Damaged) as caught:
        read_table(path, CAPTIONS)
    line = caught.value.faults[0].line()
    assert line.startswith("error[table.absent] captions.parquet is missing")
    assert str(path) in line
    assert line.endswith("fix: flux2-lora validate --config ... --force")


def test_every_flipped_bit_is_refused(path: Path):
    write_table(path, CAPTIONS, CAPTION_ROWS)
    assert [at for at in flipped_bits(path, 1000) if not refused(path)] == []
    assert not refused(path)


def test_every_other_length_is_refused(path: Path):
    write_table(path, CAPTIONS, CAPTION_ROWS)
    assert [length for length in other_lengths(path, 100) if not refused(path)] == []


def test_zeroed_pages_are_refused(path: Path):
    write_table(path, CAPTIONS, CAPTION_ROWS)
    assert [start for start in zeroed_pages(path) if not refused(path)] == []


def test_absent_files_and_folders_are_refused(path: Path, tmp_path: Path):
    write_table(path, CAPTIONS, CAPTION_ROWS)
    states = not_plain_files(path, tmp_path / "aside")
    assert [refused(path) for _, _ in zip(range(2), states, strict=False)] == [True, True]


def test_swapped_tables_are_refused(tmp_path: Path):
    write_table(tmp_path / "one", CAPTIONS, CAPTION_ROWS)
    write_table(tmp_path / "two", LATENT_INDEX, latents(3))
    with pytest.raises(Damaged):
        read_table(tmp_path / "two", CAPTIONS)
    with pytest.raises(Damaged):
        read_table(tmp_path / "one", LATENT_INDEX)


# Other people's tables


def foreign(path: Path, columns: dict[str, object], compression: str = "snappy") -> Path:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table(columns), path, compression=compression)
    return path


def test_the_text_columns_of_a_foreign_table_are_read(path: Path):
    foreign(path, {"file_name": ["1.png", "2.png"], "text": ["a", None], "size": [3, 4], "caption": [1, 2]})
    assert read_texts(path.read_bytes(), ["file_name", "text", "caption"]) == [
        {"file_name": "1.png", "text": "a"},
        {"file_name": "2.png"},
    ]


def test_a_small_foreign_table_that_expands_beyond_the_limit_is_rejected(path: Path):
    foreign(path, {"text": ["x" * (1 << 20)] * 100}, compression="zstd")
    assert path.stat().st_size < 1 << 16
    with pytest.raises(RejectedInput, match=r"table\.too_large"):
        read_texts(path.read_bytes(), ["text"])


def test_a_foreign_table_that_is_not_utf8_is_rejected(path: Path):
    import pyarrow as pa

    damaged = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers())
    foreign(path, {"text": damaged})
    with pytest.raises(RejectedInput, match=r"table\.unreadable"):
        read_texts(path.read_bytes(), ["text"])


@pytest.mark.parametrize("data", [b"", b"PAR1", b"file_name,text\n1.png,a\n"])
def test_what_is_no_parquet_is_rejected(path: Path, data: bytes):
    path.write_bytes(data)
    with pytest.raises(RejectedInput, match=r"metadata\.jsonl"):
        read_texts(path.read_bytes(), ["text"])
