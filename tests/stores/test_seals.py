"""Seals: what was just written is sealed whole, or not at all."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import BinaryIO

import pytest

from schemas.tables import CAPTIONS
from stages.stores import seals
from stages.stores.tables import write_table


@pytest.mark.parametrize("read", [1, 2])
def test_table_that_cannot_be_read_back_is_not_sealed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: int
) -> None:
    exactly, left = seals._exactly, [read]

    class Ending:
        """The file, but for its n-th read, which ends early."""

        def __init__(self, file: BinaryIO) -> None:
            self._file = file
            self.name = file.name

        def read(self, count: int) -> bytes:
            left[0] -= 1
            return self._file.read(count)[: 3 if left[0] == 0 else None]

    monkeypatch.setattr(seals, "_exactly", lambda file, count: exactly(Ending(file), count))
    with pytest.raises(OSError, match="cannot be read back") as raised:
        write_table(tmp_path / "captions.parquet", CAPTIONS, [{"caption_id": "a" * 32, "text": "a cat"}])
    assert raised.value.errno == errno.EIO


@pytest.mark.parametrize("length", [0, 3, 100])
def test_table_whose_end_is_not_given_back_is_not_sealed(tmp_path: Path, length: int) -> None:
    path = tmp_path / "captions.parquet"
    write_table(path, CAPTIONS, [{"caption_id": "a" * 32, "text": "a cat"}])
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(OSError, match="cannot be read back") as raised:
        seals.seal(path)
    assert raised.value.errno == errno.EIO
