from __future__ import annotations

from pathlib import Path

import pytest

from schemas.errors import Fault
from stages.dataset.metadata import MAX_LINE_BYTES, Row, read_rows


def rows(tmp_path: Path, name: str, data: bytes) -> list[Row | Fault]:
    path = tmp_path / name
    path.write_bytes(data)
    return list(read_rows(path, name))


def fault_of(tmp_path: Path, name: str, data: bytes) -> Fault:
    (fault,) = rows(tmp_path, name, data)
    assert isinstance(fault, Fault)
    return fault


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"not json", "table.not_json"),
        (b"[1]", "table.not_json"),
        (b'{"file_name": "a.png", "text": 3}', "table.not_json"),
        (b'{"file_name": "a.png", "text": "\xff"}', "table.not_json"),
        (b'{"file_name": "a.png", "text": "\\ud800"}', "table.not_json"),
        (b'{"x": ' + b"[" * 100_000, "table.not_json"),
        (b'{"text": "x"}', "table.columns"),
        (b'{"file_name": "a.png"}', "table.columns"),
        (b'{"file_name": "a.png", "text": "x", "prompt": "y"}', "table.columns"),
        (b'{"file_name": "a.png", "text": "' + b"x" * MAX_LINE_BYTES + b'"}', "caption.too_long"),
    ],
)
def test_bad_json_line_is_a_fault_and_the_lines_around_it_stay_good(tmp_path: Path, line: bytes, code: str) -> None:
    good = b'{"file_name": "g.png", "text": "x"}'
    first, bad, last = rows(tmp_path, "metadata.jsonl", b"\n".join([good, line, good]))
    assert isinstance(first, Row)
    assert isinstance(last, Row)
    assert isinstance(bad, Fault)
    assert (bad.code, bad.where) == (code, "metadata.jsonl line 2")


def test_byte_order_mark_is_dropped_from_both_kinds(tmp_path: Path) -> None:
    assert rows(tmp_path, "metadata.jsonl", b'\xef\xbb\xbf{"file_name": "a", "text": "x"}') == [
        Row("metadata.jsonl line 1", "a", ("x",))
    ]
    assert rows(tmp_path, "metadata.csv", b"\xef\xbb\xbffile_name,text\r\na,x\r\n") == [
        Row("metadata.csv line 2", "a", ("x",))
    ]


def test_csv_without_the_columns_says_which_it_wants(tmp_path: Path) -> None:
    fault = fault_of(tmp_path, "metadata.csv", b"image,label\na.png,x\n")
    assert fault.why == "expected file_name and one of text, caption, prompt, found image, label"


@pytest.mark.parametrize("data", [b"", b"\n\n"])
def test_empty_csv_is_a_fault(tmp_path: Path, data: bytes) -> None:
    assert fault_of(tmp_path, "metadata.csv", data).what == "columns are missing"


def test_blank_lines_of_a_csv_are_no_rows(tmp_path: Path) -> None:
    found = rows(tmp_path, "metadata.csv", b"\r\nfile_name,text\r\n\r\na.png,x\r\n\r\n")
    assert found == [Row("metadata.csv line 4", "a.png", ("x",))]


@pytest.mark.parametrize("header", [b"file_name,text,text", b"file_name,text,file_name"])
def test_column_that_comes_twice_is_refused_as_nobody_could_say_which_counts(tmp_path: Path, header: bytes) -> None:
    fault = fault_of(tmp_path, "metadata.csv", header + b"\na.png,x,y\n")
    assert (fault.code, fault.where) == ("table.columns", "metadata.csv line 1")
    assert fault.what == "a column comes twice"


def test_csv_row_of_another_length_is_a_fault(tmp_path: Path) -> None:
    found = rows(tmp_path, "metadata.csv", b"file_name,text\na.png\nb.png,x\n")
    assert isinstance(found[0], Fault)
    assert found[1] == Row("metadata.csv line 3", "b.png", ("x",))


def test_csv_that_is_not_utf8_or_not_csv_is_a_fault(tmp_path: Path) -> None:
    assert fault_of(tmp_path, "metadata.csv", b"file_name,text\na,\xe9\n").code == "caption.not_utf8"
    assert fault_of(tmp_path, "metadata.csv", b'file_name,text\na,"open\n').code == "table.not_csv"


def test_parquet_rows_are_read_and_nulls_are_faults(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({"file_name": ["a.png", "b.png", None], "text": ["x", None, "z"], "width": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "metadata.parquet")
    first, second, third = read_rows(tmp_path / "metadata.parquet", "metadata.parquet")
    assert first == Row("metadata.parquet row 1", "a.png", ("x",))
    assert [second.where, third.where] == ["metadata.parquet row 2", "metadata.parquet row 3"]
    assert {second.code, third.code} == {"table.columns"}


def test_damaged_parquet_is_a_fault_under_its_name_in_the_dataset(tmp_path: Path) -> None:
    assert fault_of(tmp_path, "captions.parquet", b"PAR1 nonsense").where == "captions.parquet"
