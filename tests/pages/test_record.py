"""What a run left, whatever state it is in."""

from __future__ import annotations

from pathlib import Path

import pytest

from schemas.errors import BadConfig
from stages.pages.record import Places, read_metrics, read_record


def written(tmp_path: Path, text: bytes) -> tuple[list[int], int]:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(text)
    lines, unreadable = read_metrics(path)
    return [line["step"] for line in lines], unreadable


def test_line_being_written_is_neither_read_nor_missed(tmp_path: Path) -> None:
    assert written(tmp_path, b'{"step":1}\n{"step":2}\n{"st') == ([1, 2], 0)


@pytest.mark.parametrize("bad", [b"", b"\xff", b"[]", b"{}", b'{"step":"2"}', b'{"step":1}', b"[" * 100_000])
def test_other_lines_are_counted(tmp_path: Path, bad: bytes) -> None:
    assert written(tmp_path, b'{"step":1}\n' + bad + b'\n{"step":3}\n') == ([1, 3], 1)


def test_no_metrics_are_none(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == ([], 0)


def test_folder_with_nothing_in_it_is_a_run_that_has_not_begun(tmp_path: Path) -> None:
    record = read_record(tmp_path, Places((tmp_path / "store",)))
    assert list(record.remarks) == ["Training has not begun: there is little to show yet."]
    assert (record.made, record.training, record.verified, record.config) == ({}, None, None, None)


def test_named_pipeline_that_is_wrong_is_an_error_and_a_found_one_a_remark(tmp_path: Path) -> None:
    path = tmp_path / "pipeline.toml"
    path.write_text("[train]\nrnak = 1\n")
    record = read_record(tmp_path, Places((tmp_path / "store",)))
    assert "The pipeline cannot be read: unknown setting train.rnak" in "".join(record.remarks)
    with pytest.raises(BadConfig):
        read_record(tmp_path, Places((tmp_path / "store",), path))
