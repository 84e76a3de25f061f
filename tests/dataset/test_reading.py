"""Other people's Parquet tables: read in a child, which a table may end, but nothing more."""

from __future__ import annotations

import io
import sys

import pytest

from schemas.errors import Fault
from stages.dataset import reading
from stages.dataset.reading import texts_of

COLUMNS = ("file_name", "text")


def table(texts: list[str], **options: object) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    buffer = io.BytesIO()
    names = [f"{number}.png" for number in range(len(texts))]
    parquet.write_table(pa.table({"file_name": names, "text": texts}), buffer, **options)
    return buffer.getvalue()


def test_rows_come_back_as_they_are() -> None:
    rows = texts_of(table(["a cat", "Kätzchen 猫\n\x1b[31m"]), COLUMNS)
    assert rows == [
        {"file_name": "0.png", "text": "a cat"},
        {"file_name": "1.png", "text": "Kätzchen 猫\n\x1b[31m"},
    ]


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1" + bytes(99) + b"PAR1"])
def test_what_is_no_table_is_a_fault(data: bytes) -> None:
    found = texts_of(data, COLUMNS)
    assert isinstance(found, Fault)
    assert (found.code, bool(found.fix)) == ("table.unreadable", True)


def test_column_that_comes_twice_is_a_fault() -> None:
    import pyarrow as pa
    from pyarrow import parquet

    buffer = io.BytesIO()
    columns = [pa.array([text]) for text in ("a.png", "a cat", "a dog")]
    parquet.write_table(pa.Table.from_arrays(columns, ["file_name", "text", "text"]), buffer)
    found = texts_of(buffer.getvalue(), COLUMNS)
    assert isinstance(found, Fault)
    assert (found.code, found.what, found.why) == ("table.columns", "a column comes twice", "text")


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="macOS has no memory limit")
def test_cell_of_a_gigabyte_in_a_small_file_does_not_fill_memory() -> None:
    data = table(["a" * (1 << 30)], compression="zstd", use_dictionary=False)
    assert len(data) < 1 << 17
    found = texts_of(data, COLUMNS)
    assert isinstance(found, Fault)
    # Without the limit it would be read, and then be table.too_large.
    assert found.code == "table.unreadable"


def test_table_that_ends_its_reader_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MODULE", "tests.dataset.no_such_module")
    found = texts_of(table(["a"]), COLUMNS)
    assert isinstance(found, Fault)
    assert (found.code, found.why) == ("table.crash", "exit code 1")
